# SPDX-License-Identifier: Apache-2.0
"""Proves on each of three hosts that it has what its groups say and nothing more, and that nobody else gets in or out.

Units, sockets, secrets, the packet filter that was confirmed over SSH, and connections that are tried.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

UNITS = [
    ("moat_gateways", "moat-gateway@1.service"),
    ("moat_gateways", "moat-config-sync.service"),
    ("moat_edge", "nginx.service"),
    ("moat_store", "minio.service"),
    ("moat_counters", "valkey-server.service"),
]
PORTS = {"moat_gateways": [4001], "moat_edge": [8443, 8080], "moat_store": [9000], "moat_counters": [6379]}
#: What each host may reach besides itself, by the counter of the rule.
ALLOWED = {
    "node1": {("node2", 4001), ("node3", 4001), ("node2", 9000), ("node2", 22), ("node3", 22), ("node1", 8081)},
    "node2": {("node1", 4001), ("node3", 4001), ("node1", 6379), ("node1", 8081)},
    "node3": {("node2", 9000), ("node1", 6379), ("node1", 8081)},
}
NAMES = ("node1", "node2", "node3")
EDGES = ("node1", "node2")


@pytest.mark.parametrize("name", NAMES)
def test_a_host_runs_what_its_groups_say_and_nothing_else(site, name: str) -> None:
    for group, unit in UNITS:
        state = site.hosts[name].show(unit, "ActiveState", "UnitFileState", "NRestarts")
        wanted = "active" if name in site.groups[group] else "inactive"
        assert state["ActiveState"] == wanted, unit
        if wanted == "active":
            assert state["UnitFileState"] == "enabled", unit
            assert state["NRestarts"] == "0", f"{unit} has been restarted by systemd since the install"
    assert site.hosts[name].ok("systemctl", "--failed", "--no-legend", "--plain") == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_sockets_are_bound_to_the_site_address_alone(site, name: str) -> None:
    # Not of the site: SSH, the model server, and docker's own name server. MinIO always listens on the loopback too.
    listeners = {(address, port) for address, port, _ in site.hosts[name].listeners()}
    found = {(a, p) for a, p in listeners if p not in (22, 8081) and a != "127.0.0.11"}
    found -= {("127.0.0.1", 9000), ("::1", 9000)}
    own = site.addresses[name]
    wanted = {
        ("0.0.0.0" if group == "moat_edge" else own, port)  # noqa: S104
        for group, ports in PORTS.items()
        if name in site.groups[group]
        for port in ports
    }
    assert found == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_host_has_the_secrets_of_its_own_services_alone(site, name: str) -> None:
    services = {
        "gateway": "moat_gateways",
        "config-sync": "moat_gateways",
        "minio": "moat_store",
        "valkey": "moat_counters",
    }
    tree = ["find", "/etc/moat/secrets"]
    folders = site.hosts[name].ok(*tree, "-mindepth", "1", "-type", "d", "-printf", "%f\\n").split()
    assert set(folders) == {s for s, group in services.items() if name in site.groups[group]}
    assert site.hosts[name].ok("stat", "-c", "%a %U", "/etc/moat/secrets").strip() == "700 root"
    given = ["(", "-path", "*/gateway*", "-o", "-path", "*/config-sync*", ")"]
    for kind, others, service in (("d", "700", "750"), ("f", "600", "440")):
        loose = ["-type", kind, "!", *given, "!", "(", "-user", "root", "-perm", others, ")"]
        assert site.hosts[name].ok(*tree, *loose) == ""
        loose = ["-type", kind, *given, "!", "(", "-user", "root", "-group", "moat-gateway", "-perm", service, ")"]
        assert site.hosts[name].ok(*tree, *loose) == ""
    assert len(site.hosts[name].ok(*tree, "-type", "f").split()) >= 4, "the check is looking in the wrong place"
    # The operator's source of truth, and the key of the authority, are on the control host alone.
    everywhere = ["find", "/etc/moat", "/opt/moat", "/var/lib/moat"]
    there = site.hosts[name].ok(
        *everywhere, "-name", "ca.key", "-o", "-name", "site_key", "-o", "-path", "/etc/moat/site"
    )
    assert bool(there) == (name == "node1")


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_shows_in_a_log_or_a_process_list(site, name: str) -> None:
    """Modules that came by SSH say in the journal what they were given."""
    files = site.hosts["node1"].ok("find", "/etc/moat/site/secrets", "-type", "f").split()
    values = [v for v in (site.hosts["node1"].ok("cat", f).strip() for f in files) if len(v) >= 16]
    assert len(values) >= 8
    places = {
        "journal": "journalctl --no-pager --output=cat",
        "logs": "find /var/log -type f ! -name '*.journal' -exec cat {} +",
        "command lines": "cat /proc/[0-9]*/cmdline | tr '\\0' ' '",
    }
    found = {what: site.hosts[name].ok("sh", "-c", command) for what, command in places.items()}
    assert [what for what, text in found.items() if any(v in text for v in values)] == []
    assert name == "node1" or "ansible" in found["journal"], "no module has left a trace there"


@pytest.mark.parametrize("name", NAMES)
def test_the_packet_filter_drops_and_lets_out_what_the_groups_need(site, name: str) -> None:
    document = json.loads(site.hosts[name].ok("nft", "-j", "list", "table", "inet", "moat_egress"))
    policies = {i["chain"]["hook"]: i["chain"]["policy"] for i in document["nftables"] if "chain" in i}
    assert policies == {"output": "drop", "forward": "drop"}
    listed = {c for c in site.counters(name) if re.fullmatch(r"moat_out_.*_(tcp|udp)_\d+", c)}
    assert listed == {f"moat_out_{site.addresses[h].replace('.', '_')}_tcp_{p}" for h, p in ALLOWED[name]}


@pytest.mark.parametrize("name", ["node2", "node3"])
def test_the_rules_were_kept_only_after_a_new_connection_by_ssh(site, name: str) -> None:
    """As the host's journal has it: rules loaded, a new login by SSH, only then the timer of the way back stopped."""
    text = site.hosts[name].ok("journalctl", "--no-pager", "-o", "json", "--output-fields=MESSAGE,UNIT")
    journal = [(str(e.get("UNIT", "")), str(e["MESSAGE"])) for e in map(json.loads, text.splitlines())]

    def lines(unit: str, word: str) -> list[int]:
        return [i for i, (u, message) in enumerate(journal) if u == unit and message.startswith(word)]

    timer = "moat-no-egress-rollback.timer"
    armed, stopped = lines(timer, "Started")[0], lines(timer, "Stopped")[0]
    applied = lines("moat-no-egress-apply.service", "moat-no-egress-apply.service: Deactivated successfully")[0]
    assert armed < applied < stopped
    assert [i for i in lines("", "Accepted publickey for root") if applied < i < stopped]
    assert not lines("moat-no-egress-rollback.service", ""), "the former rules came back"
    assert site.hosts[name].run("systemctl", "is-active", "--quiet", timer).returncode != 0


