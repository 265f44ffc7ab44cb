# SPDX-License-Identifier: Apache-2.0
"""Proves that every variable of vars.yml has its effect: in sockets, running processes, the kernel's rules, answers.

No test reads a file that a role has written: what runs is asked. Variables whose effect cannot be seen on one host are
named with the reason in tests/unit/molecule/test_alternative.py, which holds this folder against the variables.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

V: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "vars.yml").read_text("utf-8"))
MIB = 1024 * 1024
GATEWAY, STORE, COUNTERS = "moat-gateway@1.service", "minio.service", "valkey-server.service"
SYNC = "moat-config-sync.service"
HTTPS = f"https://localhost:{V['nginx_https_port']}"


def digest(pem: str) -> str:
    """Return the SHA-256 of the first certificate of a text."""
    body = pem.split("-----BEGIN CERTIFICATE-----")[1].split("-----END")[0]
    return hashlib.sha256(base64.b64decode(body)).hexdigest()


#: Prints the digest of the certificate that is served (checked against the authorities of clients), its days and names.
SERVED = """
import hashlib, json, socket, ssl, sys
context = ssl.create_default_context(cafile="/etc/moat/tls/ca.pem")
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as s:
    with context.wrap_socket(s, server_hostname=sys.argv[3]) as t:
        c, der = t.getpeercert(), t.getpeercert(binary_form=True)
