# SPDX-License-Identifier: Apache-2.0
"""Asks a running gateway over its admin socket, with the standard library."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from moat_gateway.errors import NotRunning


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(path: Path, method: str, target: str, timeout: float = 5.0) -> tuple[int, bytes]:
    """Return status and body of one request.

    Raises:
        NotRunning: nothing answers there.
    """
    connection = _UnixConnection(path, timeout)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as e:
        raise NotRunning(
            "no gateway answers on the admin socket",
            found=str(e) or type(e).__name__,
            hint="start the gateway, or name its socket with MOAT_ADMIN_SOCKET; you need to be in its group",
            path=str(path),
        ) from e
    finally:
        connection.close()


def status(path: Path) -> dict[str, Any]:
    """Return ``GET /status``.

    Raises:
        NotRunning: nothing answers there, or something else does.
    """
    code, body = request(path, "GET", "/status")
    try:
        value = json.loads(body)
        if code != 200 or not isinstance(value, dict):
            raise ValueError(f"HTTP {code}")
    except ValueError as e:
        raise NotRunning("what answers is no gateway", found=str(e), path=str(path)) from e
    return value
