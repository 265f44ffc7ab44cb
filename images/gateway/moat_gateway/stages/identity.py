# SPDX-License-Identifier: Apache-2.0
"""Fourth stage: nobody reaches LiteLLM without a key that counts.

LiteLLM has paths that ask for no key (its pages, its API description, login). Here every path needs one, except the
few in :data:`OPEN_PATHS`. Who it is travels in the request's context; LiteLLM's ``custom_auth`` hook reads it there, so
both see the same person even if a request carries several key headers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from moat_gateway.context import current
from moat_gateway.keys import Identity as Person
from moat_gateway.keys import Verdict
from moat_gateway.metrics import Counters
from moat_gateway.stages import ASGIApp, Receive, Scope, Send, header
from moat_gateway.stages.answers import refuse

#: LiteLLM's own liveness pages, for balancers that know them; they name no model and no server.
OPEN_PATHS = frozenset({"/health/liveliness", "/health/liveness"})
#: Paths whose work LiteLLM hands to native code that opens connections by itself (1.106.2: OCR is Rust only): the
#: egress check could not see them.
CLOSED_PATHS = frozenset({"/ocr", "/v1/ocr"})
#: Where clients of the APIs that LiteLLM speaks put their key, in LiteLLM's own order of precedence.
_HEADERS = (
    b"x-litellm-api-key", b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key", b"ocp-apim-subscription-key",
)  # fmt: skip
_CHALLENGE = {"www-authenticate": "Bearer"}


def presented_secret(scope: Scope) -> str | None:
    """Return the secret that a request carries, without ``Bearer``; ``None`` if there is none."""
    for name in _HEADERS:
        raw = header(scope, name)
        if raw:
            text = raw.decode("latin-1").strip()
            scheme, _, rest = text.partition(" ")
            secret = rest.strip() if scheme.lower() == "bearer" and rest else text
            if secret:
                return secret
    return None


async def _nothing_new() -> bool:
    return False


class Identity:
    """Finds out who asks, or refuses.

    Args:
        app: the stage behind.
        identify: says whose secret this is.
        recheck: before an unknown key is refused: looks whether there are newer keys, and says so.
        counters: refusals are counted there.
    """

    def __init__(
        self,
        app: ASGIApp,
        identify: Callable[[str], Person | Verdict],
        counters: Counters,
        recheck: Callable[[], Awaitable[bool]] = _nothing_new,
    ) -> None:
        self._app = app
        self._identify = identify
        self._recheck = recheck
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if path in OPEN_PATHS and scope.get("method") in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        secret = presented_secret(scope)
        who = self._identify(secret) if secret is not None else None
        if secret is not None and who is Verdict.UNKNOWN and await self._recheck():
            who = self._identify(secret)
        if isinstance(who, Person):
            context = current.get()
            assert context is not None  # noqa: S101 - the correlation stage is in front
            context.identity = who
            if path in CLOSED_PATHS:
                await refuse(
                    scope,
                    receive,
                    send,
                    404,
                    "This path is closed on this gateway (docs/gateway.md).",
                    code="not_found",
                )
                return
            await self._app(scope, receive, send)
        elif who is None:
            self._counters.refused["missing"] += 1
            await refuse(
                scope,
                receive,
                send,
                401,
                "No API key was given. Send it as `Authorization: Bearer sk-moat-...`.",
                code="missing_api_key",
                headers=_CHALLENGE,
            )
        elif who is Verdict.EXPIRED:
            self._counters.refused["expired"] += 1
            await refuse(
                scope,
                receive,
                send,
                401,
                "This API key has expired. Ask the administrator for a new one.",
                code="expired_api_key",
                headers=_CHALLENGE,
            )
        else:
            self._counters.refused["unknown"] += 1
            await refuse(
                scope,
                receive,
                send,
                401,
                "This API key is not known to this gateway.",
                code="invalid_api_key",
                headers=_CHALLENGE,
            )
