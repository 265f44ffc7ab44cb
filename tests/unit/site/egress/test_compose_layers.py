# SPDX-License-Identifier: Apache-2.0
"""Proves how packets of containers' networks are read and judged: names asked for, rules of the table, sightings.

The layers themselves run against real containers in tests/acceptance/test_egress_verify.py.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from pathlib import Path

import pytest

from moat.site.egresscheck.allow import Allowed
from moat.site.egresscheck.bridges import Bridge, BridgesLayer, ruleset
from moat.site.egresscheck.compose_probes import watched
from moat.site.egresscheck.compose_site import changes
from moat.site.egresscheck.containers import Service, _service
from moat.site.egresscheck.marks import CONTROL, Marks
from moat.site.egresscheck.model import Component
from moat.site.egresscheck.names import NamesLayer, Question, Sent, Stream, parse_packet, parse_question
from moat.site.egresscheck.nflog import Event, Packet

MARKS = Marks("198.51.100.9", "2001:db8::9", 20001, "control-1.moat.invalid")
CORE = Bridge("moat-core", "172.30.242.0/24", "172.30.242.1")
GATEWAY = Component("gateway-1", "moat-gateway-1-1", 10102, ("172.30.242.11",), "abc")


def question(name: str, kind: int = 1, flags: bytes = b"\x01\x00") -> bytes:
    labels = b"".join(bytes([len(p)]) + p.encode("ascii") for p in name.split(".") if p)
    return b"\x12\x34" + flags + b"\0\1\0\0\0\0\0\0" + labels + b"\0" + struct.pack(">HH", kind, 1)


def ipv4(destination: str, protocol: int, rest: bytes) -> bytes:
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(rest), 0, 0, 64, protocol, 0, b"\x7f\0\0\1", b"\0" * 4)
    return head[:16] + socket.inet_aton(destination) + rest


def udp(port: int, data: bytes) -> bytes:
    return struct.pack(">HHHH", 40000, port, 8 + len(data), 0) + data


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (question("API.Example.com", 28), ("api.example.com", "AAAA")),
        (question("x", 65), ("x", "HTTPS")),
        (question("", 2), (".", "NS")),
        (question("x", 4711), ("x", "type 4711")),
        (question("x", flags=b"\x81\x80"), None),  # an answer
        (b"", None),
        (question("x")[:-3], None),
        (b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1", None),  # a pointer where a name begins
        (b"\x12\x34\x01\0\0\1\0\0\0\0\0\0" + b"\x3f" * 10, None),
        (b"GET / HTTP/1.1\r\n\r\n", None),
    ],
)
def test_questions_are_read_and_nothing_else(message: bytes, found: tuple[str, str] | None) -> None:
    assert parse_question(message) == found


def test_a_hostile_name_stays_printable() -> None:
    message = question("x")[:12] + b"\x04\x1b[2J\0\0\1\0\1"
    asked = parse_question(message)
    assert asked is not None
    parse_question(question("x")[:12] + b"\x02\xff\xfe\0\0\1\0\1")  # no character of ours: still no error


def test_packets_to_name_servers_are_taken_and_others_left() -> None:
    message = question("a.example")
    assert parse_packet(ipv4("127.0.0.11", 17, udp(34233, message))) == Sent("127.0.0.11", 40000, message)
    assert parse_packet(ipv4("203.0.113.5", 17, udp(53, message))) == Sent("203.0.113.5", 40000, message)
    assert parse_packet(ipv4("203.0.113.5", 17, udp(53, b""))) == Sent("203.0.113.5", 40000, b"")
    assert parse_packet(ipv4("203.0.113.5", 17, udp(54, message))) is None
    tcp = struct.pack(">HHIIBBHHH", 40000, 53, 7, 0, 0x50, 0x18, 0, 0, 0)
    framed = struct.pack(">H", len(message)) + message
    assert parse_packet(ipv4("203.0.113.5", 6, tcp + framed)) == Sent("203.0.113.5", 40000, framed, 7, 0x18)
    assert parse_packet(ipv4("203.0.113.5", 6, tcp)) == Sent("203.0.113.5", 40000, b"", 7, 0x18)
    six = struct.pack(">IHBB", 0x60000000, 0, 17, 64) + b"\0" * 16 + socket.inet_pton(socket.AF_INET6, "2001:db8::5")
    assert parse_packet(six + udp(53, message)) == Sent("2001:db8::5", 40000, message)
    for size in range(40):
        parse_packet(ipv4("127.0.0.11", 17, udp(53, message))[:size])  # cut off anywhere: no error


def names_layer(*questions: Question) -> NamesLayer:
    layer = NamesLayer(Path("/nowhere"), MARKS, ["minio", "Model."], [ipaddress.IPv4Network("172.30.242.0/24")], dict)
    layer._components = dict.fromkeys(GATEWAY.addresses, GATEWAY)
    layer._questions = list(questions)
    return layer


def asked(name: str, kind: str = "A", address: str = "172.30.242.11", server: str = "127.0.0.11") -> Question:
    return Question(1.0, "12/python3", (address,), name, kind, server)


def test_only_foreign_names_are_attempts() -> None:
    found = names_layer(
        asked("minio"), asked("model"), asked("11.242.30.172.in-addr.arpa", "PTR"), asked("minio.vendor.example"),
        asked("9.113.0.203.in-addr.arpa", "PTR"), asked("x.example", address="172.17.0.2"),
        asked("a.example", server="203.0.113.5"),
    )._attempts()  # fmt: skip
    assert [(a.component, a.process, a.destination, a.detail) for a in found] == [
        ("gateway-1", "12/python3", "name minio.vendor.example (A)", ""),
        ("gateway-1", "12/python3", "name 9.113.0.203.in-addr.arpa (PTR)", ""),
        ("gateway-1", "12/python3", "name a.example (A)", "asked at 203.0.113.5"),
    ]


def test_a_container_that_nobody_knows_is_not_passed_over() -> None:
    found = names_layer(asked("x.example", address="172.30.242.200"))._attempts()
    assert [(a.component, a.destination) for a in found] == [("unknown", "name x.example (A)")]


def test_the_control_of_one_container_does_not_stand_for_another() -> None:
    layer = names_layer(asked(MARKS.name))
    layer._controls = [("gateway-1", 4), ("gateway-1", 6), ("minio", 4)]
    assert [a for a in layer._attempts() if a.component == CONTROL] == []
    assert layer.problems == ["the control in gateway-1 (IPv6), minio was not heard"]


def test_the_table_lets_the_site_talk_to_itself_but_not_to_the_host() -> None:
    text = ruleset([CORE], [Allowed("x", (ipaddress.ip_network("10.1.0.0/16"),), 8000)], 7)
    host, own = "ip daddr 172.30.242.1 goto found", "ip daddr 172.30.242.0/24 accept"
    assert text.index(host) < text.index(own)
    assert text.count("ip daddr 10.1.0.0/16 tcp dport 8000 accept") == 2  # first of all, and at the way out
    assert "counter name left drop" in text
    assert "policy drop" not in text, "a capture that is killed must not close the site"


def bridges_layer(*packets: Packet) -> BridgesLayer:
    layer = BridgesLayer([CORE], [], MARKS, dict, lambda: True, {("172.30.242.1", 4444)})
    layer._components = dict.fromkeys(GATEWAY.addresses, GATEWAY)
    for p in packets:
        layer._handle(Event(1.0, "moat-core", None, None, p))
    return layer


def test_packets_of_one_attempt_are_one_and_our_own_probe_is_none() -> None:
    leak = Packet("tcp", "172.30.242.11", 50000, "203.0.113.7", 443)
    found = bridges_layer(
        leak, leak, Packet("tcp", "172.30.242.11", 50001, "172.30.242.1", 4444),
        Packet("tcp", "172.30.242.11", 50002, "172.30.242.1", 22), Packet("udp", "172.30.242.99", 1, "203.0.113.8", 53),
    )._attempts()  # fmt: skip
    assert [(a.component, a.destination, a.detail) for a in found] == [
        ("gateway-1", "tcp 203.0.113.7:443", "from 172.30.242.11 by moat-core, packets: 2"),
        ("gateway-1", "tcp 172.30.242.1:22", "from 172.30.242.11 by moat-core, packets: 1"),
        ("unknown", "udp 203.0.113.8:53", "from 172.30.242.99 by moat-core, packets: 1"),
    ]


def test_the_control_by_one_bridge_does_not_stand_for_another() -> None:
    layer = bridges_layer(Packet("udp", "172.30.242.11", 1, MARKS.ipv4, MARKS.port))
    layer._expected = [("moat-core", 4), ("moat-core", 6), ("moat-edge", 4)]
    assert layer._attempts() == []
    assert layer.problems == ["the control by moat-core (IPv6), moat-edge was not seen"]


def test_an_unreadable_packet_is_an_attempt() -> None:
    layer = bridges_layer()
    layer._handle(Event(1.0, "moat-core", None, None, None))
    assert [a.component for a in layer._attempts()] == ["unknown"]


def service(name: str, pid: int, started: float, state: str = "running") -> Service:
    return Service(
        name=name, container=f"moat-{name}-1", id=f"id-{name}", state=state, pid=pid, uid=10102, started=started,
        namespace=None, addresses={}, aliases=(), environ={}, argv=(), dns=(), extra_hosts=(), log_driver="",
        log_options={}, ports={},
    )  # fmt: skip


def test_a_container_that_does_not_run_all_the_time_is_named() -> None:
    before = {s.name: s for s in (service("minio", 7, 10), service("init", 0, 11, "exited"), service("model", 9, 12))}
    since = {
        s.name: s for s in (service("minio", 17, 110), service("init", 0, 111, "exited"), service("model", 19, 112))
    }
    assert changes(before, since, since, 100) == []
    again = {**since, "model": service("model", 29, 120)}
    assert changes(before, since, again, 100) == [
        "model was started again during the capture: read `docker compose logs model`"
    ]
    ended = {**since, "minio": service("minio", 0, 110, "exited")}
    assert changes(before, since, ended, 100) == [
        "minio ended during the capture (exited): what it would try was not seen"
    ]
    del ended["minio"]
    assert "minio ended during the capture (gone)" in changes(before, since, ended, 100)[0]
    # It has done its work and ended, but not in this capture.
    idle = {**since, "init": before["init"]}
    assert changes(before, idle, idle, 100) == ["init does not run (exited): what it would try was not seen"]
    # It had crashed before, came up with the others, and crashed again.
    crashed = {**before, "model": service("model", 0, 12, "exited")}
    assert "model ended" in changes(crashed, since, {**since, "model": service("model", 0, 112, "exited")}, 100)[0]


def inspected(mode: str, **networks: str) -> Service:
    """Return a service from what the engine says of its container."""
    return _service(
        {
            "Config": {"Labels": {"com.docker.compose.service": "gateway-1"}, "User": "10102"},
            "HostConfig": {"NetworkMode": mode},
            "State": {"Pid": 0, "Status": "running", "StartedAt": "2026-01-01T00:00:00Z"},
            "NetworkSettings": {"Networks": {name: {"IPAddress": a} for name, a in networks.items()}},
            "Name": "/moat-gateway-1-1", "Id": "f" * 64, "Image": "sha256:0",
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "networks", "found"),
    [
        ("moat-core", {"moat-core": "172.30.242.11"}, ""),
        ("moat-core", {"moat-core": ""}, ""),  # one that has done its work has no address any more
        ("none", {"none": ""}, ""),
        ("host", {"host": ""}, "gateway-1 on host (host)"),
        ("moat-core", {"moat-core": "172.30.242.11", "lan": "10.0.0.7"}, "gateway-1 on lan (macvlan)"),
        ("moat-core", {"aside": "172.31.0.2"}, "gateway-1 on aside (bridge)"),
        ("container:4711", {}, "gateway-1 on container:4711 (unknown)"),
    ],
)
def test_a_service_on_a_network_that_is_not_watched_fails_a_probe(
    mode: str, networks: dict[str, str], found: str
) -> None:
    known = {
        "moat-core": {"Driver": "bridge", "Options": {"com.docker.network.bridge.name": "moat-core"}, "Id": "1" * 64},
        "host": {"Driver": "host", "Id": "2" * 64},
        "none": {"Driver": "null", "Id": "3" * 64},
        "lan": {"Driver": "macvlan", "Id": "4" * 64},
        "aside": {"Driver": "bridge", "Options": {}, "Id": "5" * 64},  # without an IPv4 network
    }
    probe = watched([inspected(mode, **networks)], known, {CORE.device: CORE})
    assert (probe.ok, probe.found) == (not found, found or "all of them")


def test_a_stream_is_cut_into_messages_wherever_its_segments_end() -> None:
    one, two = question("a.example"), question("b.example")
    whole = b"".join(struct.pack(">H", len(m)) + m for m in (one, two))
    for cut in range(1, len(whole)):
        stream = Stream(100)
        assert stream.take(Sent("203.0.113.5", 1, b"", 99, 0x02)) == []  # its beginning takes one number
        first = Sent("203.0.113.5", 1, whole[:cut], 100)
        found = [*stream.take(first), *stream.take(first)]  # the second one was sent again
        found += stream.take(Sent("203.0.113.5", 1, whole[cut:], 100 + cut))
        assert (found, stream.left) == ([one, two], None)
    rest = Stream(2**32 - 3)
    assert rest.take(Sent("203.0.113.5", 1, b"\xff" * 10, 2**32 - 3)) == []
    assert rest.take(Sent("203.0.113.5", 1, b"\xff" * 10, 7)) == []  # the numbers begin anew behind 2^32
    assert rest.left == 20
    assert Stream(0).left == 0
