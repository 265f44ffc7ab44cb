# SPDX-License-Identifier: Apache-2.0
"""Proves who is blamed for what: the allow-list, components by user, control group and port, evidence put together."""

from __future__ import annotations

import ipaddress
import pwd
import time
from pathlib import Path

import pytest

from moat.errors import EgressUnproven
from moat.site.egresscheck.allow import parse
from moat.site.egresscheck.attribute import ANSWERED, attribute, name_servers
from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.model import Attempt, Component
from moat.site.egresscheck.packets import ruleset
from moat.site.egresscheck.who import Who, listening_ports

GATEWAYS = (
    Component("gateway-1", "moat-gateway@1.service", 990),
    Component("gateway-2", "moat-gateway@2.service", 990),
    Component("nginx", "nginx.service", 33),
    Component("nginx", "nginx.service", 0),
)


def nothing(name: str) -> list[str]:
    raise AssertionError(f"{name} was looked up")


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("10.0.0.5", ["ip daddr 10.0.0.5/32"]),
        ("10.0.0.5:443", ["ip daddr 10.0.0.5/32 tcp dport 443", "ip daddr 10.0.0.5/32 udp dport 443"]),
        ("tcp 10.0.0.5:443", ["ip daddr 10.0.0.5/32 tcp dport 443"]),
        ("udp 10.0.0.0/24:514", ["ip daddr 10.0.0.0/24 udp dport 514"]),
        ("fd00::5", ["ip6 daddr fd00::5/128"]),
        ("[fd00::5]:8000", ["ip6 daddr fd00::5/128 tcp dport 8000", "ip6 daddr fd00::5/128 udp dport 8000"]),
        ("[fd00:20::/64]:8000", ["ip6 daddr fd00:20::/64 tcp dport 8000", "ip6 daddr fd00:20::/64 udp dport 8000"]),
        ("fd00:20::/64", ["ip6 daddr fd00:20::/64"]),
    ],
)
def test_an_entry_of_the_allow_list(text: str, rules: list[str]) -> None:
    assert parse(text, nothing).rules() == rules


def test_a_name_is_looked_up_once_by_the_host() -> None:
    entry = parse("LLM.site.example:8000", lambda name: ["10.0.0.7"] if name == "llm.site.example" else [])
    assert entry.name == "llm.site.example"
    assert entry.rules() == ["ip daddr 10.0.0.7/32 tcp dport 8000", "ip daddr 10.0.0.7/32 udp dport 8000"]
    assert parse("gone.site.example", lambda _: []).rules() == []


@pytest.mark.parametrize(
    "text",
    ["", "10.0.0.5:0", "10.0.0.5:70000", "10.0.0.300", "10.0.0.0/33", "a b", "[fd00::5", "x; accept", "-a", "1.2.3"],
)
def test_a_malformed_entry_is_refused(text: str) -> None:
    with pytest.raises(EgressUnproven, match="cannot be read"):
        parse(text, nothing)


def test_what_an_entry_permits() -> None:
    entry = parse("tcp 10.1.0.0/16:443", nothing)
    assert entry.permits("10.1.2.3", 443, "tcp")
    assert entry.permits("10.1.2.3", 443)
    assert not entry.permits("10.1.2.3", 443, "udp")
    assert not entry.permits("10.1.2.3", 444)
    assert not entry.permits("10.2.2.3", 443)
    assert not entry.permits("2001:db8::1", 443)
    assert not entry.permits("nonsense", 443)


def proc(folder: Path, pid: int, group: str, comm: str = "python3") -> None:
    (folder / str(pid)).mkdir(parents=True)
    (folder / str(pid) / "cgroup").write_text(f"0::{group}\n", "utf-8")
    (folder / str(pid) / "comm").write_text(comm + "\n", "utf-8")


def test_gateways_of_one_user_are_told_apart_by_their_unit(tmp_path: Path) -> None:
    proc(tmp_path, 10, "/system.slice/system-moat\\x2dgateway.slice/moat-gateway@2.service")
    who = Who(GATEWAYS, tmp_path)
    assert who.component(990, 10) == "gateway-2"
    assert who.component(990, 4711) == "gateway-1 or gateway-2"
    assert who.words(10) == "10/python3"


def test_another_service_of_a_shared_user_is_not_mistaken_for_the_component(tmp_path: Path) -> None:
    proc(tmp_path, 10, "/system.slice/php-fpm.service", "php")
    proc(tmp_path, 11, "/system.slice/system-moat\\x2dgateway.slice/other@1.service")
    proc(tmp_path, 12, "/user.slice/user-1000.slice/user@1000.service/app.slice/x.service")
    proc(tmp_path, 13, "/system.slice/nginx.service")
    who = Who(GATEWAYS, tmp_path)
    name = pwd.getpwuid(33).pw_name
    assert who.component(33, 10) == f"another program of user {name}"
    assert who.component(33, 11) == f"another program of user {name}"
    assert who.component(33, 13) == "nginx"
    # A session, a process that is gone: by the user, as ever.
    assert who.component(33, 12) == who.component(33, 4711) == "nginx"
    # The kernel's word for the group, where the process is gone; and users that are none of the site's.
    assert who.component(33, 4711, "/system.slice/php-fpm.service") == f"another program of user {name}"
    assert who.component(1, 10) is None


