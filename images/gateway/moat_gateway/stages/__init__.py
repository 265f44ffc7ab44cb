# SPDX-License-Identifier: Apache-2.0
"""The stages in front of LiteLLM: pure ASGI, one file each, stateless classes; none of them holds a stream back.

``app.py`` puts them together. A stage either answers by itself (a probe, a refusal) or hands the same ``scope``,
``receive`` and a thin wrapper of ``send`` on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header of that (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None
