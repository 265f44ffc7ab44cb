# SPDX-License-Identifier: Apache-2.0
"""Proves that a restart of the host brings everything back by itself: rules before services, then answers.

Runs after the other files of this scenario (they are in the order of the alphabet).
"""

from __future__ import annotations


def test_the_site_comes_back_by_itself(node) -> None:
    node.restart()
    assert node.ok("systemctl", "--failed", "--no-legend", "--plain") == ""
    # Before anything that could speak: the rules are loaded when the first network service starts.
    order = {}
    for unit in ("moat-no-egress.service", "minio.service", "moat-gateway@1.service", "nginx.service"):
        order[unit] = int(node.show(unit, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"])
    assert min(order, key=lambda u: order[u]) == "moat-no-egress.service"
    key = node.new_key("after-restart")
    assert node.chat(key).status == 200
    assert node.chat(key, stream=True).done
