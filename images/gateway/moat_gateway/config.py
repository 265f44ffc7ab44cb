# SPDX-License-Identifier: Apache-2.0
"""The check of LiteLLM's ``config.yaml`` before LiteLLM sees it, and the configuration that LiteLLM is then given.

Nothing is served that names a destination outside the allow-list, refers to a missing secret, needs a database, or
turns off what Moat enforces. The rules are the tables of :mod:`moat_gateway.configrules`; :func:`check` walks the file
once and reports every problem with its line. What passes here is still held by the process (``egress``), the container
networks and the firewall.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moat_gateway import configrules as rules
from moat_gateway import secretfiles, strictyaml
from moat_gateway.allowlist import (
    AllowList,
    Destination,
    NotADestination,
    destinations_of_urls,
    parse_host_port,
)
from moat_gateway.errors import (
    BadConfig,
    DatabaseSet,
    EndpointRefused,
    GatewayError,
    NoModels,
    SettingRefused,
    UnreadableSecret,
    UnsetSecret,
)
from moat_gateway.strictyaml import Document, Trail, dotted


@dataclass(frozen=True)
class CheckedConfig:
    """A configuration that may run.

    Attributes:
        effective: what LiteLLM is given: the file, with Moat's enforced settings. Holds references, no secrets.
        secrets: the values of its references.
        models: the names that clients use, sorted.
        deployments: how many entries ``model_list`` has.
        sha256: of the file's bytes.
        references: for each name in ``secrets`` the file that holds its value.
    """

    effective: Mapping[str, Any]
    secrets: Mapping[str, str] = field(repr=False)
    models: tuple[str, ...]
    deployments: int
    sha256: str
    references: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Named:
    """One destination that the file names: where, what (never more than host and port), allowed or not."""

    at: Trail
    text: str
    allowed: bool


def read(
    path: Path, secrets_dir: Path, allow: AllowList, named: list[Named] | None = None
) -> tuple[CheckedConfig | None, list[GatewayError]]:
    """Read and check one file; every destination is added to ``named``.

    Returns:
        The configuration, or ``None`` with at least one problem, in the order of the file.
    """
    try:
        document = strictyaml.read(path, BadConfig)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except GatewayError as e:
        return None, [e]
    return check(document, str(path), digest, secrets_dir, allow, named)


def check(
    document: Document,
    name: str,
    digest: str,
    secrets_dir: Path,
    allow: AllowList,
    named: list[Named] | None = None,
) -> tuple[CheckedConfig | None, list[GatewayError]]:
    """Check a parsed file; see :func:`read`."""
    if not isinstance(document.data, dict):
        return None, [
            BadConfig(
                "is empty or not a mapping",
                expected="LiteLLM's config.yaml",
                hint="write at least a model_list",
                path=name,
                line=1,
            )
        ]
    checker = _Checker(document, name, secrets_dir, allow)
    checker.run()
    if named is not None:
        named += checker.named
    if checker.problems:
        return None, sorted(checker.problems, key=lambda e: e.line or 0)
    models = document.data["model_list"]
    return (
        CheckedConfig(
            effective(document.data, checker.files),
            dict(checker.secrets),
            tuple(sorted({m["model_name"] for m in models})),
            len(models),
            digest,
            dict(checker.references),
        ),
        [],
    )


def effective(data: Mapping[str, Any], files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the configuration with the settings that Moat always sets.

    Args:
        data: the file.
        files: what stands in LiteLLM's words for each ``file:`` reference; LiteLLM itself knows only ``os.environ/``.
    """
    out: dict[str, Any] = _in_litellms_words(data, files) if files else copy.deepcopy(dict(data))
    out["general_settings"] = {
        # LiteLLM's login page is behind the identity stage; without a value it warns at each start.
        "trusted_proxy_ranges": [],
        **(out.get("general_settings") or {}),
        "master_key": rules.REFERENCE + rules.MASTER_KEY_NAME,
        "custom_auth": "moat_gateway.litellm_port.custom_auth",
        # Both are needed, or LiteLLM ignores the models of the key that custom_auth returns.
        "custom_auth_run_common_checks": True,
    }
    out["litellm_settings"] = {
        **(out.get("litellm_settings") or {}),
        "enable_post_custom_auth_checks": True,
        # POST /utils/token_counter with the name of a Llama model would fetch its tokenizer.
        "disable_hf_tokenizer_download": True,
    }
    return out


