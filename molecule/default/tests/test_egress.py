# SPDX-License-Identifier: Apache-2.0
"""Proves that nothing of the installed site tries to leave, by the product's own verification with its controls.

The verification restarts the services inside its capture, so this runs before the other files of the scenario.
"""

from __future__ import annotations

import json


def test_nothing_tries_to_leave_and_every_control_is_caught(node) -> None:
    done = node.run("moat", "egress", "verify", "--json", "--quiet", "5", timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["attempts"] == []
    layers = {layer["name"]: layer for layer in report["layers"]}
    for name in ("packets", "dns", "syscalls"):
        assert layers[name]["available"], layers[name]["why"]
        assert layers[name]["control_caught"], layers[name]["why"]
    kept = node.ok("ls", report["folder"]).split()
    assert any(name.endswith(".json") for name in kept)
    assert any(name.endswith(".html") for name in kept)


def test_the_site_is_as_it_was(node) -> None:
    assert "moat_capture" not in node.ok("nft", "list", "tables")
    assert node.ok("systemctl", "--failed", "--no-legend", "--plain") == ""
