# SPDX-License-Identifier: Apache-2.0
"""Whole answers that a stage gives by itself; refusals have OpenAI's error shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moat_gateway.stages import Receive, Scope, Send


async def send_json(send: Send, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
    """Send one JSON object."""
    raw = json.dumps(body).encode()
    await send_bytes(send, status, raw, "application/json", headers)


async def send_bytes(
    send: Send, status: int, raw: bytes, content_type: str, headers: Mapping[str, str] | None = None
) -> None:
    """Send one body of known length."""
    pairs = [("content-type", content_type), ("content-length", str(len(raw))), ("cache-control", "no-store")]
    pairs += list((headers or {}).items())
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in pairs],
        }
    )
    await send({"type": "http.response.body", "body": raw})


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    status: int,
    message: str,
    *,
    type_: str = "invalid_request_error",
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Refuse a request in OpenAI's error shape; a WebSocket is closed before it is accepted (HTTP 403)."""
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
        return
    error = {"message": message, "type": type_, "param": None, "code": code}
    await send_json(send, status, {"error": error}, headers)
