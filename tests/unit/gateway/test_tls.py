# SPDX-License-Identifier: Apache-2.0
"""Proves that the certificates work in a real handshake under strict checking, and that nothing is overwritten."""

from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moat_gateway import tls
from moat_gateway.errors import TlsFailed


def handshake(folder: Path, name: str) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    client = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    a, b = socket.socketpair()
    with a, b:

        def serve() -> None:
            try:
                with server.wrap_socket(a, server_side=True) as s:
                    s.recv(1)
            except (ssl.SSLError, OSError):
                a.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with client.wrap_socket(b, server_hostname=name) as s:
                s.sendall(b"x")
        finally:
            b.close()
            thread.join()


def test_a_strict_client_accepts_each_name_and_no_other(tmp_path: Path) -> None:
    made = tls.self_signed(tmp_path / "out", ["gw.example.test", "nginx", "127.0.0.1", "::1"])
    assert made.not_after > datetime.now(UTC) + timedelta(days=800)
    for name in ("gw.example.test", "nginx", "127.0.0.1", "::1"):
        handshake(made.folder, name)
    for name in ("other.example.test", "127.0.0.2"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(made.folder, name)


def test_modes_and_that_nothing_is_overwritten(tmp_path: Path) -> None:
    tls.self_signed(tmp_path, ["a"])
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == tls.FILES
    before = (tmp_path / "key.pem").read_bytes()
    (tmp_path / "ca.pem").unlink()
    with pytest.raises(TlsFailed, match="is there already"):
        tls.self_signed(tmp_path, ["a"])
    assert (tmp_path / "key.pem").read_bytes() == before
    assert not (tmp_path / "ca.pem").exists()


@pytest.mark.parametrize("names", [[], ["a b"], ["a:443"], ["*.x"], [""]])
def test_bad_names(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(TlsFailed):
        tls.self_signed(tmp_path, names)
    assert list(tmp_path.iterdir()) == []


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    tls.self_signed(tmp_path, ["a"], days=1, now=datetime.now(UTC) - timedelta(days=3))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, "a")
