# SPDX-License-Identifier: Apache-2.0
"""Proves which changes of a configuration are taken live, that all others are named, and that the page says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from moat_gateway.litellm_port import options, words

ROOT = Path(__file__).resolve().parents[3]
BASE: dict[str, Any] = {
    "model_list": [{"model_name": "m", "litellm_params": {"model": "openai/m"}}],
    "general_settings": {"allowed_routes": ["/v1/models"], "store_prompts_in_spend_logs": False},
    "litellm_settings": {"drop_params": True, "callbacks": ["prometheus"]},
    "router_settings": {"num_retries": 1, "client_ttl": 60},
}


def names(section: str, **values: Any) -> tuple[str, ...]:
    """Return what a change of these settings needs a restart for; ``None`` removes one."""
    new = copy.deepcopy(BASE)
    for name, value in values.items():
        if value is None:
            new.setdefault(section, {}).pop(name, None)
        else:
            new.setdefault(section, {})[name] = value
    found = options.needs_restart(BASE, new)
    assert found == tuple(n for n in options.needs_restart(new, BASE))  # the way back is no easier
    return found


def test_the_same_needs_nothing() -> None:
    assert options.needs_restart(BASE, copy.deepcopy(BASE)) == ()


@pytest.mark.parametrize("name", sorted({*options.ROUTER, options.ROUTER_GROUPS}))
def test_router_settings_that_are_live(name: str) -> None:
    assert names("router_settings", **{name: [3]}) == ()


@pytest.mark.parametrize("name", sorted(words.ROUTER_SETTINGS - {*options.ROUTER, options.ROUTER_GROUPS}))
def test_every_other_router_setting_is_named(name: str) -> None:
    if name in options.ROUTER_STRATEGY:
        pytest.skip("depends on the strategies")
    assert names("router_settings", **{name: "x"}) == (f"router_settings.{name}",)


def test_the_tables_hold_settings_of_the_router_only() -> None:
    assert {*options.ROUTER, *options.ROUTER_STRATEGY, options.ROUTER_GROUPS} <= words.ROUTER_SETTINGS
    assert set(words.ROUTING_STRATEGIES) >= options.STRATEGIES


def test_strategies_between_which_the_router_can_switch() -> None:
    assert names("router_settings", routing_strategy="least-busy", routing_strategy_args={"ttl": 1}) == ()
    assert names("router_settings", routing_strategy="lar1") == ("router_settings.routing_strategy",)


@pytest.mark.parametrize("name", sorted({*options.LITELLM, *options.LITELLM_OF_ROUTER}))
def test_litellm_settings_that_are_live(name: str) -> None:
    assert names("litellm_settings", **{name: "x"}) == ()


@pytest.mark.parametrize("name", sorted(options.GENERAL))
def test_general_settings_that_are_live(name: str) -> None:
    assert names("general_settings", **{name: "x"}) == ()


def test_what_is_unknown_or_removed_is_named() -> None:
    assert names("litellm_settings", callbacks=None) == ("litellm_settings.callbacks",)
    two = ("litellm_settings.cache", "litellm_settings.something")
    assert names("litellm_settings", cache=True, something=1) == two
    assert names("general_settings", pass_through_endpoints=[]) == ("general_settings.pass_through_endpoints",)
    assert names("environment_variables", X="1") == ("environment_variables",)
    assert options.needs_restart(BASE, {**BASE, "mcp_servers": {"a": {}}, "guardrails": []}) == (
        "guardrails",
        "mcp_servers",
    )


def test_deployments_and_credentials_are_live() -> None:
    new = {**BASE, "model_list": [], "credential_list": [{"credential_name": "c"}]}
    assert options.needs_restart(BASE, new) == ()


@pytest.mark.parametrize(
    ("params", "info", "why"),
    [
        ({"use_in_pass_through": True}, {}, "use_in_pass_through"),
        ({"max_budget": 1, "budget_duration": "1d"}, {}, "max_budget"),
        ({}, {"ptu_count": 1}, "ptu"),
    ],
)
def test_deployments_that_the_start_does_more_for(params: dict[str, Any], info: dict[str, Any], why: str) -> None:
    entry = {"model_name": "m", "litellm_params": {"model": "x", **params}, "model_info": info}
    assert options.restart_for_entries([entry]) == (f"model_list: m: {why}",)
    assert options.restart_for_entries([BASE["model_list"][0]]) == ()


def test_the_routers_among_the_models_are_known() -> None:
    assert options.routes_between_models({"litellm_params": {"model": "auto_router/complexity_router"}})
    assert not options.routes_between_models(BASE["model_list"][0])


def test_the_page_names_every_live_setting() -> None:
    page = (ROOT / "docs/gateway.md").read_text("utf-8")
    live = {*options.ROUTER, *options.ROUTER_STRATEGY, options.ROUTER_GROUPS, *options.LITELLM}
    live |= {*options.LITELLM_OF_ROUTER, *options.GENERAL, *options.STRATEGIES}
    assert [n for n in sorted(live) if f"`{n}`" not in page] == []
