# SPDX-License-Identifier: Apache-2.0
"""Proves the replication of revisions between two sites: a push at one converges at the other, over a link that fails.

Each site has a MinIO, a sidecar and a gateway of its own, real processes; the link between the two stores is a relay
that is cut and healed. The second site's nodes never talk to the first site.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.integration.hotreload.programs import Relay, until
from tests.integration.hotreload.site import Site

#: Two whole sites; in each run gateway/test_store_replicas.py shows the copying and a link that is cut.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def sites() -> Iterator[tuple[Site, Site, Relay]]:
    with closing(Site()) as here, closing(Site(copy_of=here)) as there:
        link = here.new_relay(there.minio.port)
        for site, name in ((here, "here"), (there, "there")):
            for program in site.node(name, 1).programs:
                program.start()
        here.admin.right("store", "replicate", "--secrets", str(here.secrets), "--to", f"127.0.0.1:{link.port}")
        for site in (here, there):
            site.gateways[0].wait_ready()
        yield here, there, link


def test_a_push_at_one_site_converges_at_the_other(sites: tuple[Site, Site, Relay]) -> None:
    here, there, link = sites
    here.admin.write("r1")
    number = here.admin.push().revision
    for site in (here, there):
        site.wait_serving(number)
        assert site.gateways[0].marker("m0", here.key) == "r1"
    assert link.passed > 10240
    # It does come over that link, and the second site's own store serves its node.
    assert there.nodes[0].sync_state()["source"]["where"].endswith(str(there.minio.port))


def test_nobody_pushes_at_the_site_that_receives(sites: tuple[Site, Site, Relay]) -> None:
    here, there, _ = sites
    there.admin.write("r9")
    pushed = there.admin.push()
    assert pushed.code == 17
    assert "main-site" in pushed.said["problems"][0]["message"]
    assert there.gateways[0].revision() == here.gateways[0].revision()


def test_a_link_that_is_cut_leaves_both_sites_serving_and_converges_when_it_heals(
    sites: tuple[Site, Site, Relay],
) -> None:
    here, there, link = sites
    before = there.gateways[0].revision()
    link.cut()
    here.admin.write("r2")
    newest = here.admin.push().revision
    here.wait_serving(newest)
    assert here.gateways[0].marker("m0", here.key) == "r2"
    # The other site serves what it has, restarts with it, and is not stale: its own store answers.
    gateway = there.gateways[0]
    gateway.stop()
    gateway.start()
    gateway.wait_ready()
    assert gateway.revision() == before
    assert gateway.marker("m0", here.key) == "r1"
    until("it is not stale", 120, lambda: gateway.metrics()["moat_config_staleness_seconds"] < 5)
    for _ in range(2):
        number, _ = here.hand.put({"config.yaml": here.config(f"r{here.hand.next()}"), "keys.yaml": here.keys()})
    here.wait_serving(number)
    link.heal()
    until("the newest revision arrives", 400, lambda: there.nodes[0].accepted() == number, 0.1)
    there.wait_serving(number)
    assert gateway.marker("m0", here.key) == here.gateways[0].marker("m0", here.key)
    assert gateway.status()["degraded"] == []
