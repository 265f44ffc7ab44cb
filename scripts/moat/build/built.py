# SPDX-License-Identifier: Apache-2.0
"""Built things by the key of everything that goes into them: ``$MOAT_CACHE/built/<key>/``.

A key is the hash of the inputs' hashes, of the recipe's part, of ``SOURCE_DATE_EPOCH`` and of the
builder's own source files. A thing is made in a sibling folder and renamed, so that what has a
name is whole; two builds at once make it twice and keep one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from moat.build.cache import Cache, sha256_file
from moat.console import Console

_HERE = Path(__file__).resolve().parent
_IGNORED = ("__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache")


def fingerprint(*modules: str) -> str:
    """Return the hash of the builder's own modules, e.g. ``fingerprint("layers", "pywheels")``."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        digest.update((_HERE / f"{name}.py").read_bytes())
    return digest.hexdigest()


def source_files(folder: Path) -> list[Path]:
    """Return the files of a source folder, sorted, without caches and hidden files."""
    return [
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(x in _IGNORED or x.startswith(".") for x in p.relative_to(folder).parts)
    ]


def tree_hash(folder: Path) -> str:
    """Return the hash of a source folder: relative paths, executable bits, contents."""
    digest = hashlib.sha256()
    for path in source_files(folder):
        executable = os.access(path, os.X_OK)
        digest.update(f"{path.relative_to(folder)}\0{int(executable)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def key_of(what: str, *parts: object) -> str:
    """Return ``<what>-<40 hex digits>`` over the parts (anything that JSON can hold)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return f"{what}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:40]}"


def sweep(cache: Cache, *, now: float) -> None:
    """Delete what killed builds left behind: unfinished folders that nobody has touched for six hours."""
    for left in (cache.root / "built").glob("*.tmp.*"):
        if now - left.stat().st_mtime > 6 * 3600:
            shutil.rmtree(left, ignore_errors=True)


def made(
    cache: Cache, key: str, title: str, console: Console, make: Callable[[Path], None], *, needs: Sequence[str] = ()
) -> Path:
    """Return the folder of a built thing, making it where it is missing.

    Args:
        cache: where.
        key: from :func:`key_of`.
        title: what is shown while it is made.
        console: for the step.
        make: fills the folder that it is given.
        needs: names that must be in the folder; a folder without them is made again.
    """
    target = cache.built_dir(key)
    if target.is_dir() and all((target / n).exists() for n in needs):
        console.info(f"- {title}: in the cache")
        return target
    with console.step(title):
        work = Path(tempfile.mkdtemp(prefix=f"{key}.tmp.", dir=target.parent))
        try:
            work.chmod(0o755)
            make(work)
            if target.is_dir():
                shutil.rmtree(target)
            work.rename(target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return target
