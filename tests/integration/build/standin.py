# SPDX-License-Identifier: Apache-2.0
"""A file server on loopback that can misbehave: cut a connection, refuse ranges, serve other bytes, lose files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class StandIn:
    """Serves ``files`` (path -> bytes) or a folder, and writes down what was asked.

    Attributes:
        files: what is served, by path with a leading slash.
        folder: served where ``files`` has no such path.
        cut_after: the next answers end after that many body bytes; the list is used up from the front.
        ranges: whether Range requests are honoured.
        statuses: for a path, statuses to answer before the real answer; used up from the front.
        asked: ``(method, path, Range header)`` of every request.
        dynamic: called with method and path first; its ``(status, headers, body)`` wins unless it is ``None``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.folder = folder
        self.cut_after: list[int] = []
        self.ranges = True
        self.statuses: dict[str, list[int]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.dynamic: Callable[[str, str], tuple[int, dict[str, str], bytes] | None] | None = None
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                stand_in._answer(self, body_wanted=False)

            def do_GET(self) -> None:
                stand_in._answer(self, body_wanted=True)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Root address, no trailing slash."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _content(self, path: str) -> bytes | None:
        if path in self.files:
            return self.files[path]
        if self.folder is not None and ".." not in path.split("/"):
            file = self.folder / path.lstrip("/")
            return file.read_bytes() if file.is_file() else None
        return None

    def _answer(self, handler: BaseHTTPRequestHandler, *, body_wanted: bool) -> None:
        path = unquote(urlsplit(handler.path).path)
        wanted = handler.headers.get("Range")
        self.asked.append((handler.command, path, wanted))
        status, headers, body = 200, {"Content-Type": "application/octet-stream"}, b""
        made = self.dynamic(handler.command, path) if self.dynamic else None
        content = self._content(path)
        if made is not None:
            status, extra, body = made
            headers |= extra
        elif self.statuses.get(path):
            status = self.statuses[path].pop(0)
        elif content is None:
            status = 404
        elif wanted and self.ranges:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                status = 416
            else:
                status, body = 206, content[start:]
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        else:
            body = content
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if not body_wanted:
            return
        if body and self.cut_after:
            handler.wfile.write(body[: self.cut_after.pop(0)])
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()
            return
        handler.wfile.write(body)
