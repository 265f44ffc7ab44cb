# SPDX-License-Identifier: Apache-2.0
"""Proves what several hosts are for: every gateway answers through each entrance, and a host may be missing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

EDGES = ("node1", "node2")


@pytest.mark.parametrize("edge", EDGES)
def test_every_gateway_answers_in_turn_through_each_entrance(site, ask, edge: str) -> None:
    answers = [ask(edge) for _ in range(6)]
    assert [status for status, _ in answers] == [200] * 6
    assert {gateway for _, gateway in answers} == site.gateways()


def test_a_revision_comes_to_every_node_and_each_of_them_can_show_it(site, ask) -> None:
    first = site.hosts["node1"]
    number = first.revision()
    first.ok("moat-gateway", "keys", "new", "another", "--team", "default", "--out", "/run/another.key")
    pids = {name: site.hosts[name].pid("moat-gateway@1.service") for name in site.hosts}
    said = first.ok("moat-site", "config", "push", "--wait=120")
    assert "all 3 gateways serve" in said
    for name, node in site.hosts.items():
        status = json.loads(node.ok("moat-gateway", "config", "status", "--json"))
        assert status["converged"], name
        assert status["store"]["revision"] == number + 1
        assert {n["name"] for n in status["nodes"]} == set(site.hosts)
        assert node.pid("moat-gateway@1.service") == pids[name]
        # A node reads the store and signs nothing.
        assert node.run("moat-gateway", "config", "push", "/etc/moat/config").returncode != 0


@pytest.fixture
def without_node3(site) -> Iterator[None]:
    """The third host's services are stopped, and started again."""
    site.hosts["node3"].ok("systemctl", "stop", "moat.target", "moat-gateway@1.service")
    assert site.hosts["node3"].show("moat-gateway@1.service", "ActiveState")["ActiveState"] == "inactive"
    yield
    site.hosts["node3"].ok("systemctl", "start", "moat.target", "moat-gateway@1.service")


def test_requests_are_answered_while_the_services_of_a_host_are_stopped(site, ask, without_node3: None) -> None:
    answers = [ask(edge) for edge in EDGES * 3]
    assert [status for status, _ in answers] == [200] * 6
    # nginx may have asked the third one first: the log has every gateway that was asked, the last one answered.
    answered = {gateways.rpartition(", ")[2] for _, gateways in answers}
    assert answered == site.gateways("node1", "node2")


def test_the_host_takes_its_share_again(site, ask) -> None:
    time.sleep(2)  # nginx_fail_timeout
    assert site.gateways("node3") <= {ask("node1")[1] for _ in range(6)}


def test_a_drained_gateway_on_another_host_gets_nothing_until_it_is_back(site, ask) -> None:
    site.hosts["node1"].ok("moat-site", "drain", "-e", "drain_out=node3/1")
    for edge in EDGES:
        answers = [ask(edge) for _ in range(4)]
        assert {gateway for _, gateway in answers} == site.gateways("node1", "node2")
        assert [status for status, _ in answers] == [200] * 4
    site.hosts["node1"].ok("moat-site", "drain", "-e", "drain_back=node3/1")
    for edge in EDGES:
        assert site.gateways("node3") <= {ask(edge)[1] for _ in range(6)}
