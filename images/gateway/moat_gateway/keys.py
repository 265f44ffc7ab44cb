# SPDX-License-Identifier: Apache-2.0
"""Teams and client keys: the strict reading of ``keys.yaml``, and the question "whose key is this?".

```yaml
teams:
  - id: physics
    models: ["chat-small"]      # "*" for every model
    rpm: 600                    # requests a minute, of the team, in each gateway process
keys:
  - id: physics-notebook
    team: physics
    sha256: <64 hex digits>     # of the secret; the secret itself is nowhere
    not_after: 2027-06-30       # the last day, UTC; or a time with its zone
    models: ["chat-small"]      # may narrow the team's list, never widen it
```
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets as _random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from moat_gateway import strictyaml
from moat_gateway.errors import BadKeys
from moat_gateway.strictyaml import Document, Trail, dotted

SECRET_PREFIX = "sk-moat-"  # noqa: S105 - a prefix, so that scanners for leaked keys know ours
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEAM_FIELDS = frozenset({"id", "models", "max_concurrency", "rpm", "tpm", "budget"})
_KEY_FIELDS = frozenset({"id", "team", "sha256", "not_after", "models"})


@dataclass(frozen=True)
class Team:
    """One team.

    Attributes:
        id: its name in logs and metrics.
        models: model names it may use; ``("*",)`` for all.
        rpm: requests a minute in each gateway process, or ``None``.
        tpm: tokens a minute in each gateway process, or ``None``.
        max_concurrency: accepted, not enforced yet.
        budget: accepted, not enforced yet.
    """

    id: str
    models: tuple[str, ...]
    rpm: int | None = None
    tpm: int | None = None
    max_concurrency: int | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Key:
    """One client key; ``not_after`` is the first moment at which it no longer counts."""

    id: str
    team: str
    sha256: str
    not_after: datetime | None = None
    models: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Identity:
    """Who asks: the administrator, or a key of a team.

    Attributes:
        team: the team's id; ``None`` for the administrator.
        key: the key's id; ``master`` for the administrator.
        sha256: of the presented secret, hex.
        record: the team's limits; ``None`` for the administrator.
        models: what the key may use, already inside the team's list; ``("*",)`` for all.
        not_after: when the key ends, or ``None``.
    """

    team: str | None
    key: str
    sha256: str
    record: Team | None
    models: tuple[str, ...]
    not_after: datetime | None = None

    @property
    def admin(self) -> bool:
        """Whether this is the administrator."""
        return self.record is None


class Verdict(Enum):
    """Why a presented secret does not count."""

    UNKNOWN = "unknown"
    EXPIRED = "expired"


@dataclass(frozen=True)
class KeySet:
    """The content of one keys file; ``sha256`` is of the file's bytes."""

    teams: Mapping[str, Team] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    by_hash: Mapping[str, Key] = field(default_factory=dict)
    sha256: str = ""

    def identify(self, secret: str, now: datetime) -> Identity | Verdict:
        """Say whose secret this is at ``now``.

        The look-up is by the secret's sha256, so that its time tells nothing about stored secrets; the last
        comparison takes the same time for every input.
        """
        presented = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        key = self.by_hash.get(presented)
        stored = key.sha256 if key is not None else "0" * 64
        if not hmac.compare_digest(stored, presented) or key is None:
            return Verdict.UNKNOWN
        if key.not_after is not None and now >= key.not_after:
            return Verdict.EXPIRED
        team = self.teams[key.team]
        return Identity(team.id, key.id, presented, team, key.models or team.models, key.not_after)


def new_secret() -> str:
    """Return a new secret: ``sk-moat-`` and 256 random bits."""
    return SECRET_PREFIX + _random.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """Return the hex sha256 of a secret, as it is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_not_after(value: Any) -> datetime:
    """Return the moment at which a key ends.

    Args:
        value: a date (its last day counts, UTC), or a time with a zone, as text or as YAML gave it.

    Raises:
        ValueError: neither, or a time without a zone.
    """
    if isinstance(value, str):
        value = date.fromisoformat(value) if re.fullmatch(r"\d{4}-\d\d-\d\d", value) else datetime.fromisoformat(value)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        return value.astimezone(UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC) + timedelta(days=1)
    raise ValueError("neither a date nor a time")


def read(path: Path) -> KeySet:
    """Read a keys file.

    Raises:
        BadKeys: it cannot be read or is not right; with the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise BadKeys(
            "cannot be read",
            found=e.strerror or str(e),
            hint="make it with `moat-gateway keys new`, or correct MOAT_KEYS or the file's mode",
            path=str(path),
        ) from e
    return parse(raw, str(path))


