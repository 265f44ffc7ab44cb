# SPDX-License-Identifier: Apache-2.0
"""Proves that the module moat_no_egress sees a control connection that rules would cut, and what verify.yml shows."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tests.unit.ansible.modules import module

ROOT = Path(__file__).resolve().parents[3]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "ansible" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = module("moat_no_egress")
EVIDENCE = load("filter_plugins/moat_evidence.py")


@pytest.mark.parametrize(
    ("connection", "ports", "words"),
    [
        ("198.51.100.7 40000 203.0.113.1 22", [22], ""),
        ("2001:db8::7 40000 2001:db8::1 22", [22, 2222], ""),
        ("", [], ""),  # a local run has no control connection
        ("198.51.100.7 40000 203.0.113.1 2222", [22], "add 2222 to no_egress_ssh_ports"),
        ("198.51.100.7 40000 203.0.113.1 22", [], "add 22 to no_egress_ssh_ports"),
        ("127.0.0.1 40000 127.0.0.1 22", [22], "tunnel that this host opened itself"),
        ("::1 40000 ::1 22", [22], "tunnel that this host opened itself"),
    ],
)
def test_a_control_connection_that_would_be_cut_is_named(
    connection: str, ports: list[int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", connection)
    if not connection and MODULE.control_connection() is not None:
        pytest.skip("these tests run over SSH: a parent process has a connection of its own")
    found = MODULE.path_problem(ports)
    assert (words in found) if words else found == "", found
    if words:
        assert "; do: " in found


def test_the_control_host_among_the_nodes_is_told_to_be_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is no loopback's and this host's own, as the kernel says: in a namespace that has one."""
    code = "from tests.unit.ansible.modules import module; print(module('moat_no_egress').path_problem([22]))"
    script = 'ip link set lo up && ip addr add 198.51.100.7/32 dev lo && exec "$@"'
    for client, told in (("198.51.100.7", True), ("198.51.100.8", False)):
        monkeypatch.setenv("SSH_CONNECTION", f"{client} 40000 198.51.100.7 22")
        argv = ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, "-c", code]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0 and "unshare" in done.stderr:
            pytest.skip("no network namespace can be made here")
        assert done.returncode == 0, done.stderr
        assert ("; do: give it `ansible_connection: local`" in done.stdout) == told, done.stdout


def test_the_connection_is_found_through_sudo_which_empties_the_environment() -> None:
    # The child has no SSH_CONNECTION; its parent, as a shell of sshd would, has one.
    code = (
        "import sys, subprocess; argv = [sys.executable, '-c', *sys.argv[1:]];"
        "subprocess.run(argv, env={'PATH': '/usr/bin:/bin'}, check=True)"
    )
    child = "from tests.unit.ansible.modules import module; print(module('moat_no_egress').control_connection())"
    environment = {**os.environ, "SSH_CONNECTION": "198.51.100.7 40000 203.0.113.1 2222"}
    argv = [sys.executable, "-c", code, child]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "('198.51.100.7', 40000, 2222)", done.stderr


#: As ss 6.15 (Debian 13) prints it, shortened: IPv4, IPv6, and one that a socket for both has accepted.
SESSIONS = """\
0 0 192.0.2.1:22 198.51.100.7:40000 cubic rto:204 bytes_sent:4200 bytes_retrans:200 bytes_acked:3900 bytes_received:7
0 0 [2001:db8::1]:22 [2001:db8::7]:40001 cubic rto:204 bytes_sent:10 bytes_acked:10
0 0 [::ffff:192.0.2.1]:22 [::ffff:198.51.100.8]:40002 cubic rto:204
"""


def test_the_far_ends_of_the_ssh_connections_are_read_with_what_they_acknowledged() -> None:
    found = [(s.peer, s.port, s.sent, s.acked) for s in MODULE.parse_sessions(SESSIONS)]
    assert found == [
        ("198.51.100.7", 40000, 4000, 3900), ("2001:db8::7", 40001, 10, 10), ("198.51.100.8", 40002, 0, 0),
    ]  # fmt: skip


