# SPDX-License-Identifier: Apache-2.0
"""Proves that nothing leaves: the guard stops every way out of Python, and a gateway asks no name and connects nowhere.

Each zero has its control: the same capture over the unguarded program, and over LiteLLM's own command, sees attempts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.gateway.attempts import ATTEMPTS
from tests.integration.gateway.isolated import SINKHOLE, Report, outside_of, run_isolated

WAYS_OUT = sorted(set(ATTEMPTS) - {"loopback"})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Report:
    return run_isolated("attempts", tmp_path_factory.mktemp("guarded"), python, names="sinkhole")


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Report:
    return run_isolated("attempts-unguarded", tmp_path_factory.mktemp("open"), python, names="sinkhole")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Report:
    return run_isolated("gateway", tmp_path_factory.mktemp("gateway"), python, names="drop")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Report:
    return run_isolated("stock", tmp_path_factory.mktemp("stock"), python, names="sinkhole", calls="none")


def test_reading_the_trace() -> None:
    trace = """\
12 connect(3, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.53")}, 16) = 0
12 connect(3, {sa_family=AF_UNIX, sun_path="/x"}, 110) = -1 ENOENT
13 connect(4, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("198.51.100.7")}, 16) = -1 ENETUNREACH
13 connect(5, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = -1
[pid    9] sendto(3, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(5), sin_addr=inet_addr("203.0.113.1")}, 16) = 1
9 sendto(3, "x", 1, 0, NULL, 0) = 1
"""  # noqa: E501
    assert outside_of(trace) == ["connect 198.51.100.7:443", "connect 2001:db8::1:80", "sendto 203.0.113.1:5"]


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_guard_refuses_and_counts(guarded: Report, way: str) -> None:
    result = guarded.calls[way]
    assert "refused by Moat" in result["outcome"], result
    assert result["denied"] >= 1


def test_the_guard_lets_the_loopback_alone(guarded: Report) -> None:
    assert guarded.calls["loopback"] == {"outcome": "worked", "denied": 0}


def test_with_the_guard_no_query_and_no_packet_leaves(guarded: Report) -> None:
    assert guarded.queries == []
    assert guarded.outside == []


def test_control_without_the_guard_the_same_capture_sees_them(unguarded: Report) -> None:
    assert "way-out.example" in unguarded.queries
    assert any(d.startswith(f"connect {SINKHOLE}:443") for d in unguarded.outside)
    assert any(d.startswith(f"sendto {SINKHOLE}:53") for d in unguarded.outside)
    assert any(d.startswith(f"sendmsg {SINKHOLE}:53") for d in unguarded.outside)
    assert "connect 2001:db8::7:443" in unguarded.outside
    assert all("refused by Moat" not in r["outcome"] for r in unguarded.calls.values())


def test_a_gateway_behind_a_name_server_that_drops_everything(gateway: Report) -> None:
    assert gateway.seconds_to_ready is not None, gateway.output
    assert gateway.queries == []
    assert gateway.outside == []
    for label in ("chat", "stream", "models", "info"):
        assert gateway.calls[label]["status"] == 200, (label, gateway.calls[label])
    assert "[DONE]" in gateway.calls["stream"]["body"]


def test_counting_tokens_of_a_llama_model_does_not_go_to_the_hub(gateway: Report) -> None:
    for label in ("count-llama-3", "count-llama-2", "count"):
        assert gateway.calls[label]["status"] == 200, gateway.calls[label]
        assert gateway.calls[label]["seconds"] < 20
        assert '"total_tokens":' in gateway.calls[label]["body"]


def test_an_address_in_a_prompt_is_refused_counted_and_never_connected_to(gateway: Report) -> None:
    assert gateway.calls["picture"]["status"] != 200
    assert gateway.outside == []
    assert gateway.status["egress"]["denied"] >= 1


def test_control_litellms_own_command_asks_names_and_connects(stock: Report) -> None:
    assert stock.seconds_to_ready is not None, stock.output
    assert len(stock.queries) > 0
    assert any(SINKHOLE in d for d in stock.outside)
