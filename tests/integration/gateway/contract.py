# SPDX-License-Identifier: Apache-2.0
"""Looks at the LiteLLM that is installed and prints, as JSON, each thing that Moat leans on and whether it holds.

Run with the gateway's interpreter; ``test_litellm_contract.py`` turns each line into a test with a name.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moat_gateway import litellm_port

os.environ.update(litellm_port.OFFLINE)


def _source(thing: Any) -> str:
    return inspect.getsource(thing)


def _proxy() -> Any:
    from litellm.proxy import proxy_server

    return proxy_server


def app_is_plain_asgi() -> bool:
    parameters = list(inspect.signature(_proxy().app.__call__).parameters)
    return parameters == ["scope", "receive", "send"]


def globals_that_verify_reads() -> bool:
    from litellm.proxy.auth import user_api_key_auth

    names = ("user_custom_auth", "general_settings", "prisma_client", "master_key", "llm_router")
    return all(hasattr(_proxy(), n) for n in names) and hasattr(user_api_key_auth, "enterprise_custom_auth")


def lifespan_reads_config_file_path() -> bool:
    return 'get_secret_str("CONFIG_FILE_PATH")' in _source(_proxy().proxy_startup_event)


def custom_auth_is_called_with_request_and_key() -> bool:
    from litellm.proxy.auth import user_api_key_auth

    return "await user_custom_auth(request=request, api_key=api_key)" in _source(user_api_key_auth)


def both_switches_exist() -> bool:
    from litellm.proxy.auth import user_api_key_auth

    text = _source(user_api_key_auth)
    return '"enable_post_custom_auth_checks"' in text and '"custom_auth_run_common_checks"' in text


def auth_object_takes_our_fields() -> bool:
    from litellm.proxy._types import UserAPIKeyAuth

    fields = {
        "api_key", "key_alias", "models", "team_id", "team_alias", "team_models", "team_rpm_limit", "team_tpm_limit",
        "expires", "user_role", "user_id",
    }  # fmt: skip
    return fields <= set(UserAPIKeyAuth.model_fields)


def a_hash_is_kept_as_it_is() -> bool:
    from litellm.proxy._types import UserAPIKeyAuth

    return bool(UserAPIKeyAuth(api_key="a" * 64).api_key == "a" * 64)


def all_proxy_models_is_the_word_for_every_model() -> bool:
    from litellm.proxy._types import SpecialModelNames

    return bool(SpecialModelNames.all_proxy_models.value == "all-proxy-models")


def hub_download_can_be_turned_off() -> bool:
    import litellm

    return litellm.disable_hf_tokenizer_download in (None, False) and "disable_hf_tokenizer_download" in _source(
        litellm.utils._select_tokenizer_helper
    )


def rust_is_off_for_what_is_open() -> bool:
    from litellm.rust_bridge.catalog import Route, RouteContext, decision
    from litellm.rust_bridge.configuration import Decision

    # OCR and Bedrock's transcription are Rust only: the first is a closed path, the second needs an api_base.
    asked = [r for r in Route if r not in (Route.OCR, Route.TRANSCRIPTION)]
    providers = (None, "anthropic", "openai", "huggingface", "tiktoken")
    return all(decision(RouteContext(r, provider=p)) is Decision.PYTHON for r in asked for p in providers)


def offline_switches_are_still_read() -> bool:
    root = Path(sys.modules["litellm"].__file__ or "").parent
    wanted = {n for n in litellm_port.OFFLINE if n.startswith("LITELLM_") and n not in ("LITELLM_TELEMETRY",)}
    wanted |= {"NO_DOCS", "NO_REDOC"}
    for path in root.rglob("*.py"):
        text = path.read_text("utf-8", "replace")
        wanted -= {n for n in wanted if n in text}
    return not wanted


def importing_set_no_event_loop_policy() -> bool:
    _proxy()
    loop = asyncio.new_event_loop()
    loop.close()
    return type(loop).__module__.startswith("asyncio")


def no_native_resolver() -> bool:
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return not names & {"aiodns", "pycares", "grpcio", "litellm-enterprise"}


def router_has_names_and_deployments() -> bool:
    import litellm

    router = litellm.Router(
        model_list=[
            {
                "model_name": "a",
                "litellm_params": {"model": "openai/a", "api_base": "http://127.0.0.1:9", "api_key": "x"},
            }
        ]
    )
    return list(router.model_names) == ["a"] and len(router.model_list) == 1


def bundled_tokenizers_load() -> bool:
    import tiktoken
    from litellm.litellm_core_utils.default_encoding import encoding

    return len(encoding.encode("hello")) == 1 and all(
        tiktoken.get_encoding(name).encode("hello there") for name in ("cl100k_base", "o200k_base", "p50k_base")
    )


def routing_strategies_are_those_we_name() -> bool:
    from litellm.router_utils.routing_groups import VALID_ROUTING_STRATEGIES

    from moat_gateway.litellm_port import words

    return set(words.ROUTING_STRATEGIES) == set(VALID_ROUTING_STRATEGIES)


def router_settings_are_those_we_name() -> bool:
    import litellm
    from litellm.constants import ROUTER_SETTINGS_MANAGED_OUTSIDE_CONFIG

    from moat_gateway.litellm_port import words

    known = set(litellm.Router.get_valid_args()) - ROUTER_SETTINGS_MANAGED_OUTSIDE_CONFIG
    return bool(known == set(words.ROUTER_SETTINGS))


def an_invalid_deployment_is_an_error_where_it_is_not_ignored() -> bool:
    import litellm

    entry = {"model_name": "a", "litellm_params": {"model": "nonsense/a", "api_base": "http://127.0.0.1:9"}}
    try:
        litellm.Router(model_list=[entry], ignore_invalid_deployments=False)
    except Exception:
        return not litellm.Router(model_list=[entry], ignore_invalid_deployments=True).model_list
    return False


def a_configuration_can_be_loaded_from_memory() -> bool:
    """What the dry run does, in place of a file."""
    proxy = _proxy()
    reads = "await self._get_config_from_file(config_file_path=config_file_path)" in _source(
        proxy.ProxyConfig.get_config
    )
    loads = list(inspect.signature(proxy.ProxyConfig.load_config).parameters) == ["self", "router", "config_file_path"]
    return reads and loads


def one_thread_after_the_import_of_the_proxy() -> bool:
    """The dry run forks a process that has imported LiteLLM: with threads, that would not be sound."""
    code = "from litellm.proxy import proxy_server; import threading; print(threading.active_count())"
    argv = [sys.executable, "-c", code]
    environment = {**os.environ, **litellm_port.OFFLINE}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout.split() == ["1"]


# --- what is changed while LiteLLM serves (litellm_port/live.py) ---


def _small_router() -> Any:
    import litellm

    entry = {
        "model_name": "a",
        "litellm_params": {"model": "openai/a", "api_base": "http://127.0.0.1:9", "api_key": "x"},
    }
    return litellm.Router(model_list=[entry])


def the_tables_of_the_router_are_those_that_are_swapped() -> bool:
    """What a router with one more deployment holds in other attributes, and not in ours, would not be swapped."""
    from moat_gateway.litellm_port import live, put

    router, ours = _small_router(), {*put.TABLES, "pattern_router", "healthy_deployments"}
    before = {k: repr(v) for k, v in vars(router).items() if k not in ours}
    second = {"model": "openai/b", "api_base": "http://127.0.0.1:9", "api_key": "x"}
    staging = live._staging(router)
    staging._create_deployment(deployment_info={}, _model_name="b*", _litellm_params=second, _model_info={"id": "i"})
    added = {n for n in ours - {"healthy_deployments"} if repr(getattr(staging, n)) != repr(getattr(router, n))}
    untouched = {k: repr(v) for k, v in vars(router).items() if k not in ours} == before
    return untouched and {"model_list", "model_id_to_deployment_index_map", "pattern_router"} <= added


def the_router_answers_from_its_tables() -> bool:
    from moat_gateway.litellm_port import live, put

    router = _small_router()
    staging = live._staging(router)
    model = router.model_list[0]
    staging._add_model_to_list_and_index_map(model={**model, "model_name": "new"}, model_id=model["model_info"]["id"])
    staging.model_names = {"new"}
    for name in (*put.TABLES, "pattern_router"):
        setattr(router, name, getattr(staging, name))
    router._invalidate_model_group_info_cache()
    router._invalidate_access_groups_cache()
    return [m["model_name"] for m in router.get_model_list()] == ["new"] and bool(router.get_all_deployments("new"))


def a_router_that_is_discarded_leaves_no_callback() -> bool:
    import litellm

    _small_router()
    before = dict(litellm_port.callback_counts())
    for _ in range(3):
        litellm.Router(num_retries=1, fallbacks=[{"a": ["b"]}]).discard()
    return dict(litellm_port.callback_counts()) == before


def a_change_of_the_strategy_leaves_no_callback() -> bool:
    from moat_gateway.litellm_port import options

    router = _small_router()
    router.routing_strategy_init(routing_strategy="simple-shuffle", routing_strategy_args={})
    before = dict(litellm_port.callback_counts())
    for strategy in (*sorted(options.STRATEGIES), "simple-shuffle"):
        router.routing_strategy_init(routing_strategy=strategy, routing_strategy_args={})
    return dict(litellm_port.callback_counts()) == before


def the_router_has_the_attributes_of_its_live_settings() -> bool:
    from moat_gateway.litellm_port import options

    router = _small_router()
    names = {a for table in (options.ROUTER, options.LITELLM_OF_ROUTER) for row in table.values() for a in row}
    known = set(type(router).get_valid_args())
    settings = {*options.ROUTER, *options.ROUTER_STRATEGY, options.ROUTER_GROUPS}
    caches = hasattr(router.cooldown_cache, "default_cooldown_time") and hasattr(router, "_routing_groups_input")
    return all(hasattr(router, n) for n in names) and settings <= known and caches


def litellm_reads_its_live_settings_at_each_request() -> bool:
    """Each is an attribute of the module that some function reads; none is copied at import only."""
    import litellm

    from moat_gateway.litellm_port import options

    root = Path(litellm.__file__).parent
    text = "".join(p.read_text("utf-8", "replace") for p in root.rglob("*.py") if "integrations" not in p.parts)
    return all(hasattr(litellm, n) and f"litellm.{n}" in text for n in {*options.LITELLM, *options.LITELLM_OF_ROUTER})


def the_proxy_reads_its_live_general_settings_at_each_request() -> bool:
    from moat_gateway.litellm_port import options

    load = _source(_proxy().ProxyConfig.load_config)
    root = Path(_proxy().__file__).parent
    text = "".join(p.read_text("utf-8", "replace") for p in root.rglob("*.py"))
    return all(f'"{n}"' in text and f'"{n}"' not in load for n in options.GENERAL)


def the_proxy_has_what_a_change_calls() -> bool:
    proxy = _proxy()
    config = proxy.proxy_config
    calls = (
        "_check_for_os_environ_vars", "_load_yaml_settings_stores", "_config_with_resolved_settings",
        "_apply_resolved_runtime_settings", "load_credential_list",
    )  # fmt: skip
    functions = (
        "validate_deployment_max_agentic_loops", "validate_deployment_access_windows", "pin_complexity_router_model_id",
        "drop_params_flag", "hash_token", "litellm_master_key_hash", "llm_model_list",
    )  # fmt: skip
    resolves = config._check_for_os_environ_vars(config={"a": {"b": ["x", {"c": "os.environ/PATH"}]}})
    return (
        all(callable(getattr(config, n)) for n in calls)
        and all(hasattr(proxy, n) for n in functions)
        and resolves == {"a": {"b": ["x", {"c": os.environ["PATH"]}]}}
    )


def the_price_table_forgets_a_deployment() -> bool:
    import litellm

    from moat_gateway.litellm_port import prices

    before = len(litellm.model_cost)
    entry = {
        "model_name": "z",
        "litellm_params": {"model": "openai/z-unknown", "api_key": "x"},
        "model_info": {"id": "z"},
    }
    router = litellm.Router(model_list=[entry])
    known = len(litellm.model_cost) > before
    for key in prices.keys_of(router, router.model_list[0]):
        prices.forget(key)
    litellm.utils._invalidate_model_cost_lowercase_map()
    return known and len(litellm.model_cost) == before and "z" not in litellm.utils._registered_pricing_fields()


CONTRACTS: dict[str, Callable[[], bool]] = {
    f.__name__: f
    for f in (
        app_is_plain_asgi, globals_that_verify_reads, lifespan_reads_config_file_path,
        custom_auth_is_called_with_request_and_key, both_switches_exist, auth_object_takes_our_fields,
        a_hash_is_kept_as_it_is, all_proxy_models_is_the_word_for_every_model, hub_download_can_be_turned_off,
        rust_is_off_for_what_is_open, offline_switches_are_still_read, importing_set_no_event_loop_policy,
        no_native_resolver, router_has_names_and_deployments, bundled_tokenizers_load,
        the_tables_of_the_router_are_those_that_are_swapped, the_router_answers_from_its_tables,
        a_router_that_is_discarded_leaves_no_callback, a_change_of_the_strategy_leaves_no_callback,
        the_router_has_the_attributes_of_its_live_settings, litellm_reads_its_live_settings_at_each_request,
        the_proxy_reads_its_live_general_settings_at_each_request, the_proxy_has_what_a_change_calls,
        the_price_table_forgets_a_deployment,
        routing_strategies_are_those_we_name, router_settings_are_those_we_name,
        an_invalid_deployment_is_an_error_where_it_is_not_ignored, one_thread_after_the_import_of_the_proxy,
        a_configuration_can_be_loaded_from_memory,
    )
}  # fmt: skip


def main() -> None:
    results: dict[str, str] = {"version": litellm_port.version()}
    for name, contract in CONTRACTS.items():
        try:
            results[name] = "holds" if contract() else "does not hold"
        except Exception as e:
            results[name] = f"{type(e).__name__}: {e}"
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
