# SPDX-License-Identifier: Apache-2.0
"""Everything that is checked before a configuration becomes a revision, and again on every node before it is applied.

Each part reports every problem it finds, with the file and the line; only what cannot be read ends the looking at that
file. The parts: names of files and ``routers/`` (:mod:`configdir`), ``config.yaml`` by the rules of :mod:`config`,
keys, what the router would pass over silently (unknown strategies, settings, models), and last a dry run of the router.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from moat_gateway import config, configdir, keys, literals, prepared, revision, strictyaml
from moat_gateway.errors import BadConfig, BadKeys, GatewayError
from moat_gateway.litellm_port import words
from moat_gateway.prepared import Prepared
from moat_gateway.settings import Settings
from moat_gateway.strictyaml import Document, Trail, dotted

_FALLBACKS = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks")


class DryRun(Protocol):
    """Builds a router from a prepared configuration; :class:`moat_gateway.dryrun.DryRun` does."""

    def run(self, prepared_json: bytes) -> None:
        """Build it, or raise :class:`moat_gateway.errors.DryRunFailed`."""


def check(
    files: Mapping[str, bytes], settings: Settings, *, dry_run: DryRun | None, number: int = 0
) -> tuple[Prepared | None, list[GatewayError]]:
    """Check the content of a revision as this machine would run it.

    Args:
        files: the content by path.
        settings: its allow-list and its folder of secrets count.
        dry_run: builds the router when nothing else was found; ``None`` leaves that out.
        number: of the revision; 0 for none.

    Returns:
        What a gateway loads, or ``None`` with every problem, by file and line.
    """
    problems = configdir.check(files)
    document, checked = _config(files, settings, problems)
    key_set = _keys(files, problems)
    if document is not None:
        problems += _Words(document, _Names(document.data)).problems()
        if key_set is not None:
            problems += _models_of_keys(files[configdir.KEYS], _Names(document.data))
    if problems or checked is None or key_set is None:
        return None, sorted(problems, key=lambda e: (e.path or "", e.line or 0))
    ready = prepared.prepare(checked, key_set, revision=number)
    if dry_run is not None:
        try:
            dry_run.run(ready.to_json())
        except GatewayError as e:
            named = re.match(r"model_list\[(\d+)\]", e.found or "")
            if named is not None and document is not None:
                e.line = document.line(("model_list", int(named.group(1))))
            return None, [e]
    return ready, []


def problem(error: GatewayError) -> dict[str, str | int | None]:
    """Return one problem as `config validate --json` shows it."""
    plain = error.to_dict()
    return {"file": plain.pop("path"), **plain}


def _config(
    files: Mapping[str, bytes], settings: Settings, problems: list[GatewayError]
) -> tuple[Document | None, config.CheckedConfig | None]:
    raw = files.get(configdir.CONFIG)
    if raw is None:
        return None, None
    try:
        document = strictyaml.parse_bytes(raw, name=configdir.CONFIG, error=BadConfig)
    except GatewayError as e:
        problems.append(e)
        return None, None
    checked, found = config.check(
        document, configdir.CONFIG, revision.sha256(raw), settings.secrets_dir, settings.allow
    )
    problems += found
    problems += [
        BadConfig(
            f"{dotted(at)} is {what}",
            expected="text, a number, true or false",
            hint="put quotation marks around it",
            path=configdir.CONFIG,
            line=document.line(at),
        )
        for at, what in prepared.unplain(document.data)
    ]
    problems += [
        BadConfig(
            f"{dotted(at)} looks like a secret itself, and a revision must hold none",
            found=f"a value of {length} characters",
            expected="os.environ/NAME",
            hint="put the value into the file NAME in the folder of secrets of every node and write os.environ/NAME "
            "here; if it is a placeholder, write not-needed",
            path=configdir.CONFIG,
            line=document.line(at),
        )
        for at, length in literals.find(document.data)
    ]
    return (document if isinstance(document.data, dict) else None), checked


def _keys(files: Mapping[str, bytes], problems: list[GatewayError]) -> keys.KeySet | None:
    raw = files.get(configdir.KEYS)
    if raw is None:
        return None
    try:
        return keys.parse(raw, configdir.KEYS)
    except GatewayError as e:
        problems.append(e)
        return None


class _Names:
    """The names under which a client, a fallback or a key may ask for a model."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        entries = [e for e in _list(data.get("model_list")) if isinstance(e, dict)]
        self.deployed = {e["model_name"] for e in entries if isinstance(e.get("model_name"), str)}
        router = _mapping(data.get("router_settings"))
        self.known = set(self.deployed)
        self.known |= {str(alias) for alias in _mapping(router.get("model_group_alias"))}
        self.known |= {
            g["group_name"]
            for g in _list(router.get("routing_groups"))
            if isinstance(g, dict) and isinstance(g.get("group_name"), str)
        }
        self.groups: set[str] = set()
        for entry in entries:
            info = _mapping(entry.get("model_info"))
            self.groups |= {g for g in _list(info.get("access_groups")) if isinstance(g, str)}
            self.known |= {info[k] for k in ("id", "team_public_model_name") if isinstance(info.get(k), str)}
        # As LiteLLM matches them: from the beginning, each star for anything.
        self._patterns = [re.compile(re.escape(n).replace(r"\*", ".*")) for n in sorted(self.deployed) if "*" in n]

    def has(self, name: str) -> bool:
        """Say whether a request for this name finds a deployment."""
        return name in self.known or any(p.match(name) for p in self._patterns)

    def may_be_allowed(self, name: str) -> bool:
        """Say whether a key's or team's list may hold this: a model, an access group, or a pattern that fits one."""
        if self.has(name) or name in self.groups:
            return True
        return "*" in name and any(re.fullmatch(re.escape(name).replace(r"\*", ".*"), known) for known in self.known)

    def is_source(self, name: str) -> bool:
        """Say whether fallbacks of this name can ever count; LiteLLM also compares without the provider's prefix."""
        return (
            name == "*"
            or self.has(name)
            or any(known.endswith("/" + name) or name.endswith("/" + known) for known in self.known)
        )

    def near(self, name: str) -> str:
        """Return the known names, the likeliest first."""
        likely = difflib.get_close_matches(name, self.known, 3, 0.6)
        return ", ".join([*likely, *(n for n in sorted(self.known) if n not in likely)][:12]) or "no model"