def test_only_what_was_sent_under_the_new_rules_proves_a_connection() -> None:
    session = MODULE.Session
    noted = [session("198.51.100.7", 40000, 4000, 3900)]
    assert not MODULE.proven(noted, noted)
    # What was on its way when they came; then a packet that was sent after that.
    assert not MODULE.proven(noted, [session("198.51.100.7", 40000, 4100, 4001)])
    assert MODULE.proven(noted, [session("198.51.100.7", 40000, 4100, 4028)])
    # Another connection, and one that has ended.
    assert not MODULE.proven(noted, [session("198.51.100.8", 40000, 9000, 9000)])
    assert not MODULE.proven(noted, [])
    # Nobody has come by SSH.
    assert MODULE.proven([], [])


@pytest.mark.parametrize(
    ("connection", "said", "whose"),
    [
        ("", SESSIONS, []),
        ("198.51.100.7 40000 192.0.2.1 22", SESSIONS, [40000]),
        ("::ffff:198.51.100.8 40002 ::ffff:192.0.2.1 22", SESSIONS, [40002]),
        # The one that started a terminal multiplexer is gone: any of those that are there may be the operator's.
        ("198.51.100.7 39000 192.0.2.1 22", SESSIONS, [40000, 40001, 40002]),
        ("198.51.100.7 39000 192.0.2.1 22", "", []),
        # Without an answer of ss nothing is taken for proven.
        ("198.51.100.7 40000 192.0.2.1 22", None, [40000]),
    ],
)
def test_the_connection_that_has_to_prove_itself_is_the_operators(
    connection: str, said: str | None, whose: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "inherited", lambda name: connection)
    monkeypatch.setattr(MODULE, "run", lambda argv: (127, "", "") if said is None else (0, said, ""))
    assert [s.port for s in MODULE.to_be_proven([22])] == whose


@pytest.mark.parametrize(
    ("bridge", "members", "found"),
    [
        ("docker0", [], True),
        ("br-0123456789ab", [], True),
        ("podman1", [], True),
        ("cni-podman0", [], True),
        ("cni0", [], True),
        ("virbr0", [], True),
        ("lxcbr0", [], True),
        ("incusbr0", [], True),
        # Bridges of the host's own, for a network card and a VLAN.
        ("br0", [], False),
        ("bridge0", ["vlan"], False),
        # Of an engine that nobody has heard of, and of a virtual machine.
        ("br0", ["veth"], True),
        ("uplink", ["tap"], True),
    ],
)
def test_bridges_of_containers_and_virtual_machines_are_told_from_the_hosts_own(
    bridge: str, members: list[str], found: bool
) -> None:
    """The kernel's own devices, in a network namespace that has them, and a view of /sys that belongs to it."""
    make = {
        "veth": "link add member0 type veth peer name far0",
        "tap": "tuntap add dev member0 mode tap",
        "vlan": "link add card0 type veth peer name card1 && ip link add link card0 name member1 type vlan id 7",
    }
    lines = [f"ip link add {bridge} type bridge", *(f"ip {make[m]}" for m in members)]
    lines += [f"ip link set member{i} master {bridge} 2>/dev/null || true" for i in range(2)]
    code = (
        "import pathlib, sys; from tests.unit.ansible.modules import module; M = module('moat_no_egress');"
        "M.SOCKETS = (); print(M.engines())"
    )
    script = "set -e; mount -t sysfs sysfs /sys; " + "; ".join(lines) + '; exec "$@"'
    argv = ["unshare", "--net", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0 and re.search("unshare|mount|not supported|Unknown device type", done.stderr):
        pytest.skip(f"such devices cannot be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([f"bridge {bridge}"] if found else [])


@pytest.mark.parametrize(
    ("uevent", "iflink", "device", "found"),
    [
        ("INTERFACE=eth0\nIFINDEX=7\n", "7", True, False),
        ("DEVTYPE=vlan\nINTERFACE=eth0.7\nIFINDEX=7\n", "2", False, False),
        ("DEVTYPE=bond\nINTERFACE=bond0\nIFINDEX=7\n", "7", False, False),
        ("INTERFACE=veth1\nIFINDEX=7\n", "2", False, True),
    ],
    ids=["network card", "VLAN", "bond", "veth"],
)
def test_a_device_of_the_hosts_own_is_told_from_the_end_of_a_containers_cable(
    tmp_path: Path, uevent: str, iflink: str, device: bool, found: bool
) -> None:
    """As the kernel shows them: not every one of these can be made where the tests run."""
    for name, text in (("uevent", uevent), ("ifindex", "7\n"), ("iflink", f"{iflink}\n")):
        (tmp_path / name).write_text(text)
    if device:
        (tmp_path / "device").mkdir()
    assert MODULE.is_virtual(tmp_path) is found


@pytest.mark.parametrize("there", ["", "run/docker.sock", "run/crio/crio.sock", "run/podman/podman.sock"])
def test_the_socket_of_an_engine_tells_of_one_that_has_no_network_yet(tmp_path: Path, there: str) -> None:
    if there:
        (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / there).touch()
    # podman's is made by systemd wherever podman is installed, used or not.
    assert MODULE.engines(tmp_path) == ([f"/{there}"] if there and "podman" not in there else [])


LINK = {"family": "inet", "local": "192.0.2.7", "prefixlen": 24, "valid_life_time": 4294967295}
LEASE = {**LINK, "dynamic": True, "valid_life_time": 3600}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (LINK, []),
        (LEASE, ["192.0.2.7 on eth0, for another 3600 s"]),
        ({**LINK, "valid_life_time": 60}, ["192.0.2.7 on eth0, for another 60 s"]),
        # A router's announcement, which comes in by itself; an address of DHCPv6, and one that is set by hand.
        ({**LEASE, "family": "inet6", "local": "2001:db8::7", "prefixlen": 64}, []),
        (
            {**LEASE, "family": "inet6", "local": "2001:db8::7", "prefixlen": 128},
            ["2001:db8::7 on eth0, for another 3600 s"],
        ),
        ({**LINK, "family": "inet6", "local": "2001:db8::7", "prefixlen": 128}, []),
    ],
)
def test_an_address_that_ends_by_itself_is_a_lease(address: dict[str, object], words: list[str]) -> None:
    links = [{"ifname": "lo", "addr_info": [LINK]}, {"ifname": "down"}, {"ifname": "eth0", "addr_info": [address]}]
    assert MODULE.leased(links) == words
    assert MODULE.leased(None) == []


