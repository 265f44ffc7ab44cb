# SPDX-License-Identifier: Apache-2.0
"""What is watched while revisions come: a load and what it saw, and when each gateway said what it serves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.hotreload.node import Node
from tests.integration.hotreload.programs import Program


@dataclass
class Traffic:
    """A running load, and after :meth:`stop` what it saw."""

    program: Program
    out: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def stop(self) -> Traffic:
        assert self.program.stop(90) == 0, self.program.tail()
        seen = json.loads(self.out.read_text())
        self.records, self.failures = seen["records"], seen["failures"]
        return self

    def done(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == kind and not r["failed"]]

    def assert_whole(self, at_least: int = 20) -> None:
        """Nothing that went through nginx failed or was cut, and there was traffic of each kind."""
        assert self.failures == []
        for kind in ("new", "kept", "stream"):
            assert len(self.done(kind)) >= at_least, (kind, len(self.done(kind)))

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
