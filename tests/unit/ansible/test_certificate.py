# SPDX-License-Identifier: Apache-2.0
"""Proves moat_certificate: chains that OpenSSL's program and Python's strict TLS accept, and when one is made again.

The clock is a parameter: renewal is proven at the very day.
"""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ansible.modules import module

CERT = module("moat_certificate")
NOW = datetime.now(UTC).replace(microsecond=0)
NAMES = ["node1.example.net", "192.0.2.11", "2001:db8::1", "localhost", "127.0.0.1"]


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    folder = tmp_path / "pki"
    assert CERT.authority(folder, "authority", NOW, False).reason == "there was none"
    return folder


def sign(folder: Path, name: str = "node1", names: list[str] = NAMES, now: datetime = NOW, **more: Any) -> str:
    options: dict[str, Any] = {"force": False, "dry": False, **more}
    reason: str = CERT.signed(folder, name, names, 825, 30, now, **options).reason
    return reason


def handshake(folder: Path, name: str, server_name: str, trust: bytes | None = None) -> None:
    """Make a TLS connection as a client with Python's strict checks.

    Raises:
        ssl.SSLError: it did not come about.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    client = ssl.create_default_context(cadata=(trust or (folder / "ca.pem").read_bytes()).decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    a, b = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(a, server_side=True) as s:
                s.recv(1)
        except (ssl.SSLError, OSError):
            a.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(b, server_hostname=server_name) as s:
            s.sendall(b"x")
    finally:
        b.close()
        thread.join(10)
        a.close()


def test_made_once_with_exact_modes_and_accepted_by_strict_clients(pki: Path) -> None:
    assert sign(pki) == "there was none"
    assert sign(pki) == ""
    assert CERT.authority(pki, "authority", NOW, False).reason == ""
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in pki.iterdir()}
    assert modes == {"ca.pem": "0o644", "ca.key": "0o600", "node1.pem": "0o644", "node1.key": "0o600"}
    for name in NAMES:
        handshake(pki, "node1", name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, "node1", "another.example.net")
    if shutil.which("openssl"):
        argv = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(pki / "ca.pem")]
        done = subprocess.run([*argv, str(pki / "node1.pem")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("day", "reason"), [(0, ""), (794, ""), (796, "it ends soon"), (900, "it ends soon")], ids=str)
def test_a_certificate_is_made_again_thirty_days_before_its_end(pki: Path, day: int, reason: str) -> None:
    sign(pki)
    assert sign(pki, now=NOW + timedelta(days=day)) == reason


def test_it_is_made_again_for_each_reason_and_for_no_other(pki: Path) -> None:
    sign(pki)
    assert sign(pki, names=list(reversed(NAMES))) == ""
    assert sign(pki, names=NAMES[:-1], dry=True) == "its names were others"
    assert sign(pki, names=NAMES[:-1]) == "its names were others"
    assert sign(pki, names=NAMES[:-1]) == ""
    assert sign(pki, names=NAMES[:-1], force=True) == "it was asked for"
    other = (pki / "node1.key").read_bytes()
    sign(pki, name="node2")
    (pki / "node2.key").write_bytes(other)
    assert sign(pki, name="node2") == "certificate and key did not belong together"
    (pki / "node2.pem").write_text("damaged")
    assert sign(pki, name="node2") == "it could not be read"


def test_another_authority_makes_every_certificate_again(pki: Path, tmp_path: Path) -> None:
    sign(pki)
    other = tmp_path / "other"
    CERT.authority(other, "authority", NOW, False)
    for name in ("ca.pem", "ca.key"):
        shutil.copy(other / name, pki / name)
    assert sign(pki) == "another authority signed it"


def test_an_authority_is_replaced_without_a_moment_in_which_clients_fail(pki: Path) -> None:
    sign(pki)
    old = (pki / "ca.pem").read_bytes()
    assert CERT.authority(pki, "authority_rotated", NOW, False).reason == "it is replaced"
    both = (pki / "ca.pem").read_bytes()
    assert both.endswith(old)
    assert CERT.authority(pki, "authority_rotated", NOW, False).reason == ""  # begun already
    assert (pki / "ca.pem").read_bytes() == both
    # Until it is asked for, the certificate of the old one stays: clients that have not got the new file go on.
    assert sign(pki) == ""
    handshake(pki, "node1", "localhost", old)
    handshake(pki, "node1", "localhost", both)
    assert sign(pki, force=True) == "it was asked for"
    handshake(pki, "node1", "localhost", both)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(pki, "node1", "localhost", old)
    assert CERT.authority(pki, "authority_settled", NOW, False).reason == "the one before is dropped"
    assert CERT.authority(pki, "authority_settled", NOW, False).reason == ""
    handshake(pki, "node1", "localhost")
    assert sign(pki) == ""


@pytest.mark.parametrize("cut", ["ca.pem.next", "ca.key", "finish"])
@pytest.mark.parametrize("first", [True, False], ids=["the first authority", "another authority"])
def test_a_replacement_that_is_cut_short_at_any_point_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, first: bool
) -> None:
    """The power goes right before a file is written; the next run has both authorities, whichever the point."""
    pki = tmp_path / "pki"
    if not first:
        CERT.authority(pki, "authority", NOW, False)
        sign(pki)
    old = (pki / "ca.pem").read_bytes() if not first else b""
    real, finish, state = CERT.write, CERT.finish, "authority" if first else "authority_rotated"
    calls = 0

    def write(path: Path, data: bytes, mode: int) -> None:
        if path.name == cut:
            raise KeyboardInterrupt
        real(path, data, mode)

    def finishing(folder: Path) -> None:
        nonlocal calls
        calls += 1
        if cut == "finish" and calls == 2:
            raise KeyboardInterrupt
        finish(folder)

    with monkeypatch.context() as patched:
        patched.setattr(CERT, "write", write)
        patched.setattr(CERT, "finish", finishing)
        with pytest.raises(KeyboardInterrupt):
            CERT.authority(pki, state, NOW, False)
    if not first:
        # Clients, and runs that only look, find an authority all the time.
        assert (pki / "ca.pem").read_bytes() == old
        assert sign(pki, dry=True) == ""
    CERT.authority(pki, state, NOW, False)
    chain = (pki / "ca.pem").read_bytes()
    assert chain.count(b"BEGIN") == (1 if first else 2)
    assert chain.endswith(old)
    assert not (pki / "ca.pem.next").exists()
    sign(pki, force=True)
    handshake(pki, "node1", "localhost", chain)


def test_a_lost_key_of_the_authority_is_said_and_nothing_is_made(pki: Path) -> None:
    (pki / "ca.key").unlink()
    before = (pki / "ca.pem").read_bytes()
    with pytest.raises(CERT.Refused, match="restore it from the backup"):
        CERT.authority(pki, "authority", NOW, False)
    assert (pki / "ca.pem").read_bytes() == before


def test_an_authority_that_has_ended_is_said_and_what_is_said_helps(pki: Path) -> None:
    sign(pki)
    later = NOW + timedelta(days=3651)
    with pytest.raises(CERT.Refused, match="has ended") as refused:
        CERT.authority(pki, "authority", later, False)
    steps = re.findall(r"-e rotate=(\w+)", str(refused.value))
    assert steps == ["authority", "certificates"]
    # Those plays, in that order: what each does with the authority, and then the certificates.
    assert CERT.authority(pki, "authority_rotated", later, False).reason == "it is replaced"
    assert CERT.authority(pki, "authority", later, False).reason == ""
    assert sign(pki, now=later, force=True) == "it ends soon"  # it has ended
    assert CERT.authority(pki, "authority_settled", later, False).reason == "the one before is dropped"
    assert sign(pki, now=later) == ""


def test_the_end_of_the_authority_is_told_a_year_before(pki: Path) -> None:
    assert CERT.authority(pki, "authority", NOW + timedelta(days=3285), False).warning == ""
    said = CERT.authority(pki, "authority", NOW + timedelta(days=3286), False).warning
    assert "ends in 364 days" in said
    assert "Do: moat-site rotate_secrets -e rotate=authority, give every client the new ca.pem" in said


def test_a_certificate_that_ends_with_its_authority_is_not_made_again_by_every_run(pki: Path) -> None:
    sign(pki)
    # It is renewed for the last time, then counts until the authority does.
    assert sign(pki, now=NOW + timedelta(days=3630)) == "it ends soon"
    assert sign(pki, now=NOW + timedelta(days=3631)) == ""
    assert sign(pki, now=NOW + timedelta(days=3649)) == ""


def test_the_operators_own_pair_is_checked_and_taken(pki: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    CERT.authority(own, "authority", NOW, False)
    sign(own, name="front")
    sign(own, name="wrong")

    def take(cert: str, key: str, now: datetime = NOW) -> str:
        reason: str = CERT.given(pki, "node1", own / cert, own / key, now, False).reason
        return reason

    assert take("front.pem", "front.key") == "another pair was given"
    assert take("front.pem", "front.key") == ""
    for cert, key, words in (
        ("front.pem", "wrong.key", "do not belong together"),
        ("front.key", "front.key", "cannot be used"),
        ("missing.pem", "front.key", "cannot be used"),
    ):
        with pytest.raises(CERT.Refused, match=words):
            take(cert, key)
    with pytest.raises(CERT.Refused, match="has ended"):
        take("front.pem", "front.key", NOW + timedelta(days=900))
    handshake(pki, "node1", "localhost", (own / "ca.pem").read_bytes())


@pytest.mark.parametrize("name", ["a b", "", "-x", "a..b", "host:8443"])
def test_what_is_no_name_is_refused(pki: Path, name: str) -> None:
    with pytest.raises(CERT.Refused):
        sign(pki, names=[name])
    with pytest.raises(CERT.Refused):
        sign(pki, names=[])
