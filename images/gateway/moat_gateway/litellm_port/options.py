# SPDX-License-Identifier: Apache-2.0
"""Which settings of LiteLLM 1.106.2 can be changed while it serves; whatever is not named here needs a restart.

A setting is in a table only if LiteLLM reads it at each request, or if what it makes of it at the start is an attribute
of the router that can be replaced; ``tests/integration/gateway/contract.py`` holds each of them against the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: ``router_settings``: the attributes of the router that follow from each.
ROUTER: Mapping[str, tuple[str, ...]] = {
    "allowed_fails": ("allowed_fails",),
    "allowed_fails_policy": ("allowed_fails_policy",),
    "content_policy_fallbacks": ("content_policy_fallbacks",),
    "context_window_fallbacks": ("context_window_fallbacks",),
    "cooldown_time": ("cooldown_time",),
    "default_fallbacks": ("fallbacks",),
    "default_priority": ("default_priority",),
    "disable_cooldowns": ("disable_cooldowns",),
    "enable_pre_call_checks": ("enable_pre_call_checks",),
    "enable_tag_filtering": ("enable_tag_filtering",),
    "enable_weighted_failover": ("enable_weighted_failover",),
    "fallbacks": ("fallbacks",),
    "max_fallbacks": ("max_fallbacks",),
    "model_group_alias": ("model_group_alias",),
    "model_group_retry_policy": ("model_group_retry_policy",),
    "num_retries": ("num_retries",),
    "retry_after": ("retry_after",),
    "retry_policy": ("retry_policy",),
    "stream_timeout": ("stream_timeout",),
    "tag_filtering_match_any": ("tag_filtering_match_any",),
    "timeout": ("timeout", "_explicit_timeout", "request_timeout", "default_litellm_params"),
}
#: ``router_settings`` for which the router has a way of its own to begin anew.
ROUTER_STRATEGY = frozenset({"routing_strategy", "routing_strategy_args"})
ROUTER_GROUPS = "routing_groups"
#: Strategies between which the router can switch; others are set up in ways that only a start does.
STRATEGIES = frozenset(
    {
        "simple-shuffle", "least-busy", "usage-based-routing", "usage-based-routing-v2", "latency-based-routing",
        "cost-based-routing",
    }
)  # fmt: skip

#: ``litellm_settings``: attributes of the module ``litellm`` that it reads at each request.
LITELLM = frozenset(
    {
        "add_function_to_prompt", "drop_params", "enable_json_schema_validation", "forward_traceparent_to_llm_provider",
        "modify_params", "redact_messages_in_exceptions", "redact_user_api_key_info", "turn_off_message_logging",
    }
)  # fmt: skip
#: ``litellm_settings`` that the router takes as its own defaults when it is made: its attributes.
LITELLM_OF_ROUTER: Mapping[str, tuple[str, ...]] = {
    "allowed_fails": ("allowed_fails",),
    "content_policy_fallbacks": ("content_policy_fallbacks",),
    "context_window_fallbacks": ("context_window_fallbacks",),
    "default_fallbacks": ("fallbacks",),
    "fallbacks": ("fallbacks",),
    "max_fallbacks": ("max_fallbacks",),
    "num_retries": ("num_retries",),
    "request_timeout": ("timeout", "_explicit_timeout", "request_timeout", "default_litellm_params"),
}
#: ``general_settings`` that LiteLLM reads at each request.
GENERAL = frozenset(
    {
        "admission_queue_timeout_seconds", "allow_client_side_credentials", "allowed_routes",
        "always_include_stream_usage", "enforce_user_param", "expose_fallback_errors_to_caller",
        "forward_client_headers_to_llm_api", "forward_llm_provider_auth_headers", "forward_openai_org_id",
        "max_in_flight_requests_per_worker", "max_queued_requests_per_worker", "max_response_size_mb",
        "reject_clientside_metadata_tags", "user_header_mappings", "user_header_name",
    }
)  # fmt: skip

#: Sections that are compared setting by setting.
SETTINGS = ("general_settings", "litellm_settings", "router_settings")
#: Sections that can be changed as a whole; the entries of ``model_list`` have rules of their own.
WHOLE = frozenset({"model_list", "credential_list"})


def changed(old: Mapping[str, Any], new: Mapping[str, Any], section: str) -> tuple[str, ...]:
    """Return the settings of a section that are not the same in both configurations."""
    a, b = old.get(section) or {}, new.get(section) or {}
    return tuple(sorted(k for k in {*a, *b} if k not in a or k not in b or a[k] != b[k]))


def needs_restart(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of what differs and cannot be changed while LiteLLM serves (deployments left out).

    Args:
        old: the configuration in force, as LiteLLM was given it.
        new: the one that is wanted.
    """
    names = [
        section
        for section in sorted({*old, *new})
        if section not in WHOLE and section not in SETTINGS and old.get(section) != new.get(section)
    ]
    for section in SETTINGS:
        names += [f"{section}.{name}" for name in changed(old, new, section) if not _live(section, name, old, new)]
    return tuple(names)


def _live(section: str, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if section == "general_settings":
        return name in GENERAL
    if section == "litellm_settings":
        return name in LITELLM or name in LITELLM_OF_ROUTER
    if name in ROUTER_STRATEGY:
        return all((c.get("router_settings") or {}).get("routing_strategy", "simple-shuffle") in STRATEGIES
                   for c in (old, new))  # fmt: skip
    return name in ROUTER or name == ROUTER_GROUPS


def restart_for_entries(entries: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return why deployments that were added, changed or removed need a restart; empty if they do not.

    Args:
        entries: of ``model_list``, old and new ones.
    """
    names = set()
    for entry in entries:
        params, info = entry.get("litellm_params") or {}, entry.get("model_info") or {}
        name = entry.get("model_name")
        if params.get("use_in_pass_through"):
            names.add(f"model_list: {name}: use_in_pass_through")
        if params.get("max_budget") is not None and params.get("budget_duration") is not None:
            names.add(f"model_list: {name}: max_budget")
        if any(k.startswith("ptu") for k in info):
            names.add(f"model_list: {name}: ptu")
    return tuple(sorted(names))


def routes_between_models(entry: Mapping[str, Any]) -> bool:
    """Say whether a deployment is one of LiteLLM's own routers, which look at the other deployments when made."""
    return str((entry.get("litellm_params") or {}).get("model", "")).startswith("auto_router/")
