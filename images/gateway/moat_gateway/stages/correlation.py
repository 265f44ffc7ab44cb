# SPDX-License-Identifier: Apache-2.0
"""First stage: every request has an id and a trace, and every answer, errors included, says the id.

The caller's ``x-request-id`` is taken if it is short and plain, else a new one is made. A valid W3C ``traceparent``
gives the trace of the log lines and is left as it is; without one, a new one is put into the request. (LiteLLM hands it
on to the model server only when its OpenTelemetry callback is on and ``forward_traceparent_to_llm_provider`` is set.)
"""

from __future__ import annotations

import os
import re

from moat_gateway.context import RequestContext, current
from moat_gateway.logs import Log, where_of
from moat_gateway.stages import ASGIApp, Message, Receive, Scope, Send, header
from moat_gateway.stages.answers import refuse

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def parse_traceparent(value: bytes | None) -> str | None:
    """Return the trace id of a valid ``traceparent``, else ``None`` (W3C Trace Context, section 3.2)."""
    match = _TRACEPARENT.fullmatch(value or b"")
    if match is None:
        return None
    version, trace, span, _flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more) or trace == b"0" * 32 or span == b"0" * 16:
        return None
    return trace.decode()


class Correlation:
    """Gives requests their ids, and answers 500 when a stage behind breaks before it said anything.

    Args:
        app: the stage behind.
        log: for ``request.failed``.
    """

    def __init__(self, app: ASGIApp, log: Log) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        request_id = given.decode() if given is not None and _SANE_ID.fullmatch(given) else os.urandom(16).hex()
        trace_id = parse_traceparent(header(scope, b"traceparent"))
        span_id = os.urandom(8).hex()
        headers = [(k, v) for k, v in scope["headers"] if k != b"x-request-id"]
        if trace_id is None:
            trace_id = os.urandom(16).hex()
            headers = [(k, v) for k, v in headers if k not in (b"traceparent", b"tracestate")]
            headers.append((b"traceparent", f"00-{trace_id}-{span_id}-01".encode()))
        headers.append((b"x-request-id", request_id.encode()))
        context = RequestContext(request_id, trace_id, span_id)
        token = current.set(context)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] in ("http.response.start", "websocket.accept"):
                started = True
                own = [(k, v) for k, v in message.get("headers", ()) if k.lower() != b"x-request-id"]
                message = {**message, "headers": [*own, (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._app({**scope, "headers": headers}, receive, send_with_id)
        except Exception as e:
            self._log.event(
                "request.failed",
                "error",
                method=scope.get("method"),
                path=scope["path"],
                error=type(e).__name__,
                where=where_of(e),
            )
            if started:
                raise  # the server must close the connection: the answer is not complete
            if scope["type"] == "http":
                await refuse(
                    scope,
                    receive,
                    send_with_id,
                    500,
                    f"The gateway failed on this request; its id is {request_id}.",
                    type_="server_error",
                    code="internal_error",
                )
            else:
                raise
        finally:
            current.reset(token)