class _Words:
    """What the router would pass over, or fail at only when a request comes."""

    def __init__(self, document: Document, names: _Names) -> None:
        self._document = document
        self._data = document.data
        self._names = names
        self._found: list[GatewayError] = []

    def problems(self) -> list[GatewayError]:
        """Look at everything."""
        router = _mapping(self._data.get("router_settings"))
        for name in router:
            if name not in words.ROUTER_SETTINGS:
                self._report(
                    ("router_settings", str(name)),
                    f"router_settings.{name} is no setting of the router",
                    expected=", ".join(difflib.get_close_matches(str(name), words.ROUTER_SETTINGS, 3, 0.6))
                    or "a setting of LiteLLM's router",
                    hint="correct the name, or move it to the section it belongs to",
                )
        self._strategy(
            ("router_settings", "routing_strategy"), router.get("routing_strategy"), words.ROUTING_STRATEGIES
        )
        self._groups(_list(router.get("routing_groups")))
        self._aliases(_mapping(router.get("model_group_alias")))
        for group in _mapping(router.get("model_group_retry_policy")):
            self._known(("router_settings", "model_group_retry_policy", str(group)), group)
        for section in ("router_settings", "litellm_settings"):
            settings = _mapping(self._data.get(section))
            for name in _FALLBACKS:
                self._fallbacks((section, name), _list(settings.get(name)))
            for i, target in enumerate(_list(settings.get("default_fallbacks"))):
                self._known((section, "default_fallbacks", i), target)
        self._ids()
        return self._found

    def _report(self, at: Trail, message: str, *, expected: str | None, hint: str, found: str | None = None) -> None:
        self._found.append(
            BadConfig(
                message,
                found=found,
                expected=expected,
                hint=hint,
                path=configdir.CONFIG,
                line=self._document.line(at),
            )
        )

    def _strategy(self, at: Trail, value: Any, known: tuple[str, ...]) -> None:
        if value is not None and value not in known:
            self._report(
                at,
                f"{dotted(at)} is an unknown routing strategy",
                found=repr(value)[:100],
                expected=", ".join(known),
                hint="choose one of these",
            )

    def _groups(self, groups: list[Any]) -> None:
        for i, group in enumerate(groups):
            at: Trail = ("router_settings", "routing_groups", i)
            if isinstance(group, dict):
                self._strategy((*at, "routing_strategy"), group.get("routing_strategy"), words.GROUP_STRATEGIES)
                for k, model in enumerate(_list(group.get("models"))):
                    self._known((*at, "models", k), model)

    def _aliases(self, aliases: Mapping[Any, Any]) -> None:
        for alias, target in aliases.items():
            at: Trail = ("router_settings", "model_group_alias", str(alias))
            self._known(at, target.get("model") if isinstance(target, dict) else target)

    def _fallbacks(self, at: Trail, entries: list[Any]) -> None:
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict) or len(entry) != 1:
                self._report(
                    (*at, i),
                    f"{dotted((*at, i))} is not a fallback",
                    expected="one model and the list of its fallbacks: `- model: [other]`",
                    hint="correct the line",
                )
                continue
            ((source, targets),) = entry.items()
            if not self._names.is_source(str(source)):
                self._unknown((*at, i, str(source)), source)
            for k, target in enumerate(targets if isinstance(targets, list) else [targets]):
                where: Trail = (*at, i, str(source), k) if isinstance(targets, list) else (*at, i, str(source))
                self._known(where, target.get("model") if isinstance(target, dict) else target)

    def _known(self, at: Trail, name: Any) -> None:
        if not isinstance(name, str) or not self._names.has(name):
            self._unknown(at, name)

    def _unknown(self, at: Trail, name: Any) -> None:
        self._report(
            at,
            f"{dotted(at)} names an unknown model",
            found=ascii(name)[:100],
            expected=self._names.near(str(name)),
            hint="correct the name, or add the model to model_list",
        )

    def _ids(self) -> None:
        """Refuse one id for two deployments: the router would hold only one of them."""
        seen: set[str] = set()
        for i, entry in enumerate(_list(self._data.get("model_list"))):
            info = _mapping(entry).get("model_info")
            if info is not None and not isinstance(info, dict):
                at: Trail = ("model_list", i, "model_info")
                self._report(at, f"{dotted(at)} is not a mapping", expected="keys and values", hint="correct the line")
            own = _mapping(_mapping(entry).get("model_info")).get("id")
            if own is None:
                continue
            if str(own) in seen:
                self._report(
                    ("model_list", i, "model_info", "id"),
                    f"model_list[{i}].model_info.id is the id of another deployment",
                    found=ascii(own)[:100],
                    expected="each id once",
                    hint="remove it (an id is made), or choose another",
                )
            seen.add(str(own))


def _models_of_keys(raw: bytes, names: _Names) -> Iterator[GatewayError]:
    document = strictyaml.parse_bytes(raw, name=configdir.KEYS, error=BadKeys)
    for section in ("teams", "keys"):
        for i, entry in enumerate(_list(document.data.get(section))):
            for k, name in enumerate(_list(_mapping(entry).get("models"))):
                if name != "*" and not names.may_be_allowed(name):
                    at: Trail = (section, i, "models", k)
                    yield BadKeys(
                        f"{dotted(at)} names an unknown model",
                        found=ascii(name)[:100],
                        expected=names.near(name),
                        hint="correct the name, or add the model to config.yaml",
                        path=configdir.KEYS,
                        line=document.line(at),
                    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}
