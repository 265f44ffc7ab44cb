# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501, RUF009 - a table whose rows are sentences, and fields made by a function
"""The one table of settings: it drives parsing, ``--help``, the reference page and the deployment's argument specs.

A setting is a field of :class:`Settings`; its name gives the variable (``MOAT_PORT``), the key in
``/etc/moat/gateway.yaml`` (``port``) and the option (``--port``). The command line wins over the environment, the
environment over the file, the file over the default. Secrets are never settings: settings name their files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from moat_gateway import strictyaml
from moat_gateway.allowlist import AllowList, NotADestination, as_address
from moat_gateway.errors import BadSetting
from moat_gateway.strictyaml import Document

PREFIX = "MOAT_"
SETTINGS_FILE_VARIABLE = "MOAT_SETTINGS_FILE"
DEFAULT_SETTINGS_FILE = Path("/etc/moat/gateway.yaml")


class Kind(Enum):
    """What a value is, in the words of the reference page and of Ansible's argument specs."""

    TEXT = "str"
    PATH = "path"
    INTEGER = "int"
    SECONDS = "float"
    DESTINATIONS = "list"
    ADDRESS = "address"


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: field of :class:`Settings` and key in ``gateway.yaml``.
        kind: type of the value.
        default: as it is in :class:`Settings`.
        description: one sentence for the operator.
        unit: unit of a number, or ``None``.
        minimum: smallest number allowed, or ``None``.
        maximum: largest number allowed, or ``None``.
        choices: the words that are allowed; empty for any.
    """

    name: str
    kind: Kind
    default: Any
    description: str
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def env(self) -> str:
        """The environment variable."""
        return PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        """The command-line option."""
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        """The default as one writes it."""
        if self.kind is Kind.DESTINATIONS:
            return "(none)"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def _setting(kind: Kind, default: Any, description: str, **more: Any) -> Any:
    return field(default=default, metadata={"setting": (kind, description, more)})


@dataclass(frozen=True)
class Settings:
    """The values in force; see :data:`SETTINGS` for what each means."""

    config: Path = _setting(Kind.PATH, Path("/etc/moat/config.yaml"), "LiteLLM's own configuration file.")
    keys: Path = _setting(
        Kind.PATH,
        Path("/etc/moat/keys.yaml"),
        "Teams and client keys; only hashes of secrets. Read again when it changes.",
    )
    secrets_dir: Path = _setting(
        Kind.PATH,
        Path("/run/secrets"),
        "Folder of secret files; a file NAME answers os.environ/NAME of the configuration.",
    )
    master_key_file: Path = _setting(
        Kind.PATH,
        Path("/run/secrets/master_key"),
        "File with the administrator's key (one line, at least 32 characters).",
    )
    egress_allow: tuple[str, ...] = _setting(
        Kind.DESTINATIONS,
        (),
        "Where the gateway may connect to, besides the loopback: host names, addresses, networks, each with or without :port; separated by commas or blanks.",
    )
    host: str = _setting(Kind.ADDRESS, "127.0.0.1", "Address to listen on.")
    port: int = _setting(Kind.INTEGER, 4000, "Port to listen on.", minimum=0, maximum=65535)
    instance: str = _setting(Kind.TEXT, "gateway", "Name of this gateway in status and logs.")
    admin_socket: Path = _setting(
        Kind.PATH, Path("/run/moat/admin.sock"), "Unix socket for status, metrics and reload (mode 0660)."
    )
    keys_poll: float = _setting(
        Kind.SECONDS, 0.5, "How often the keys file is looked at for a change.", unit="s", minimum=0.1, maximum=60
    )
    shutdown_delay: float = _setting(
        Kind.SECONDS,
        1.0,
        "After SIGTERM: how long readiness says 503 while requests are still taken, so that nginx and probes notice.",
        unit="s",
        minimum=0,
        maximum=60,
    )
    shutdown_timeout: float = _setting(
        Kind.SECONDS,
        60.0,
        "After that: how long running requests and streams may go on before they are cut.",
        unit="s",
        minimum=1,
        maximum=3600,
    )
    keepalive_timeout: float = _setting(
        Kind.SECONDS,
        75.0,
        "How long an idle client connection is kept; above the proxy's own value, so that the proxy closes first.",
        unit="s",
        minimum=1,
        maximum=3600,
    )
    log_level: str = _setting(
        Kind.TEXT, "info", "Least level that is logged.", choices=("debug", "info", "warning", "error")
    )
    store_endpoint: str = _setting(
        Kind.TEXT, "", "Object store (moat-gateway store): HOST:PORT, or with http:// or https:// in front."
    )
    store_bucket: str = _setting(Kind.TEXT, "moat-config", "Bucket of configuration revisions.")
    store_access_key_file: Path = _setting(
        Kind.PATH, Path("/run/secrets/store_access_key"), "File with the store's access key."
    )
    store_secret_key_file: Path = _setting(
        Kind.PATH, Path("/run/secrets/store_secret_key"), "File with the store's secret key."
    )
    store_ca_file: str = _setting(
        Kind.TEXT, "", "Certificate authority of the store, for https; empty for the system's."
    )
    store_timeout: float = _setting(
        Kind.SECONDS, 60.0, "How long `store init` waits for the store to answer.", unit="s", minimum=1, maximum=600
    )
    store_status_bucket: str = _setting(
        Kind.TEXT, "moat-status", "Bucket (not versioned) in which each node tells what its gateways serve."
    )
    sync_dir: str = _setting(
        Kind.TEXT,
        "",
        "Folder of this node in which config-sync keeps verified revisions and from which gateways serve; empty: config and keys are local files.",
    )
    reports_dir: str = _setting(
        Kind.TEXT, "", "Folder of this node in which each gateway tells what it serves; needed with sync_dir."
    )
    source_dir: str = _setting(
        Kind.TEXT, "", "Folder to use as the source of revisions (a USB drive, a share) instead of the object store."
    )
    site_keys_dir: Path = _setting(
        Kind.PATH,
        Path("/etc/moat/site-keys"),
        "Folder of the public site keys (*.pub, minisign) that may sign revisions.",
    )
    site_key_file: Path = _setting(
        Kind.PATH,
        Path("/run/secrets/site_key"),
        "File with the secret site key (minisign); only where revisions are signed.",
    )
    node: str = _setting(Kind.TEXT, "", "Name of this node in `config status`; empty: the host's name.")
    reload_interval: float = _setting(
        Kind.SECONDS,
        1.0,
        "Within this time a new revision is noticed; the pointer is asked for four times as often.",
        unit="s",
        minimum=0.2,
        maximum=3600,
    )
    stale_after: float = _setting(
        Kind.SECONDS,
        30.0,
        "Without an answer of the source for this long, gateways say that they are degraded.",
        unit="s",
        minimum=1,
        maximum=86400,
    )
    sync_keep: int = _setting(Kind.INTEGER, 10, "How many good revisions a node keeps.", minimum=2, maximum=1000)
    revision_max: int = _setting(
        Kind.INTEGER, 64, "Largest revision that is taken.", unit="MiB", minimum=1, maximum=1024
    )
    dry_run_timeout: float = _setting(
        Kind.SECONDS, 10.0, "How long the dry run of a router may take.", unit="s", minimum=0.5, maximum=600
    )
    dry_run_memory: int = _setting(
        Kind.INTEGER,
        512,
        "How much memory the dry run of a router may take for itself.",
        unit="MiB",
        minimum=64,
        maximum=65536,
    )
    restart_policy: str = _setting(
        Kind.TEXT,
        "rolling",
        "What follows from a change that LiteLLM cannot take live: one gateway after the other drains and restarts, or it is only reported.",
        choices=("rolling", "report"),
    )
    secrets_poll: float = _setting(
        Kind.SECONDS, 1.0, "How often secret files are looked at for a change.", unit="s", minimum=0.1, maximum=60
    )

    @property
    def allow(self) -> AllowList:
        """The parsed allow-list."""
        return AllowList.parse(self.egress_allow)


def _table() -> tuple[Setting, ...]:
    rows = []
    for f in fields(Settings):
        kind, description, more = f.metadata["setting"]
        assert f.default is not MISSING  # noqa: S101 - every setting has a default
        rows.append(Setting(f.name, kind, f.default, description, **more))
    return tuple(rows)


SETTINGS: tuple[Setting, ...] = _table()


def load(environ: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> tuple[Settings, tuple[str, ...]]:
    """Return the settings in force, and the `MOAT_*` variables that are no setting (a typing error, perhaps).

    Args:
        environ: the environment.
        overrides: values of the command line, by name.

    Raises:
        BadSetting: a value cannot be used, or the file holds an unknown key.
    """
    named = environ.get(SETTINGS_FILE_VARIABLE)
    path = Path(named) if named else DEFAULT_SETTINGS_FILE
    document = _read_file(path) if named or path.exists() else Document({}, {})
    from_file: Mapping[str, Any] = document.data or {}
    values: dict[str, Any] = {}
    for s in SETTINGS:
        if overrides and overrides.get(s.name) is not None:
            values[s.name] = _parse(s, overrides[s.name], s.option)
        elif s.env in environ:
            values[s.name] = _parse(s, environ[s.env], s.env)
        elif s.name in from_file:
            values[s.name] = _parse(s, from_file[s.name], s.name, str(path), document.line((s.name,)))
    known = {s.env for s in SETTINGS} | {SETTINGS_FILE_VARIABLE}
    return Settings(**values), tuple(sorted(k for k in environ if k.startswith(PREFIX) and k not in known))


def _read_file(path: Path) -> Document:
    document = strictyaml.read(path, BadSetting)
    if document.data is None:
        return document
    if not isinstance(document.data, dict):
        raise BadSetting("is not a mapping", expected="lines like `port: 4000`", path=str(path), line=1)
    known = {s.name for s in SETTINGS}
    for key in document.data:
        if key not in known:
            raise BadSetting(
                f"holds the unknown setting {str(key)!r}",
                expected="one of those in docs/reference/settings.md",
                hint="correct or remove the line",
                path=str(path),
                line=document.line((str(key),)),
            )
    return document


def _parse(setting: Setting, raw: Any, where: str, path: str | None = None, line: int | None = None) -> Any:
    try:
        return _PARSERS[setting.kind](setting, raw)
    except _Unusable as e:
        raise BadSetting(
            f"{where} cannot be used",
            found=repr(raw),
            expected=e.expected,
            hint="correct the line" if path else f"set {setting.env} to such a value",
            path=path,
            line=line,
        ) from None


class _Unusable(Exception):
    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


def _text(setting: Setting, raw: Any) -> str:
    if not isinstance(raw, str) or any(ord(c) < 32 for c in raw):
        raise _Unusable("one line of text")
    if setting.choices and raw not in setting.choices:
        raise _Unusable(" or ".join(setting.choices))
    return raw


def _path(setting: Setting, raw: Any) -> Path:
    if not isinstance(raw, str) or not raw or "\0" in raw:
        raise _Unusable("a path")
    return Path(raw)


def _number(setting: Setting, raw: Any) -> float:
    low, high = setting.minimum, setting.maximum
    whole = setting.kind is Kind.INTEGER
    expected = f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}" + (
        f" ({setting.unit})" if setting.unit else ""
    )
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise _Unusable(expected)
    try:
        value = int(raw) if whole else float(raw)
    except (ValueError, OverflowError):
        raise _Unusable(expected) from None
    # The comparison is false for NaN, which must be refused too.
    if not (low is not None and high is not None and low <= value <= high):
        raise _Unusable(expected)
    return value


def _destinations(setting: Setting, raw: Any) -> tuple[str, ...]:
    texts = raw.replace(",", " ").split() if isinstance(raw, str) else raw
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise _Unusable("a list of destinations")
    try:
        AllowList.parse(texts)
    except NotADestination as e:
        raise _Unusable(f"host names, addresses or networks, each with or without :port; {str(e)!r} is none") from None
    return tuple(texts)


def _address(setting: Setting, raw: Any) -> str:
    # A name would be looked up before anything listens: addresses only.
    if not isinstance(raw, str) or as_address(raw) is None:
        raise _Unusable("an IPv4 or IPv6 address")
    return raw


_PARSERS: Mapping[Kind, Callable[[Setting, Any], Any]] = {
    Kind.TEXT: _text,
    Kind.PATH: _path,
    Kind.INTEGER: _number,
    Kind.SECONDS: _number,
    Kind.DESTINATIONS: _destinations,
    Kind.ADDRESS: _address,
}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add an option for each named setting (all of them without names)."""
    group = parser.add_argument_group("settings", "each is also a MOAT_* variable and a key in gateway.yaml")
    for s in SETTINGS:
        if not names or s.name in names:
            group.add_argument(
                s.option,
                dest=f"setting_{s.name}",
                metavar=(s.unit or s.kind.value).upper(),
                help=f"{s.description.rstrip('.').replace('%', '%%')} ({s.env}; default {s.default_text or 'empty'})",
            )


def overrides(args: argparse.Namespace) -> dict[str, str]:
    """Return what the command line set, by name."""
    return {k.removeprefix("setting_"): v for k, v in vars(args).items() if k.startswith("setting_") and v is not None}


def markdown() -> str:
    """Return the reference page (``docs/reference/settings.md``)."""
    lines = [
        "# Settings of the gateway",
        "",
        "Made by `moat-gateway settings --markdown`; a test compares the two. The command line wins over the environment, the",
        "environment over `/etc/moat/gateway.yaml` (`MOAT_SETTINGS_FILE` names another file), the file over the default.",
        "",
        "| variable | key in gateway.yaml | type | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for s in SETTINGS:
        kind = s.kind.value
        if s.choices:
            kind = " / ".join(s.choices)
        elif s.minimum is not None and s.maximum is not None:
            kind += f", {s.minimum:g} to {s.maximum:g}" + (f" {s.unit}" if s.unit else "")
        default = f"`{s.default_text}`" if s.default_text else "empty"
        lines.append(f"| `{s.env}` | `{s.name}` | {kind} | {default} | {s.description} |")
    return "\n".join(lines) + "\n"
