# SPDX-License-Identifier: Apache-2.0
"""Proves that the module moat_no_egress sees a control connection that rules would cut, and what verify.yml shows."""

from __future__ import annotations

import importlib.util
import json
import os
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
