# SPDX-License-Identifier: Apache-2.0
"""Proves that the site's packet filter is read from the kernel as it is: what it lets out, and whether it is closed.

The tables are loaded by the host's own nft, in a network namespace of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loads packet filter rules: needs root")

TABLE = """
table inet moat_egress {
  counter moat_out_ntp { }
  counter moat_out_dns { }
  counter moat_entry_1 { }
  chain output {
    type filter hook output priority filter; policy POLICY;
    oif "lo" accept
    tcp sport { 22 } tcp flags & ack == ack accept
    ct state established,related accept
    ip daddr 10.0.0.123 udp dport 123 counter name moat_out_ntp accept
    ip daddr 10.0.0.53 tcp dport 53 counter name moat_out_dns accept
    ip daddr 10.20.0.5 tcp dport 8000 counter name moat_entry_1 accept
    ip6 daddr fd00:20::/64 udp dport 8001 accept
    ip daddr { 10.0.1.0/24, 10.0.2.7 } tcp dport { 9000, 9001 } accept
    ip daddr 10.66.0.1 tcp dport 1 drop
    counter reject with icmpx admin-prohibited
  }
}
"""
PROGRAM = """
import json, subprocess, sys
from moat.site.egresscheck import systemd_probes as p
if sys.argv[1]:
    subprocess.run(["nft", "-f", "-"], input=sys.argv[1], text=True, check=True)
probe = p.probes([])[0]
print(json.dumps({"out": p.let_out(), "ok": probe.ok, "found": probe.found, "rules": p.rules()}))
"""


def read(table: str) -> dict[str, Any]:
    argv = ["unshare", "--net", sys.executable, "-c", PROGRAM, table]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_the_rules_let_out_is_the_allow_list_without_the_host_s_own_servers() -> None:
    assert sorted(read(TABLE.replace("POLICY", "drop"))["out"]) == [
        "tcp 10.0.1.0/24:9000",
        "tcp 10.0.1.0/24:9001",
        "tcp 10.0.2.7:9000",
        "tcp 10.0.2.7:9001",
        "tcp 10.20.0.5:8000",
        "udp [fd00:20::/64]:8001",
    ]


def test_a_closed_filter_holds_and_an_open_or_missing_one_does_not() -> None:
    assert read(TABLE.replace("POLICY", "drop"))["ok"] is True
    opened = read(TABLE.replace("POLICY", "accept"))
    assert (opened["ok"], opened["found"]) == (False, "policy accept, and its last rule refuses")
    missing = read("")
    assert (missing["ok"], missing["found"]) == (False, "no such table")
    assert "moat_egress" in missing["rules"]


def test_the_rules_shown_are_the_site_s_without_those_of_the_capture() -> None:
    shown = read(TABLE.replace("POLICY", "drop") + "table inet moat_capture {\n}\n")["rules"]
    assert shown.startswith("table inet moat_egress {")
    assert "moat_capture" not in shown
