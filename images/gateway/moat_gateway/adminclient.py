# SPDX-License-Identifier: Apache-2.0
"""Asks a running gateway over its admin socket, with the standard library."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from moat_gateway.errors import NoAnswer, NotRunning


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
        NotRunning: there is no socket, or nobody listens on it.
        NoAnswer: any other failure, its own timeout included. Who waits until a gateway is idle must not take a slow
            one for one that has ended.
    """
    connection = _UnixConnection(path, timeout)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.read()
    except (FileNotFoundError, ConnectionRefusedError) as e:
        raise NotRunning(
            "no gateway answers on the admin socket",
            found=str(e),
            hint="start the gateway, or name its socket with MOAT_ADMIN_SOCKET",
            path=str(path),
        ) from e
    except (OSError, http.client.HTTPException) as e:
        raise NoAnswer(
            "no answer comes from the admin socket",
            found=str(e) or type(e).__name__,
            expected=f"an answer within {timeout:g} s",
            hint="you need to be in the gateway's group"
            if isinstance(e, PermissionError)
            else "ask again; if it stays so, look at the gateway's log and its use of CPU",
            path=str(path),
        ) from e
    finally:
        connection.close()


def status(path: Path) -> dict[str, Any]:
    """Return ``GET /status``.

    Raises:
        NotRunning: there is no socket, or nobody listens on it.
        NoAnswer: none came in time, or something else answers.
    """
    code, body = request(path, "GET", "/status")
    try:
        value = json.loads(body)
        if code != 200 or not isinstance(value, dict):
            raise ValueError(f"HTTP {code}")
    except ValueError as e:
        raise NoAnswer("what answers is no gateway", found=str(e), path=str(path)) from e
    return value
