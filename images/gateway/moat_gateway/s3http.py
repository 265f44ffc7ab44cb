# SPDX-License-Identifier: Apache-2.0
"""boto3's HTTP with an end: each request has a deadline by the clock, and no answer is read beyond a limit.

boto3 itself bounds the pause between two bytes only, reads the body of a refusal whole, and headers without an end.
"""

from __future__ import annotations

import socket
from typing import Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.exceptions import BotoCoreError, HTTPClientError
from botocore.httpsession import URLLib3Session

from moat_gateway.deadline import Deadline, Unfinished

_REFUSAL = 256 << 10  # bytes of an answer that is no success
_ANSWER = 16 << 20  # bytes of one that is none of an object: a list of a thousand names has below 2 MiB
_CHUNK = 1 << 16  # bytes


class Session(URLLib3Session):  # type: ignore[misc]  # botocore has no types
    """Sends requests, one at a time.

    What streams (an object's body) is left to the caller, under the same deadline, until its ``end`` is called or the
    next request begins.

    Args:
        deadline: of each request.
        how: see botocore.
    """

    def __init__(self, deadline: Deadline, **how: Any) -> None:
        super().__init__(**how)
        self._deadline = deadline
        self._manager.pool_classes_by_scheme = _pools(deadline)

    def send(self, request: Any) -> Any:
        """See botocore; every failure is one of its own exceptions."""
        whole = not request.stream_output
        request.stream_output = True  # else it would read everything
        self._deadline.begin()
        try:
            answer = super().send(request)
            streams = not whole and answer.status_code < 300
            if not streams:
                answer._content = _read(answer.raw, _REFUSAL if answer.status_code >= 300 else _ANSWER)
                self._deadline.end()
        except Exception as e:
            self._deadline.end()
            if self._deadline.over:
                raise HTTPClientError(error=self._deadline.late()) from e
            if isinstance(e, BotoCoreError):
                raise
            raise HTTPClientError(error=e) from e
        if self._deadline.over:
            # What was cut off may look whole: headers, and a body without a length, end where the connection does.
            raise HTTPClientError(error=self._deadline.late())
        return answer


def _read(raw: Any, limit: int) -> bytes:
    out = bytearray()
    for chunk in raw.stream(_CHUNK):
        out += chunk
        if len(out) > limit:
            raw.close()
            raise Unfinished(f"an answer of more than {limit} bytes")
    return bytes(out)


def _pools(deadline: Deadline) -> dict[str, type]:
    class Watched:
        """A connection that the deadline can shut down."""

        _handle: socket.socket | None = None

        def _new_conn(self) -> Any:
            self._leave()
            made = super()._new_conn()  # type: ignore[misc]  # of urllib3's connection
            self._handle = deadline.watch(made)
            return made

        def close(self) -> None:
            super().close()  # type: ignore[misc]
            self._leave()

        def _leave(self) -> None:
            if self._handle is not None:
                deadline.leave(self._handle)
                self._handle = None

    class Plain(Watched, AWSHTTPConnection):  # type: ignore[misc]
        pass

    class Tls(Watched, AWSHTTPSConnection):  # type: ignore[misc]
        pass

    class PlainPool(AWSHTTPConnectionPool):  # type: ignore[misc]
        ConnectionCls = Plain

    class TlsPool(AWSHTTPSConnectionPool):  # type: ignore[misc]
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}