def test_all_hosts_run_the_same_release(site) -> None:
    releases = {node.ok("readlink", "-f", "/opt/moat/current").strip() for node in site.hosts.values()}
    assert len(releases) == 1
    records = {json.loads(node.ok("cat", "/var/lib/moat/installed.json"))["version"] for node in site.hosts.values()}
    assert len(records) == 1


def test_nothing_is_left_of_the_packed_release(site) -> None:
    left = "ls -A /opt/moat | grep -e '[.]tar$' ; ls -A /opt/moat/tool 2>/dev/null | grep -v '^moat.pyz$'; true"
    assert {name: node.ok("sh", "-c", left) for name, node in site.hosts.items()} == dict.fromkeys(site.hosts, "")


def test_the_evidence_of_every_host_is_on_the_control_host(site) -> None:
    for name in ("node2", "node3"):
        assert site.hosts["node1"].ok("find", f"/var/lib/moat/evidence/hosts/{name}", "-name", "evidence.html")


@pytest.mark.parametrize("edge", EDGES)
def test_an_edge_reaches_every_gateway(site, edge: str) -> None:
    assert {h: site.attempt(edge, site.addresses[h], 4001) for h in NAMES} == dict.fromkeys(NAMES, "connected")


def test_from_elsewhere_only_the_entrances_are_open(site) -> None:
    """The machine that runs the tests is on the network of the hosts and none of them: the units do not answer it."""
    ports = [(name, port) for group, ports in PORTS.items() for name in site.groups[group] for port in ports]
    with ThreadPoolExecutor(len(ports)) as pool:  # what is swallowed takes its time
        tried = dict(zip(ports, pool.map(lambda p: site.attempt_from_elsewhere(*p), ports), strict=True))
    entrances = {(name, port) for name in site.groups["moat_edge"] for port in PORTS["moat_edge"]}
    assert {what for what, answer in tried.items() if answer == "connected"} == entrances
    # Swallowed by the unit's own filter, not refused by a port on which nobody listens.
    assert {answer for what, answer in tried.items() if what not in entrances} == {"TimeoutError"}


def test_what_is_not_on_the_allow_list_is_refused_and_counted(site) -> None:
    node = site.hosts["node3"]
    # Outside there is not even a route on this network; with one, packets exist that the filter has to stop.
    node.ok("ip", "route", "add", "198.51.100.0/24", "dev", "eth0")
    try:
        for address, port, kind in [
            (site.addresses["node2"], 22, "tcp"),  # there, and open: before the install it was reached from here
            (site.addresses["node2"], 4001, "tcp"),
            (site.addresses["node1"], 8443, "tcp"),
            (site.addresses["node1"], 53, "udp"),
            ("198.51.100.7", 443, "tcp"),
            ("198.51.100.7", 53, "udp"),
        ]:
            for user in ("root", "moat-gateway"):
                before = site.counters("node3")["moat_out_denied"]
                answer = site.attempt("node3", address, port, kind=kind, user=user)
                assert answer in ("No route to host", "Operation not permitted"), (address, port, user)
                assert site.counters("node3")["moat_out_denied"] > before, (address, port, user)
    finally:
        node.ok("ip", "route", "del", "198.51.100.0/24")


def test_the_control_what_is_on_the_allow_list_passes_and_is_counted(site) -> None:
    rule = f"moat_out_{site.addresses['node1'].replace('.', '_')}_tcp_8081"
    before = site.counters("node3")
    assert site.attempt("node3", site.addresses["node1"], 8081, user="moat-gateway") == "connected"
    after = site.counters("node3")
    assert after[rule] > before[rule]
    assert after["moat_out_denied"] == before["moat_out_denied"]