def parse(raw: bytes, name: str) -> KeySet:
    """Parse the bytes of a keys file; see :func:`read`."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadKeys("is not UTF-8 text", found=f"byte {e.start}", path=name) from e
    if len(raw) > strictyaml.MAX_BYTES:
        raise BadKeys("is too large", found=f"{len(raw)} bytes", path=name)
    reader = _Reader(strictyaml.parse(text, name=name, error=BadKeys), name)
    teams, keys = reader.teams_and_keys()
    return KeySet({t.id: t for t in teams}, tuple(keys), {k.sha256: k for k in keys}, hashlib.sha256(raw).hexdigest())


class _Reader:
    """Turns the document into records, refusing what it does not understand."""

    def __init__(self, document: Document, name: str) -> None:
        self._document = document
        self._name = name

    def teams_and_keys(self) -> tuple[list[Team], list[Key]]:
        top = self._document.data
        if not isinstance(top, dict):
            # An empty file is refused too: that is how a file looks while an editor writes it.
            raise self._bad((), "is empty or not a mapping", "`teams:` and `keys:`")
        self._only(top, frozenset({"teams", "keys"}), ())
        teams = [self._team(t, ("teams", i)) for i, t in enumerate(self._list(top.get("teams"), ("teams",)))]
        self._unique([t.id for t in teams], "teams", "id")
        known = {t.id: t for t in teams}
        keys = [self._key(k, ("keys", i), known) for i, k in enumerate(self._list(top.get("keys"), ("keys",)))]
        self._unique([k.id for k in keys], "keys", "id")
        self._unique([k.sha256 for k in keys], "keys", "sha256")
        return teams, keys

    def _team(self, raw: Any, at: Trail) -> Team:
        raw = self._fields(raw, _TEAM_FIELDS, at)
        budget = raw.get("budget")
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or budget < 0):
            raise self._bad((*at, "budget"), f"{dotted((*at, 'budget'))} is not an amount", "a number from 0")
        models = self._models(raw, at)
        if models is None:
            raise self._bad(at, f"{dotted(at)} has no models", 'a list of model names, or ["*"] for every model')
        return Team(
            self._id(raw, at),
            models,
            self._count(raw, at, "rpm"),
            self._count(raw, at, "tpm"),
            self._count(raw, at, "max_concurrency"),
            float(budget) if budget is not None else None,
        )

    def _key(self, raw: Any, at: Trail, teams: Mapping[str, Team]) -> Key:
        raw = self._fields(raw, _KEY_FIELDS, at)
        team = raw.get("team")
        if team not in teams:
            raise self._bad((*at, "team"), f"{dotted(at)} names a team that is not there", "the id of a team", team)
        digest = raw.get("sha256")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            # What stands there may be a secret that somebody pasted: it is not shown.
            raise self._bad((*at, "sha256"), f"{dotted((*at, 'sha256'))} is not a sha256", "64 lower-case hex digits")
        models = self._models(raw, at)
        allowed = teams[team].models
        if models is not None and allowed != ("*",):
            beyond = [m for m in models if m not in allowed]
            if beyond:
                raise self._bad(
                    (*at, "models"), f"{dotted(at)} asks for more than its team", ", ".join(allowed), ", ".join(beyond)
                )
        not_after = raw.get("not_after")
        try:
            ends = parse_not_after(not_after) if not_after is not None else None
        except (ValueError, OverflowError):
            raise self._bad(
                (*at, "not_after"),
                f"{dotted((*at, 'not_after'))} is not a moment",
                "a date, or a time with its zone such as 2027-06-30T12:00:00Z",
                str(not_after),
            ) from None
        return Key(self._id(raw, at), team, digest, ends, models)

    def _list(self, raw: Any, at: Trail) -> list[Any]:
        if raw is None:
            return []
        if not isinstance(raw, list):
            raise self._bad(at, f"{dotted(at)} is not a list", "a list")
        return raw

    def _fields(self, raw: Any, allowed: frozenset[str], at: Trail) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise self._bad(at, f"{dotted(at)} is not a mapping", f"the fields {', '.join(sorted(allowed))}")
        self._only(raw, allowed, at)
        return raw

    def _only(self, raw: Mapping[Any, Any], allowed: frozenset[str], at: Trail) -> None:
        for name in raw:
            if name not in allowed:
                raise self._bad(
                    (*at, str(name)), f"{dotted(at)} holds an unknown field", ", ".join(sorted(allowed)), str(name)
                )

    def _id(self, raw: Mapping[str, Any], at: Trail) -> str:
        value = raw.get("id")
        if not isinstance(value, str) or not _ID.fullmatch(value):
            raise self._bad((*at, "id"), f"{dotted(at)} has no usable id", "letters, digits, '.', '_', '-'", str(value))
        return value

    def _count(self, raw: Mapping[str, Any], at: Trail, name: str) -> int | None:
        value = raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            where = (*at, name)
            raise self._bad(where, f"{dotted(where)} is not a count", "a whole number from 1", str(value))
        return value

    def _models(self, raw: Mapping[str, Any], at: Trail) -> tuple[str, ...] | None:
        if "models" not in raw:
            return None
        value = raw["models"]
        where = (*at, "models")
        # LiteLLM reads an empty list as "every model": it is refused, so that nobody opens all by clearing a list.
        if not isinstance(value, list) or not value or not all(isinstance(m, str) and m for m in value):
            raise self._bad(where, f"{dotted(where)} is not a list of model names", 'names, or ["*"] for every model')
        reserved = [m for m in value if m.startswith(("all-", "no-default"))]
        if reserved:
            raise self._bad(where, f"{dotted(where)} holds a word of LiteLLM's own", "model names", reserved[0])
        return ("*",) if "*" in value else tuple(value)

    def _unique(self, values: list[str], section: str, name: str) -> None:
        seen: set[str] = set()
        for i, value in enumerate(values):
            if value in seen:
                shown = None if name == "sha256" else value
                raise self._bad((section, i, name), f"two {section} have the same {name}", f"each {name} once", shown)
            seen.add(value)

    def _bad(self, at: Trail, message: str, expected: str, found: str | None = None) -> BadKeys:
        return BadKeys(
            message,
            found=found,
            expected=expected,
            hint="correct the file",
            path=self._name,
            line=self._document.line(at),
        )
