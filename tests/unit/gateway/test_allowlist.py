# SPDX-License-Identifier: Apache-2.0
"""Proves what the allow-list lets through: nothing but the loopback by default, and no trick with the spelling."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway.allowlist import (
    AllowList,
    Destination,
    NotADestination,
    destinations_of_urls,
    is_local,
    parse_host_port,
)


def urls(text: str) -> list[str]:
    return ["?" if isinstance(d, NotADestination) else str(d) for d in destinations_of_urls(text)]


@pytest.mark.parametrize(
    ("entry", "allowed", "refused"),
    [
        ("model", ["model:8081", "MODEL.:1", "model:443"], ["model2:1", "a.model:1", "203.0.113.1:1"]),
        ("model:8081", ["model:8081"], ["model:8082"]),
        ("203.0.113.7", ["203.0.113.7:1", "[::ffff:203.0.113.7]:5"], ["203.0.113.8:1"]),
        ("203.0.113.7:443", ["203.0.113.7:443"], ["203.0.113.7:80"]),
        ("203.0.113.0/24", ["203.0.113.255:9"], ["203.0.114.1:9", "[2001:db8::1]:9"]),
        ("2001:db8::/32", ["[2001:db8:1::5]:9"], ["[2001:db9::1]:9", "203.0.113.1:9"]),
        ("[2001:db8::1]:443", ["[2001:db8::1]:443"], ["[2001:db8::1]:444"]),
    ],
)
def test_entries(entry: str, allowed: list[str], refused: list[str]) -> None:
    allow = AllowList.parse([entry])
    for text in allowed:
        assert allow.allows(parse_host_port(text)), text
    for text in refused:
        assert not allow.allows(parse_host_port(text)), text


@pytest.mark.parametrize("local", ["localhost", "127.0.0.1", "127.8.8.8", "::1", "::", "::ffff:127.0.0.1"])
def test_the_loopback_needs_no_entry(local: str) -> None:
    assert is_local(local)
    assert AllowList().allows(Destination(local, 80))


@pytest.mark.parametrize(
    "name", ["localhost.example.net", "127.0.0.1.example.net", "127.1", "2130706433", "0x7f000001"]
)
def test_what_only_looks_local_is_not(name: str) -> None:
    assert not AllowList().allows(Destination(name, 80))


@pytest.mark.parametrize(
    "text",
    ["", "a b", "a:b:c", "http://x", "x:0", "x:65536", "x:", "[::1", "[x]:1", "ex\u0430mple", "a..b", "-a", "a/b"],
)
def test_what_is_no_destination(text: str) -> None:
    with pytest.raises(NotADestination):
        AllowList.parse([text])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("http://model:8081/v1", ["model:8081"]),
        ("https://api.openai.com/v1", ["api.openai.com:443"]),
        ("redis://:pass@valkey/0", ["valkey:6379"]),
        ("see http://a and https://b:1", ["a:80", "b:1"]),
        ("http://allowed@evil.example/", ["evil.example:80"]),
        ("http://allowed:80@evil.example:81/", ["evil.example:81"]),
        ("http://evil.example#@allowed/", ["evil.example:80"]),
        ("http://evil.example\\@allowed/", ["?"]),
        ("http://[2001:db8::1]:9/x", ["[2001:db8::1]:9"]),
        ("http://a,b:2/x", ["a:80", "b:2"]),
        ("HTTP://UPPER.example", ["upper.example:80"]),
        ("http://%65vil/", ["?"]),
        ("http:///path", ["?"]),
        ("http://\u0435vil.example/", ["?"]),
        ("file:///etc/x", []),
        ("s3://bucket/key", ["bucket"]),
        ("oidc/azure", []),
        ("no url", []),
    ],
)
def test_where_urls_point(text: str, want: list[str]) -> None:
    assert urls(text) == want


names = st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z](\.[a-z]{2,5}){0,2}", fullmatch=True).filter(lambda n: n != "localhost")
ports = st.integers(1, 65535)


@given(names, ports)
def test_an_empty_list_allows_no_name(name: str, port: int) -> None:
    assert not AllowList().allows(Destination(name, port))


@given(names, names, ports, ports)
def test_a_name_with_a_port_allows_exactly_that(name: str, other: str, port: int, other_port: int) -> None:
    allow = AllowList.parse([f"{name}:{port}"])
    assert allow.allows(Destination(name, port))
    assert allow.allows(Destination(other, other_port)) == ((name, port) == (other, other_port))


@given(st.ip_addresses(), ports)
def test_addresses_are_allowed_by_their_network_alone(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    expected = is_local(str(address))
    assert AllowList().allows(Destination(str(address), port)) == expected
    assert AllowList.parse([str(address)]).allows(Destination(str(address), port))


@given(st.text(max_size=60))
def test_reading_urls_never_breaks(text: str) -> None:
    for d in destinations_of_urls("http://" + text):
        assert isinstance(d, Destination | NotADestination)


def test_a_long_text_is_read_in_one_pass() -> None:
    """A value of a configuration may be megabytes long; a search that backs up over it would take hours."""
    text = "y" * 2_000_000 + " http://model:8081/" + "z" * 2_000_000
    assert [str(d) for d in destinations_of_urls(text)] == ["model:8081"]


@pytest.mark.parametrize("before", ["1" * 100, "a" * 100, "?:.", "x://"])
def test_what_stands_before_a_url_does_not_hide_it(before: str) -> None:
    found = list(destinations_of_urls(before + "://outside.example.net/x"))
    assert found
    assert all(isinstance(d, NotADestination) or d.host == "outside.example.net" for d in found)