def outside(
    effective: Mapping[str, Any], secrets: Mapping[str, str], files: Mapping[str, Path], allow: AllowList
) -> dict[str, GatewayError]:
    """Return, by name, what :func:`check` would say at the next start about the destinations in these secrets.

    Args:
        effective: what LiteLLM is given.
        secrets: new values of some of its references.
        files: where the values are.
        allow: the allow-list.
    """
    out: dict[str, GatewayError] = {}
    for at, value in _leaves(effective, ()):
        name = value.removeprefix(rules.REFERENCE) if isinstance(value, str) else ""
        if name == value or name not in secrets or name in out:
            continue
        for d in _destinations_in(at, secrets[name]):
            if isinstance(d, NotADestination) or not allow.allows(d):
                what, shown = _against(d, secrets[name], secret=True)
                out[name] = _refusal(at, what, shown, allow, str(files[name]), None)
                break
    return out


def _destinations_in(at: Trail, text: str) -> list[Destination | NotADestination]:
    """Return the destinations in a value: its URLs, or the one that a key such as ``host`` makes of it."""
    found = list(destinations_of_urls(text))
    key = next((s for s in reversed(at) if isinstance(s, str)), "")
    if not found and "://" not in text and rules.DESTINATION_KEY.search(key) and text and text[0] not in "/.":
        try:
            found = [parse_host_port(text.partition("/")[0])]
        except NotADestination:
            found = [NotADestination("a destination that cannot be read")]
    return found


def _against(d: Destination | NotADestination, text: str, *, secret: bool) -> tuple[str, Destination | None]:
    """Return what there is against a destination that is not allowed, and the destination if it may be shown."""
    if isinstance(d, NotADestination):
        return f"holds a {d}", None
    if secret and "://" not in text:
        # What looks like a host name may be a password that somebody put there: it is not shown.
        return "refers to a secret that holds a destination", None
    return f"points to {d}", d


def _refusal(
    at: Trail, what: str, destination: Destination | None, allow: AllowList, path: str, line: int | None
) -> EndpointRefused:
    return EndpointRefused(
        f"{dotted(at)} {what}, which is not in the allow-list",
        expected=str(allow),
        hint=f"add {destination} to MOAT_EGRESS_ALLOW if it is a server of this site, or remove it"
        if destination
        else "write the host plainly, or remove it",
        path=path,
        line=line,
    )


def _in_litellms_words(value: Any, files: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _in_litellms_words(v, files) for k, v in value.items()}
    if isinstance(value, list):
        return [_in_litellms_words(v, files) for v in value]
    return files.get(value, value) if isinstance(value, str) else value


