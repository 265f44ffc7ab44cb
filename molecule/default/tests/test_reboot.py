# SPDX-License-Identifier: Apache-2.0
"""Proves that a restart of the host brings everything back by itself: rules before services, then answers.

Runs after the other files of this scenario (they are in the order of the alphabet).
"""

from __future__ import annotations

import subprocess
import time


def test_the_site_comes_back_by_itself(node) -> None:
    subprocess.run(["docker", "restart", "--time", "90", node.name], check=True, capture_output=True)
    give_up = time.monotonic() + 180
    while node.run("systemctl", "is-system-running").stdout.strip() not in ("running", "degraded"):
        assert time.monotonic() < give_up, "the host did not come up again within 180 s"
        time.sleep(1)
    assert node.ok("systemctl", "--failed", "--no-legend", "--plain") == ""
    # Before anything that could speak: the rules are loaded when the first network service starts.
    order = {}
    for unit in ("moat-no-egress.service", "minio.service", "moat-gateway@1.service", "nginx.service"):
        order[unit] = int(node.show(unit, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"])
    assert min(order, key=lambda u: order[u]) == "moat-no-egress.service"
    key = node.new_key("after-restart")
    assert node.chat(key).status == 200
    assert node.chat(key, stream=True).done