seconds = ssl.cert_time_to_seconds(c["notAfter"]) - ssl.cert_time_to_seconds(c["notBefore"])
names = [v for _, v in c["subjectAltName"]]
print(json.dumps({"digest": hashlib.sha256(der).hexdigest(), "days": seconds / 86400, "names": names}))
"""


def served(node, address: str, port: int, name: str) -> dict[str, Any]:
    return json.loads(node.ok("python3", "-c", SERVED, address, str(port), name))


def environ(node, unit: str) -> dict[str, str]:
    """Return the environment of the running process."""
    raw = node.ok("cat", f"/proc/{node.pid(unit)}/environ")
    return dict(entry.partition("=")[::2] for entry in raw.split("\0") if entry)


def table(node) -> list[dict[str, Any]]:
    """Return the rules that the kernel holds."""
    return json.loads(node.ok("nft", "-j", "list", "table", "inet", "moat_egress"))["nftables"]


def counters(node) -> dict[str, int]:
    """Return the packets of each named counter, by its comment."""
    found = [i["counter"] for i in table(node) if "counter" in i]
    return {c.get("comment", c["name"]): c["packets"] for c in found}


def test_the_services_listen_on_the_other_addresses_and_ports(node) -> None:
    found = node.listeners()
    ports = (V["nginx_https_port"], V["nginx_http_port"])
    expected = {
        (V["minio_address"], V["minio_port"], "minio"),
        (V["valkey_address"], V["valkey_port"], "valkey-server"),
        *((a.strip("[]"), p, "nginx") for a in V["nginx_listen_addresses"] for p in ports),
    }  # fmt: skip
    assert expected <= found
    # By address and port alone: the program's name is Python's.
    assert (V["gateway_listen_address"], V["gateway_base_port"] + 1) in {(a, p) for a, p, _ in found}
    assert {p for _, p, _ in found} & {8443, 8080, 4001, 4002, 6379, 9000, 9001} == set(), "a default port is open too"


def test_as_many_gateways_as_asked_for(node) -> None:
    units = node.ok("systemctl", "list-units", "--plain", "--no-legend", "moat-gateway@*.service").splitlines()
    assert [u.split()[0] for u in units] == [f"moat-gateway@{n}.service" for n in range(1, V["gateway_count"] + 1)]


def test_the_limits_of_the_units(node) -> None:
    gateway = node.show(
        GATEWAY, "MemoryMax", "TasksMax", "TimeoutStartUSec", "TimeoutStopUSec", "MemoryDenyWriteExecute"
    )
    stop = V["gateway_shutdown_delay"] + V["gateway_shutdown_timeout"] + 15
    assert gateway == {
        "MemoryMax": str(int(V["gateway_memory_max"].removesuffix("M")) * MIB),
        "TasksMax": str(V["gateway_tasks_max"]),
        "TimeoutStartUSec": f"{V['gateway_start_timeout'] // 60}min",
        "TimeoutStopUSec": f"{stop // 60}min {stop % 60}s",
        "MemoryDenyWriteExecute": "yes" if V["gateway_memory_deny_write_execute"] else "no",
    }
    sync = str(int(V["config_sync_memory_max"].removesuffix("M")) * MIB)
    assert node.show(SYNC, "MemoryMax") == {"MemoryMax": sync}
    assert node.show(STORE, "MemoryMax") == {"MemoryMax": str(V["minio_memory_max"] * MIB)}
    assert node.show(COUNTERS, "MemoryMax") == {"MemoryMax": str((V["valkey_memory"] * 3 // 2 + 32) * MIB)}
    nginx = node.show("nginx.service", "MemoryMax", "TimeoutStopUSec")
    assert nginx == {
        "MemoryMax": str((V["nginx_body_memory"] + 256) * MIB),
        "TimeoutStopUSec": f"{V['nginx_stop_timeout']}s",
    }
    mounts = node.ok("cat", f"/proc/{node.pid('nginx.service')}/mountinfo").splitlines()
    bodies = [m for m in mounts if m.split()[4] == "/var/cache/moat-nginx"]
    assert [f"size={V['nginx_body_memory'] * 1024}k" in m for m in bodies] == [True]


def test_the_networks_that_the_units_may_reach(node) -> None:
    def allowed(unit: str) -> set[str]:
        return set(node.show(unit, "IPAddressAllow")["IPAddressAllow"].split())

    assert {f"{a}/32" for a in V["minio_allow"]} <= allowed(STORE)
    assert {f"{a}/32" for a in V["valkey_allow"]} <= allowed(COUNTERS)
    assert {"198.51.100.0/24", "2001:db8:20::/64", "203.0.113.9/32"} <= allowed(GATEWAY)


def test_the_gateway_runs_with_its_settings(node) -> None:
    found = environ(node, GATEWAY)
    expected = {
        "MOAT_SHUTDOWN_DELAY": V["gateway_shutdown_delay"],
        "MOAT_SHUTDOWN_TIMEOUT": V["gateway_shutdown_timeout"],
        "MOAT_KEEPALIVE_TIMEOUT": V["gateway_keepalive_timeout"],
        "MOAT_SECRETS_POLL": V["gateway_secrets_poll"],
        "MOAT_STALE_AFTER": V["config_sync_stale_after"],
        **{f"MOAT_{k.upper()}": v for k, v in V["gateway_settings"].items()},
    }
    assert {k: found.get(k) for k in expected} == {k: str(v) for k, v in expected.items()}
    allow = found["MOAT_EGRESS_ALLOW"].split()
    assert "model-1.alternative.example:8443" in allow
    assert {e["address"] for e in V["moat_egress_allow"]} & {a.rpartition(":")[0].strip("[]") or a for a in allow}


def test_config_sync_runs_with_its_settings(node) -> None:
    found = environ(node, SYNC)
    expected = {
        "MOAT_NODE": V["config_sync_node"],
        "MOAT_STORE_BUCKET": V["config_sync_bucket"],
        "MOAT_STORE_STATUS_BUCKET": V["config_sync_status_bucket"],
        "MOAT_RELOAD_INTERVAL": V["config_sync_reload_interval"],
        "MOAT_SYNC_KEEP": V["config_sync_revisions_keep"],
        "MOAT_REVISION_MAX": V["config_sync_revision_max"],
        "MOAT_DRY_RUN_TIMEOUT": V["config_sync_dry_run_timeout"],
        "MOAT_DRY_RUN_MEMORY": V["config_sync_dry_run_memory"],
        "MOAT_RESTART_POLICY": V["config_sync_restart_policy"],
    }
    assert {k: found.get(k) for k in expected} == {k: str(v) for k, v in expected.items()}


def test_revisions_and_reports_are_in_the_other_buckets_under_the_other_name(node) -> None:
    status = json.loads(node.ok("moat-gateway", "config", "status", "--json"))
    assert status["converged"], json.dumps(status, indent=1)[:3000]
    assert status["store"]["revision"] >= 1
    assert {n["name"] for n in status["nodes"]} == {V["config_sync_node"]}
    drive = V["minio_drives"][0]
    for bucket, key in ((V["config_sync_bucket"], "current"), (V["config_sync_status_bucket"], "nodes")):
        assert key in node.ok("ls", f"{drive}/{bucket}").split()
    assert node.run("test", "-e", f"{drive}/moat-config/current").returncode != 0


def test_only_warnings_are_logged(node) -> None:
    lines = node.ok("journalctl", "--no-pager", "--output=cat", f"--unit={GATEWAY}").splitlines()
    levels = {json.loads(line)["level"] for line in lines if line.startswith("{")}
    assert V["gateway_log_level"] == "warning"
    assert levels <= {"warning", "error"}
    # At the default level each start says start.ready; it has started.
    assert any("Started" in line for line in lines)


def test_the_entrance_shows_the_operators_own_certificate(node) -> None:
    given = digest(node.ok("cat", V["base_tls_certificate"]))
    assert node.ok("cat", V["base_tls_key"]).startswith("-----BEGIN")
    for address in ("127.0.0.1", "::1"):
        # It is checked against /etc/moat/tls/ca.pem, which has the operator's authority by base_tls_ca alone.
        assert served(node, address, V["nginx_https_port"], V["moat_server_name"])["digest"] == given
    assert V["base_tls_ca"]


def test_the_sites_own_certificates_have_the_other_days_and_names(node) -> None:
    found = served(node, V["minio_address"], V["minio_port"], V["minio_address"])
    assert abs(found["days"] - V["base_certificate_days"]) < 2
    names = {V["moat_server_name"], V["moat_address"], V["minio_address"], V["valkey_address"], *V["base_names"]}
    assert names <= set(found["names"])


def test_as_many_workers_of_nginx_as_asked_for(node) -> None:
    workers = node.ok("ps", "-o", "args=", "--ppid", str(node.pid("nginx.service"))).splitlines()
    assert len([w for w in workers if "worker process" in w]) == V["nginx_worker_processes"]


def test_the_plain_port_sends_clients_to_the_other_port(node) -> None:
    program = (
        "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', int(sys.argv[1]));"
        "c.request('GET', '/v1/models');"
        "r = c.getresponse(); print(r.status, r.getheader('location'))"
    )
    status, location = node.ok("python3", "-c", program, str(V["nginx_http_port"])).split()
    assert status.startswith("30")
    assert location == f"https://127.0.0.1:{V['nginx_https_port']}/v1/models"


def test_a_chat_completion_and_a_stream_come_through_the_other_port(node, client_key: str) -> None:
    """From the demo's own configuration (``moat_profile_config: demo``): nobody wrote this site's config.yaml."""
    assert V["moat_profile_config"] == "demo"
    answer = node.chat(client_key, url=HTTPS)
    assert answer.status == 200
    assert len(answer.text.split()) >= 3
    stream = node.chat(client_key, url=HTTPS, stream=True, max_tokens=16)
    assert (stream.status, stream.done) == (200, True)


def test_the_store_keeps_its_buckets_on_the_other_drive(node) -> None:
    assert [folder for folder in V["minio_drives"] if "/var/lib/moat" in folder] == []
    for bucket in V["minio_buckets"]:
        folder = node.host.file(f"{V['minio_drives'][0]}/{bucket}")
        assert folder.is_directory
        assert folder.user == "moat-minio"
    assert not node.host.file("/var/lib/moat/minio/data").exists


def test_the_counters_hold_the_other_amount(node) -> None:
    text = node.ok("journalctl", "--no-pager", "--output=cat", f"--unit={COUNTERS}")
    assert "Server initialized" in text or "Ready to accept connections" in text
    # Its administration is closed to everybody, so the limit is read where the server got it.
    argv = node.ok("cat", f"/proc/{node.pid(COUNTERS)}/cmdline").split("\0")[0]
    assert f"{V['valkey_address']}:{V['valkey_port']}" in argv


def test_the_package_beside_is_there_and_the_hosts_own_sources_are_aside(node) -> None:
    for package in V["apt_offline_extra_packages"]:
        assert node.host.package(package).is_installed
    assert V["apt_offline_disable_other_sources"] is True
    assert not node.host.file("/etc/apt/sources.list").exists
    assert node.ok("cat", "/etc/apt/moat-disabled/sources.list") == "# the host own sources: none\n"
    asked = node.ok("apt-get", "indextargets", "--format", "$(SITE)$(URI)").split()
    assert asked
    assert {a for a in asked if "/opt/moat/" not in a} == set()


def test_no_evidence_was_collected(node) -> None:
    assert V["evidence_enabled"] is False
    assert node.ok("sh", "-c", "ls /var/lib/moat/evidence 2>/dev/null || true") == ""


def test_nothing_forwarded_is_filtered_and_ssh_is_the_other_port(node) -> None:
    rules = table(node)
    hooks = {i["chain"]["hook"] for i in rules if i.get("chain", {}).get("hook")}
    assert V["no_egress_forward"] is False
    assert hooks == {"output"}
    text = json.dumps(rules)
    for port in V["no_egress_ssh_ports"]:
        assert f'"right": {port}' in text or f'{{"set": [{port}]}}' in text
    limit = next(i["limit"] for i in rules if "limit" in i)
    assert (limit["rate"], limit["per"], limit["burst"]) == (
        V["no_egress_log_per_minute"],
        "minute",
        V["no_egress_log_burst"],
    )


#: Sends one packet to each destination and prints what became of it. The device leads nowhere.
SEND = """
import json, socket, sys
out = []
for kind, family, address, port, *source in json.load(sys.stdin):
    s = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET,
                      socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    if source:
        s.bind(("", source[0]))
    s.settimeout(0.2)
    try:
        s.connect((address, port))
        if kind == "udp":
            s.send(b"x")
        out.append("sent")
    except TimeoutError:
        out.append("sent")
    except OSError as e:
        out.append(e.strerror)
