# SPDX-License-Identifier: Apache-2.0
"""Proves what the dry run's child lets through: no connection, look-up or program, no part of a secret in its words.

Building a real router is proven in ``tests/integration/gateway/test_dry_run.py``.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway import dryrunchild

PACKAGE = Path(__file__).resolve().parents[3] / "images/gateway"

#: Each must raise; an audit hook cannot be taken back, so this runs in a process of its own.
ATTEMPTS = """
import os, socket, subprocess, sys
from moat_gateway import dryrunchild
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
def attempts():
    with socket.socket() as s:
        yield "connect", lambda: s.connect(("127.0.0.1", port))
        yield "connect_ex", lambda: s.connect_ex(("127.0.0.1", port))
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        yield "sendto", lambda: s.sendto(b"x", ("127.0.0.1", port))
        yield "sendmsg", lambda: s.sendmsg([b"x"], [], 0, ("127.0.0.1", port))
    yield "getaddrinfo", lambda: socket.getaddrinfo("localhost", 80)
    yield "gethostbyname", lambda: socket.gethostbyname("localhost")
    yield "Popen", lambda: subprocess.Popen(["true"])
    yield "system", lambda: os.system("true")
    yield "posix_spawn", lambda: os.posix_spawn("/bin/true", ["true"], {})
    yield "exec", lambda: os.execv("/bin/true", ["true"])
    yield "fork", os.fork
if sys.argv[1] == "guarded":
    sys.addaudithook(dryrunchild._refuse)
for name, attempt in attempts():
    if sys.argv[1] == "open" and name in ("exec", "fork"):
        continue
    try:
        attempt()
        print("done", name)
    except RuntimeError as e:
        print("refused", name)
a, b = socket.socketpair()
a.send(b"x")
print("pair", b.recv(1))
"""


def attempt(how: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, how],
        env={"PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_run_can_neither_connect_nor_look_up_nor_start_programs() -> None:
    *lines, pair = attempt("guarded")
    assert [line.split()[0] for line in lines] == ["refused"] * 11
    assert pair == "pair b'x'"  # an event loop needs this


def test_without_the_guard_the_same_attempts_succeed() -> None:
    *lines, _pair = attempt("open")
    assert [line.split()[0] for line in lines] == ["done"] * 9


# --- words ---

SECRET = "sk-provider-0123456789-canary"


@pytest.mark.parametrize(
    "words",
    [SECRET, f"bad key {SECRET}!", f"ends with {SECRET[-8:]}", f"starts {SECRET[:8]}", f"in the middle {SECRET[9:18]}"],
)
def test_words_with_a_part_of_a_secret_are_not_shown(words: str) -> None:
    line = dryrunchild.one_line(ValueError(words), ["another-secret", SECRET])
    assert line == "ValueError: (its words are not shown: they repeat a secret)"


def test_a_short_secret_is_found_too() -> None:
    assert "abc" not in dryrunchild.one_line(ValueError("xxabcxx"), ["abc"]).removeprefix("ValueError")


@given(words=st.text(), secret=st.text(min_size=1, max_size=40))
def test_a_line_is_one_printable_line(words: str, secret: str) -> None:
    line = dryrunchild.one_line(ValueError(words), [secret])
    assert line.isprintable()
    assert len(line) <= dryrunchild.MAX_TEXT + 20


def test_only_the_first_line_is_passed_on() -> None:
    assert dryrunchild.one_line(KeyError("x"), []) == "KeyError: 'x'"
    assert dryrunchild.one_line(ValueError("one\ntwo"), []) == "ValueError: one"
    assert dryrunchild.one_line(ValueError(), []) == "ValueError"


# --- messages ---


def test_messages_come_through_whole() -> None:
    a, b = socket.socketpair()
    with a, b:
        for message in (b"", b"x", bytes(100_000)):
            dryrunchild.send(a, message)
            assert dryrunchild.receive(b, time.monotonic() + 10) == message
        a.sendall(b"\0\0\0\5ab")
        a.close()
        with pytest.raises(EOFError):
            dryrunchild.receive(b, time.monotonic() + 10)


def test_waiting_has_an_end() -> None:
    a, b = socket.socketpair()
    with a, b, pytest.raises(OSError, match="timed out"):
        dryrunchild.receive(b, time.monotonic() + 0.05)


def test_a_message_that_is_too_long_is_refused() -> None:
    a, b = socket.socketpair()
    with a, b:
        a.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ValueError, match="too long"):
            dryrunchild.receive(b, time.monotonic() + 10)
