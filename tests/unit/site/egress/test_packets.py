# SPDX-License-Identifier: Apache-2.0
"""Proves whose a packet is that does not come from a user of the site.

The layer itself runs in tests/integration/egress/test_capture.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.model import Component
from moat.site.egresscheck.nflog import Event, Packet
from moat.site.egresscheck.packets import PacketsLayer
from moat.site.egresscheck.who import Who

NGINX = Component("nginx", "nginx.service", 33)
ROOT = Component("nginx", "nginx.service", 0)
GONE = Event(1.0, "other", 0, None, Packet("tcp", "192.0.2.1", 50000, "203.0.113.5", 443))


@pytest.mark.parametrize(("components", "seen"), [((NGINX, ROOT), ["unknown"]), ((NGINX,), [])])
def test_a_packet_of_root_whose_process_is_gone_may_be_a_component_s_if_one_runs_as_root(
    components: tuple[Component, ...], seen: list[str], tmp_path: Path
) -> None:
    layer = PacketsLayer([], draw())
    layer._who = Who(components, tmp_path)
    layer._handle_other(GONE)
    assert [a.component for a in layer.stop()] == seen
    assert layer.notes == ([] if seen else ["1 packets of users outside the site were left alone"])
