# SPDX-License-Identifier: Apache-2.0
"""Proves that a wrong allow-list is refused with its place, and that nft accepts every rule file that the role makes.

The files are loaded into a network namespace of their own and read back as JSON: policies, counters, order.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from tests.unit.ansible.egress_rules import FILTERS, ROLE, in_namespace, namespaces_possible, render

needs_namespace = pytest.mark.skipif(not namespaces_possible(), reason="needs root, nft and network namespaces")

ALLOW = [
    {"address": "198.51.100.5", "port": 8000, "comment": "vLLM, rack 3"},
    {"address": "2001:db8:20::/64", "port": "8000", "name": "vllm-2.site.example"},
    {"address": "203.0.113.0/24", "port": 5514, "protocol": "udp"},
]

HERE = {"address": "198.51.100.5", "port": 80}
NAME = {"address": "vllm.site", "port": 80}
WRONG: list[tuple[Any, list[str]]] = [
    ("10.0.0.1:80", ["moat_egress_allow", "not a list"]),
    ([{"port": 80}], ["moat_egress_allow[0]", "address is missing"]),
    ([{"address": "198.51.100.5"}], ["moat_egress_allow[0]", "port is missing"]),
    ([ALLOW[0], NAME], ["moat_egress_allow[1].address", "vllm.site", "never looked up"]),
    ([{"address": "10.20.0.5/24", "port": 80}], ["moat_egress_allow[0].address", "host bits", "10.20.0.0/24"]),
    ([{"address": "0.0.0.0/0", "port": 80}], ["moat_egress_allow[0].address", "whole address space"]),
    ([{"address": "::/0", "port": 80}], ["moat_egress_allow[0].address", "whole address space"]),
    ([{"address": "fe80::1%eth0", "port": 80}], ["moat_egress_allow[0].address", "fe80::1%eth0"]),
    ([{"address": "198.51.100.5", "port": 70000}], ["moat_egress_allow[0].port", "70000", "1 to 65535"]),
    ([{"address": "198.51.100.5", "port": 0}], ["moat_egress_allow[0].port", "0", "1 to 65535"]),
    ([{"address": "198.51.100.5", "port": True}], ["moat_egress_allow[0].port", "True"]),
    ([{"address": "198.51.100.5", "port": "80-90"}], ["moat_egress_allow[0].port", "80-90"]),
    ([{**HERE, "protocol": "sctp"}], ["moat_egress_allow[0].protocol", "sctp", "tcp or udp"]),
    ([{**HERE, "comment": 'a" accept'}], ["moat_egress_allow[0].comment", "one plain line"]),
    ([{**HERE, "comment": "a\nb"}], ["moat_egress_allow[0].comment"]),
    ([{**HERE, "host": "x"}], ["moat_egress_allow[0]", "unknown field", "host"]),
    ([{**HERE, "name": "a b"}], ["moat_egress_allow[0].name", "a b"]),
    ([HERE, dict(HERE)], ["moat_egress_allow[1]", "the same as moat_egress_allow[0]"]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "words"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_a_wrong_entry_is_refused_with_its_place(value: Any, words: list[str]) -> None:
    with pytest.raises(AnsibleFilterError) as refused:
        FILTERS.entries(value)
    for word in [*words, "found: ", "expected: "]:
        assert word in str(refused.value)


def test_the_gateway_is_given_names_addresses_and_networks_but_no_udp() -> None:
    v6 = {"address": "2001:db8::7", "port": 80}
    assert FILTERS.gateway_allow([*ALLOW, v6]) == [
        "198.51.100.5:8000", "vllm-2.site.example:8000", "2001:db8:20::/64", "[2001:db8::7]:80",
    ]  # fmt: skip


def nodes(me: str, hostvars: dict[str, dict[str, Any]], groups: dict[str, list[str]]) -> list[tuple[str, int]]:
    found = FILTERS.nodes(me, groups, hostvars, [4001, 4002], [9000], [6379], [22])
    return [(one["address"], one["port"]) for one in found]


THREE = {f"node{i}": {"moat_address": f"192.0.2.1{i}"} for i in (1, 2, 3)}
GROUPS = {
    "moat_gateways": ["node1", "node2", "node3"],
    "moat_edge": ["node1"],
    "moat_store": ["node3"],
    "moat_counters": ["node1"],
}


def test_each_node_reaches_what_its_groups_use_and_nothing_else() -> None:
    assert nodes("node1", THREE, GROUPS) == [
        ("192.0.2.12", 4001), ("192.0.2.12", 4002), ("192.0.2.13", 4001), ("192.0.2.13", 4002), ("192.0.2.13", 9000),
    ]  # fmt: skip
    assert nodes("node2", THREE, GROUPS) == [("192.0.2.13", 9000), ("192.0.2.11", 6379)]
    assert nodes("node3", THREE, GROUPS) == [("192.0.2.11", 6379)]


def test_the_control_host_among_the_nodes_reaches_the_others_by_ssh() -> None:
    local = {**THREE, "node1": {**THREE["node1"], "ansible_connection": "local"}}
    assert {("192.0.2.12", 22), ("192.0.2.13", 22)} <= set(nodes("node1", local, GROUPS))
    assert ("192.0.2.11", 22) not in nodes("node1", local, GROUPS)


def test_a_service_with_an_address_of_its_own_is_reached_there() -> None:
    own = {
        "node1": {**THREE["node1"], "valkey_address": "198.51.100.11", "ansible_connection": "local"},
        "node2": {**THREE["node2"], "gateway_listen_address": "198.51.100.12", "ansible_host": "203.0.113.12"},
        "node3": {**THREE["node3"], "minio_address": "2001:db8::13", "ansible_host": "node3.site.example"},
    }
    assert nodes("node2", own, GROUPS) == [("2001:db8::13", 9000), ("198.51.100.11", 6379)]
    assert nodes("node1", own, GROUPS) == [
        ("198.51.100.12", 4001), ("198.51.100.12", 4002), ("192.0.2.13", 4001), ("192.0.2.13", 4002),
        ("2001:db8::13", 9000),
        # By SSH under Ansible's address; a name is not looked up.
        ("203.0.113.12", 22), ("192.0.2.13", 22),
    ]  # fmt: skip
    for wrong in ("127.0.0.1", "0.0.0.0"):  # noqa: S104
        lost = {**own, "node3": {**own["node3"], "minio_address": wrong}}
        with pytest.raises(AnsibleFilterError, match="minio_address of host node3: host node2 cannot reach it"):
            nodes("node2", lost, GROUPS)


def test_the_units_let_in_every_address_that_a_peer_is_known_to_have() -> None:
    own = {**THREE, "node2": {**THREE["node2"], "gateway_listen_address": "198.51.100.12", "valkey_address": "::1"}}
    assert FILTERS.peers(["node1", "node2", "node1"], own) == ["192.0.2.11", "192.0.2.12", "198.51.100.12"]
    one = {"localhost": {"moat_address": "127.0.0.1", "gateway_listen_address": "0.0.0.0"}}  # noqa: S104
    assert FILTERS.peers(["localhost"], one) == []


def test_what_is_listed_and_computed_is_set_once_and_the_loopback_not_at_all() -> None:
    listed = FILTERS.entries([{"address": "192.0.2.13", "port": 9000}, {"address": "127.0.0.1", "port": 8081}])
    computed = FILTERS.nodes("node2", GROUPS, THREE, [4001], [9000], [6379], [22])
    assert [(o["address"], o["port"], o["comment"]) for o in FILTERS.joined(listed, computed)] == [
        ("192.0.2.13", 9000, ""), ("192.0.2.11", 6379, "counters on node1"),
    ]  # fmt: skip


def refused_by_ansible(variables: dict[str, Any], tmp_path: Path) -> str:
    """Let Ansible evaluate the role's variables for the documented inventory of three hosts."""
    play = tmp_path / "play.yml"
    play.write_text(
        json.dumps([{
            "hosts": "node2", "gather_facts": False,
            "vars_files": [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")],
            "tasks": [{"ansible.builtin.debug": {"msg": "{{ _no_egress_entries | map(attribute='counter') | list }}"}}],
        }])
    )  # fmt: skip
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8", "ANSIBLE_HOME": str(tmp_path / "ansible"),
        "ANSIBLE_NOCOLOR": "1", "ANSIBLE_CONFIG": str(ROLE.parents[1] / "ansible.cfg"), "PYTHONDONTWRITEBYTECODE": "1",
        "ANSIBLE_FILTER_PLUGINS": str(ROLE.parents[1] / "filter_plugins"),
    }  # fmt: skip
    argv = [sys.executable, "-m", "ansible", "playbook", str(play)]
    argv += ["-i", str(ROLE.parents[1] / "inventory/example-multinode.yml"), "-e", json.dumps(variables)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    return " ".join((done.stdout + done.stderr).split())


def test_ansible_computes_the_entries_of_the_documented_inventory(tmp_path: Path) -> None:
    said = refused_by_ansible({"moat_egress_allow": [{"address": "198.51.100.5", "port": 80}]}, tmp_path)
    assert "failed=0" in said, said
    for counter in ("198_51_100_5_tcp_80", "192_0_2_13_tcp_9000", "192_0_2_11_tcp_6379"):
        assert f"moat_out_{counter}" in said
    assert "tcp_22" not in said


def test_the_operator_of_ansible_reads_the_refusal_and_not_a_defect_of_a_template(tmp_path: Path) -> None:
    said = refused_by_ansible({"moat_egress_allow": [{"address": "10.20.0.5/24", "port": 80}]}, tmp_path)
    assert "moat_egress_allow[0].address: the network has host bits set; found: '10.20.0.5/24'" in said, said
    said = refused_by_ansible({"moat_egress_allow": [], "moat_address": "127.0.0.1"}, tmp_path)
    assert "moat_address of host node3: host node2 cannot reach it under a loopback address" in said, said


def test_a_single_host_needs_nothing() -> None:
    one = {"localhost": {"moat_address": "127.0.0.1", "ansible_connection": "local"}}
    assert nodes("localhost", one, {g: ["localhost"] for g in GROUPS}) == []


def test_a_node_that_others_cannot_reach_under_its_address_is_refused() -> None:
    lost = {**THREE, "node3": {"moat_address": "127.0.0.1"}}
    with pytest.raises(AnsibleFilterError, match=r"moat_address of host node3: host node2 cannot reach it"):
        nodes("node2", lost, GROUPS)


def loaded(text: str) -> list[dict[str, Any]]:
    """Load a rule file in a namespace and return nft's JSON of it."""
    done = in_namespace(["sh", "-c", "nft -f - && nft -j list table inet moat_egress"], text)
    assert done.returncode == 0, done.stderr
    document: list[dict[str, Any]] = json.loads(done.stdout)["nftables"]
    return document


VARIANTS: dict[str, dict[str, Any]] = {
    "nothing allowed": {},
    "an allow-list": {"allow": ALLOW},
    "everything that a host may need": {
        "allow": ALLOW,
        "no_egress_dhcp_client": True,
        "no_egress_ntp_servers": ["198.51.100.1", "2001:db8::1"],
        "no_egress_name_servers": ["198.51.100.2", "2001:db8::/120"],
        "no_egress_ssh_ports": [22, 2222],
        "no_egress_extra_output": ["ip protocol vrrp accept"],
        "no_egress_extra_forward": ["iifname br0 oifname br0 accept"],
    },
    "no forward chain, no ssh": {"allow": ALLOW, "no_egress_forward": False, "no_egress_ssh_ports": []},
}


@needs_namespace
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_loads_with_closed_policies_and_a_counter_for_each_rule(name: str) -> None:
    variant = VARIANTS[name]
    text = render(**variant)
    found = loaded(text)
    chains = {o["chain"]["name"]: o["chain"] for o in found if "chain" in o}
    assert {c["policy"] for c in chains.values()} == {"drop"}
    assert set(chains) == ({"output"} if variant.get("no_egress_forward") is False else {"output", "forward"})
    extra = len(variant.get("no_egress_extra_output", [])) + len(variant.get("no_egress_extra_forward", []))
    rules = [o["rule"] for o in found if "rule" in o]
    counted = [r for r in rules if any("counter" in e for e in r["expr"])]
    logging = [r for r in rules if any("log" in e for e in r["expr"])]
    assert len(counted) + len(logging) + extra == len(rules)
    # Every counter that is made is used by a rule.
    used = {e["counter"] for r in counted for e in r["expr"] if "counter" in e}
    assert used == {o["counter"]["name"] for o in found if "counter" in o}
    last = [r for r in rules if r["chain"] == "output"][-1]["expr"]
    assert last[-1] == {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}
    assert {"counter": "moat_out_denied"} in last


@needs_namespace
@pytest.mark.parametrize("name", VARIANTS)
def test_loading_again_and_the_closed_rules_replace_the_table_in_one_transaction(name: str) -> None:
    text, closed = render(**VARIANTS[name]), render(template="closed.nft.j2", **VARIANTS[name])
    script = "nft -f - && nft -s list ruleset"
    once, twice = in_namespace(["sh", "-c", script], text), in_namespace(["sh", "-c", script], text + text)
    assert once.returncode == 0
    assert once.stdout == twice.stdout
    after = in_namespace(["sh", "-c", script], text + closed).stdout
    assert after.count("policy drop") == once.stdout.count("policy drop")
    assert "198.51.100.5" not in after


@needs_namespace
def test_other_tables_stay() -> None:
    other = "table inet other {\n\tchain c {\n\t\ttype filter hook input priority 0; policy accept;\n\t}\n}\n"
    script = "nft -f - && nft list tables"
    assert in_namespace(["sh", "-c", script], other + render(ALLOW)).stdout.splitlines() == [
        "table inet other",
        "table inet moat_egress",
    ]


@needs_namespace
def test_a_statement_that_nft_does_not_know_fails_the_whole_file() -> None:
    text = render(ALLOW, no_egress_extra_output=["let everything out"])
    done = in_namespace(["sh", "-c", "nft -f -; nft list tables"], text)
    assert "syntax error" in done.stderr
    assert done.stdout == ""


def test_no_rule_of_ours_flushes_the_ruleset_but_the_stop_of_the_hosts_own_unit() -> None:
    # `flush ruleset` would take the host's other tables away.
    def code(name: str) -> str:
        lines = (ROLE / "templates" / name).read_text("utf-8").splitlines()
        return "\n".join(line for line in lines if not line.startswith("#"))

    flushing = [p.name for p in (ROLE / "templates").iterdir() if "flush ruleset" in code(p.name)]
    assert flushing == ["host-stop.nft.j2"]
