# SPDX-License-Identifier: Apache-2.0
"""What is known about the request that is being served, for logs and for the stages behind.

One mutable object travels in a context variable, so that a task started for the request (LiteLLM's logging, for
one) sees what a later stage added, such as the team.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moat_gateway.keys import Identity


@dataclass
class RequestContext:
    """One request.

    Attributes:
        request_id: the caller's ``x-request-id`` if it was sane, else ours.
        trace_id: 32 hex digits, the caller's or ours.
        span_id: 16 hex digits, always ours.
        identity: who asks; ``None`` before the identity stage, and on paths that need nobody.
    """

    request_id: str
    trace_id: str
    span_id: str
    identity: Identity | None = field(default=None)


current: ContextVar[RequestContext | None] = ContextVar("moat_request", default=None)