class _Checker:
    def __init__(self, document: Document, name: str, secrets_dir: Path, allow: AllowList) -> None:
        self._document = document
        self._data: dict[Any, Any] = document.data
        self._name = name
        self._dir = secrets_dir
        self._allow = allow
        self.problems: list[GatewayError] = []
        self.named: list[Named] = []
        self.secrets: dict[str, str] = {}
        self.references: dict[str, Path] = {}
        self.files: dict[str, str] = {}

    def run(self) -> None:
        """Apply every rule."""
        self._sections()
        self._database()
        self._refused()
        self._environment()
        self._strings()
        self._models()
        self._services()
        self._callbacks()

    # --- reporting ---

    def _report(self, error: type[GatewayError], at: Trail, message: str, **more: str | None) -> None:
        more = {"hint": "correct the line", **more}
        self.problems.append(error(message, path=self._name, line=self._document.line(at), **more))

    def _get(self, at: tuple[str, ...]) -> Any:
        value: Any = self._data
        for step in at:
            if not isinstance(value, dict) or step not in value:
                return None
            value = value[step]
        return value

    # --- shape ---

    def _sections(self) -> None:
        for section in ("general_settings", "litellm_settings", "router_settings", "environment_variables"):
            value = self._data.get(section)
            if value is not None and not isinstance(value, dict):
                self._report(BadConfig, (section,), f"{section} is not a mapping", expected="keys and values")
                self._data[section] = {}

    def _database(self) -> None:
        for at in rules.DATABASE:
            if self._get(at):
                self._report(
                    DatabaseSet,
                    at,
                    f"{dotted(at)} asks for a database",
                    expected="no database",
                    hint="remove it; keys and teams are in keys.yaml",
                )

    def _refused(self) -> None:
        for at, bad, why in rules.REFUSED:
            value = self._get(at)
            if value is not None and bad(value):
                self._report(SettingRefused, at, f"{dotted(at)} is not allowed: {why}", hint="remove it")
        key = self._get(("general_settings", "master_key"))
        if key is not None and key != rules.REFERENCE + rules.MASTER_KEY_NAME:
            self._report(
                SettingRefused,
                ("general_settings", "master_key"),
                "general_settings.master_key is not allowed: the key comes from its file",
                hint="remove it; MOAT_MASTER_KEY_FILE names the file",
            )

    def _environment(self) -> None:
        for key in self._data.get("environment_variables") or {}:
            at = ("environment_variables", str(key))
            if not isinstance(key, str) or rules.RESERVED_NAMES.fullmatch(key):
                self._report(
                    SettingRefused, at, f"{dotted(at)} is not allowed: it steers the gateway itself", hint="remove it"
                )

    # --- every string of the file ---

    def _strings(self) -> None:
        for at, value in _leaves(self._data, ()):
            if isinstance(value, str) and value.startswith(rules.REFERENCE):
                resolved = self._resolve(at, value.removeprefix(rules.REFERENCE))
                if resolved is not None:
                    self._destinations(at, resolved, secret=True)
            elif isinstance(value, str) and value.startswith(rules.FILE_REFERENCE):
                resolved = self._resolve_file(at, value)
                if resolved is not None:
                    self._destinations(at, resolved, secret=True)
            elif isinstance(value, str):
                self._destinations(at, value)
        self._node_pairs(self._data, ())

    def _resolve(self, at: Trail, name: str) -> str | None:
        if name == rules.MASTER_KEY_NAME:
            return None
        if not secretfiles.is_reference_name(name) or rules.RESERVED_NAMES.fullmatch(name):
            self._report(
                SettingRefused,
                at,
                f"{dotted(at)} refers to {name!r}, which cannot be a secret",
                hint="choose another name",
            )
            return None
        if name in self.secrets:
            return self.secrets[name]
        path = secretfiles.find(self._dir, name)
        if path is None:
            self._report(
                UnsetSecret,
                at,
                f"{dotted(at)} refers to the secret {name}, for which there is no file",
                expected=f"{self._dir / name} or {self._dir / name.lower()}",
                hint="make the file (mode 0400, for the gateway's user) or remove the reference",
            )
            return None
        return self._read(name, path)

    def _resolve_file(self, at: Trail, text: str) -> str | None:
        # Normalised as text, before anything is opened: `..` must not lead out of the folder.
        path = Path(os.path.normpath(text.removeprefix("file:")))
        folder = Path(os.path.normpath(self._dir))
        if folder not in path.parents or not text.isprintable():
            self._report(
                SettingRefused,
                at,
                f"{dotted(at)} refers to a file outside of the folder of secrets",
                found=ascii(text[:200]),
                expected=f"file:{folder}/NAME",
                hint="put the secret into the folder of secrets, or refer to it as os.environ/NAME",
            )
            return None
        name = rules.FILE_NAME_PREFIX + hashlib.sha256(str(path).encode()).hexdigest()[:16].upper()
        self.files[text] = rules.REFERENCE + name
        if name in self.secrets:
            return self.secrets[name]
        if not os.path.lexists(path):
            self._report(
                UnsetSecret,
                at,
                f"{dotted(at)} refers to a secret file that is not there",
                expected=str(path),
                hint="make the file (mode 0400, for the gateway's user) or remove the reference",
            )
            return None
        return self._read(name, path)

    def _read(self, name: str, path: Path) -> str | None:
        try:
            self.secrets[name] = secretfiles.read_value(path)
        except UnreadableSecret as e:
            if not any(p.path == e.path for p in self.problems):  # several references, one file
                self.problems.append(e)
            return None
        self.references[name] = path
        return self.secrets[name]

    def _destinations(self, at: Trail, text: str, *, secret: bool = False) -> None:
        for d in _destinations_in(at, text):
            allowed = not isinstance(d, NotADestination) and self._allow.allows(d)
            hidden = secret and "://" not in text and not allowed
            self.named.append(Named(at, "a destination in a secret" if hidden else str(d), allowed))
            if not allowed:
                self._outside(at, *_against(d, text, secret=secret))

    def _node_pairs(self, value: Any, at: Trail) -> None:
        """Check ``[["host", 26379], ...]``, the form of Redis' sentinel nodes."""
        if isinstance(value, dict):
            for k, v in value.items():
                self._node_pairs(v, (*at, str(k)))
        elif isinstance(value, list):
            if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int and 0 < value[1] < 65536:
                try:
                    d: Destination | None = parse_host_port(value[0])
                except NotADestination:
                    d = None
                allowed = d is not None and self._allow.allows(Destination(d.host, value[1]))
                self.named.append(Named(at, str(Destination(d.host, value[1]) if d else "an unreadable host"), allowed))
                if not allowed:
                    self._outside(
                        at, f"points to {value[0]}:{value[1]}" if d else "holds a host that cannot be read", d
                    )
            else:
                for i, v in enumerate(value):
                    self._node_pairs(v, (*at, i))

    def _outside(self, at: Trail, what: str, destination: Destination | None) -> None:
        self.problems.append(_refusal(at, what, destination, self._allow, self._name, self._document.line(at)))

    # --- what would call a public cloud without saying so ---

    def _models(self) -> None:
        entries = self._data.get("model_list")
        if not entries:
            self._report(
                NoModels,
                ("model_list",),
                "names no model",
                expected="at least one entry in model_list",
                hint="add a model",
            )
            return
        if not isinstance(entries, list):
            self._report(BadConfig, ("model_list",), "model_list is not a list", expected="a list of deployments")
            return
        credentials = self._credentials()
        for i, entry in enumerate(entries):
            at: Trail = ("model_list", i)
            params = entry.get("litellm_params") if isinstance(entry, dict) else None
            if (
                not isinstance(params, dict)
                or not isinstance(entry.get("model_name"), str)
                or not isinstance(params.get("model"), str)
            ):
                self._report(
                    BadConfig, at, f"{dotted(at)} is not a deployment", expected="model_name and litellm_params.model"
                )
                continue
            by_name = params.get("litellm_credential_name")
            named = credentials.get(by_name, {}) if isinstance(by_name, str) else {}
            if not any(params.get(b) or named.get(b) for b in rules.BASES):
                self._report(
                    EndpointRefused,
                    (*at, "litellm_params"),
                    f"{dotted(at)} ({params['model']}) has no api_base: LiteLLM would call its public servers",
                    expected="api_base of a server of this site",
                    hint="add litellm_params.api_base",
                )
            info = entry.get("model_info")
            if isinstance(info, dict) and info.get("custom_tokenizer"):
                self._report(
                    EndpointRefused,
                    (*at, "model_info", "custom_tokenizer"),
                    f"{dotted(at)} asks for a tokenizer from a public hub",
                    hint="remove model_info.custom_tokenizer",
                )

    def _credentials(self) -> dict[str, dict[str, Any]]:
        return {
            entry["credential_name"]: entry["credential_values"]
            for entry in self._entries("credential_list")
            if isinstance(entry.get("credential_name"), str) and isinstance(entry.get("credential_values"), dict)
        }

    def _entries(self, section: str) -> Iterator[dict[Any, Any]]:
        value = self._data.get(section)
        yield from (entry for entry in value if isinstance(entry, dict)) if isinstance(value, list) else ()

    def _services(self) -> None:
        for section in rules.NEEDS_BASE:
            for at, params in _params_of(self._data.get(section), (section,)):
                if not any(params.get(b) for b in rules.BASES):
                    self._report(
                        EndpointRefused,
                        at,
                        f"{dotted(at)} has no api_base: LiteLLM would call a public service",
                        expected="api_base of a server of this site",
                        hint="add it, or remove the entry",
                    )
        guardrails = self._data.get("guardrails")
        for i, guardrail in enumerate(guardrails if isinstance(guardrails, list) else []):
            own = guardrail.get("litellm_params") if isinstance(guardrail, dict) else None
            own = own if isinstance(own, dict) else {}
            kind = str(own.get("guardrail", ""))
            if "." in kind:
                self._code(("guardrails", i), kind)
            elif not (kind in rules.LOCAL_GUARDRAILS or own.get("api_base")):
                self._report(
                    EndpointRefused,
                    ("guardrails", i),
                    f"guardrails[{i}] ({kind}) has no api_base: LiteLLM would call a public service",
                    hint="add litellm_params.api_base, or remove it",
                )
        servers = self._data.get("mcp_servers")
        for name, server in servers.items() if isinstance(servers, dict) else ():
            if isinstance(server, dict) and (server.get("command") or server.get("transport") == "stdio"):
                self._report(
                    SettingRefused,
                    ("mcp_servers", str(name)),
                    f"mcp_servers.{name} starts a program: it would be outside of the egress check",
                    hint="run the server by itself and give its url",
                )
        cache = self._get(("litellm_settings", "cache_params"))
        type_ = str(cache.get("type", "redis")) if isinstance(cache, dict) else "local"
        if type_ not in rules.CACHE_TYPES or (type_ == "s3" and not cache.get("s3_endpoint_url")):
            self._report(
                EndpointRefused,
                ("litellm_settings", "cache_params"),
                f"litellm_settings.cache_params of type {type_} would call a public cloud",
                expected="redis, local, or s3 with s3_endpoint_url",
                hint="choose another cache",
            )

    def _code(self, at: Trail, name: Any) -> None:
        """Refuse Python code that is not of this package: data must not choose what is executed."""
        if not (isinstance(name, str) and name.startswith(rules.OWN_CODE)):
            self._report(
                SettingRefused,
                at,
                f"{dotted(at)} names Python code",
                found=str(name)[:100],
                expected=f"nothing, or a name in {rules.OWN_CODE.rstrip('.')}",
                hint="remove it",
            )

    def _callbacks(self) -> None:
        for where in rules.CODE:
            named = self._get(where)
            for name in named if isinstance(named, list) else [named] if named else []:
                self._code(where, name)
        settings = self._data.get("litellm_settings") or {}
        for section in rules.CALLBACK_LISTS:
            names = settings.get(section) or []
            for i, name in enumerate(names if isinstance(names, list) else [names]):
                at: Trail = ("litellm_settings", section, i)
                if not isinstance(name, str):
                    self._report(BadConfig, at, f"{dotted(at)} is not a name", expected="the name of a callback")
                    continue
                if "." in name:
                    self._code(at, name)
                    continue
                needs = rules.CALLBACK_NEEDS.get(name)
                if name not in rules.LOCAL_CALLBACKS or (needs and not self._get(("litellm_settings", *needs))):
                    self._report(
                        EndpointRefused,
                        at,
                        f"{dotted(at)} ({name}) would call its vendor's cloud",
                        expected=f"litellm_settings.{'.'.join(needs)}"
                        if needs
                        else ", ".join(sorted(rules.LOCAL_CALLBACKS)),
                        hint="remove it, or give the site's own endpoint",
                    )


def _leaves(value: Any, at: Trail) -> Iterator[tuple[Trail, Any]]:
    if isinstance(value, dict):
        for k, v in value.items():
            # A key can be a destination too (pass-through maps, headers): it is read like a value.
            if isinstance(k, str) and "://" in k:
                yield (*at, k), k
            yield from _leaves(v, (*at, k if isinstance(k, int) and not isinstance(k, bool) else str(k)))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _leaves(v, (*at, i))
    else:
        yield at, value


def _params_of(value: Any, at: Trail) -> Iterator[tuple[Trail, dict[str, Any]]]:
    entries = value if isinstance(value, list) else [value] if value else []
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            params = entry.get("litellm_params")
            yield ((*at, i) if isinstance(value, list) else at), params if isinstance(params, dict) else entry
