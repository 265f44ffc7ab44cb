# SPDX-License-Identifier: Apache-2.0
"""What is watched while revisions come: a load and what it saw, and when each gateway said what it serves."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.hotreload.node import Node
from tests.integration.hotreload.programs import Program, until

KINDS = ("new", "kept", "stream")


@dataclass
class Traffic:
    """A running load, and after :meth:`stop` what it saw."""

    program: Program
    out: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    at_least: int = 0

    def progress(self) -> dict[str, Any]:
        """Return how far the running load has come (see ``tell`` in ``load.py``); empty before its first word."""
        assert self.program.running(), self.program.tail()
        return (self.program.events() or [{}])[-1]

    def until_probed(self, marker: str) -> None:
        """Wait until a probe of a gateway was answered with this marker."""
        until(f"a probe sees {marker}", 120, lambda: marker in self.progress().get("probed", ()), 0.1)

    def stop(self, at_least: int = 20) -> Traffic:
        """End the load, but not before so many requests of each kind were answered: how fast they are is no claim."""
        self.at_least = at_least

        def enough() -> bool:
            now = self.progress()
            return bool(now) and (now["failed"] or all(now["done"].get(k, 0) >= at_least for k in KINDS))

        until(lambda: f"{at_least} requests of each kind: {self.progress()}", 180, enough, 0.1)
        assert self.program.stop(180) == 0, self.program.tail()
        seen = json.loads(self.out.read_text())
        self.records, self.failures = seen["records"], seen["failures"]
        return self

    def done(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == kind and not r["failed"]]

    def assert_whole(self) -> None:
        """Nothing that went through nginx failed or was cut, and there was traffic of each kind."""
        assert self.failures == []
        for kind in KINDS:
            assert len(self.done(kind)) >= self.at_least, (kind, len(self.done(kind)))

    def assert_forward(self) -> None:
        """What each gateway said, one request after the other, never went back: a half-applied revision would.

        All models of a revision carry its marker. If one model answered with the new marker and another one, asked
        later, with the old, then the gateway had applied half of a revision.
        """
        for target in {r["target"] for r in self.records} - {"nginx"}:
            seen = [r for r in self.records if r["target"] == target and not r["failed"]]
            numbers = [int(r["marker"].removeprefix("r")) for r in seen]
            back = [(a, b) for a, b, m, n in zip(seen, seen[1:], numbers, numbers[1:], strict=False) if n < m]
            assert not back, f"{target} went back: {back[0]}"


class Watch:
    """Notes when each gateway's report first named a revision (CLOCK_MONOTONIC), for ``with``.

    It looks every 10 ms, and notes as ``late`` by how much its own looks came late: that is what this machine, busy as
    it is, adds to a measured time.
    """

    PAUSE = 0.01  # seconds

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.first: dict[tuple[str, int], float] = {}
        self.late: list[float] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            self.late.append(max(0.0, now - due))
            for node in self._nodes:
                for name, number in node.reported().items():
                    self.first.setdefault((name, number), now)
            due = time.monotonic() + self.PAUSE
            time.sleep(self.PAUSE)

    def served_by_all(self, number: int) -> float | None:
        """Return the moment at which the last gateway named this revision; ``None`` if one has not."""
        names = [g.name for n in self._nodes for g in n.gateways]
        moments = [self.first.get((name, number)) for name in names]
        known = [m for m in moments if m is not None]
        return max(known) if len(known) == len(names) else None

    def wait(self, number: int, seconds: float = 180) -> float:
        """Wait until all gateways have named this revision; return the moment at which the last did."""
        deadline = time.monotonic() + seconds
        while (moment := self.served_by_all(number)) is None:
            assert time.monotonic() < deadline, "\n".join(
                [f"not all serve {number} within {seconds:g} s", *(n.describe() for n in self._nodes)]
            )
            time.sleep(self.PAUSE)
        return moment


class Busy:
    """Measures how much slower this machine is than alone, for ``with``: the control of a measured time.

    Ten times a second a few milliseconds of arithmetic are done; their wall time, over the processor time they took, is
    what everybody else on the machine makes of a step.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._samples: list[tuple[float, float]] = []  # moment, wall time over processor time

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            wall, used = time.monotonic(), time.thread_time()
            while time.thread_time() - used < 0.004:
                pass
            now = time.monotonic()
            self._samples.append((now, (now - wall) / (time.thread_time() - used)))
            time.sleep(0.1)

    def since(self, moment: float) -> float:
        """Return the mean factor since a moment (CLOCK_MONOTONIC), at least 1."""
        factors = [f for at, f in self._samples if at >= moment] or [f for _, f in self._samples[-3:]]
        return max(1.0, statistics.fmean(factors)) if factors else 1.0


def figures(values: Sequence[float]) -> tuple[float, float, float]:
    """Return p50, p95 (the smallest value that 95 % do not exceed) and the largest."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1]


def table(rows: Mapping[str, Sequence[float]]) -> str:
    """Return p50, p95 and the longest of measured seconds, a line each."""
    lines = [f"{'seconds':<50} {'n':>4} {'p50':>7} {'p95':>7} {'max':>7}"]
    for name, values in rows.items():
        p50, p95, longest = figures(values)
        lines.append(f"{name:<50} {len(values):>4} {p50:>7.3f} {p95:>7.3f} {longest:>7.3f}")
    return "\n".join(lines)
