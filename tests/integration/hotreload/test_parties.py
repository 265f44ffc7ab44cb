# SPDX-License-Identifier: Apache-2.0
"""Proves that several parties get along: two administrators who push at once, and a node whose clock is a year wrong.

Two nodes with a sidecar and a gateway each at one MinIO, all real processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from tests.integration.gateway.harness import PACKAGE
from tests.integration.hotreload.node import Gateway
from tests.integration.hotreload.programs import HERE, until
from tests.integration.hotreload.site import Admin, Pushed, Site

#: In each run gateway/test_revision_stores.py shows both at the stores, with no gateways.
pytestmark = pytest.mark.long

YEAR = 365 * 86400.0  # seconds


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with closing(Site()) as made:
        made.node("n1", 1)
        made.node("n2", 1, PYTHONPATH=f"{HERE / 'wrongclock'}:{PACKAGE}", TEST_CLOCK_SHIFT=str(YEAR))
        yield made.start(nginx=False)


def fresh(gateway: Gateway) -> None:
    """What it serves is not stale; a busy machine asks the store late now and then, a wrong clock is wrong for ever."""
    until("it is not stale", 120, lambda: gateway.metrics()["moat_config_staleness_seconds"] < 5)


def test_a_node_whose_clock_is_a_year_wrong_follows_like_the_others(site: Site) -> None:
    site.admin.write("r1")
    pushed = site.admin.push("--wait", "180")
    assert pushed.revision == 1
    site.wait_serving(1, 5)
    wrong = site.nodes[1]
    # The control: the processes of that node do have another year, by what they write into their logs and reports.
    year = int(site.nodes[0].sync_state()["checked_at"][:4])
    assert int(wrong.sync_state()["checked_at"][:4]) == year + 1
    assert wrong.gateways[0].events()[0]["ts"].startswith(str(year + 1))
    for node in site.nodes:
        assert node.gateways[0].marker("m1", site.key) == "r1"
        fresh(node.gateways[0])
        assert node.gateways[0].status()["degraded"] == []
    told = site.admin.status()
    assert {g["name"]: g["revision"] for g in told["gateways"]} == {g.name: 1 for g in site.gateways}
    assert [g["degraded"] for g in told["gateways"]] == [[], []]
    # The other way round: revisions made by an administrator whose clock is wrong count as any other.
    site.admin.write("r2")
    done = site.admin.command(
        "config", "push", str(site.admin.content), "--json",
        PYTHONPATH=f"{HERE / 'wrongclock'}:{PACKAGE}", TEST_CLOCK_SHIFT=str(-YEAR),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    site.wait_serving(int(json.loads(done.stdout)["revision"]))


def test_of_two_administrators_who_push_at_once_one_wins_and_the_other_is_told(site: Site) -> None:
    other = Admin(site, "other")
    conflicts = 0
    for round_ in range(2):
        before = int(site.hand.bucket.current()["revision"])

        def push(who: Admin, marker: str = f"r{before + 1}") -> Pushed:
            who.write(marker, **{f"of-{who.name}": site.base(marker)})
            return who.push("--author", who.name)

        with ThreadPoolExecutor(2) as both:
            results = dict(zip((site.admin, other), both.map(push, (site.admin, other)), strict=True))
        won = {who: p for who, p in results.items() if p.code == 0}
        lost = {who: p for who, p in results.items() if p.code != 0}
        assert won, (round_, results)
        pointer = site.hand.bucket.current()
        for p in lost.values():
            conflicts += 1
            assert p.code == 22
            assert p.said["problems"][0]["kind"] == "push-conflict"
            (winner,) = won
            assert winner.name in json.dumps(p.said["problems"])
        # What serves in the end is what a winner was told, whole.
        numbers = {p.revision: who for who, p in won.items()}
        assert len(numbers) == len(won)
        # (A number that the loser had taken stays unused.)
        assert pointer["revision"] == max(numbers) > before
        assert pointer["author"] == numbers[pointer["revision"]].name
        site.wait_serving(pointer["revision"])
        for gateway in site.gateways:
            models = gateway.status()["models"]
            assert f"of-{pointer['author']}" in models
            assert len([m for m in models if m.startswith("of-")]) == 1
    # A push counts from its beginning: two that overlap cannot both win. (On a busy machine one may begin late.)
    assert conflicts >= 1
