# SPDX-License-Identifier: Apache-2.0
"""Proves the rules of a rolling restart: one at a time, only while the others serve, and a stop when one stays away."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moat_gateway.sync.nodefolder import Turn
from moat_gateway.sync.reports import Report
from moat_gateway.sync.turns import Turns

BOOT = "b"


@dataclass
class Node:
    """Gateways that report, and the time."""

    turns: Turns = field(init=False)
    said: list[tuple[str, int, str, str | None]] = field(default_factory=list)
    reports: dict[str, Report] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    now: float = 1000.0
    revision: int = 2

    def begin(self, *, rolling: bool = True, resume: Turn | None = None) -> Node:
        self.turns = Turns(rolling=rolling, drain=61, say=lambda *a: self.said.append(a), resume=resume, back=120)
        return self

    def report(self, name: str, **values: Any) -> None:
        fields: dict[str, Any] = {
            "pid": 7, "boot_id": BOOT, "beat_boottime": self.now, "revision": 1, "sha256": None, "applied_at": None,
            "ready": True, "draining": False, "started_at": "first", "needs_restart": ("callbacks",),
        }  # fmt: skip
        self.reports[name] = Report(name=name, **{**fields, **values})
        self.silent.discard(name)

    def back(self, name: str, **values: Any) -> None:
        """A gateway that was restarted and serves the new revision."""
        self.report(name, **{"started_at": "second", "needs_restart": (), "revision": self.revision, **values})

    def step(self, seconds: float = 1.0) -> str | None:
        self.now += seconds
        for name, r in self.reports.items():
            if name not in self.silent:
                self.reports[name] = Report(**{**vars(r), "beat_boottime": self.now})
        turn = self.turns.step(self.reports, self.revision, self.now, BOOT)
        return turn.instance if turn else None


def three(**how: Any) -> Node:
    node = Node().begin(**how)
    for name in ("g1", "g2", "g3"):
        node.report(name)
    return node


def test_one_after_the_other() -> None:
    node = three()
    for name in ("g1", "g2", "g3"):
        assert node.step() == name
        node.report(name, draining=True, ready=False)
        assert node.step() == name
        node.silent.add(name)
        assert node.step(30) == name
        node.back(name, ready=False)
        assert node.step() == name, "it is there and does not serve yet"
        node.back(name)
    assert node.step() is None
    assert [(i, w) for i, _, w, _ in node.said] == [(g, w) for g in ("g1", "g2", "g3") for w in ("given", "done")]


def test_nothing_to_do_gives_no_turn() -> None:
    node = three()
    for name in node.reports:
        node.report(name, needs_restart=())
    assert node.step() is None
    assert node.said == []


def test_a_site_that_only_wants_a_report_gets_no_restart() -> None:
    node = three(rolling=False)
    assert node.step() is None
    assert node.said == []


def test_it_waits_while_another_gateway_is_down() -> None:
    node = three()
    node.silent.add("g3")
    assert node.step(20) is None
    assert node.turns.degraded == ("the restart of g1 waits until g3 is ready",)
    node.report("g3", ready=False)
    assert node.step() == "g3", "one that does not serve costs nothing to restart"


def test_a_gateway_that_was_taken_away_is_not_waited_for_for_ever() -> None:
    node = three()
    node.silent.add("g3")
    assert node.step(20) is None
    assert node.step(120) == "g1"
    assert node.turns.degraded == ()


def test_one_that_stays_away_stops_the_rolling_and_a_late_return_goes_on() -> None:
    node = three()
    assert node.step() == "g1"
    node.silent.add("g1")
    assert node.step(100) == "g1"
    assert node.step(130) is None
    assert node.said[-1] == ("g1", 2, "failed", "it was not back and ready within 120 s")
    assert "stopped at g1" in node.turns.degraded[0]
    assert node.step(300) is None, "nobody else is risked"
    node.back("g1")
    assert node.step() == "g2"
    assert node.turns.degraded == ()


def test_one_that_comes_back_and_still_needs_a_restart_is_not_restarted_again() -> None:
    node = three()
    assert node.step() == "g1"
    node.back("g1", needs_restart=("callbacks",), revision=1)
    assert node.step() is None
    assert node.said[-1][2] == "failed"
    assert node.step(500) is None


def test_a_newer_revision_ends_the_stop() -> None:
    node = three()
    node.step()
    node.silent.add("g1")
    node.step(10)
    node.step(130)
    node.revision = 3
    node.report("g1")
    assert node.step() == "g1"
    assert node.turns.turn == Turn("g1", 3, "first")


def test_a_newer_revision_may_make_the_restart_needless() -> None:
    node = three()
    assert node.step() == "g1"
    node.revision = 3
    for name in ("g1", "g2", "g3"):
        node.report(name, needs_restart=(), revision=3)
    assert node.step() is None
    assert node.said[-1] == ("g1", 2, "done", "no restart is needed any more")


def test_a_newer_revision_during_the_restart_counts_as_back() -> None:
    node = three()
    assert node.step() == "g1"
    node.silent.add("g1")
    node.step(10)
    node.revision = 3
    node.back("g1", revision=2, needs_restart=("callbacks",))
    assert node.step() == "g1", "revision 3 needs another restart, which is a turn of its own"
    assert [w for _, _, w, _ in node.said] == ["given", "done", "given"]


def test_one_that_does_not_end_stops_the_rolling() -> None:
    node = three()
    assert node.step() == "g1"
    assert node.step(150) == "g1", "a drain may take its time"
    assert node.step(40) is None
    assert node.said[-1][3] == "it did not end within 181 s"


def test_a_turn_survives_a_restart_of_config_sync() -> None:
    node = Node().begin(resume=Turn("g1", 2, "first"))
    node.report("g2")
    assert node.step() == "g1", "g1 is on its way; nobody else gets the turn"
    node.back("g1")
    assert node.step() == "g2"


def test_reports_of_an_earlier_boot_do_not_count() -> None:
    node = three()
    for name in node.reports:
        node.report(name, boot_id="another")
    assert node.step() is None
