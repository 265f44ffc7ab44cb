# SPDX-License-Identifier: Apache-2.0
"""Second stage: ``/_moat/live`` and ``/_moat/ready``, without a key; the rest of ``/_moat/`` is 404."""

from __future__ import annotations

from collections.abc import Callable

from moat_gateway.stages import ASGIApp, Receive, Scope, Send
from moat_gateway.stages.answers import refuse, send_json

PREFIX = "/_moat/"


class Probes:
    """Answers probes.

    Args:
        app: the stage behind.
        not_ready: returns why the gateway is not ready; empty when it is.
    """

    def __init__(self, app: ASGIApp, not_ready: Callable[[], tuple[str, ...]]) -> None:
        self._app = app
        self._not_ready = not_ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await refuse(scope, receive, send, 405, "Probes are read with GET.", headers={"allow": "GET, HEAD"})
        elif scope["path"] == PREFIX + "live":
            await send_json(send, 200, {"status": "live"})
        elif scope["path"] == PREFIX + "ready":
            reasons = self._not_ready()
            if reasons:
                await send_json(send, 503, {"status": "not ready", "reasons": list(reasons)}, {"retry-after": "1"})
            else:
                await send_json(send, 200, {"status": "ready"})
        else:
            await refuse(scope, receive, send, 404, "There is no such probe.", code="not_found")
