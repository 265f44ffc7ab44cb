# SPDX-License-Identifier: Apache-2.0
"""Third stage: counts requests and streams, and logs each request once, when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable

from moat_gateway.context import current
from moat_gateway.logs import Log
from moat_gateway.metrics import Counters
from moat_gateway.stages import ASGIApp, Message, Receive, Scope, Send


class Meter:
    """Counts and logs.

    Args:
        app: the stage behind.
        counters: where the numbers are kept.
        log: for ``request.finished``.
        clock: monotonic seconds.
    """

    def __init__(self, app: ASGIApp, counters: Counters, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._counters = counters
        self._log = log
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        counters = self._counters
        begun = self._clock()
        status = 0
        stream = False

        async def watch(message: Message) -> None:
            nonlocal status, stream
            kind = message["type"]
            if kind == "http.response.start":
                status = message["status"]
                stream = any(
                    k.lower() == b"content-type" and v.startswith(b"text/event-stream") for k, v in message["headers"]
                )
                counters.active_streams += stream
            elif kind == "websocket.accept":
                status, stream = 101, True
                counters.active_streams += 1
            elif kind == "websocket.close" and not status:
                status = 403
            await send(message)

        counters.in_flight += 1
        try:
            await self._app(scope, receive, watch)
        finally:
            took = self._clock() - begun
            counters.in_flight -= 1
            counters.active_streams -= stream
            counters.seconds += took
            # Nothing was said: the stage in front answers 500, or the client went away.
            counters.requests[f"{(status or 500) // 100}xx"] += 1
            context = current.get()
            self._log.event(
                "request.finished",
                "info" if status < 500 else "warning",
                method=scope.get("method", "WEBSOCKET"),
                path=scope["path"],
                status=status or None,
                duration_ms=round(1000 * took, 1),
                stream=stream,
                key=context.identity.key if context and context.identity else None,
            )
