# SPDX-License-Identifier: Apache-2.0
"""What a gateway serves or shall serve: a revision of the node, or the local files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moat_gateway import configrules as rules
from moat_gateway.config import CheckedConfig
from moat_gateway.litellm_port import Wanted
from moat_gateway.prepared import Prepared


@dataclass(frozen=True)
class Served:
    """A configuration without the values of its secrets.

    Attributes:
        revision: its number; 0 for local files.
        sha256: of its ``revision.json``; ``None`` for local files.
        config_sha256: of its ``config.yaml``.
        effective: what LiteLLM is given, with references instead of secrets.
        digests: of each entry of ``model_list``.
        references: the names of the secrets that each entry needs.
        sections: for each other section the names of the secrets in it.
        files: for each name the file with its value.
    """

    revision: int
    sha256: str | None
    config_sha256: str
    effective: Mapping[str, Any] = field(repr=False)
    digests: tuple[str, ...] = field(repr=False)
    references: tuple[tuple[str, ...], ...] = field(repr=False)
    sections: Mapping[str, tuple[str, ...]]
    files: Mapping[str, Path]

    def wanted(self, secrets: Mapping[str, str]) -> Wanted:
        """Return it with these values, for LiteLLM."""
        return Wanted(self.effective, self.digests, self.references, {n: secrets[n] for n in self.files})

    def section_secrets(self) -> frozenset[str]:
        """Return the secrets that stand elsewhere than in deployments and credentials: LiteLLM reads them once."""
        return frozenset(n for s, held in self.sections.items() if s != "credential_list" for n in held)

    def sections_of(self, names: frozenset[str]) -> tuple[str, ...]:
        """Return the sections, deployments and credentials left out, that hold one of these secrets."""
        return tuple(
            sorted(s for s, held in self.sections.items() if s != "credential_list" and names.intersection(held))
        )


def of_revision(prepared: Prepared, sha256: str) -> Served:
    """Return what a prepared revision asks for."""
    return Served(
        revision=prepared.revision,
        sha256=sha256,
        config_sha256=prepared.config_sha256,
        effective=prepared.effective,
        digests=tuple(d.digest for d in prepared.deployments),
        references=tuple(d.references for d in prepared.deployments),
        sections=prepared.sections,
        files={name: Path(path) for name, path in prepared.references.items()},
    )


def of_local_files(config: CheckedConfig) -> Served:
    """Return what the local ``config.yaml`` asks for; no revision has deployments that count as equal to its own."""
    entries = config.effective["model_list"]
    return Served(
        revision=0,
        sha256=None,
        config_sha256=config.sha256,
        effective=config.effective,
        digests=tuple(f"local {i}" for i in range(len(entries))),
        references=tuple(tuple(dict.fromkeys(names_in(e))) for e in entries),
        sections={s: tuple(names_in(v)) for s, v in config.effective.items() if s != "model_list"},
        files=config.references,
    )


def names_in(value: Any) -> Iterator[str]:
    """Yield the names of the references in a value."""
    if isinstance(value, Mapping):
        for v in value.values():
            yield from names_in(v)
    elif isinstance(value, list):
        for v in value:
            yield from names_in(v)
    elif isinstance(value, str) and value.startswith(rules.REFERENCE):
        yield value.removeprefix(rules.REFERENCE)
