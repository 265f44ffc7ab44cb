# SPDX-License-Identifier: Apache-2.0
"""The lock files in ``bundles/locks/``: one JSON object a line, sorted, reviewed as diffs.

A lock names bytes, never hosts: ``source`` says which kind of place serves the file and under
which path, and the host comes from the build host's own configuration (pip's index, apt's
sources, Go's proxy). So a lock made behind one mirror is fetched through another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from moat.errors import LockFailed

#: This checkout (scripts/moat/build/locks.py is three levels down).
ROOT = Path(__file__).resolve().parents[3]
LOCKS = ROOT / "bundles" / "locks"


@dataclass(frozen=True, order=True)
class LockedFile:
    """One input by its bytes.

    Attributes:
        kind: ``wheel``, ``deb``, ``go-module`` (zip), ``go-mod`` (.mod file), ``go-info``, ``model``, ``tokenizer``.
        name: package, module or model name.
        version: exact version (Debian: with epoch and revision).
        filename: basename in the bundle and in the cache's views.
        sha256: of the file, lower-case hex.
        size: in bytes.
        license: SPDX expression, or ``NOASSERTION`` where upstream says nothing usable.
        source: ``pypi:NAME``, ``debian:SUITE/COMPONENT/POOL-PATH`` (security suites: ``debian-security:...``),
            ``goproxy:ESCAPED-PATH``, ``hf:REPO@REVISION/FILE``.
        uses: where it goes, sorted: ``image:NAME`` (base packages or wheels of one image), ``wheelhouse``,
            ``host`` (apt repository of the bundle), ``builder`` (toolchain of the build, never shipped),
            ``profile:demo`` (only when the profile is demo).
        marker: environment marker of a wheel (``python_full_version >= '3.12'``), or empty.
        pythons: target Pythons that a wheel is for, e.g. ``("3.11", "3.13")``; empty for all else.
    """

    kind: str
    name: str
    version: str
    filename: str
    sha256: str
    size: int
    license: str
    source: str
    uses: tuple[str, ...] = ()
    marker: str = ""
    pythons: tuple[str, ...] = ()

    def to_line(self) -> str:
        """Return the canonical line (no newline)."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


def read_lock(path: Path) -> list[LockedFile]:
    """Read one ``*.jsonl`` lock.

    Raises:
        LockFailed: a line is malformed, has unknown or missing fields, or the file is not sorted.
    """
    names = {f.name for f in fields(LockedFile)}
    entries: list[LockedFile] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as e:
        raise LockFailed(
            f"cannot read the lock {path.name}", found=str(e), hint="make it with `moat lock`", path=str(path)
        ) from e
    for number, line in enumerate(lines, 1):
        try:
            raw = json.loads(line)
            if set(raw) != names:
                raise ValueError(f"fields {sorted(set(raw) ^ names)} are missing or unknown")
            raw["uses"], raw["pythons"] = tuple(raw["uses"]), tuple(raw["pythons"])
            entries.append(LockedFile(**raw))
        except (ValueError, TypeError) as e:
            raise LockFailed(
                f"{path.name} line {number} is not a lock entry",
                found=str(e),
                expected="one JSON object as written by `moat lock`",
                hint="restore the file from git",
                path=str(path),
            ) from e
    if entries != sorted(entries):
        raise LockFailed(f"{path.name} is not sorted", hint="re-make it with `moat lock`", path=str(path))
    return entries


def write_lock(path: Path, entries: Iterable[LockedFile]) -> None:
    """Write one lock, sorted, by temporary file and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(e.to_line() + "\n" for e in sorted(entries)), "utf-8")
    temporary.replace(path)
