# SPDX-License-Identifier: Apache-2.0
"""Words of LiteLLM's router that a configuration may use, so that a typing error is named with its line.

LiteLLM passes over a setting of the router that it does not know, with a warning; a contract test compares the lists.
"""

from __future__ import annotations

#: ``router_settings.routing_strategy``, and ``routing_groups[].routing_strategy``, which also knows ``priority``.
ROUTING_STRATEGIES = (
    "simple-shuffle",
    "least-busy",
    "latency-based-routing",
    "cost-based-routing",
    "usage-based-routing",
    "usage-based-routing-v2",
    "provider-budget-routing",
    "lar1",
)
GROUP_STRATEGIES = (*ROUTING_STRATEGIES, "priority")

#: Keys of ``router_settings``.
ROUTER_SETTINGS = frozenset(
    {
        "alerting_config", "allowed_fails", "allowed_fails_policy", "background_health_check_model_groups",
        "cache_kwargs", "cache_responses", "caching_groups", "client_ttl", "content_policy_fallbacks",
        "context_window_fallbacks", "cooldown_time", "debug_level", "default_fallbacks", "default_litellm_params",
        "default_max_parallel_requests", "default_priority", "deployment_affinity_ttl_seconds", "disable_cooldowns",
        "enable_health_check_routing", "enable_pre_call_checks", "enable_tag_filtering", "enable_weighted_failover",
        "fallbacks", "guardrail_list", "health_check_ignore_transient_errors", "health_check_staleness_threshold",
        "max_fallbacks", "model_group_affinity_config", "model_group_alias", "model_group_retry_policy", "num_retries",
        "optional_pre_call_checks", "plugins", "polling_interval", "provider_budget_config", "redis_db", "redis_host",
        "redis_password", "redis_port", "redis_url", "retry_after", "retry_policy", "routing_groups",
        "routing_strategy", "routing_strategy_args", "set_verbose", "stream_timeout", "tag_filtering_match_any",
        "tag_routing_prefix", "timeout",
    }
)  # fmt: skip