def test_root_is_nobody_but_by_the_unit(tmp_path: Path) -> None:
    proc(tmp_path, 10, "/system.slice/nginx.service", "nginx")
    proc(tmp_path, 11, "/user.slice/user-0.slice/session-3.scope", "ssh")
    who = Who(GATEWAYS, tmp_path)
    assert who.component(0, 10) == "nginx"
    assert who.component(0, 11) is None
    assert who.uids == [33, 990]


def test_a_unit_is_not_mistaken_for_one_with_a_longer_name(tmp_path: Path) -> None:
    proc(tmp_path, 10, "/system.slice/my-nginx.service.d/x")
    proc(tmp_path, 11, "/system.slice/nginx.servicexyz")
    proc(tmp_path, 12, "/system.slice/docker-4f5e.scope")
    who = Who((*GATEWAYS, Component("minio", "moat-minio-1", 10103, cgroup="4f5e")), tmp_path)
    assert who.component(1, 11) is None
    assert who.component(1, 12) == "minio"


def test_a_host_with_several_hierarchies_of_control_groups(tmp_path: Path) -> None:
    proc(tmp_path, 10, "/")
    text = "12:cpu:/\n1:name=systemd:/docker/4f/system.slice/nginx.service\n0::/docker/4f\n"
    (tmp_path / "10" / "cgroup").write_text(text, "utf-8")
    assert Who(GATEWAYS, tmp_path).component(1, 10) == "nginx"


