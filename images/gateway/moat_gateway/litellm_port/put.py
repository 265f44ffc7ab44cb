# SPDX-License-Identifier: Apache-2.0
"""The one step that puts a prepared configuration into force, each part of it with the way back.

Nothing here awaits anything: a request sees all of it or nothing.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moat_gateway.configrules import MASTER_KEY_NAME
from moat_gateway.litellm_port import options

if TYPE_CHECKING:
    from moat_gateway.litellm_port.live import Wanted

#: Attributes of the router that hold its deployments, and what each is before there is one.
TABLES: Mapping[str, Callable[[], Any]] = {
    "model_list": list,
    "model_names": set,
    "model_id_to_deployment_index_map": dict,
    "model_name_to_deployment_indices": dict,
    "team_model_to_deployment_indices": dict,
    "team_public_model_names": frozenset,
    "deployment_names": list,
    "deployment_latency_map": dict,
    "provider_default_deployment_ids": list,
    "team_pattern_routers": dict,
    "_provider_unresolved_deployments": tuple,
}
Undo = list[Callable[[], object]]


def serving_router() -> Any:
    """Return the router that serves."""
    from litellm.proxy import proxy_server

    return proxy_server.llm_router


def put(old: Wanted, new: Wanted, staging: Any, defaults: Mapping[str, Any], undo: Undo) -> None:
    """Put a configuration into force.

    Args:
        old: what serves.
        new: what shall serve.
        staging: the new tables of the router; ``None`` if the deployments stay as they are.
        defaults: of LiteLLM's settings.
        undo: gets what takes each step back; to be called in the reverse order if this raises.
    """
    import litellm
    from litellm.proxy import proxy_server

    router = serving_router()
    set_environment(new.secrets, undo)
    general = options.changed(old.effective, new.effective, "general_settings")
    ours = options.changed(old.effective, new.effective, "litellm_settings")
    routing = options.changed(old.effective, new.effective, "router_settings")
    if ours:
        _put_litellm(new.effective, ours, defaults, undo)
    attributes = {a for n in ours for a in options.LITELLM_OF_ROUTER.get(n, ())}
    attributes |= {a for n in routing for a in options.ROUTER.get(n, ())}
    if attributes:
        _put_attributes(router, new.effective, attributes, defaults, undo)
    undo.append(router._invalidate_model_group_info_cache)
    undo.append(router._invalidate_access_groups_cache)
    if staging is not None:
        tables = {n: getattr(staging, n) for n in (*TABLES, "pattern_router")}
        for name, value in {**tables, "healthy_deployments": tables["model_list"]}.items():
            _set(router, name, value, undo)
    router._invalidate_model_group_info_cache()
    router._invalidate_access_groups_cache()
    if options.ROUTER_STRATEGY.intersection(routing):
        _put_strategy(router, new.effective, old.effective, undo)
    groups = (new.effective.get("router_settings") or {}).get(options.ROUTER_GROUPS)
    if groups or options.ROUTER_GROUPS in routing:
        _put_groups(router, groups, undo)
    if old.effective.get("credential_list") != new.effective.get("credential_list") or old.secrets != new.secrets:
        resolved = proxy_server.proxy_config._check_for_os_environ_vars(
            config={"credential_list": copy.deepcopy(new.effective.get("credential_list"))}
        )
        _set(litellm, "credential_list", proxy_server.proxy_config.load_credential_list(config=resolved), undo)
    if general or ours or routing:
        undo.append(lambda: _load_sections(old.effective))
        _load_sections(new.effective)
    _set(proxy_server, "llm_model_list", router.get_model_list(), undo)


def _put_litellm(effective: Mapping[str, Any], names: Sequence[str], defaults: Mapping[str, Any], undo: Undo) -> None:
    import litellm

    wanted = effective.get("litellm_settings") or {}
    for name in names:
        value = copy.deepcopy(wanted[name]) if name in wanted else copy.deepcopy(defaults[name])
        if name == "drop_params" and name in wanted:
            from litellm.proxy import proxy_server

            value = proxy_server.drop_params_flag(
                value, "litellm_settings.drop_params", proxy_server.verbose_proxy_logger
            )
        _set(litellm, name, value, undo)
        if name == "request_timeout":
            explicit = name in wanted or defaults["request_timeout_explicitly_set"]
            _set(litellm, "request_timeout_explicitly_set", explicit, undo)


def _put_attributes(
    router: Any, effective: Mapping[str, Any], names: set[str], defaults: Mapping[str, Any], undo: Undo
) -> None:
    """Take attributes from a router that LiteLLM makes of the new settings: it is LiteLLM who checks them."""
    import litellm

    # A router adds its default fallbacks to the list that it is given: each gets a list of its own.
    _put_litellm(effective, tuple(options.LITELLM_OF_ROUTER), defaults, undo)
    settings = effective.get("router_settings") or {}
    template = litellm.Router(**{k: copy.deepcopy(v) for k, v in settings.items() if k in options.ROUTER})
    try:
        for name in sorted(names):
            value = getattr(template, name)
            if name == "default_litellm_params":
                value = {**router.default_litellm_params, "timeout": template.default_litellm_params.get("timeout")}
            _set(router, name, value, undo)
        if "cooldown_time" in names:
            _set(router.cooldown_cache, "default_cooldown_time", template.cooldown_time, undo)
    finally:
        template.discard()


def _put_strategy(router: Any, new: Mapping[str, Any], old: Mapping[str, Any], undo: Undo) -> None:
    def put(effective: Mapping[str, Any]) -> None:
        settings = effective.get("router_settings") or {}
        strategy = settings.get("routing_strategy", "simple-shuffle")
        arguments = copy.deepcopy(settings.get("routing_strategy_args") or {})
        router.routing_strategy_init(routing_strategy=strategy, routing_strategy_args=arguments)
        router.routing_strategy, router.routing_strategy_args = strategy, arguments

    undo.append(lambda: put(old))
    put(new)


def _put_groups(router: Any, groups: Any, undo: Undo) -> None:
    before = router._routing_groups_input
    undo.append(lambda: _init_groups(router, before))
    _init_groups(router, copy.deepcopy(groups))


def _init_groups(router: Any, groups: Any) -> None:
    router._init_routing_groups(groups)
    router._routing_groups_input = groups


def _load_sections(effective: Mapping[str, Any]) -> None:
    """Do with the sections of settings what LiteLLM does when it reads its configuration again."""
    from litellm.proxy import proxy_server

    config = proxy_server.proxy_config
    names = (*options.SETTINGS, "environment_variables")
    sections = copy.deepcopy({n: effective[n] for n in names if n in effective})
    config._load_yaml_settings_stores(sections)
    sections = config._check_for_os_environ_vars(config=config._config_with_resolved_settings(sections))
    config._apply_resolved_runtime_settings(sections)
    rest = {k: v for k, v in config.config.items() if k not in names}
    config.config = MappingProxyType({**rest, **sections})


@contextmanager
def environment(secrets: Mapping[str, str]) -> Generator[None]:
    """Set the variables for as long as one step without an ``await`` takes."""
    undo: Undo = []
    set_environment(secrets, undo)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def set_environment(secrets: Mapping[str, str], undo: Undo) -> None:
    """Set the variables for good."""
    for name, value in secrets.items():
        before = os.environ.get(name)
        if before == value:
            continue
        undo.append(partial(os.environ.pop, name, None) if before is None else partial(_set_variable, name, before))
        os.environ[name] = value


def _set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def _set(thing: Any, name: str, value: Any, undo: Undo) -> None:
    before = getattr(thing, name)
    undo.append(lambda: setattr(thing, name, before))
    setattr(thing, name, value)


def set_master_key(key: str) -> None:
    """Put another administrator's key into force; Moat's identity stage is told separately."""
    from litellm.proxy import proxy_server

    os.environ[MASTER_KEY_NAME] = key
    proxy_server.master_key = key
    proxy_server.litellm_master_key_hash = proxy_server.hash_token(key)
    settings = proxy_server.proxy_config.settings
    settings.apply_runtime_values({**settings.resolved(), "master_key": key})


def callback_counts() -> Mapping[str, int]:
    """Return how many callbacks LiteLLM holds in each of its lists; they must not grow with changes."""
    import litellm

    names = (
        "callbacks", "success_callback", "failure_callback", "_async_success_callback", "_async_failure_callback",
        "input_callback", "service_callback",
    )  # fmt: skip
    return MappingProxyType({n: len(getattr(litellm, n)) for n in names})
