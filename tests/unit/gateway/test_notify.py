# SPDX-License-Identifier: Apache-2.0
"""Proves what the gateway tells systemd, over real sockets of both kinds, and that it says nothing elsewhere."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moat_gateway.notify import VARIABLE, Notifier


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_each_message_is_one_datagram(tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "n") if kind == "path" else f"@moat-test-{tmp_path.name}-{tmp_path.parent.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address if kind == "path" else "\0" + address[1:])
        manager.settimeout(5)
        environ = {VARIABLE: address, "OTHER": "1"}
        notifier = Notifier(environ)
        assert environ == {"OTHER": "1"}, "a library could speak in the gateway's name"
        notifier.status("loading")
        assert manager.recv(1000) == b"STATUS=loading"
        notifier.ready("serving")
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
        notifier.stopping("finishing")
        assert manager.recv(1000) == b"STOPPING=1\nSTATUS=finishing"


def test_without_a_manager_nothing_is_sent(tmp_path: Path) -> None:
    Notifier({}).ready("serving")


def test_a_manager_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    Notifier({VARIABLE: str(tmp_path / "gone")}).ready("serving")
