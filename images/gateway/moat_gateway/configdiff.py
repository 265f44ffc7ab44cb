# SPDX-License-Identifier: Apache-2.0
"""What changes between two contents of a configuration, as unified diffs that a person may read and paste."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moat_gateway import configdir

_HASH = re.compile(r"\b[0-9a-f]{64}\b")
_SHOWN = 10  # hex digits of a key's hash


@dataclass(frozen=True)
class Change:
    """One file that differs.

    Attributes:
        path: its path in the revision.
        change: ``added``, ``removed`` or ``changed``.
        diff: unified diff, or one line where it is no text.
    """

    path: str
    change: str
    diff: str


def compare(old: Mapping[str, bytes], new: Mapping[str, bytes], old_name: str, new_name: str) -> tuple[Change, ...]:
    """Return the files that differ, by path.

    Args:
        old: content by path.
        new: content by path.
        old_name: what to call the old one.
        new_name: what to call the new one.
    """
    out = []
    for path in sorted({*old, *new}):
        a, b = old.get(path), new.get(path)
        if a != b:
            change = "added" if a is None else "removed" if b is None else "changed"
            out.append(Change(path, change, _diff(path, a, b, old_name, new_name)))
    return tuple(out)


def _diff(path: str, old: bytes | None, new: bytes | None, old_name: str, new_name: str) -> str:
    a, b = _lines(path, old), _lines(path, new)
    if a is None or b is None:
        return f"{path}: {_size(old)} -> {_size(new)}\n"
    names = (
        f"{old_name}/{path}" if old is not None else "(none)",
        f"{new_name}/{path}" if new is not None else "(none)",
    )
    return "".join(_ended(difflib.unified_diff(a, b, *names))) or f"{path}: only a shortened hash differs\n"


def _lines(path: str, raw: bytes | None) -> list[str] | None:
    """Return the lines of a text; ``None`` if it is none."""
    if raw is None:
        return []
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    if path == configdir.KEYS:
        # A hash of a key is no secret, and nobody needs all of it to see which one it is.
        text = _HASH.sub(lambda m: m.group()[:_SHOWN] + "...", text)
    return ["".join(c if c.isprintable() or c == "\t" else "?" for c in line) + "\n" for line in text.splitlines()]


def _ended(lines: Iterable[str]) -> Iterable[str]:
    return (line if line.endswith("\n") else line + "\n" for line in lines)


def _size(raw: bytes | None) -> str:
    return "nothing" if raw is None else f"{len(raw)} bytes, sha256 {hashlib.sha256(raw).hexdigest()[:16]}..."
