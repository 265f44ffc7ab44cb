# SPDX-License-Identifier: Apache-2.0
"""Changes what LiteLLM serves while it serves, without a request noticing more than the difference.

LiteLLM's own ways are one deployment at a time (a request may see half of a change) or everything anew (the loop is
held for as long as that takes). Here the new tables of the router are made beside it, a slice at a time, with only
what differs made anew; then one step without an ``await`` puts them into the router that LiteLLM already has. So its
callbacks, its cache, its cool-downs and its usage counts stay, nothing needs to be thrown away, and a request that
chose its deployment before keeps that deployment's own object to its end.

Everything runs on the event loop: in a thread, requests see tables that do not fit together.
"""

from __future__ import annotations

import copy
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from moat_gateway.errors import GatewayError, LiteLLMRefused
from moat_gateway.litellm_port import options
from moat_gateway.litellm_port.effective import EffectiveFile, entry_text, head_text

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
_RETIRED_SECONDS = 600.0  # prices of a deployment are kept this long after it went: requests may still be running
_RETIRED_MOST = 1000

_BEFORE_LONG = 0.0002  # seconds that a slice may have taken before a deployment is made in it, which takes 1 to 2 ms

#: Lets the loop go on when a slice has been long enough; the argument says how long that is (s).
Pause = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Wanted:
    """A configuration that LiteLLM shall serve.

    Attributes:
        effective: what LiteLLM is given, with references instead of secrets.
        digests: of each entry of ``model_list``.
        references: the names of the secrets in each entry.
        secrets: the values of all references.
    """

    effective: Mapping[str, Any]
    digests: Sequence[str]
    references: Sequence[Sequence[str]]
    secrets: Mapping[str, str] = field(repr=False)

    @property
    def entries(self) -> Sequence[Mapping[str, Any]]:
        """The entries of ``model_list``."""
        return self.effective.get("model_list") or ()


class NeedsRestart(Exception):
    """What is wanted cannot be taken live; ``names`` says why."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(", ".join(names))
        self.names = names


@dataclass(frozen=True)
class _Built:
    """The deployments that one entry became (several for a list of organizations, none if it is not active here)."""

    key: tuple[str, ...]
    models: tuple[dict[str, Any], ...]
    text: str


class Change:
    """A change that is ready; :meth:`commit` makes it visible. It is dropped by not calling that.

    Attributes:
        made: how many deployments were made anew.
    """

    def __init__(self, serving: Serving, wanted: Wanted, staging: Any, made: int) -> None:
        self._serving = serving
        self.wanted = wanted
        self.staging = staging  # None: the deployments stay as they are
        self.made = made
        self.built: list[_Built] = []
        self.before: list[_Built] = []
        self.head = ""

    def commit(self) -> None:
        """Put the change into force, whole; it takes well under a millisecond.

        Raises:
            LiteLLMRefused: LiteLLM does not accept it; everything is as it was before.
        """
        self._serving.commit(self)

    async def tidy(self, pause: Pause) -> None:
        """After :meth:`commit`: let go, a slice at a time, what belonged to the deployments that went.

        Args:
            pause: as for :meth:`Serving.prepare`.
        """
        await self._serving.tidy(self, pause)

    def drop(self) -> None:
        """Forget the change, and what making it left in LiteLLM's price table."""
        self._serving.drop(self)


