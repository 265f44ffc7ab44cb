# SPDX-License-Identifier: Apache-2.0
"""Proves that a deadline ends a connection whatever comes over it, only its own, and that a stuck step is noticed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moat_gateway.deadline import Deadline, Step
from moat_gateway.errors import SyncStuck
from moat_gateway.logs import Log
from moat_gateway.notify import Notifier
from moat_gateway.settings import Settings
from moat_gateway.sync.manager import ConfigSyncManager, step_limit


@contextlib.contextmanager
def dripping() -> Iterator[socket.socket]:
    """Return a connection over which something comes all the time."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.02):
                theirs.send(b"x")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield ours
    finally:
        stop.set()
        thread.join(10)
        ours.close()
        theirs.close()


def test_a_connection_that_never_pauses_is_cut_at_the_deadline() -> None:
    deadline = Deadline(0.2)
    with dripping() as connection:
        handle = deadline.watch(connection)
        deadline.begin()
        begun = time.monotonic()
        while connection.recv(100):
            pass
        assert time.monotonic() - begun >= 0.19
        assert deadline.over
        assert str(deadline.late()) == "no whole answer within 0.2 s"
        deadline.leave(handle)
        deadline.end()
        assert handle.fileno() == -1


def test_a_connection_is_cut_after_its_client_closed_it_too_as_long_as_an_answer_is_read() -> None:
    deadline = Deadline(0.2)
    with dripping() as connection:
        # What an HTTP client does whose answer ends where the connection does: it keeps a file only.
        answer = connection.makefile("rb")
        deadline.begin()
        handle = deadline.watch(connection)
        connection.close()
        deadline.leave(handle)
        assert answer.read(), "until it is cut"
        answer.close()
    assert deadline.over
    deadline.end()
    assert handle.fileno() == -1


def test_a_connection_that_is_made_too_late_is_cut_at_once() -> None:
    deadline = Deadline(0.01)
    deadline.begin()
    while not deadline.over:
        time.sleep(0.001)
    with dripping() as connection:
        handle = deadline.watch(connection)
        while connection.recv(100):
            pass
        deadline.leave(handle)
        deadline.end()


def test_a_request_that_ended_in_time_cuts_nothing_of_the_next() -> None:
    deadline = Deadline(0.05)
    with dripping() as connection:
        handle = deadline.watch(connection)
        deadline.begin()
        deadline.end()
        time.sleep(0.1)
        assert not deadline.over
        assert connection.recv(1) == b"x"
        deadline.leave(handle)
        assert handle.fileno() == -1


def test_a_step_is_stuck_when_its_time_is_over_and_not_between_steps() -> None:
    now = [100.0]
    step = Step(60, clock=lambda: now[0])
    now[0] += 1000
    assert step.stuck() is None
    with step:
        now[0] += 60
        assert step.stuck() is None
        now[0] += 3
        assert step.stuck() == 63
    assert step.stuck() is None


class Hanging:
    """A follower whose step waits for something that does not come."""

    def __init__(self) -> None:
        self.begun, self.let = threading.Event(), threading.Event()

    def step(self, *, asked: bool) -> None:
        self.begun.set()
        self.let.wait(60)

    def pause(self) -> float:
        return 60.0


def test_config_sync_ends_when_a_step_does_not(tmp_path: Path) -> None:
    settings = Settings(sync_dir=str(tmp_path / "sync"), reports_dir=str(tmp_path), node="n1")
    assert step_limit(settings) > 2 * settings.dry_run_timeout
    manager = ConfigSyncManager(settings, Log(lambda _line: None), Notifier({}))
    manager._step = Step(0.0)
    follower = Hanging()
    thread = threading.Thread(target=manager._follow, args=(follower,), daemon=True)
    thread.start()
    try:
        assert follower.begun.wait(60)
        time.sleep(0.01)
        with pytest.raises(SyncStuck) as stuck:
            manager._watch(thread)
        # Another code than those after which the service manager leaves it alone.
        assert stuck.value.exit_code == 27
    finally:
        manager._stop.set()
        manager._wake.set()
        follower.let.set()
        thread.join(60)
    with pytest.raises(RuntimeError, match="has ended"):
        manager._watch(thread)
