# SPDX-License-Identifier: Apache-2.0
"""Proves that no answer of a store, however slow, long or odd, holds a client up or spoils it for the next request."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.hostilestore import HostileStore, answer
from tests.integration.gateway.stores import Place, Refused

from moat_gateway import tls
from moat_gateway.revstore import Pointer

Answers = Callable[[HostileStore, socket.socket], None]

NO_KEY = answer("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>")


@contextlib.contextmanager
def place_of(store: HostileStore, folder: Path, python: Path) -> Iterator[Place]:
    made = Place(store, folder, python)  # type: ignore[arg-type]  # it has what is needed of a Backend
    try:
        yield made
    finally:
        made.close()


def flood(client: socket.socket, first: bytes) -> None:
    """Send without an end, as fast as it is taken."""
    client.sendall(first)
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    while True:
        client.sendall(piece)


CHUNKED = "\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW: dict[str, Answers] = {
    "a body": lambda s, c: s.drip(c, b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\nETag: x\r\n\r\n", b"{"),
    "a body without a length": lambda s, c: s.drip(c, b"HTTP/1.1 200 OK\r\nETag: x\r\n\r\n", b"{"),
    "the body of a refusal": lambda s, c: s.drip(c, b"HTTP/1.1 500 No\r\nContent-Length: 300\r\n\r\n", b"<"),
    "a refusal without a length": lambda s, c: s.drip(c, b"HTTP/1.1 500 No\r\n\r\n", b"<"),
    "headers": lambda s, c: s.drip(c, b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
    "one header": lambda s, c: s.drip(c, b"HTTP/1.1 200 OK\r\na: ", b"b"),
    "no header at all": lambda s, c: s.drip(c, b"HTTP", b"/"),
    "words to go on": lambda s, c: s.drip(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


def test_an_answer_that_trickles_is_given_up_and_the_next_one_is_taken(tmp_path: Path, python: Path) -> None:
    with contextlib.ExitStack() as stack:
        stores, drivers = {}, {}
        for n, (name, talk) in enumerate(SLOW.items()):
            store = stack.enter_context(HostileStore(lambda _c, _line: None))
            store.talk = lambda c, _line, store=store, talk=talk: talk(store, c)  # type: ignore[misc]
            stores[name] = store
            drivers[name] = stack.enter_context(place_of(store, tmp_path / str(n), python)).driver()
        begun = time.monotonic()
        for driver in drivers.values():
            driver.send("pointer")
        for name, driver in drivers.items():
            with pytest.raises(Refused) as e:
                driver.end()
            assert e.value.error == "StoreFailed", name
            assert "no whole answer within 8 s" in e.value.text, name
        # Eight seconds; the margin is for a busy machine.
        assert time.monotonic() - begun < 30
        for name, driver in drivers.items():
            stores[name].talk = lambda c, _line: c.sendall(NO_KEY)
            with pytest.raises(Refused) as e:
                driver.ask("pointer")
            assert e.value.error == "NoRevision", name


@pytest.mark.parametrize("status", ["500 No", "403 No", "404 No", "200 OK"])
def test_an_answer_without_an_end_is_not_read_to_it(tmp_path: Path, python: Path, status: str) -> None:
    with HostileStore(lambda c, _line: flood(c, f"HTTP/1.1 {status}{CHUNKED}".encode())) as store:
        with place_of(store, tmp_path / "place", python) as place, pytest.raises(Refused) as e:
            place.driver().ask("list")
        assert (e.value.error, "an answer of more than" in e.value.text) == ("StoreFailed", True)


def listing(token: str) -> bytes:
    return (
        '<?xml version="1.0"?><ListBucketResult><IsTruncated>true</IsTruncated>'
        f"<NextContinuationToken>{token}</NextContinuationToken></ListBucketResult>"
    ).encode()


@pytest.mark.parametrize("again", [True, False], ids=["the same token", "always another token"])
def test_a_list_without_an_end_is_given_up(tmp_path: Path, python: Path, again: bool) -> None:
    with HostileStore(lambda _c, _line: None) as store:
        store.talk = lambda c, _line: c.sendall(answer("200 OK", listing("t" if again else str(len(store.requests)))))
        with place_of(store, tmp_path / "place", python) as place, pytest.raises(Refused) as e:
            place.driver().ask("list")
        assert "has no end" in e.value.text
        assert len(store.requests) <= 200


DATES = ["Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 +2359", "Wed, 01 Jan 2031 00:00:00 -0000", "x"]


@pytest.mark.parametrize("date", DATES)
def test_a_refusal_with_an_odd_date_spoils_no_later_request(tmp_path: Path, python: Path, date: str) -> None:
    refusal = answer("403 Forbidden", b"<Error><Code>RequestTimeTooSkewed</Code></Error>", f"Date: {date}")
    with HostileStore(lambda c, _line: c.sendall(refusal)) as store, place_of(store, tmp_path / "p", python) as place:
        driver = place.driver()
        with pytest.raises(Refused) as e:
            driver.ask("pointer")
        assert e.value.error == "StoreFailed"
        assert "HTTP 403" in e.value.text
        # Then the last second of the year 9999 is over, which is the last one that there is.
        time.sleep(1.5)
        store.talk = lambda c, _line: c.sendall(NO_KEY)
        with pytest.raises(Refused) as e:
            driver.ask("pointer")
        assert e.value.error == "NoRevision"


ODD = [
    answer("200 OK", b"<a>"),
    answer("200 OK", b"<ListBucketResult><Contents><Size>many</Size></Contents></ListBucketResult>"),
    answer("200 OK", b"<ListBucketResult><Contents><Key>revisions/1</Key></Contents></ListBucketResult>"),
    answer("500 No", b"\xff\xfe<"),
    b"HTTP/1.1 999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"SSH-2.0-x\r\n",
]


def test_an_odd_answer_is_a_failure_of_the_store_and_no_defect(tmp_path: Path, python: Path) -> None:
    with HostileStore(lambda _c, _line: None) as store, place_of(store, tmp_path / "p", python) as place:
        driver = place.driver()

        def talk(client: socket.socket, raw: bytes) -> None:
            client.sendall(raw)
            client.shutdown(socket.SHUT_RDWR)

        for raw in ODD:
            store.talk = lambda c, _line, raw=raw: talk(c, raw)  # type: ignore[misc]
            for operation in ("list", "pointer", "reports", "replica_of"):
                # Refused or not: what nothing expected would end the driver.
                with contextlib.suppress(Refused):
                    driver.ask(operation)
        store.talk = lambda c, _line: c.sendall(NO_KEY)
        with pytest.raises(Refused) as refused:
            driver.ask("pointer")
        assert refused.value.error == "NoRevision"


NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("certificate", "other_authority", "found"),
    [
        ({"now": NOW - timedelta(days=60)}, False, "certificate has expired"),
        # As it looks to a host whose clock is behind.
        ({"now": NOW + timedelta(days=60)}, False, "certificate is not yet valid"),
        ({"names": ["store.site"]}, False, "hostname '127.0.0.1' doesn't match"),
        ({}, True, "unable to get local issuer certificate|self-signed certificate|signature failure"),
    ],
    ids=["expired", "a clock that is behind", "another name", "another authority"],
)
def test_a_certificate_that_is_not_taken_is_named_with_what_to_compare(
    tmp_path: Path, python: Path, certificate: dict[str, Any], other_authority: bool, found: str
) -> None:
    pem, other = tmp_path / "pem", tmp_path / "other"
    tls.self_signed(pem, **{"names": ["127.0.0.1"], "days": 30, **certificate})
    tls.self_signed(other, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem / "cert.pem", pem / "key.pem")
    ca = (other if other_authority else pem) / "ca.pem"
    with (
        HostileStore(lambda c, _line: c.sendall(NO_KEY), context) as store,
        place_of(store, tmp_path / "p", python) as place,
    ):
        driver = place.driver(
            MOAT_STORE_ENDPOINT=f"https://127.0.0.1:{store.port}", MOAT_STORE_CA_FILE=str(ca), MOAT_STORE_TIMEOUT="1"
        )
        with pytest.raises(Refused) as e:
            driver.ask("pointer")
        assert e.value.error == "StoreFailed"
        assert re.search(f"found TLS: ({found})", e.value.text), e.value.text
        for word in (str(ca), "MOAT_STORE_CA_FILE", "clock", f"{NOW:%Y-}"):
            assert word in e.value.text
        assert "start the store" not in e.value.text


CLIENTS = """
import gc, sys
from pathlib import Path
from moat_gateway.s3store import S3Store
from moat_gateway.settings import Settings
folder = Path(sys.argv[1])
settings = Settings(
    store_endpoint=sys.argv[2], store_access_key_file=folder / "store_access_key",
    store_secret_key_file=folder / "store_secret_key",
)
for _ in range(4):
    S3Store(settings).replica_of()
