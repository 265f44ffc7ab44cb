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
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moat_gateway.errors import GatewayError, LiteLLMRefused
from moat_gateway.litellm_port import options, prices, put
from moat_gateway.litellm_port.effective import EffectiveFile, entry_text, head_text
from moat_gateway.litellm_port.put import environment, serving_router

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
        self._serving.drop()


class Serving:
    """What LiteLLM serves.

    Args:
        file: from which LiteLLM reads its configuration again.
        clock: monotonic seconds.
    """

    def __init__(self, file: EffectiveFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._built: list[_Built] = []
        self._head = ""
        self._prices = prices.Prices(clock)
        self.wanted = Wanted({}, (), (), {})
        self._defaults: dict[str, Any] = {}

    # --- the start ---

    def before_start(self, wanted: Wanted) -> None:
        """Write the file for LiteLLM and note LiteLLM's own defaults; call after its import, before its start.

        Raises:
            LiteLLMRefused: the file cannot be written.
        """
        import litellm

        self._prices.begin()
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
        for model in serving_router().model_list:
            by_id[str(model["model_info"]["id"])].append(model)
        self._built = []
        with environment(self.wanted.secrets):
            for i, entry in enumerate(self.wanted.entries):
                model = _resolved(entry)
                proxy_server.pin_complexity_router_model_id(model)
                params, declared = model["litellm_params"], (model.get("model_info") or {}).get("id")
                id_ = (
                    str(declared)
                    if declared is not None
                    else serving_router().generate_model_id(entry["model_name"], params)
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
        self._prices.prune()
        same_models = len(reused) == len(self._built) and all(a is b for a, b in zip(reused, self._built, strict=True))
        change = Change(self, wanted, None if same_models else _staging(serving_router()), len(new))
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
            self.drop()
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
            with environment(secrets):
                model = _resolved(entry)
                proxy_server.validate_deployment_max_agentic_loops(model)
                proxy_server.validate_deployment_access_windows(model)
                name, params = model.pop("model_name"), model.pop("litellm_params")
                info = model.pop("model_info", None) or {}
                declared = None if info.get("id") is None else str(info["id"])
                if declared is None:
                    info["id"] = staging.generate_model_id(name, params)
                self._prices.note(prices.keys_of(staging, {"model_info": info, "litellm_params": params}))
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
        undo: put.Undo = []
        try:
            put.put(self.wanted, change.wanted, change.staging, self._defaults, undo)
            # Last, since it is the one step that cannot be taken back.
            self._file.swap()
        except Exception as e:
            for step in reversed(undo):
                step()
            self.drop()
            if isinstance(e, GatewayError):
                raise
            raise LiteLLMRefused(
                "LiteLLM does not accept the settings",
                found=type(e).__name__,
                hint="correct router_settings or litellm_settings; the old configuration goes on serving",
            ) from e
        self._prices.keep()
        change.before, self._built = self._built, change.built
        self.wanted = change.wanted
        self._head = change.head

    def drop(self) -> None:
        """See :meth:`Change.drop`."""
        self._prices.put_back()

    async def tidy(self, change: Change, pause: Pause) -> None:
        """See :meth:`Change.tidy`."""
        if change.staging is None:
            return
        router = serving_router()
        kept = {id(b) for b in change.built}
        used: set[str] = set()
        for built in change.built:
            used.update(key for model in built.models for key in prices.keys_of(router, model))
            await pause()
        for built in change.before:
            for model in built.models if id(built) not in kept else ():
                # The limit of requests at once is made anew, by the deployment's new numbers.
                router.cache.in_memory_cache.delete_cache(f"{model['model_info']['id']}_max_parallel_requests_client")
                self._prices.retire(key for key in prices.keys_of(router, model) if key not in used)
            await pause()
        self._prices.used(used)


# --- small steps ---


def _staging(router: Any) -> Any:
    """Return a stand-in that makes deployments as the router would, and collects them in tables of its own."""
    staging = copy.copy(router)
    for name, empty in put.TABLES.items():
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
