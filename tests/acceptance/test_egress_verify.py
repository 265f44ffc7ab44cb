# SPDX-License-Identifier: Apache-2.0
"""Proves `moat egress verify` on the running demo: nothing is found in it, and every planted leak is found and named.

Two runs of the deployment's own moat.pyz restart the demo inside a capture. In the second one a process in gateway-1
and one in the model's container do what leaks do: look up an outside name, send metrics to a public address, ask for
an update, send UDP without a connect, connect by IPv6, ask a name server directly, and wait a while before the last
attempt. All aim at documentation addresses and names; the capture drops at the way out what the site's rules let
through, and the demo's networks have no way out anyway.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.stack import Stack, run

from moat.console import Console
from moat.site.egresscheck.bridges import BridgesLayer, counters
from moat.site.egresscheck.compose_probes import all_probes
from moat.site.egresscheck.containers import Deployment
from moat.site.egresscheck.marks import draw

#: Runs in gateway-1, with sockets of its own: nothing of the gateway's guard is in its way.
LEAKS = r"""
import socket, time
def leak(call, *args):
    try:
        call(*args)
    except OSError:
        pass
def connect(family, *address):
    s = socket.socket(family)
    s.settimeout(2)
    leak(s.connect, address)
def send(data, *address):
    leak(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, data, address)