gc.collect()
from botocore.client import BaseClient
print(sum(isinstance(o, BaseClient) for o in gc.get_objects()))
"""


def test_a_client_that_nobody_uses_any_more_is_gone(tmp_path: Path, python: Path) -> None:
    with HostileStore(lambda c, _line: c.sendall(NO_KEY)) as store, place_of(store, tmp_path / "p", python) as place:
        argv = [str(python), "-c", CLIENTS, str(place.folder / "secrets"), f"127.0.0.1:{store.port}"]
        done = subprocess.run(argv, env=place.environment(), capture_output=True, text=True, timeout=120)
    # Twelve MB each: config-sync makes a new one whenever something unexpected happened.
    assert done.stdout.split() == ["0"], done.stderr


# --- the last step of a push ---

MOVE = """
import sys
from pathlib import Path
from moat_gateway.errors import GatewayError
from moat_gateway.revstore import Pointer
from moat_gateway.s3store import S3Store
from moat_gateway.settings import Settings
folder = Path(sys.argv[1])
settings = Settings(
    store_endpoint=sys.argv[2], store_access_key_file=folder / "store_access_key",
    store_secret_key_file=folder / "store_secret_key",
)
try:
    print(S3Store(settings).move(Pointer(2, "revisions/2", "a" * 64, 10, "now", "me"), '"old"').revision)