def test_a_lease_is_refused_unless_the_rules_let_the_host_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps([{"ifname": "eth0", "addr_info": [LEASE]}])
    monkeypatch.setattr(MODULE, "run", lambda argv: (0, said, "") if argv[1:3] == ["-j", "address"] else (1, "", ""))
    found = MODULE.lease_problem(dhcp=False)
    assert "found: 192.0.2.7 on eth0" in found
    assert "; do: set no_egress_dhcp_client: true" in found
    assert MODULE.lease_problem(dhcp=True) == ""


def test_the_fields_are_those_of_this_machines_ip() -> None:
    """``ip -j`` is asked for real: a renamed field would make every lease invisible."""
    done = subprocess.run([MODULE.ip(), "-j", "address", "show", "lo"], capture_output=True, text=True, check=True)
    info = json.loads(done.stdout)[0]["addr_info"][0]
    assert info["family"] == "inet"
    assert info["valid_life_time"] == MODULE.FOREVER
    assert info["prefixlen"] == 8


def test_the_table_marks_what_is_wrong_and_puts_it_last() -> None:
    rows = [
        {"host": "a", "what": "one", "ok": False, "found": "bad"},
        {"host": "a", "what": "longer", "ok": True, "found": "good"},
    ]
    assert EVIDENCE.table(rows) == ["ok     longer  good", "WRONG  one     bad"]
    assert EVIDENCE.table([*rows, {"host": "b", "what": "x", "ok": True, "found": "y"}])[0].startswith(
        "ok     a  longer"
    )


def test_a_contradiction_becomes_one_sentence_with_what_to_do() -> None:
    finding = {"what": "a secret is open", "found": "0644", "expected": "0600", "hint": "chmod it"}
    assert EVIDENCE.line(finding) == "a secret is open; found: 0644, expected: 0600; do: chmod it."
    assert EVIDENCE.line({"message": "it cannot be written"}) == "it cannot be written."
