# SPDX-License-Identifier: Apache-2.0
"""The admin socket: ``GET /status``, ``GET /metrics``, ``POST /reload``. A Unix socket, never behind nginx."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from moat_gateway.errors import CannotListen
from moat_gateway.logs import Log
from moat_gateway.stages import ASGIApp, Receive, Scope, Send
from moat_gateway.stages.answers import send_bytes, send_json
from moat_gateway.status import State

SOCKET_MODE = 0o660


def admin_app(state: State, log: Log, reload: Callable[[], Awaitable[dict[str, Any]]]) -> ASGIApp:
    """Return the admin socket's application.

    Args:
        state: of the gateway.
        log: for ``admin.reload``.
        reload: looks for changes at once, and says what it found.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        asked = (scope["method"], scope["path"])
        if asked == ("GET", "/status"):
            await send_json(send, 200, state.status())
        elif asked == ("GET", "/metrics"):
            text = state.metrics().encode()
            await send_bytes(send, 200, text, "text/plain; version=0.0.4; charset=utf-8")
        elif asked == ("POST", "/reload"):
            body = await reload()
            log.event("admin.reload", "info" if body["ok"] else "error", ok=body["ok"])
            await send_json(send, 200 if body["ok"] else 409, body)
        else:
            await send_json(send, 404, {"error": "there are GET /status, GET /metrics, POST /reload"})

    return app


def open_socket(path: Path) -> socket.socket:
    """Open the admin socket, mode 0660; a dead one of an earlier process is replaced.

    Raises:
        CannotListen: another gateway answers there, something else is in the way, or the folder cannot be written.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() or path.is_symlink():
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise CannotListen(
                    "something that is no socket is in the place of the admin socket",
                    hint="move it away",
                    path=str(path),
                )
            _refuse_if_alive(path)
            path.unlink()
        # The mode must be right from the first moment, not after a chmod.
        before = os.umask(0o777 & ~SOCKET_MODE)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(64)
    except OSError as e:
        sock.close()
        raise CannotListen(
            "the admin socket cannot be opened",
            found=e.strerror or str(e),
            hint="make its folder writable for the gateway's user, or set MOAT_ADMIN_SOCKET",
            path=str(path),
        ) from e
    except CannotListen:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _refuse_if_alive(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as e:
            if e.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return
            raise
    raise CannotListen(
        "another gateway answers on the admin socket", hint="stop it, or set MOAT_ADMIN_SOCKET", path=str(path)
    )
