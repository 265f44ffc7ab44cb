# SPDX-License-Identifier: Apache-2.0
"""Proves that nodes agree who restarts first through their reports alone, and never restart at the same time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from moat_gateway.revstore import NodeReport
from moat_gateway.sync.neighbours import SETTLE, Neighbours


@dataclass
class Time:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def gateway(name: str = "g1", **values: Any) -> dict[str, Any]:
    return {"name": name, "age": 1.0, "ready": True, "draining": False, "needs_restart": [], **values}


def report(*gateways: Mapping[str, Any], turn: Any = None, rolling: bool = True, age: float | None = 1.0) -> NodeReport:
    value = {"format": 1, "node": "x", "rolling": rolling, "sync": {"turn": turn}, "gateways": list(gateways)}
    return NodeReport(json.dumps(value).encode(), age)


def answer(node: str, others: Mapping[str, NodeReport]) -> str | None:
    """Ask as a node does whose word has arrived and that waited."""
    time = Time()
    neighbours = Neighbours(node, clock=time)
    assert neighbours.objection() == ""
    neighbours.told(time.now)
    while time.now < 100 + SETTLE + 1:
        neighbours.looked(others)
        neighbours.objection()
        time.now += 0.5
    neighbours.looked(others)
    return neighbours.objection()


WAITS: dict[str, Any] = {"needs_restart": ["callbacks"]}


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({}, None),
        ({"n2": report(gateway(ready=False))}, None),  # itself
        ({"n1": report(gateway())}, None),
        ({"n1": report(gateway(**WAITS))}, "node n1 restarts its gateways first"),
        ({"n3": report(gateway(**WAITS))}, None),
        ({"n1": report(gateway(**WAITS), rolling=False)}, None),
        ({"n3": report(gateway(**WAITS), turn={"instance": "g9"})}, "g9 of node n3 is being restarted"),
        ({"n3": report(gateway(ready=False))}, "g1 of node n3 is not ready"),
        ({"n3": report(gateway(draining=True))}, "g1 of node n3 is not ready"),
        ({"n3": report(gateway(), gateway("g2", age=20.0))}, "g2 of node n3 is not ready"),
        ({"n3": report(gateway("g2", age=500.0))}, None),  # removed long ago
        ({"n3": report(gateway("g2", age=None))}, None),  # of an earlier boot
        ({"n1": report(gateway(**WAITS), age=31.0)}, None),  # the node is gone
        ({"n1": report(gateway(**WAITS), age=None)}, None),  # on a drive that was carried here
        ({"n1": NodeReport(b"nonsense", 1.0), "n3": NodeReport(b"{}", 1.0), "n4": NodeReport(b"[]", 1.0)}, None),
    ],
    ids=itertools.count(),
)
def test_who_may_restart(others: Mapping[str, NodeReport], why: str | None) -> None:
    assert answer("n2", others) == why


def test_a_site_of_one_node_does_not_wait() -> None:
    time = Time()
    neighbours = Neighbours("n1", clock=time)
    assert neighbours.objection() == ""
    assert neighbours.wanted
    neighbours.told(time.now)
    neighbours.looked({"n1": report(gateway(**WAITS))})
    assert neighbours.objection() is None


def test_word_that_was_sent_before_the_question_does_not_count() -> None:
    time = Time()
    neighbours = Neighbours("n1", clock=time)
    neighbours.objection()
    neighbours.told(time.now - 1)
    neighbours.looked({})
    assert neighbours.objection() == ""


def test_a_source_that_is_lost_is_waited_for_and_said() -> None:
    time = Time()
    neighbours = Neighbours("n1", clock=time)
    neighbours.objection()
    neighbours.failed("gone")
    assert "gone" in str(neighbours.objection())
    neighbours.told(time.now)
    neighbours.looked({})
    assert neighbours.objection() is None
    for _ in range(6):
        time.now += 1
        neighbours.objection()
    assert neighbours.objection() == "the other nodes cannot be asked"


def test_a_later_question_begins_anew() -> None:
    time = Time()
    neighbours = Neighbours("n1", clock=time)
    neighbours.objection()
    neighbours.told(time.now)
    neighbours.looked({})
    assert neighbours.objection() is None
    time.now += 60
    assert not neighbours.wanted
    assert neighbours.objection() == ""


@dataclass
class Node:
    """A node of the simulation: wants one restart, which takes ten seconds."""

    name: str
    wants_at: float
    delay: float  # of everything it says or reads
    time: Time
    neighbours: Neighbours = field(init=False)
    begun: float | None = None
    ended: float | None = None
    posts: list[tuple[float, NodeReport, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.neighbours = Neighbours(self.name, clock=self.time)

    @property
    def wants(self) -> bool:
        return self.time.now >= self.wants_at and self.begun is None

    def act(self, store: dict[str, NodeReport]) -> None:
        now = self.time.now
        if self.begun is not None and self.ended is None and now >= self.begun + 10:
            self.ended = now
        if self.wants and self.neighbours.objection() is None:
            self.begun = now
        restarting = self.begun is not None and self.ended is None
        mine = report(
            gateway(ready=not restarting, needs_restart=["x"] if self.wants else []),
            turn={"instance": "g1"} if restarting else None,
        )
        self.posts.append((now + self.delay, mine, now))
        while self.posts and self.posts[0][0] <= now:
            _, arrived, offered = self.posts.pop(0)
            store[self.name] = arrived
            if self.neighbours.wanted:
                self.neighbours.told(offered)
                self.neighbours.looked(store)


@pytest.mark.parametrize("delays", tuple(itertools.product((0.0, 0.4, 2.0), repeat=3)))
@pytest.mark.parametrize("offsets", [(0, 0, 0), (0, 0.1, 0.2), (5.0, 2.5, 0), (5.1, 0, 4.9), (0, 5.0, 10.0)])
def test_three_nodes_never_restart_at_once_and_all_do(
    offsets: tuple[float, float, float], delays: tuple[float, float, float]
) -> None:
    time = Time()
    names = ("a", "b", "c")
    nodes = [Node(n, 110 + o, d, time) for n, o, d in zip(names, offsets, delays, strict=True)]
    store: dict[str, NodeReport] = {n: report(gateway()) for n in names}
    while any(n.ended is None for n in nodes):
        for n in nodes:
            n.act(store)
        restarting = [n.name for n in nodes if n.begun is not None and n.ended is None]
        assert len(restarting) <= 1, restarting
        time.now = round(time.now + 0.1, 3)
        assert time.now < 300, "somebody waits for ever"
