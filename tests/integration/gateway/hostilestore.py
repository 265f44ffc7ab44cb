# SPDX-License-Identifier: Apache-2.0
"""A server that speaks as much of S3 as it likes: each test says what it answers."""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

Talk = Callable[[socket.socket, bytes], None]


class HostileStore:
    """A listener whose every request is answered by `talk`, given the socket and the request's first line.

    The attributes are those of a ``stores.Backend``.

    Args:
        talk: writes the answer; an `OSError` means that the other side has gone.
        tls: with TLS.
    """

    kind = "hostile"
    program = None

    def __init__(self, talk: Talk, tls: ssl.SSLContext | None = None) -> None:
        self.access, self.secret = secrets.token_hex(8), secrets.token_hex(20)
        self.requests: list[bytes] = []
        self.body = b""  # of the last request
        self.talk = talk
        self._tls = tls
        self._ended = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> HostileStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._ended = True
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(client)
            if self._tls is not None:
                client = stack.enter_context(self._tls.wrap_socket(client, server_side=True))
            for line, self.body in _requests(client):
                self.requests.append(line)
                self.talk(client, line)

    def drip(self, client: socket.socket, first: bytes, more: bytes, pause: float = 0.5) -> None:
        """Send something, then a little of something else, again and again, as long as anybody listens."""
        client.sendall(first)
        while not self._ended:
            client.sendall(more)
            time.sleep(pause)


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """Return an HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", 'ETag: "e1"', *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _requests(client: socket.socket) -> Iterator[tuple[bytes, bytes]]:
    """Yield the first line and the body of each request."""
    stream = client.makefile("rb")
    while line := stream.readline():
        length = 0
        while (header := stream.readline().strip().lower()) != b"":
            if header.startswith(b"content-length:"):
                length = int(header.partition(b":")[2])
            if header == b"expect: 100-continue":
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        yield line.strip(), stream.read(length)