class Serving:
    """What LiteLLM serves.

    Args:
        file: from which LiteLLM reads its configuration again.
        clock: monotonic seconds.
    """

    def __init__(self, file: EffectiveFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._built: list[_Built] = []
        self._head = ""
        self._retired: dict[str, float] = {}
        self._prices_before: dict[str, Any] = {}
        self.wanted = Wanted({}, (), (), {})
        self._packaged_models: frozenset[str] = frozenset()
        self._defaults: dict[str, Any] = {}

    # --- the start ---

    def before_start(self, wanted: Wanted) -> None:
        """Write the file for LiteLLM and note LiteLLM's own defaults; call after its import, before its start.

        Raises:
            LiteLLMRefused: the file cannot be written.
        """
        import litellm

        self._packaged_models = frozenset(litellm.model_cost)
        names = {*options.LITELLM, *options.LITELLM_OF_ROUTER, "request_timeout_explicitly_set"}
        self._defaults = {n: copy.deepcopy(getattr(litellm, n, None)) for n in names}
        self.wanted = wanted
        self._head = head_text(wanted.effective)
        self._file.write(self._head, map(entry_text, wanted.entries))
        self._file.swap()

    def after_start(self) -> None:
        """Note which deployments LiteLLM made of which entry; call after its start."""
        from litellm.proxy import proxy_server

        by_id: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for model in _router().model_list:
            by_id[str(model["model_info"]["id"])].append(model)
        self._built = []
        with _environment(self.wanted.secrets):
            for i, entry in enumerate(self.wanted.entries):
                model = _resolved(entry)
                proxy_server.pin_complexity_router_model_id(model)
                params, declared = model["litellm_params"], (model.get("model_info") or {}).get("id")
                id_ = (
                    str(declared) if declared is not None else _router().generate_model_id(entry["model_name"], params)
                )
                count = len(params["organization"]) if isinstance(params.get("organization"), list) else 1
                models, by_id[id_] = by_id[id_][:count], by_id[id_][count:]
                # What LiteLLM left out has a key that matches nothing: the next change tries it again.
                key = _key(self.wanted, i) if models else ("",)
                self._built.append(_Built(key, tuple(models), entry_text(entry)))

    # --- a change ---

    async def prepare(self, wanted: Wanted, pause: Pause) -> Change:
        """Make everything that the change needs, a slice at a time; nothing of it serves yet.

        Args:
            wanted: what shall be served.
            pause: awaited between two steps; it lets the loop go on when a slice has been long enough.

        Raises:
            NeedsRestart: something cannot be taken live.
            LiteLLMRefused: LiteLLM does not accept a deployment.
        """
        names = options.needs_restart(self.wanted.effective, wanted.effective)
        await pause()
        spare: defaultdict[tuple[str, ...], list[_Built]] = defaultdict(list)
        for built in self._built:
            spare[built.key].append(built)
        reused: list[_Built | None] = []
        for i in range(len(wanted.entries)):
            same = spare.get(_key(wanted, i))
            reused.append(same.pop() if same else None)
            await pause()
        gone_keys = {built.key for left in spare.values() for built in left}
        gone = [e for e, built in zip(self.wanted.entries, self._built, strict=True) if built.key in gone_keys]
        new = [e for e, built in zip(wanted.entries, reused, strict=True) if built is None]
        names += options.restart_for_entries([*gone, *new])
        if gone or new:
            names += tuple(
                f"model_list: {e.get('model_name')}: auto_router"
                for e in (*self.wanted.entries, *wanted.entries)
                if options.routes_between_models(e)
            )
        if names:
            raise NeedsRestart(tuple(dict.fromkeys(names)))
        self._prune()
        same_models = len(reused) == len(self._built) and all(a is b for a, b in zip(reused, self._built, strict=True))
        change = Change(self, wanted, None if same_models else _staging(_router()), len(new))
        try:
            if same_models:
                change.built = self._built
            else:
                await self._build(change, reused, pause)
            same_head = _without_models(wanted.effective) == _without_models(self.wanted.effective)
            change.head = self._head if same_head else head_text(wanted.effective)
            await pause()
            self._file.write(change.head, [b.text for b in change.built])
            await pause()
        except BaseException:
            self.drop(change)
            raise
        return change

    async def _build(self, change: Change, reused: Sequence[_Built | None], pause: Pause) -> None:
        wanted, staging = change.wanted, change.staging
        ids = [str(i) for e in wanted.entries if (i := (e.get("model_info") or {}).get("id")) is not None]
        duplicates = frozenset(i for i in ids if ids.count(i) > 1) if len(set(ids)) != len(ids) else frozenset[str]()
        for i, entry in enumerate(wanted.entries):
            same = reused[i]
            # A wildcard is also in the tables of patterns; making it again puts it there.
            if same is None or any("*" in str(m.get("model_name")) or _team_wildcard(m) for m in same.models):
                await pause(_BEFORE_LONG)
                secrets = {n: wanted.secrets[n] for n in wanted.references[i] if n in wanted.secrets}
                models = self._make(staging, entry, secrets, duplicates)
                built = _Built(_key(wanted, i), models, entry_text(entry))
            else:
                built = same
                for model in same.models:
                    staging._add_model_to_list_and_index_map(model=model, model_id=str(model["model_info"]["id"]))
                    staging.deployment_names.append(model["litellm_params"]["model"])
            change.built.append(built)
            await pause()
        staging.model_names = {e["model_name"] for e in wanted.entries}
        staging.deployment_latency_map = {m["litellm_params"]["model"]: 0 for m in staging.model_list}
        await pause()

    def _make(
        self, staging: Any, entry: Mapping[str, Any], secrets: Mapping[str, str], duplicates: frozenset[str]
    ) -> tuple[dict[str, Any], ...]:
        """Make one entry's deployments as LiteLLM does when it loads a configuration."""
        from litellm.proxy import proxy_server

        before = len(staging.model_list)
        try:
            with _environment(secrets):
                model = _resolved(entry)
                proxy_server.validate_deployment_max_agentic_loops(model)
                proxy_server.validate_deployment_access_windows(model)
                name, params = model.pop("model_name"), model.pop("litellm_params")
                info = model.pop("model_info", None) or {}
                declared = None if info.get("id") is None else str(info["id"])
                if declared is None:
                    info["id"] = staging.generate_model_id(name, params)
                self._note_prices(str(info["id"]), params)
                organizations = params.get("organization")
                for organization in organizations if isinstance(organizations, list) else [organizations]:
                    if organization is not None:
                        params["organization"] = organization
                    staging._create_deployment(
                        deployment_info=model,
                        _model_name=name,
                        _litellm_params=params,
                        _model_info=info,
                        declared_id=declared,
                        duplicate_ids=duplicates,
                    )
        except Exception as e:
            # The exception's text may quote a parameter, and a parameter may be a secret.
            raise LiteLLMRefused(
                f"LiteLLM does not accept the deployment {entry.get('model_name')}",
                found=type(e).__name__,
                hint="correct its litellm_params; `moat-gateway config validate` builds the router as the gateway does",
            ) from e
        return tuple(staging.model_list[before:])

    # --- the one step ---

    def commit(self, change: Change) -> None:
        """See :meth:`Change.commit`."""
        undo: list[Callable[[], object]] = []
        try:
            self._put(change, undo)
        except Exception as e:
            for step in reversed(undo):
                step()
            self.drop(change)
            if isinstance(e, GatewayError):
                raise
            raise LiteLLMRefused(
                "LiteLLM does not accept the settings",
                found=type(e).__name__,
                hint="correct router_settings or litellm_settings; the old configuration goes on serving",
            ) from e
        self._prices_before.clear()
        change.before, self._built = self._built, change.built
        self.wanted = change.wanted
        self._head = change.head

    def _put(self, change: Change, undo: list[Callable[[], object]]) -> None:
        import litellm
        from litellm.proxy import proxy_server

        old, new = self.wanted, change.wanted
        router = _router()
        _set_environment(new.secrets, undo)
        general = options.changed(old.effective, new.effective, "general_settings")
        ours = options.changed(old.effective, new.effective, "litellm_settings")
        routing = options.changed(old.effective, new.effective, "router_settings")
        if ours:
            self._put_litellm(new.effective, ours, undo)
        attributes = {a for n in ours for a in options.LITELLM_OF_ROUTER.get(n, ())}
        attributes |= {a for n in routing for a in options.ROUTER.get(n, ())}
        if attributes:
            self._put_attributes(router, new.effective, attributes, undo)
        if change.staging is not None:
            tables = {n: getattr(change.staging, n) for n in (*TABLES, "pattern_router")}
            for name, value in {**tables, "healthy_deployments": tables["model_list"]}.items():
                _set(router, name, value, undo)
        undo.append(router._invalidate_model_group_info_cache)
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
        # Last, since it is the one step that cannot be taken back.
        self._file.swap()

    def _put_litellm(
        self, effective: Mapping[str, Any], names: Sequence[str], undo: list[Callable[[], object]]
    ) -> None:
        import litellm

        wanted = effective.get("litellm_settings") or {}
        for name in names:
            value = copy.deepcopy(wanted[name]) if name in wanted else copy.deepcopy(self._defaults[name])
            if name == "drop_params" and name in wanted:
                from litellm.proxy import proxy_server

                value = proxy_server.drop_params_flag(
                    value, "litellm_settings.drop_params", proxy_server.verbose_proxy_logger
                )
            _set(litellm, name, value, undo)
            if name == "request_timeout":
                explicit = name in wanted or self._defaults["request_timeout_explicitly_set"]
                _set(litellm, "request_timeout_explicitly_set", explicit, undo)

    def _put_attributes(
        self, router: Any, effective: Mapping[str, Any], names: set[str], undo: list[Callable[[], object]]
    ) -> None:
        """Take attributes from a router that LiteLLM makes of the new settings: it is LiteLLM who checks them."""
        import litellm

        # A router adds its default fallbacks to the list that it is given: each gets a list of its own.
        self._put_litellm(effective, tuple(options.LITELLM_OF_ROUTER), undo)
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

    # --- LiteLLM's price table, which knows each deployment by its id ---

    def _note_prices(self, id_: str, params: Mapping[str, Any]) -> None:
        import litellm

        for key in _price_keys(_router(), {"model_info": {"id": id_}, "litellm_params": params}):
            self._prices_before.setdefault(key, copy.copy(litellm.model_cost.get(key)))

    def drop(self, change: Change) -> None:
        """See :meth:`Change.drop`."""
        import litellm

        del change
        for key, before in self._prices_before.items():
            if before is None:
                _forget_price(key)
            else:
                litellm.model_cost[key] = before
        if self._prices_before:
            litellm.utils._invalidate_model_cost_lowercase_map()
        self._prices_before.clear()

    async def tidy(self, change: Change, pause: Pause) -> None:
        """See :meth:`Change.tidy`."""
        if change.staging is None:
            return
        now, router = self._clock(), _router()
        kept = {id(b) for b in change.built}
        used: set[str] = set()
        for built in change.built:
            used.update(key for model in built.models for key in _price_keys(router, model))
            await pause()
        for built in change.before:
            for model in built.models if id(built) not in kept else ():
                # The limit of requests at once is made anew, by the deployment's new numbers.
                router.cache.in_memory_cache.delete_cache(f"{model['model_info']['id']}_max_parallel_requests_client")
                keys = _price_keys(router, model)
                self._retired.update((k, now) for k in keys if k not in used and k not in self._packaged_models)
            await pause()
        for key in used.intersection(self._retired):
            del self._retired[key]

    def _prune(self) -> None:
        """Forget the prices of deployments that went long ago: they would add up."""
        import litellm

        oldest = sorted(self._retired, key=self._retired.__getitem__)
        limit = self._clock() - _RETIRED_SECONDS
        over = len(oldest) - _RETIRED_MOST
        gone = [k for i, k in enumerate(oldest) if self._retired[k] < limit or i < over]
        for key in gone:
            del self._retired[key]
            _forget_price(key)
        if gone:
            litellm.utils._invalidate_model_cost_lowercase_map()


def set_master_key(key: str) -> None:
    """Put another administrator's key into force; Moat's identity stage is told separately."""
    from litellm.proxy import proxy_server

    from moat_gateway.configrules import MASTER_KEY_NAME

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


# --- small steps ---


def _router() -> Any:
    from litellm.proxy import proxy_server

    return proxy_server.llm_router


def _staging(router: Any) -> Any:
    """Return a stand-in that makes deployments as the router would, and collects them in tables of its own."""
    staging = copy.copy(router)
    for name, empty in TABLES.items():
        setattr(staging, name, empty())
    staging.pattern_router = type(router.pattern_router)()
    # An invalid deployment is left out at the start; a change is taken whole or not at all.
    staging.ignore_invalid_deployments = False
    # The caches are the serving router's; they are emptied once, when the tables are swapped.
    staging._invalidate_model_group_info_cache = staging._invalidate_access_groups_cache = lambda: None
    return staging


def _key(wanted: Wanted, i: int) -> tuple[str, ...]:
    # The values are compared as they are: hashing them would cost more, and they are in memory anyway.
    return (wanted.digests[i], *(wanted.secrets.get(n, "") for n in wanted.references[i]))


def _resolved(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with its references answered as LiteLLM does, which turns words like "true" into truth values."""
    from litellm.proxy import proxy_server

    resolved: dict[str, Any] = proxy_server.proxy_config._check_for_os_environ_vars(config=copy.deepcopy(dict(entry)))
    return resolved


def _team_wildcard(model: Mapping[str, Any]) -> bool:
    return "*" in str((model.get("model_info") or {}).get("team_public_model_name") or "")


def _without_models(effective: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in effective.items() if k != "model_list"}


@contextmanager
def _environment(secrets: Mapping[str, str]) -> Generator[None]:
    """Set the variables for as long as one step without an ``await`` takes."""
    undo: list[Callable[[], object]] = []
    _set_environment(secrets, undo)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def _set_environment(secrets: Mapping[str, str], undo: list[Callable[[], object]]) -> None:
    for name, value in secrets.items():
        before = os.environ.get(name)
        if before == value:
            continue
        undo.append(partial(os.environ.pop, name, None) if before is None else partial(_set_variable, name, before))
        os.environ[name] = value


def _set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def _set(thing: Any, name: str, value: Any, undo: list[Callable[[], object]]) -> None:
    before = getattr(thing, name)
    undo.append(lambda: setattr(thing, name, before))
    setattr(thing, name, value)


def _put_strategy(
    router: Any, new: Mapping[str, Any], old: Mapping[str, Any], undo: list[Callable[[], object]]
) -> None:
    def put(effective: Mapping[str, Any]) -> None:
        settings = effective.get("router_settings") or {}
        strategy = settings.get("routing_strategy", "simple-shuffle")
        arguments = copy.deepcopy(settings.get("routing_strategy_args") or {})
        router.routing_strategy_init(routing_strategy=strategy, routing_strategy_args=arguments)
        router.routing_strategy, router.routing_strategy_args = strategy, arguments

    undo.append(lambda: put(old))
    put(new)


def _put_groups(router: Any, groups: Any, undo: list[Callable[[], object]]) -> None:
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


def _price_keys(router: Any, model: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names under which LiteLLM's price table knows a deployment: its id, and the model behind it."""
    params = model["litellm_params"]
    behind = router._backend_cost_map_keys(str(params.get("model", "")), params.get("custom_llm_provider"))
    return (str(model["model_info"]["id"]), *behind)


def _forget_price(key: str) -> None:
    import litellm

    litellm.model_cost.pop(key, None)
    litellm.utils._registered_pricing_fields().pop(key, None)
