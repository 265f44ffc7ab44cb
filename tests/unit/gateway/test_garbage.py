# SPDX-License-Identifier: Apache-2.0
"""Proves that no finaliser runs inside ContextVar.set, where CPython 3.11 dies of it, and that garbage still goes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from moat_gateway import garbage

#: What a request does (sets variables, leaves cycles), and a finaliser that sets variables: a log line's, a span's.
CHILD = """
import asyncio, contextvars, gc, resource, sys
from moat_gateway import garbage

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
names = [contextvars.ContextVar(f"v{i}") for i in range(40)]
for name in names:
    name.set(object())
ended = 0

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        global ended
        ended += 1
        for name in names:
            name.set(object())

async def main():
    side = asyncio.create_task(garbage.run(0.001))
    for n in range(60_000):
        Cycle()
        others = [[] for _ in range(n % 7)]  # so that each allocation in turn is the one that is too many
        names[n % 40].set(n)
        if n % 50 == 0:
            await asyncio.sleep(0)
    side.cancel()

if sys.argv[1] == "held":
    garbage.hold()
gc.set_threshold(7, 3, 3)
asyncio.run(main())
print(ended)
"""


def _child(how: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[3]
    return subprocess.run(
        [sys.executable, "-c", CHILD, how],
        env={**os.environ, "PYTHONPATH": str(root / "images" / "gateway"), "PYTHONMALLOC": "debug"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_process_that_holds_outlives_finalisers_that_set_context_variables() -> None:
    done = _child("held")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50_000, "nothing was collected"


@pytest.mark.skipif(not garbage.AT_ALLOCATION, reason="this interpreter collects between instructions only")
def test_the_control_one_that_does_not_hold_dies() -> None:
    done = _child("not held")
    died = done.returncode == -signal.SIGSEGV or "Error" in done.stderr
    assert died, f"exit {done.returncode}: {done.stdout}{done.stderr}"


class _Counted:
    """Counts, a clock, and what was collected, as a test sets them."""

    def __init__(self) -> None:
        self.counts = (0, 0, 0)
        self.now = 1000.0
        self.takes = 0.5
        self.done: list[int] = []

    def collect(self, generation: int) -> None:
        self.done.append(generation)
        self.now += self.takes

    def collector(self) -> garbage.Collector:
        return garbage.Collector(self.collect, lambda: self.counts, lambda: self.now)


@pytest.fixture
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(
    ("counts", "generation"),
    [((700, 99, 99), None), ((701, 0, 0), 0), ((701, 10, 10), 0), ((701, 11, 0), 1), ((701, 0, 11), 2)],
)
@pytest.mark.usefixtures("thresholds")
def test_the_interpreters_own_thresholds_decide(counts: tuple[int, int, int], generation: int | None) -> None:
    counted = _Counted()
    counted.counts = counts
    assert counted.collector().step() == generation
    assert counted.done == ([] if generation is None else [generation])


@pytest.mark.usefixtures("thresholds")
def test_full_collections_take_a_fiftieth_of_the_time_at_most() -> None:
    counted = _Counted()
    counted.counts = (701, 11, 11)
    collector = counted.collector()
    assert collector.step() == 2
    counted.now += 24.9
    assert collector.step() == 1
    counted.now += 0.1
    assert collector.step() == 2


def test_a_threshold_of_nothing_means_never() -> None:
    counted = _Counted()
    counted.counts = (10**6, 10**3, 10**3)
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        assert counted.collector().step() is None
    finally:
        gc.set_threshold(*before)


@pytest.mark.skipif(not garbage.AT_ALLOCATION, reason="this interpreter collects by itself")
def test_on_the_event_loop_cycles_go_within_a_moment() -> None:
    class Thing:
        pass

    async def main() -> None:
        side = asyncio.create_task(garbage.run(0.01))
        thing = Thing()
        thing.itself = thing  # type: ignore[attr-defined]
        seen = weakref.ref(thing)
        del thing
        more = [[] for _ in range(2 * gc.get_threshold()[0])]  # type: ignore[var-annotated]
        await asyncio.sleep(0.2)
        assert len(more) > 700
        assert seen() is None
        side.cancel()

    was = gc.isenabled()
    gc.collect()
    garbage.hold()
    try:
        asyncio.run(main())
    finally:
        if was:
            gc.enable()