leak(socket.getaddrinfo, "callback.vendor.example", 443)
connect(socket.AF_INET, "203.0.113.10", 4318)
leak(socket.getaddrinfo, "updates.packages.example", 443)
connect(socket.AF_INET, "203.0.113.11", 443)
send(b"metric:1|c", "203.0.113.12", 8125)
connect(socket.AF_INET6, "2001:db8::13", 443)
send(b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\4only\3dns\7example\0\0\1\0\1", "203.0.113.53", 53)
time.sleep(DELAY)
connect(socket.AF_INET, "203.0.113.14", 443)
"""
#: Seconds that the last leak waits. (One of two minutes works the same with --quiet 120, and takes as long.)
DELAY = 15
SINK = "moat-test-hole"
MODEL_LEAK = "import socket; s = socket.socket(); s.settimeout(2); s.connect(('203.0.113.15', 443))"


@dataclass(frozen=True)
class Run:
    """One verification: exit code, its JSON, and its folder with the report."""

    code: int
    report: dict[str, Any]
    folder: Path

    @property
    def page(self) -> str:
        return (self.folder / "egress-report.html").read_text("utf-8")

    def attempts(self, layer: str) -> set[tuple[str, str]]:
        """Return component and destination of what a layer saw."""
        return {(a["component"], a["destination"]) for a in self.report["attempts"] if a["layer"] == layer}


def verify(stack: Stack, folder: Path, quiet: int) -> Run:
    done = stack.moat(
        "egress", "verify", "--site", "compose", "--dir", str(stack.folder), "--key-file", str(stack.key_file),
        "--quiet", str(quiet), "--out", str(folder), "--json",
    )  # fmt: skip
    assert done.stdout, done.stderr
    return Run(done.returncode, json.loads(done.stdout), folder)


@pytest.fixture(scope="module")
def default(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return verify(stack, tmp_path_factory.mktemp("default"), 2)


@pytest.fixture(scope="module")
def leaking(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    before = stack.inspect("gateway-1")["State"]["StartedAt"]
    problems: list[BaseException] = []

    def plant() -> None:
        try:
            until = time.monotonic() + 240
            while (state := stack.inspect("gateway-1")["State"])["StartedAt"] == before or not state["Running"]:
                assert time.monotonic() < until, "gateway-1 was not restarted"
                time.sleep(0.2)
            leaks = LEAKS.replace("DELAY", str(DELAY))
            run("docker", "exec", "--detach", stack.container("gateway-1"), "python3", "-c", leaks)
            run("docker", "exec", "--detach", stack.container("model"), "python3", "-c", MODEL_LEAK)
        except BaseException as e:
            problems.append(e)

    thread = threading.Thread(target=plant)
    thread.start()
    found = verify(stack, tmp_path_factory.mktemp("leaking"), DELAY - 5)
    thread.join()
    assert problems == []
    return found


def test_the_default_site_tries_nothing(default: Run) -> None:
    report = default.report
    assert report["attempts"] == []
    assert report["problems"] == []
    assert [p for p in report["probes"] if not p["ok"]] == []
    assert (default.code, report["ok"], report["proven"], report["clean"]) == (0, True, True, True)
    components = {c["name"]: c["uid"] for c in report["components"]}
    assert components["gateway-1"] == components["gateway-2"] == components["minio-init"] == 10102
    assert components["config-sync"] == 10102
    assert {"nginx", "minio", "valkey", "model"} < components.keys()


def test_every_layer_caught_its_control_and_none_is_passed_over(default: Run) -> None:
    layers = {n["name"]: (n["available"], n["control_caught"]) for n in default.report["layers"]}
    assert layers.keys() == {"syscalls", "bridges", "dns"}
    assert layers["bridges"] == layers["dns"] == (True, True)
    # A kernel that refuses BPF programs says so; one that takes them must see the control.
    assert layers["syscalls"] in ((True, True), (False, None))


def test_the_report_says_what_it_is_about(default: Run, stack: Stack) -> None:
    subject = default.report["subject"]
    assert subject["image of gateway-1"] == stack.inspect("gateway-1")["Image"]
    assert subject["compose.yaml"].startswith("sha256 ")
    for gateway in ("gateway-1", "gateway-2"):
        assert subject[f"configuration of {gateway}"].startswith(("revision ", "local files, ")), subject
    assert default.report["verdict"]["word"] == "PASS"
    assert any("The watching ended 2 seconds after" in m for m in default.report["verdict"]["mind"])


def test_every_kind_of_request_was_made(default: Run) -> None:
    requests = {r["kind"]: r for r in default.report["requests"]}
    for kind in ("models", "chat", "stream", "chat at gateway-1", "chat at gateway-2", "metrics of gateway-2"):
        assert (requests[kind]["status"], requests[kind]["ok"]) == (200, True), kind
    assert requests["ui"]["status"] == 404
    assert requests["embeddings"]["status"] >= 400, "the demo's model has none: it is recorded"
    assert requests["embeddings"]["ok"] is True


def test_the_endpoints_of_the_default_site(default: Run) -> None:
    endpoints = {(e["setting"], e["url"]): e["allowed"] for e in default.report["endpoints"]}
    assert set(endpoints.values()) == {True}
    assert ("gateway-1: config.yaml model_list[0].litellm_params.api_base", "model:8081") in endpoints
    assert ("nginx: server", "172.30.242.11:4001") in endpoints
    assert default.report["allowed"] == ["model:8081"]


def test_containers_reach_neither_the_host_nor_the_outside(default: Run) -> None:
    """Each probe made packets arrive at the host: a probe that nothing came out of would prove nothing."""
    probes = {p["name"]: p["found"] for p in default.report["probes"]}
    for service, bridge in (("config-sync", "moat-core"), ("nginx", "moat-edge")):
        assert "EHOSTUNREACH" in probes[f"{service} cannot reach the host's services by {bridge} (tcp)"]
        assert "nothing arrived" in probes[f"{service} cannot reach the host's services by {bridge} (udp)"]
        out = probes[f"nothing from {service} leaves by {bridge}, masquerade included"]
        assert int(out.split()[0]) >= 2, out
        assert "0 at the way out" in out


def test_the_reader_sees_the_verdict_and_the_program_the_same_facts(default: Run, leaking: Run) -> None:
    for one, word in ((default, "PASS"), (leaking, "FAIL")):
        assert json.loads((one.folder / "egress-report.json").read_text("utf-8"))["attempts"] == one.report["attempts"]
        assert f'<p class="word">{word}</p>' in one.page
        assert "<script" not in one.page


def test_planted_leaks_end_with_the_code_for_an_attempt_found(leaking: Run) -> None:
    assert (leaking.code, leaking.report["ok"], leaking.report["clean"]) == (24, False, False)


@pytest.mark.parametrize(
    ("layer", "destination"),
    [
        pytest.param("dns", "name callback.vendor.example (A)", id="callback to an outside name"),
        pytest.param("dns", "name callback.vendor.example (AAAA)", id="callback to an outside name, IPv6"),
        pytest.param("bridges", "tcp 203.0.113.10:4318", id="metrics exporter to a public address"),
        pytest.param("dns", "name updates.packages.example (A)", id="update check: the name"),
        pytest.param("bridges", "tcp 203.0.113.11:443", id="update check: the connection"),
        pytest.param("bridges", "udp 203.0.113.12:8125", id="UDP without connect"),
        pytest.param("dns", "name only.dns.example (A)", id="DNS only, at a name server of its own"),
        pytest.param("bridges", "udp 203.0.113.53:53", id="DNS only: the packet"),
        pytest.param("bridges", "tcp 203.0.113.14:443", id="long after the start"),
    ],
)
def test_a_planted_leak_is_caught_and_named(leaking: Run, layer: str, destination: str) -> None:
    assert ("gateway-1", destination) in leaking.attempts(layer)
    assert destination in leaking.page


def test_an_ipv6_connect_without_a_packet_is_caught(leaking: Run) -> None:
    layers = {n["name"]: n["available"] for n in leaking.report["layers"]}
    if not layers["syscalls"]:
        pytest.skip("this kernel lets nobody trace system calls; without a packet there is nothing else to see")
    assert any(d.endswith("[2001:db8::13]:443") for c, d in leaking.attempts("syscalls") if c == "gateway-1")


def test_the_leak_of_another_component_is_its_own(leaking: Run) -> None:
    assert ("model", "tcp 203.0.113.15:443") in leaking.attempts("bridges")
    assert {c for layer in ("bridges", "dns", "syscalls") for c, _ in leaking.attempts(layer)} == {"gateway-1", "model"}


def test_an_attempt_names_its_process_and_its_time(leaking: Run) -> None:
    report = leaking.report
    for a in report["attempts"]:
        assert report["started"] <= a["when"] <= report["ended"]
    by_name = [a["process"] for a in report["attempts"] if a["destination"] == "name callback.vendor.example (A)"]
    assert all(p.endswith("/python3") and p.split("/")[0].isdecimal() for p in by_name), by_name
    early, late = (
        datetime.fromisoformat(next(a["when"] for a in report["attempts"] if place in a["destination"]))
        for place in ("203.0.113.53:53", "203.0.113.14:443")
    )
    # The packets are dated when they are read, which may be a little late.
    assert DELAY - 1 <= (late - early).total_seconds() < DELAY + 5


def test_an_endpoint_outside_the_allow_list_is_listed(stack: Stack, tmp_path: Path) -> None:
    """The gateway refuses to start with it; the list names it all the same, without what may be secret in it."""
    entry = """
  - model_name: planted
    litellm_params:
      model: openai/planted
      api_base: http://user:s3cret-word@203.0.113.20:8000/v1?token=s3cret-word
"""
    planted = tmp_path / "config.yaml"
    planted.write_bytes((stack.config_dir / "config.yaml").read_bytes().rstrip() + entry.encode())
    done = stack.gateway("endpoints", "--config", str(planted), "--json")
    found = json.loads(done.stdout)["endpoints"]
    endpoints = {e["url"]: e["allowed"] for e in found if e["setting"].startswith("config.yaml")}
    assert endpoints == {"model:8081": True, "203.0.113.20:8000": False}
    assert "s3cret-word" not in done.stdout


@pytest.fixture
def open_firewall(stack: Stack) -> Iterator[None]:
    """Take the firewall's rules away; the controls' addresses lead into a bridge without ports meanwhile."""
    run("ip", "link", "delete", SINK, check=False)  # what a killed run has left
    run("ip", "link", "add", SINK, "type", "bridge")
    try:
        run("ip", "link", "set", SINK, "up")
        run("ip", "route", "add", "198.51.100.0/24", "dev", SINK)
        assert stack.moat("firewall", "remove").returncode == 0
        yield
    finally:
        applied = stack.moat("firewall", "apply")
        run("ip", "link", "delete", SINK)
        assert applied.returncode == 0, applied.stderr


def test_the_probes_notice_an_open_firewall(stack: Stack, open_firewall: None) -> None:
    """Without a restart: the probes alone, over the table of the capture, which still lets nothing out."""
    deployment, marks, own = Deployment(stack.folder), draw(), set[tuple[str, int]]()
    layer = BridgesLayer(deployment.bridges(), [], marks, dict, lambda: True, own)
    layer.start([])
    try:
        probes = {p.name: (p.ok, p.found) for p in all_probes(deployment, Console(quiet=True), marks, own)}
        left = counters()["left"]
    finally:
        layer.stop()
    assert probes["the rules of `moat firewall` are in force"][0] is False
    for service, bridge in (("config-sync", "moat-core"), ("nginx", "moat-edge")):
        assert probes[f"{service} cannot reach the host's services by {bridge} (tcp)"] == (False, "reached")
        assert probes[f"{service} cannot reach the host's services by {bridge} (udp)"] == (False, "reached")
    # moat-edge is no internal network: its packets come as far as the way out, and are dropped there by the capture.
    ok, found = probes["nothing from nginx leaves by moat-edge, masquerade included"]
    assert (ok, left >= 2) == (False, True), found


def test_nothing_of_the_capture_is_left(leaking: Run, stack: Stack) -> None:
    assert run("nft", "list", "table", "inet", "moat_capture", check=False).returncode != 0
    with stack.client() as client:
        assert client.get("/v1/models").status_code == 200
    for service in ("nginx", "gateway-1", "model"):
        pid = str(stack.inspect(service)["State"]["Pid"])
        assert "198.51.100" not in run("nsenter", "-t", pid, "-n", "ip", "route").stdout
