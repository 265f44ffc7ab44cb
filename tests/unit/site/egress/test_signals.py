# SPDX-License-Identifier: Apache-2.0
"""Proves that signals end a verification once, and never in the middle of what must run to its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from moat.site.egresscheck.signals import deferred, ended_once


@pytest.fixture(autouse=True)
def as_a_terminal_gives_them() -> Iterator[None]:
    """Under nohup SIGHUP is ignored from the beginning, and stays so (the second test)."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_ends_and_further_ones_do_not() -> None:
    before = signal.getsignal(signal.SIGHUP)
    done: list[str] = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt, match="signal 1"), ended_once():
        work()
    assert done == ["cleaned up"]
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_once(), deferred():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_comes_meanwhile_takes_effect_at_the_end_whichever_thread_takes_it() -> None:
    done: list[str] = []

    def work() -> None:
        with deferred():
            thread = threading.Thread(target=lambda: signal.raise_signal(signal.SIGTERM))
            thread.start()
            thread.join()
            done.append("all of it")
        done.append("not reached")

    with pytest.raises(KeyboardInterrupt, match="signal 15"), ended_once():
        work()
    assert done == ["all of it"]
