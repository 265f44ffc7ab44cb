# SPDX-License-Identifier: Apache-2.0
"""Proves that nothing gets out of the containers' networks, nor to the host's services, and that this is noticed.

Each attempt is made from inside a container's own network namespace, towards documentation addresses. Before that the
host gets a route for them into a bridge without ports: even without the firewall nothing could leave this machine. The
positive control is the firewall's own counters: each attempt that reaches the host must move one. (That the same
attempts get through without the rules is shown in tests/integration/compose/test_firewall.py, where the "outside" is a
namespace.)
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.stack import RUNNING, Stack, run

OUTSIDE = "203.0.113.7"
SINK = "moat-test-sink"


@pytest.fixture(scope="module", autouse=True)
def sink() -> Iterator[None]:
    """Route the documentation network into a bridge that leads nowhere."""
    run("ip", "link", "delete", SINK, check=False)
    run("ip", "link", "add", SINK, "type", "bridge")
    run("ip", "link", "set", SINK, "up")
    run("ip", "route", "add", "203.0.113.0/24", "dev", SINK)
    assert f"dev {SINK}" in run("ip", "route", "get", OUTSIDE).stdout
    yield
    run("ip", "link", "delete", SINK)


def attempt(address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """Return ``connected``, or the error's name."""
    try:
        with socket.socket(socket.AF_INET, kind) as s:
            s.settimeout(3)
            s.connect((address, port))
            if kind == socket.SOCK_DGRAM:
                s.send(b"x")
                s.recv(1)
            return "connected"
    except TimeoutError:
        return "ETIMEDOUT"
    except OSError as e:
        return errno.errorcode.get(e.errno or 0, str(e))


@pytest.mark.parametrize("service", RUNNING)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_no_service_reaches_the_outside(stack: Stack, service: str, kind: socket.SocketKind) -> None:
    before = stack.firewall()
    result = stack.inside(service, lambda: attempt(OUTSIDE, 443, kind))
    after = stack.firewall()
    # docker 20.10 gives containers of an internal network a default route, newer engines do not. With one, the packet
    # comes as far as the firewall; without, the kernel refuses before there is a packet.
    pid = str(stack.inspect(service)["State"]["Pid"])
    if run("nsenter", "-t", pid, "-n", "ip", "route", "show", "default").stdout:
        assert result == "EHOSTUNREACH"
        moved = ("ipv4", "MOAT-FORWARD", "moat-edge" if service == "nginx" else "moat-core")
        assert after[moved] > before[moved]
    else:
        assert service != "nginx"
        assert result == "ENETUNREACH"


def test_a_container_that_makes_itself_a_route_is_stopped_by_the_firewall(stack: Stack) -> None:
    """What a root process inside the network could do: the layers must not depend on a missing route."""
    pid = str(stack.inspect("gateway-1")["State"]["Pid"])
    before = stack.firewall()
    run("nsenter", "-t", pid, "-n", "ip", "route", "add", "203.0.113.0/24", "via", "172.30.242.1")
    try:
        assert stack.inside("gateway-1", lambda: attempt(OUTSIDE, 443)) in ("EHOSTUNREACH", "ETIMEDOUT")
    finally:
        run("nsenter", "-t", pid, "-n", "ip", "route", "del", "203.0.113.0/24")
    after = stack.firewall()
    assert after["ipv4", "MOAT-FORWARD", "moat-core"] > before["ipv4", "MOAT-FORWARD", "moat-core"]


@pytest.mark.parametrize(("service", "bridge", "address"), [
    ("nginx", "moat-edge", "172.30.241.1"),
    ("nginx", "moat-core", "172.30.242.1"),
    ("gateway-1", "moat-core", "172.30.242.1"),
    ("model", "moat-core", "172.30.242.1"),
])  # fmt: skip
def test_no_service_reaches_the_hosts_services(stack: Stack, service: str, bridge: str, address: str) -> None:
    with socket.create_server((address, 0)) as listener:  # a service of the host, on the bridge's own address
        port = listener.getsockname()[1]
        assert attempt(address, port) == "connected"  # control: it does answer, from the host itself
        before = stack.firewall()
        assert stack.inside(service, lambda: attempt(address, port)) == "EHOSTUNREACH"
    assert stack.firewall()["ipv4", "MOAT-INPUT", bridge] > before["ipv4", "MOAT-INPUT", bridge]


def ask_resolver(name: str) -> tuple[str, float]:
    """Ask the container's resolver for an address; return the answer in a word, and the seconds."""
    question = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0"
    question += b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\0\0\1\0\1"
    started = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(3)
        s.connect(("127.0.0.11", 53))
        try:
            s.send(question)
            answer = s.recv(512)
        except OSError:
            return "nothing", time.monotonic() - started
    return ("answers" if answer[7] else "refused"), time.monotonic() - started


@pytest.mark.parametrize("service", ["nginx", "gateway-1", "model"])
def test_names_of_services_resolve_and_foreign_ones_do_not(stack: Stack, service: str) -> None:
    assert stack.inside(service, lambda: ask_resolver("minio"))[0] == "answers"
    assert stack.inside(service, lambda: ask_resolver("name.example"))[0] in ("nothing", "refused")


def test_containers_have_no_ipv6_but_a_loopback(stack: Stack) -> None:
    for service in RUNNING:
        pid = stack.inspect(service)["State"]["Pid"]
        table = Path(f"/proc/{pid}/net/if_inet6")
        interfaces = {line.split()[-1] for line in table.read_text().splitlines()} if table.exists() else set()
        assert interfaces <= {"lo"}, service


def test_the_gateways_refuse_by_themselves_too(stack: Stack) -> None:
    """The innermost layer: the gateway's own guard, before any packet; its count is in its status."""
    status = stack.ask_gateway("status")
    assert status["egress"]["denied"] == 0
    assert status["egress"]["allow"] == ["model:8081"]


def test_published_ports_answer_with_the_rules_in_place(stack: Stack) -> None:
    assert json.loads(stack.moat("firewall", "status", "--json").stdout)["closed"] is True
    with stack.client() as client:
        assert client.get("/v1/models").status_code == 200


def test_applying_the_rules_again_changes_nothing(stack: Stack) -> None:
    before = run("iptables-save").stdout.count("\n")
    answer = json.loads(stack.moat("firewall", "apply", "--json").stdout)
    assert (answer["ok"], answer["changed"]) == (True, False)
    assert run("iptables-save").stdout.count("\n") == before