except GatewayError as e:
    print(type(e).__name__, e.one_line())
"""
OLD = Pointer(1, "revisions/1", "b" * 64, 10, "before", "somebody")
OTHER = Pointer(2, "revisions/2", "c" * 64, 10, "now", "somebody else")


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Slow Down", "504 Gateway Time-out"])
@pytest.mark.parametrize(
    ("became", "said"),
    [
        ("moved", "^2$"),
        ("stays", "^StoreFailed cannot move the pointer"),
        ("other", "^PushConflict .*revision 2 by somebody else"),
        ("silent", "^StoreFailed whether revision 2 is in force is not known"),
    ],
)
def test_a_failure_of_the_store_at_the_last_step_is_looked_up(
    tmp_path: Path, python: Path, status: str, became: str, said: str
) -> None:
    with HostileStore(lambda _c, _line: None) as store, place_of(store, tmp_path / "p", python) as place:
        put: list[bytes] = []

        def talk(client: socket.socket, line: bytes) -> None:
            if line.startswith(b"PUT"):
                put.append(store.body)
                client.sendall(answer(status))
            elif became == "silent":
                client.sendall(answer(status))
            elif became == "stays":
                client.sendall(answer("200 OK", OLD.to_bytes()).replace(b"e1", b"old"))
            else:
                client.sendall(answer("200 OK", put[0] if became == "moved" else OTHER.to_bytes()))

        store.talk = talk
        argv = [str(python), "-c", MOVE, str(place.folder / "secrets"), f"127.0.0.1:{store.port}"]
        done = subprocess.run(argv, env=place.environment(), capture_output=True, text=True, timeout=120)
    assert re.search(said, done.stdout.strip()), done.stdout + done.stderr
    assert len(put) == 1, "never written twice"
