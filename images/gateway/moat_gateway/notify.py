# SPDX-License-Identifier: Apache-2.0
"""Tells systemd (``Type=notify``) when the gateway is ready and when it stops; elsewhere it does nothing.

The protocol is one datagram of ``NAME=value`` lines to the Unix socket that ``NOTIFY_SOCKET`` names (sd_notify(3)).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import MutableMapping

VARIABLE = "NOTIFY_SOCKET"


class Notifier:
    """Speaks to the service manager.

    Args:
        environ: the environment; the variable is taken out of it, so that no library speaks in the gateway's name.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = environ.pop(VARIABLE, "")
        # A name in the abstract namespace is written with an "@".
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]

    def status(self, text: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        self._send(f"STATUS={text}")

    def ready(self, text: str) -> None:
        """Say that requests are served."""
        self._send(f"READY=1\nSTATUS={text}")

    def stopping(self, text: str) -> None:
        """Say that the end has begun."""
        self._send(f"STOPPING=1\nSTATUS={text}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # A manager that does not listen must not stop the gateway; the manager's own time limit notices.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.connect(self._address)
            s.sendall(message.encode())
