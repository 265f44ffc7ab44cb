# SPDX-License-Identifier: Apache-2.0
"""Proves that gateways come, go, and are taken out of nginx by the commands of the page, and what is kept of it.

It leaves the host with the two gateways that the other files expect.
"""

from __future__ import annotations

import json

import pytest

VARS = "/etc/moat/site/vars.yml"
DRAINED = "/etc/moat/site/drained.json"
TWO, THREE = [f"moat-gateway@{n}.service" for n in (2, 3)]


def members(node) -> list[str]:
    """Return the ports of the gateways that nginx asks."""
    lines = node.ok("cat", "/etc/moat/nginx/upstream.conf").splitlines()
    servers = [line.split() for line in lines if line.strip().startswith("server ")]
    return sorted({s[1].rstrip(";").rpartition(":")[2] for s in servers if "down" not in " ".join(s).split("#")[0]})


@pytest.mark.long
def test_a_gateway_comes_and_goes_and_the_operators_file_stays_as_it_is_but_for_the_number(node) -> None:
    before = node.ok("cat", VARS)
    assert "gateway_count" not in before
    first = node.pid("moat-gateway@1.service")
    node.ok("moat-site", "scale", "-e", "gateway_count=3", timeout=600)
    assert node.ok("cat", VARS) == f"{before}gateway_count: 3\n"
    assert members(node) == ["4001", "4002", "4003"]
    assert json.loads(node.ok("moat-gateway", "@3", "status", "--json"))["ready"]
    node.ok("moat-site", "scale", "-e", "gateway_count=2", timeout=600)
    assert node.ok("cat", VARS) == f"{before}gateway_count: 2\n"
    assert members(node) == ["4001", "4002"]
    assert node.show(THREE, "ActiveState", "UnitFileState") == {"ActiveState": "inactive", "UnitFileState": "disabled"}
    assert node.run("moat-gateway", "@3", "status").returncode == 15
    assert node.pid("moat-gateway@1.service") == first, "a gateway that stays was restarted"


def test_a_number_that_cannot_be_meant_is_not_kept(node) -> None:
    before = node.ok("cat", VARS)
    done = node.run("moat-site", "scale", "-e", "gateway_count=abc")
    assert done.returncode == 28
    assert "expected a number from 1 to 64" in " ".join(done.stdout.split())
    assert node.ok("cat", VARS) == before


def test_a_drain_that_is_refused_is_not_kept(node) -> None:
    done = node.run("moat-site", "drain", "-e", "drain_out=1,2")
    assert (done.returncode, "would serve nobody" in done.stdout) == (28, True), done.stdout[-3000:]
    assert node.run("cat", DRAINED).stdout.strip() in ("", "[]")
    assert members(node) == ["4001", "4002"]


def test_a_gateway_that_is_out_is_idle_and_comes_back(node) -> None:
    node.ok("moat-site", "drain", "-e", "drain_out=2", timeout=600)
    assert json.loads(node.ok("cat", DRAINED)) == ["localhost/2"]
    assert members(node) == ["4001"]
    assert node.show(TWO, "ActiveState") == {"ActiveState": "active"}
    node.ok("moat-site", "drain", "-e", "drain_back=2", timeout=600)
    assert json.loads(node.ok("cat", DRAINED)) == []
    assert members(node) == ["4001", "4002"]