def test_listening_ports(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(
        "  sl  local_address rem_address   st\n"
        "   0: 0100007F:20FB 00000000:0000 0A 0 0 0 0 0 1\n"
        "   1: 0100007F:1F90 0100007F:AAAA 01 0 0 0 0 0 2\n",
        "ascii",
    )
    assert listening_ports(tmp_path) == [8443]


def attempt(layer: str, process: str, component: str, destination: str, second: int = 1, detail: str = "") -> Attempt:
    return Attempt(f"2026-01-01T00:00:{second:02d}.000Z", layer, process, component, destination, detail)


def test_a_packet_learns_its_process_from_the_call_and_the_call_its_protocol_from_the_packet() -> None:
    seen = [
        attempt("packets", "uid 990", "gateway-1 or gateway-2", "tcp 203.0.113.5:443"),
        attempt("syscalls", "77/python3", "gateway-2", "connect 203.0.113.5:443"),
        attempt("syscalls", "99/minio", "minio", "connect 203.0.113.5:443"),
    ]
    found = {(a.layer, a.process, a.component, a.destination) for a in attribute(seen, GATEWAYS)}
    assert found == {
        ("packets", "77/python3", "gateway-2", "tcp 203.0.113.5:443"),
        ("syscalls", "77/python3", "gateway-2", "tcp 203.0.113.5:443"),
        ("syscalls", "99/minio", "minio", "connect 203.0.113.5:443"),
    }


def test_a_storm_of_attempts_is_put_together_in_seconds() -> None:
    seen = []
    for i in range(20000):
        when = f"2026-01-01T00:{i // 1000 % 60:02d}:{i // 20 % 60:02d}.{i % 1000:03d}Z"
        seen.append(Attempt(when, "packets", "uid 990", "gateway-1 or gateway-2", "tcp 203.0.113.5:443"))
        seen.append(Attempt(when, "syscalls", "7/python3", "gateway-1", "connect 203.0.113.5:443"))
    started = time.monotonic()
    found = attribute(seen, GATEWAYS)
    assert time.monotonic() - started < 20
    assert {(a.process, a.component, a.destination) for a in found} == {
        ("7/python3", "gateway-1", "tcp 203.0.113.5:443")
    }


def test_a_call_long_before_is_not_the_packet_s() -> None:
    seen = [
        attempt("syscalls", "77/python3", "gateway-2", "connect 203.0.113.5:443", second=1),
        attempt("packets", "uid 990", "gateway-1 or gateway-2", "tcp 203.0.113.5:443", second=30),
    ]
    assert attribute(seen, GATEWAYS)[1].process == "uid 990"


def test_the_name_behind_an_address_is_told() -> None:
    seen = [attempt("packets", "1/x", "nginx", "tcp [2001:db8:53::1]:443", detail="refused")]
    (found,) = attribute(seen, GATEWAYS, {"2001:db8:53::1": "api.example.com"})
    assert found.detail == "refused; this address was the sinkhole's answer to api.example.com"


def test_only_the_way_of_a_question_to_the_name_server_is_left_out_and_only_if_names_were_watched() -> None:
    seen = [
        attempt("syscalls", "1/x", "nginx", "udp 10.0.0.53:53"),
        attempt("syscalls", "1/x", "nginx", "udp 10.0.0.53:853"),
        attempt("syscalls", "1/x", "nginx", "udp 203.0.113.53:53"),
        attempt("packets", "1/x", "nginx", "udp 10.0.0.53:53"),
        attempt("dns", "1/x", "nginx", "name api.example.com (A)"),
    ]
    assert len(attribute(seen, GATEWAYS)) == 5
    left = attribute(seen, GATEWAYS, name_servers=frozenset({"10.0.0.53"}))
    assert sorted((a.layer, a.destination) for a in left) == [
        ("dns", "name api.example.com (A)"),
        ("packets", "udp 10.0.0.53:53"),
        ("syscalls", "udp 10.0.0.53:853"),
        ("syscalls", "udp 203.0.113.53:53"),
    ]


def test_a_call_to_the_name_server_that_no_question_belongs_to_is_an_attempt() -> None:
    call = attempt("syscalls", "1/x", "nginx", "tcp 10.0.0.53:53")
    servers = frozenset({"10.0.0.53"})
    assert attribute([call], GATEWAYS, name_servers=servers) == [call]
    others = attempt("dns", "2/y", "gateway-1", "name api.example.com (A)")
    assert call in attribute([call, others], GATEWAYS, name_servers=servers)
    later = attempt("dns", "1/x", "nginx", "name api.example.com (A)", second=30)
    assert call in attribute([call, later], GATEWAYS, name_servers=servers)


def test_a_question_that_was_answered_truly_explains_its_call_and_is_no_attempt() -> None:
    call = attempt("syscalls", "7/python3", "gateway-2", "udp 10.0.0.53:53")
    answered = attempt(ANSWERED, "uid 990", "gateway-1 or gateway-2", "name llm.site.example (A)")
    assert attribute([call, answered], GATEWAYS, name_servers=frozenset({"10.0.0.53"})) == []
    assert attribute([call, answered], GATEWAYS) == [call]


def test_a_question_learns_its_process_if_just_one_spoke_to_the_name_server() -> None:
    question = attempt("dns", "uid 990", "gateway-1 or gateway-2", "name api.example.com (A)")
    one = attempt("syscalls", "7/python3", "gateway-2", "udp 10.0.0.53:53")
    two = attempt("syscalls", "8/python3", "gateway-1", "connect 10.0.0.53:53")
    other = attempt("syscalls", "9/minio", "minio", "udp 10.0.0.53:53")
    servers = frozenset({"10.0.0.53"})
    found, unasked = attribute([question, one, other], GATEWAYS, name_servers=servers)
    assert (found.process, found.component) == ("7/python3", "gateway-2")
    assert unasked == other
    assert attribute([question, one, two], GATEWAYS, name_servers=servers) == [question]
    again = attempt("dns", "uid 990", "gateway-1 or gateway-2", "name api.example.com (A)", second=9)
    assert {a.process for a in attribute([question, again, one], GATEWAYS, name_servers=servers)} == {"7/python3"}


def test_name_servers(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("# x\nnameserver 10.0.0.53\nsearch a\nnameserver fe80::1%eth0\nnameserver\n", "ascii")
    assert name_servers(conf) == {"10.0.0.53", "fe80::1"}
    assert name_servers(tmp_path / "none") == frozenset()


def test_controls_go_to_documentation_addresses_only() -> None:
    for _ in range(50):
        marks = draw()
        assert ipaddress.ip_address(marks.ipv4) in ipaddress.ip_network("198.51.100.0/24")
        assert ipaddress.ip_address(marks.ipv6) in ipaddress.ip_network("2001:db8::/32")
        assert marks.name.endswith(".invalid")
        assert marks.is_control(marks.ipv4, marks.port)
        assert not marks.is_control("203.0.113.1", marks.port)


def test_the_rules_refuse_each_user_after_what_is_allowed_and_touch_nobody_else() -> None:
    lines = ruleset([33, 990], [parse("tcp 10.0.0.5:8000", nothing)], [22, 8443], 4000, 4001).splitlines()
    rules = [line.strip() for line in lines]
    allowed = rules.index("ip daddr 10.0.0.5/32 tcp dport 8000 accept")
    refused = [i for i, rule in enumerate(rules) if rule.endswith("goto refuse")]
    assert [rules[i].split()[2] for i in refused] == ["33", "990"]
    assert allowed < min(refused)
    assert not any("drop" in rule or "reject" in rule for rule in rules if "skuid 0-" in rule)
