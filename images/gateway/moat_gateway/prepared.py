# SPDX-License-Identifier: Apache-2.0
"""What a gateway loads of a revision: checked, without YAML, without a secret's value, ready to be compared.

config-sync writes it once a node (``prepared.json``), and every gateway of the node reads it: parsing JSON takes a
tenth of the time of YAML, and what follows from a change is a comparison of digests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from moat_gateway import configrules as rules
from moat_gateway.config import CheckedConfig
from moat_gateway.errors import BadRevision
from moat_gateway.keys import Key, KeySet, Team
from moat_gateway.strictyaml import Trail

FORMAT = 1
_ID_LENGTH = 32  # hex digits of a digest that name a deployment


@dataclass(frozen=True)
class Deployment:
    """One entry of ``effective["model_list"]``, at the same index.

    Attributes:
        id: LiteLLM's ``model_info.id``: the file's own, else made of the digest; it does not change with a secret.
        digest: sha256 of the entry and of the credential that it names; equal digests mean equal deployments.
        references: names of the secrets that it needs.
    """

    id: str
    digest: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A checked configuration as data.

    Attributes:
        revision: its number; 0 for local files and folders that are not pushed yet.
        config_sha256: of ``config.yaml``.
        keys_sha256: of ``keys.yaml``.
        effective: what LiteLLM is given, with references instead of secrets, and an id for every deployment.
        references: for the name of each reference the file that holds its value.
        models: the names that clients use, sorted.
        deployments: aligned with ``effective["model_list"]``.
        sections: for each other section of ``effective`` the references in it, if it holds any.
        keys: teams and keys as plain values; see :meth:`key_set`.
    """

    revision: int
    config_sha256: str
    keys_sha256: str
    effective: Mapping[str, Any] = field(repr=False)
    references: Mapping[str, str]
    models: tuple[str, ...]
    deployments: tuple[Deployment, ...] = field(repr=False)
    sections: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, Any] = field(repr=False)

    def to_json(self) -> bytes:
        """Return the bytes of ``prepared.json``; equal content gives equal bytes."""
        value = {
            "format": FORMAT,
            "revision": self.revision,
            "config_sha256": self.config_sha256,
            "keys_sha256": self.keys_sha256,
            "effective": self.effective,
            "references": dict(self.references),
            "models": list(self.models),
            "sections": {name: list(names) for name, names in self.sections.items()},
            "deployments": [{"id": d.id, "digest": d.digest, "references": d.references} for d in self.deployments],
            "keys": self.keys,
        }
        # Sections and deployments keep their order: LiteLLM gives the first of equals a meaning.
        return (json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, raw: bytes) -> Prepared:
        """Read ``prepared.json``.

        Raises:
            BadRevision: it is not what :meth:`to_json` writes, or of another format.
        """
        try:
            return cls.from_plain(json.loads(raw))
        except (ValueError, RecursionError) as e:
            raise _unreadable(e) from None

    @classmethod
    def from_plain(cls, value: Any) -> Prepared:
        """Take what ``json.loads`` made of ``prepared.json``; see :meth:`from_json`. It looks at shapes only: quick."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']!r}")
            prepared = cls(
                revision=_an(int, value["revision"]),
                config_sha256=_an(str, value["config_sha256"]),
                keys_sha256=_an(str, value["keys_sha256"]),
                effective=_an(dict, value["effective"]),
                references={_an(str, k): _an(str, v) for k, v in value["references"].items()},
                models=_texts(value["models"]),
                deployments=tuple(
                    Deployment(_an(str, d["id"]), _an(str, d["digest"]), _texts(d["references"]))
                    for d in value["deployments"]
                ),
                sections={_an(str, k): _texts(v) for k, v in value["sections"].items()},
                keys=_an(dict, value["keys"]),
            )
            if len(prepared.deployments) != len(prepared.effective["model_list"]):
                raise ValueError("other deployments than model_list has")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise _unreadable(e) from None
        return prepared

    def key_set(self) -> KeySet:
        """Return teams and keys as the identity stage asks them.

        Raises:
            BadRevision: they are not what :func:`prepare` writes.
        """
        try:
            teams = {t["id"]: Team(**{**t, "models": tuple(t["models"])}) for t in self.keys["teams"]}
            keys = tuple(_key(k) for k in self.keys["keys"])
            unknown = [k.team for k in keys if k.team not in teams]
            if unknown:
                raise ValueError(f"team {unknown[0]}")
        except (ValueError, KeyError, TypeError) as e:
            raise _unreadable(e) from None
        return KeySet(teams, keys, {k.sha256: k for k in keys}, self.keys_sha256)


def _key(plain: Mapping[str, Any]) -> Key:
    ends, models = plain["not_after"], plain["models"]
    return Key(
        plain["id"],
        plain["team"],
        plain["sha256"],
        datetime.fromisoformat(ends).astimezone(UTC) if ends is not None else None,
        tuple(models) if models is not None else None,
    )


def _unreadable(e: Exception) -> BadRevision:
    return BadRevision(
        "the prepared configuration cannot be read",
        found=f"{type(e).__name__}: {ascii(str(e))[:100]}",
        expected=f"format {FORMAT}, as config-sync of this version writes it",
        hint="let config-sync fetch the revision again; run the same version of both",
    )


def prepare(checked: CheckedConfig, keys: KeySet, *, revision: int) -> Prepared:
    """Put together what a gateway loads; :func:`unplain` has found nothing in the configuration."""
    effective = json.loads(json.dumps(checked.effective, allow_nan=False))
    deployments = _deployments(effective)
    for entry, deployment in zip(effective["model_list"], deployments, strict=True):
        entry["model_info"] = {**(entry.get("model_info") or {}), "id": deployment.id}
    return Prepared(
        revision=revision,
        config_sha256=checked.sha256,
        keys_sha256=keys.sha256,
        effective=effective,
        references={name: str(path) for name, path in checked.references.items()},
        models=checked.models,
        deployments=deployments,
        sections={
            name: found for name, value in effective.items() if name != "model_list" and (found := _references(value))
        },
        keys={
            "teams": [
                {
                    "id": t.id,
                    "models": list(t.models),
                    "rpm": t.rpm,
                    "tpm": t.tpm,
                    "max_concurrency": t.max_concurrency,
                    "budget": t.budget,
                }
                for t in keys.teams.values()
            ],
            "keys": [
                {
                    "id": k.id,
                    "team": k.team,
                    "sha256": k.sha256,
                    "not_after": k.not_after.isoformat() if k.not_after is not None else None,
                    "models": list(k.models) if k.models is not None else None,
                }
                for k in keys.keys
            ],
        },
    )


def _deployments(effective: Mapping[str, Any]) -> tuple[Deployment, ...]:
    listed = effective.get("credential_list")
    credentials = {
        str(c.get("credential_name")): c for c in (listed if isinstance(listed, list) else []) if isinstance(c, Mapping)
    }
    out: list[Deployment] = []
    seen: dict[str, int] = {}
    for entry in effective["model_list"]:
        named = entry["litellm_params"].get("litellm_credential_name")
        credential = credentials.get(named) if isinstance(named, str) else None
        whole = json.dumps([entry, credential], sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(whole.encode("ascii")).hexdigest()
        seen[digest] = seen.get(digest, 0) + 1
        own = (entry.get("model_info") or {}).get("id")
        # Two equal entries are two deployments (twice the share of the requests): each needs a name.
        made = digest[:_ID_LENGTH] + (f"-{seen[digest]}" if seen[digest] > 1 else "")
        out.append(Deployment(str(own) if own is not None else made, digest, _references([entry, credential])))
    return tuple(out)


def _references(value: Any) -> tuple[str, ...]:
    found = {
        v.removeprefix(rules.REFERENCE)
        for _, v in _walk(value, ())
        if isinstance(v, str) and v.startswith(rules.REFERENCE)
    }
    return tuple(sorted(found))


def unplain(data: Any) -> Iterator[tuple[Trail, str]]:
    """Yield what JSON cannot say, or says otherwise than YAML: where, and what it is."""
    for at, value in _walk(data, ()):
        if isinstance(value, _Key):
            yield at, f"a key that YAML reads as {type(value.key).__name__}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield at, "a number that is not finite"
        elif value is not None and not isinstance(value, str | bool | int | float):
            yield at, f"a value that YAML reads as {type(value).__name__}"


@dataclass(frozen=True)
class _Key:
    key: Any


def _walk(value: Any, at: Trail) -> Iterator[tuple[Trail, Any]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            step = (*at, k if isinstance(k, int) and not isinstance(k, bool) else str(k))
            if not isinstance(k, str):
                yield step, _Key(k)
            yield from _walk(v, step)
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _walk(v, (*at, i))
    else:
        yield at, value


def _an(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(_an(str, v) for v in values)
