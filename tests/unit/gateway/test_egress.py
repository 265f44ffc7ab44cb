# SPDX-License-Identifier: Apache-2.0
"""Proves the decisions of the egress guard; that the installed hook obeys them is shown in the integration tests."""

from __future__ import annotations

import socket

import pytest

from moat_gateway.allowlist import AllowList
from moat_gateway.egress import EgressGuard


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(*allow: str) -> tuple[EgressGuard, list[tuple[str, str, int]], Clock]:
    said: list[tuple[str, str, int]] = []
    clock = Clock()
    guard = EgressGuard(AllowList.parse(allow), lambda op, d, n: said.append((op, d, n)), clock)
    return guard, said, clock


@pytest.mark.parametrize("host", [None, "", b"", "localhost", "127.0.0.1", b"127.0.0.1", "::1", "203.0.113.9", "model"])
def test_look_ups_that_are_let_through(host: object) -> None:
    guard, said, _ = make("model:8081")
    guard.check_name("getaddrinfo", host, 80)
    assert said == []


@pytest.mark.parametrize(
    "host", ["huggingface.co", b"huggingface.co", "model.example.net", "localhost.example.net", "127.1"]
)
def test_look_ups_that_are_refused_before_a_query(host: object) -> None:
    guard, said, _ = make("model:8081")
    with pytest.raises(socket.gaierror):
        guard.check_name("getaddrinfo", host, 443)
    assert len(said) == guard.denied_total == 1


def test_connections() -> None:
    guard, _, _ = make("203.0.113.0/24", "198.51.100.7:443")
    for host, port in (("127.0.0.1", 1), ("::1", 2), ("203.0.113.200", 5), ("198.51.100.7", 443), ("::", 9)):
        guard.check_connect("connect", host, port)
    for host, port in (("198.51.100.7", 80), ("198.51.100.8", 443), ("2001:db8::1", 443), ("192.0.2.1", 53)):
        with pytest.raises(PermissionError):
            guard.check_connect("connect", host, port)
    assert guard.denied_total == 4


def test_an_address_is_allowed_for_the_name_it_was_looked_up_for_on_its_port_and_for_a_time() -> None:
    guard, _, clock = make("model:8081")
    guard.remember("model", ["203.0.113.5"])
    guard.remember("evil.example", ["203.0.113.6"])
    guard.check_connect("connect", "203.0.113.5", 8081)
    for host, port in (("203.0.113.5", 22), ("203.0.113.6", 8081)):
        with pytest.raises(PermissionError):
            guard.check_connect("connect", host, port)
    clock.now = 3601
    with pytest.raises(PermissionError):
        guard.check_connect("connect", "203.0.113.5", 8081)


def test_every_refusal_is_counted_and_the_log_is_not_flooded() -> None:
    guard, said, clock = make()
    for i in range(50):
        clock.now = i / 10
        with pytest.raises(PermissionError):
            guard.check_connect("connect", "203.0.113.1", 80)
    assert guard.denied_total == 50
    assert said == [("connect", "203.0.113.1:80", 1)]
    clock.now = 11
    with pytest.raises(PermissionError):
        guard.check_connect("connect", "203.0.113.1", 80)
    assert said[-1] == ("connect", "203.0.113.1:80", 50)
