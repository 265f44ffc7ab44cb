# SPDX-License-Identifier: Apache-2.0
"""What changed between two locks, as a reviewer wants to read it: names and versions, old to new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moat.build.locks import LockedFile


@dataclass(frozen=True)
class Change:
    """One package that differs.

    Attributes:
        name: of the package or module.
        old: versions before, or empty.
        new: versions after, or empty.
        note: what else differs when the versions are the same.
    """

    name: str
    old: str
    new: str
    note: str


def changes(old: Iterable[LockedFile], new: Iterable[LockedFile]) -> list[Change]:
    """Return the differences by name."""
    before, after = _by_name(old), _by_name(new)
    out = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key, []), after.get(key, [])
        if a == b:
            continue
        old_versions, new_versions = _versions(a), _versions(b)
        note = "" if old_versions != new_versions else ", ".join(_differing(a, b))
        out.append(Change(key[1], old_versions, new_versions, note))
    return out


def _by_name(entries: Iterable[LockedFile]) -> dict[tuple[str, str], list[LockedFile]]:
    out: dict[tuple[str, str], list[LockedFile]] = {}
    for e in sorted(entries):
        out.setdefault((e.kind, e.name), []).append(e)
    return out


def _versions(entries: Sequence[LockedFile]) -> str:
    return ", ".join(sorted({e.version for e in entries}))


def _differing(a: Sequence[LockedFile], b: Sequence[LockedFile]) -> list[str]:
    if {e.sha256 for e in a} != {e.sha256 for e in b}:
        return ["other bytes under the same version"]
    return sorted({f for x, y in zip(a, b, strict=False) for f in vars(x) if getattr(x, f) != getattr(y, f)})


def render(found: Sequence[Change]) -> str:
    """Return a table ``name  old -> new``, one change a line."""
    if not found:
        return "nothing changed"
    width = max(len(c.name) for c in found)
    old_width = max(len(c.old or "-") for c in found)
    lines = []
    for c in found:
        right = f"{c.new or 'removed'}" + (f"  ({c.note})" if c.note else "")
        lines.append(f"  {c.name:<{width}}  {c.old or '-':<{old_width}} -> {right}")
    return "\n".join(lines)
