# SPDX-License-Identifier: Apache-2.0
"""Proves `moat firewall` with the kernel's own packet filter, in a network of namespaces that leads nowhere.

A namespace plays the host: it has the two bridges, a FORWARD chain like docker's, a "LAN" with one machine, and a
published port. One namespace on each bridge plays a container. The control comes first: without our rules the
same attempts reach the LAN machine and the host's service, so the laboratory can tell open from closed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAN = "203.0.113.9"  # a documentation address; here it belongs to a namespace that we made
EDGE, CORE = "172.30.241.10", "172.30.242.11"

pytestmark = pytest.mark.skipif(shutil.which("iptables") is None, reason="needs iptables")


class Namespace:
    """A network namespace that lives as long as one sleeping process."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "600"])
        self.pid = self._holder.pid
        deadline = time.monotonic() + 5
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{self.pid}/ns/net").readlink() == own:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.run("ip link set lo up")
        self.children: list[subprocess.Popen[bytes]] = []

    def argv(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--", *words]

    def run(self, command: str) -> str:
        done = subprocess.run(self.argv(*command.split()), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def listen(self, address: str, port: int) -> None:
        code = (
            "import socket\n"
            f"family=socket.{'AF_INET6' if ':' in address else 'AF_INET'}\n"
            f"s=socket.create_server(({address!r},{port}),family=family)\n"
            "print('up',flush=True)\n"
            "while True:\n c,_=s.accept(); c.sendall(b'hello'); c.close()\n"
        )
        child = subprocess.Popen(self.argv(sys.executable, "-c", code), stdout=subprocess.PIPE)
        self.children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"

    def connect(self, address: str, port: int) -> str:
        """Return what a connection reads, or the error's name."""
        code = (
            "import errno,socket\n"
            "try:\n"
            f" print(socket.create_connection(({address!r},{port}),2).recv(9).decode())\n"
            "except TimeoutError: print('ETIMEDOUT')\n"
            "except OSError as e: print(errno.errorcode[e.errno])\n"
        )
        done = subprocess.run(self.argv(sys.executable, "-c", code), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def close(self) -> None:
        for child in [*self.children, self._holder]:
            child.kill()
            child.wait()
            if child.stdout:
                child.stdout.close()


class Lab:
    """Host, two containers and a LAN machine."""

    def __init__(self) -> None:
        self.host, self.edge, self.core, self.lan = (Namespace() for _ in range(4))
        self.all = (self.host, self.edge, self.core, self.lan)
        for name, space, octet in (("moat-edge", self.edge, 241), ("moat-core", self.core, 242)):
            self.host.run(f"ip link add {name} type bridge")
            self.host.run(f"ip address add 172.30.{octet}.1/24 dev {name}")
            self.host.run(f"ip link set {name} up")
            self._wire(space, f"c{octet}", EDGE if octet == 241 else CORE, f"172.30.{octet}.1", master=name)
        self.host.run("ip link add lan0 type veth peer name eth0 netns " + str(self.lan.pid))
        self.host.run("ip address add 203.0.113.1/24 dev lan0")
        self.host.run("ip link set lan0 up")
        self.lan.run(f"ip address add {LAN}/24 dev eth0")
        self.lan.run("ip link set eth0 up")
        self.lan.run("ip route add default via 203.0.113.1")
        # The bridges must not filter what stays on them; forwarding as docker switches it on.
        self.host.run("sysctl -qw net.ipv4.ip_forward=1")
        for rule in ("-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-A DOCKER-USER -j RETURN"):
            self.host.run(f"iptables {rule}")
        self.host.run("iptables -A FORWARD -j ACCEPT")  # docker's, for its bridges
        self.host.listen("0.0.0.0", 2222)  # noqa: S104 - a service of the host that we play
        self.lan.listen(LAN, 80)
        self.edge.listen(EDGE, 8443)  # nginx
        self.core.listen(CORE, 4001)  # a gateway

    def _wire(self, space: Namespace, name: str, address: str, via: str, *, master: str) -> None:
        self.host.run(f"ip link add {name} type veth peer name eth0 netns {space.pid}")
        self.host.run(f"ip link set {name} master {master} up")
        space.run(f"ip address add {address}/24 dev eth0")
        space.run("ip link set eth0 up")
        space.run(f"ip route add default via {via}")

    def moat(self, action: str) -> tuple[int, dict[str, object]]:
        done = subprocess.run(
            self.host.argv(sys.executable, "-m", "moat", "firewall", action, "--json"),
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT / "scripts"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            check=False,
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def refused(self, chain: str, bridge: str) -> int:
        _, answer = self.moat("status")
        for family in answer["families"]:  # type: ignore[attr-defined]
            for rule in family["rules"]:
                if family["family"] == "ipv4" and rule["chain"] == chain and rule["text"].startswith(f"-i {bridge} "):
                    return int(rule["packets"])
        raise AssertionError(f"no rule for {bridge} in {chain}")

    def rules(self) -> str:
        text = self.host.run("iptables-save") + self.host.run("ip6tables-save")
        return "\n".join(line for line in text.splitlines() if line.startswith("-"))

    def close(self) -> None:
        for space in self.all:
            space.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


def test_without_rules_everything_is_open_and_with_them_only_the_published_way_is(lab: Lab) -> None:
    # Control: the laboratory lets everything through.
    assert lab.moat("status")[0] == 23
    assert lab.edge.connect(LAN, 80) == "hello"
    assert lab.core.connect(LAN, 80) == "hello"
    assert lab.edge.connect("172.30.241.1", 2222) == "hello"
    assert lab.core.connect("203.0.113.1", 2222) == "hello"

    code, answer = lab.moat("apply")
    assert (code, answer["ok"], answer["changed"]) == (0, True, True)
    before = {b: (lab.refused("MOAT-FORWARD", b), lab.refused("MOAT-INPUT", b)) for b in ("moat-edge", "moat-core")}

    # Out, to the host by either of its addresses, and across the bridges: refused at once, not left to hang.
    for space in (lab.edge, lab.core):
        assert space.connect(LAN, 80) == "EHOSTUNREACH"
        assert space.connect("172.30.241.1", 2222) == "EHOSTUNREACH"
        assert space.connect("203.0.113.1", 2222) == "EHOSTUNREACH"
    assert lab.edge.connect(CORE, 4001) == "EHOSTUNREACH"
    after = {b: (lab.refused("MOAT-FORWARD", b), lab.refused("MOAT-INPUT", b)) for b in ("moat-edge", "moat-core")}
    assert after["moat-edge"] == (before["moat-edge"][0] + 2, before["moat-edge"][1] + 2)
    assert after["moat-core"] == (before["moat-core"][0] + 1, before["moat-core"][1] + 2)

    # The published port answers the LAN and the host; the host reaches its containers.
    assert lab.lan.connect(EDGE, 8443) == "hello"
    assert lab.host.connect(EDGE, 8443) == "hello"
    assert lab.host.connect(CORE, 4001) == "hello"


def test_a_second_apply_changes_nothing_and_keeps_the_counters(lab: Lab) -> None:
    lab.moat("apply")
    lab.edge.connect(LAN, 80)
    rules, count = lab.rules(), lab.refused("MOAT-FORWARD", "moat-edge")
    assert count == 1
    code, answer = lab.moat("apply")
    assert (code, answer["changed"]) == (0, False)
    assert lab.rules() == rules
    assert lab.refused("MOAT-FORWARD", "moat-edge") == count


def test_remove_leaves_exactly_what_was_there(lab: Lab) -> None:
    lab.host.run("iptables -A INPUT -p tcp --dport 9 -j DROP")  # somebody else's
    before = lab.rules()
    lab.moat("apply")
    assert lab.rules() != before
    code, answer = lab.moat("remove")
    assert (code, answer["changed"], answer["closed"]) == (0, True, False)
    assert lab.rules() == before
    assert lab.moat("remove")[1]["changed"] is False


@pytest.mark.parametrize(
    "damage",
    [
        "iptables -F MOAT-INPUT",
        "iptables -D INPUT -j MOAT-INPUT",
        "iptables -D MOAT-FORWARD 2",
        "iptables -I DOCKER-USER 1 -j ACCEPT",
        "iptables -I MOAT-FORWARD 1 -j RETURN",
        "iptables -F DOCKER-USER",
        "iptables -D FORWARD -j DOCKER-USER",
    ],
)
def test_status_sees_what_somebody_took_away_and_apply_mends_it(lab: Lab, damage: str) -> None:
    lab.moat("apply")
    assert lab.moat("status")[0] == 0
    lab.host.run(damage)
    code, answer = lab.moat("status")
    assert (code, answer["closed"]) == (23, False)
    assert lab.moat("apply")[0] == 0
    assert lab.edge.connect(LAN, 80) == "EHOSTUNREACH"
    assert lab.core.connect("172.30.242.1", 2222) == "EHOSTUNREACH"


def test_ipv6_is_closed_too(lab: Lab) -> None:
    if not Path("/proc/sys/net/ipv6").exists():
        pytest.skip("this kernel has no IPv6")
    lab.host.run("ip address add 2001:db8:1::1/64 dev moat-edge nodad")
    lab.host.run("ip address add 2001:db8:9::1/64 dev lan0 nodad")
    lab.host.run("sysctl -qw net.ipv6.conf.all.forwarding=1")
    lab.edge.run("ip address add 2001:db8:1::10/64 dev eth0 nodad")
    lab.edge.run("ip -6 route add default via 2001:db8:1::1")
    lab.lan.run("ip address add 2001:db8:9::9/64 dev eth0 nodad")
    lab.lan.run("ip -6 route add default via 2001:db8:9::1")
    lab.lan.listen("2001:db8:9::9", 81)
    deadline = time.monotonic() + 10
    while lab.edge.connect("2001:db8:9::9", 81) != "hello":  # control: open, once the links are up
        assert time.monotonic() < deadline
        time.sleep(0.2)
    lab.moat("apply")
    # EACCES is how Linux tells of an ICMPv6 "administratively prohibited".
    assert lab.edge.connect("2001:db8:9::9", 81) == "EACCES"
    assert lab.edge.connect("2001:db8:1::1", 2222) in ("EACCES", "EHOSTUNREACH")


def test_refused_without_the_right_it_says_what_to_do() -> None:
    # Root by name, without the capabilities: what a process in a container has.
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-all", "--", sys.executable, "-m", "moat", "firewall", "apply"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "scripts"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        check=False,
    )
    assert done.returncode == 23
    assert "run it as root on the host" in done.stderr
