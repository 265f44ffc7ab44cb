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

sys.path.insert(0, str(ROOT / "tests/unit/ansible"))
from egress_rules import render  # noqa: E402 - found by the line above

ALLOW = [
    {"address": "10.20.0.5", "port": 8000},
    {"address": "fd00:20::/64", "port": 8001, "protocol": "udp"},
]
#: The rule file as the role writes it, with everything that a host may need.
ROLE = render(
    ALLOW,
    no_egress_dhcp_client=True,
    no_egress_ntp_servers=["10.0.0.123", "fd00::123"],
    no_egress_name_servers=["10.0.0.53", "fd00::53"],
    no_egress_ssh_ports=[22, 2222],
    no_egress_extra_output=['udp dport 9999 counter drop comment "a rule of the site"'],
)
PROGRAM = """
import json, pathlib, subprocess, sys
from moat.site.egresscheck import systemd_probes as p
for text in sys.argv[1:3]:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
p._written = lambda: sys.argv[3]
probes = p.probes([], sys.argv[4:])
print(json.dumps({"out": p.let_out(), "probes": [(x.ok, x.found) for x in probes], "rules": p.rules()}))
"""


def read(table: str, more: str = "", *allowed: str, written: str = ROLE) -> dict[str, Any]:
    """Load a table, change it by ``more``, and return what the probes say where the role wrote ``written``."""
    argv = ["unshare", "--net", sys.executable, "-c", PROGRAM, table, more, written, *allowed]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def insert(rule: str, chain: str = "output") -> str:
    return f"insert rule inet moat_egress {chain} {rule}\n"


CLOSED = [[True, "policy drop, and its last rule refuses"]] * 2


def test_what_the_role_lets_out_is_the_allow_list_without_the_host_s_own_servers() -> None:
    found = read(ROLE)
    assert found["out"] == ["tcp 10.20.0.5:8000", "udp [fd00:20::/64]:8001"]
    assert found["probes"] == CLOSED


@pytest.mark.parametrize("template", ["no-egress.nft.j2", "closed.nft.j2"])
@pytest.mark.parametrize(
    "more", [{}, {"no_egress_ssh_ports": []}, {"allow": ALLOW, "no_egress_dhcp_client": True}], ids=str
)
def test_every_rule_that_the_role_writes_is_known(template: str, more: dict[str, Any]) -> None:
    text = render(template=template, **more)
    assert [ok for ok, _ in read(text, written=render(**more))["probes"]] == [True, True]


@pytest.mark.parametrize(
    "rule",
    [
        "accept",
        "meta skuid 990 accept",
        "tcp dport 443 accept",
        "ip protocol vrrp accept",
        "ip daddr 10.0.0.0/8 accept",
        "ip daddr 0.0.0.0/0 tcp dport 443 accept",
        "ip daddr 10.0.0.1-10.0.0.9 tcp dport 443 accept",
        "ip daddr { 10.20.0.5, 10.0.0.1-10.0.0.9 } tcp dport 8000 accept",
        "ip daddr != 10.0.0.1 tcp dport 443 accept",
        "ip daddr 10.20.0.5 tcp dport 8001 accept",
        # A counter's name alone makes no rule the role's.
        "ip daddr 0.0.0.0/0 tcp dport 8000 counter name moat_out_10_20_0_5_tcp_8000 accept",
        "ip daddr 10.66.0.1 tcp dport 443 counter name moat_out_dns accept",
        "tcp dport 123 counter name moat_out_ntp accept",
        "ct state established,related,new accept",
        "tcp sport 22 accept",
        "tcp sport 22 tcp flags & (syn | ack) == syn accept",
        'oif != "lo" accept',
        "ip daddr 10.66.0.1 ip daddr set 10.20.0.5",
    ],
)
def test_a_rule_that_opens_more_than_the_list_fails_the_probe_and_is_shown(rule: str) -> None:
    found = read(ROLE, insert(rule))
    (ok, words), forward = found["probes"]
    assert not ok
    assert rule.split()[0] in words.partition("not on the site's list: `")[2]
    assert forward == CLOSED[1]
    # And what leaves by it is an attempt: it is no entry of the capture's allow-list.
    assert found["out"] == ["tcp 10.20.0.5:8000", "udp [fd00:20::/64]:8001"]


def test_a_jump_may_lead_anywhere() -> None:
    chain = "add chain inet moat_egress aside\nadd rule inet moat_egress aside accept\n"
    assert not read(ROLE, chain + insert("meta skuid 990 jump aside"))["probes"][0][0]


def test_an_entry_that_is_in_the_kernel_and_not_in_the_role_s_file_is_more_than_the_list() -> None:
    found = read(ROLE, written=render())
    assert found["out"] == []
    assert not found["probes"][0][0]
    assert "ip daddr 10.20.0.5 tcp dport 8000" in found["probes"][0][1]


def test_what_the_list_of_this_run_covers_is_no_surplus() -> None:
    more = insert("ip daddr 10.66.0.1 tcp dport 443 accept")
    assert read(ROLE, more, "10.66.0.0/16:443")["probes"] == CLOSED
    assert read(ROLE, more, "tcp 10.66.0.1")["probes"] == CLOSED
    assert not read(ROLE, more, "udp 10.66.0.1:443", "10.66.0.1:444", "model.site.example:443")["probes"][0][0]


def test_the_way_through_the_host_is_probed_unless_the_role_leaves_it_open() -> None:
    opened = read(ROLE, insert('iifname "br0" accept', "forward"))
    assert opened["probes"][0] == CLOSED[0]
    assert not opened["probes"][1][0]
    assert "br0" in opened["probes"][1][1]
    gone = "delete chain inet moat_egress forward\n"
    assert not read(ROLE, gone)["probes"][1][0]
    assert len(read(ROLE, gone, written=render(ALLOW, no_egress_forward=False))["probes"]) == 1


def test_a_closed_filter_holds_and_an_open_sleeping_or_missing_one_does_not() -> None:
    opened = read(ROLE.replace("policy drop", "policy accept"))["probes"][0]
    assert opened == [False, "policy accept, and its last rule refuses"]
    asleep = read(ROLE, "add table inet moat_egress { flags dormant; }\n")["probes"][0]
    assert asleep == [False, "no such chain, or the table sleeps"]
    missing = read("")
    assert missing["probes"][0] == [False, "no such table"]
    assert "moat_egress" in missing["rules"]


def test_the_rules_shown_are_the_site_s_without_those_of_the_capture() -> None:
    shown = read(ROLE, "table inet moat_capture {\n}\n")["rules"]
    assert shown.startswith("table inet moat_egress {")
    assert "moat_capture" not in shown