print(json.dumps(out))
"""
ALLOWED = (
    ("tcp", 4, "198.51.100.77", 8443, "model servers by IPv4"),
    ("tcp", 6, "2001:db8:20::7", 8000, "model servers by IPv6"),
    ("udp", 4, "203.0.113.9", 5514, "log collector"),
    ("udp", 4, V["no_egress_ntp_servers"][0], 123, "time servers of the site"),
    ("udp", 6, V["no_egress_name_servers"][0], 53, "name servers of the site"),
)
REFUSED = (
    ("tcp", 4, "198.51.100.77", 8444),
    ("tcp", 4, "203.0.113.9", 5514),
    ("udp", 4, "203.0.113.10", 5514),
    ("udp", 4, "192.0.2.124", 123),
    ("udp", 6, "2001:db8::54", 53),
)


@pytest.fixture
def way_out(node, planted) -> None:
    """A device with a default route that leads nowhere: packets that pass the rules end there."""
    # Not every kernel has devices of the kind dummy; a pair of which the other end belongs to nobody does the same.
    pair = ["ip", "link", "add", "moat-t0", "type", "veth", "peer", "name", "moat-t1"]
    planted(pair, ["ip", "link", "delete", "moat-t0"])
    node.ok("ip", "address", "add", "192.0.2.9/24", "dev", "moat-t0")
    node.ok("ip", "address", "add", "2001:db8:9::9/64", "dev", "moat-t0", "nodad")
    for device in ("moat-t1", "moat-t0"):
        node.ok("ip", "link", "set", device, "arp", "off", "up")
    node.ok("ip", "route", "add", "default", "dev", "moat-t0")
    node.ok("ip", "-6", "route", "add", "default", "dev", "moat-t0")


def test_what_is_listed_leaves_and_nothing_else(node, way_out) -> None:
    before = counters(node)
    out = json.loads(node.ok("python3", "-c", SEND, stdin=json.dumps([a[:4] for a in ALLOWED])))
    assert out == ["sent"] * len(ALLOWED)
    between = counters(node)
    for *_, comment in ALLOWED:
        assert between[comment] > before[comment], comment
    denied = "refused: not on the site's allow-list"
    assert between[denied] == before[denied]
    out = json.loads(node.ok("python3", "-c", SEND, stdin=json.dumps(REFUSED)))
    assert counters(node)[denied] >= between[denied] + len(REFUSED)
    assert "sent" not in [o for o, r in zip(out, REFUSED, strict=True) if r[0] == "tcp"]


def site_rules(node) -> dict[str, int]:
    """Return the packets of the rules that the operator wrote, by chain."""
    rules = [i["rule"] for i in table(node) if "rule" in i and i["rule"].get("comment") == "a rule of the site"]
    return {r["chain"]: next(e["counter"]["packets"] for e in r["expr"] if "counter" in e) for r in rules}


def test_the_rules_of_the_site_come_first(node, way_out) -> None:
    assert "9999" in V["no_egress_extra_output"][0]
    before = counters(node)
    assert site_rules(node) == {"output": 0}
    node.ok("python3", "-c", SEND, stdin=json.dumps([("udp", 4, "203.0.113.200", 9999)]))
    assert site_rules(node) == {"output": 1}
    # Neighbour discovery of the new device may run at any time; config-sync asks the store all the time.
    after = counters(node)
    may = {"IPv6 neighbour discovery; never passes a router", "programs of this host among themselves"}
    assert {c for c in before if after[c] != before[c]} <= may


def test_the_host_may_ask_for_its_address(node, way_out) -> None:
    assert V["no_egress_dhcp_client"] is True
    before = counters(node)
    node.ok("python3", "-c", SEND, stdin=json.dumps([("udp", 4, "203.0.113.200", 67, 68)]))
    assert counters(node)["the host asks for its own address"] == before["the host asks for its own address"] + 1
