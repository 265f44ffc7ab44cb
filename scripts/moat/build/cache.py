# SPDX-License-Identifier: Apache-2.0
"""The build host's cache: downloads by content, built things by the key of what went into them.

Layout (docs/architecture.md, section 3)::

    files/<first two hex digits>/<sha256>   downloads; a name here is proof of the content
    partial/<sha256>                        downloads under way, continued after a cut
    built/<key>/                            layers, programs, root file systems
    apt/  uv/  venv/  locks/                private apt state, uv's cache, tools, the local Debian lock

Deleting any of it costs time only.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from moat.build.locks import LockedFile
from moat.errors import FetchFailed, HashMismatch

_BLOCK = 1 << 20


def cache_root() -> Path:
    """Return ``$MOAT_CACHE``, or ``~/.cache/moat``."""
    configured = os.environ.get("MOAT_CACHE")
    return Path(configured).expanduser().absolute() if configured else Path.home() / ".cache" / "moat"


def sha256_file(path: Path) -> str:
    """Return the lower-case hex sha256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Cache:
    """Content-addressed files and built directories.

    Args:
        root: the cache's folder; ``None`` is :func:`cache_root`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_root()

    def path(self, sha256: str) -> Path:
        """Return where a file with this hash is, or would be."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ValueError(f"not a sha256: {sha256!r}")
        return self.root / "files" / sha256[:2] / sha256

    def partial(self, sha256: str) -> Path:
        """Return where a download under way is kept."""
        return self.root / "partial" / self.path(sha256).name

    def has(self, sha256: str) -> bool:
        """Say whether the file is there (the name is written only after its hash was checked)."""
        return self.path(sha256).is_file()

    def has_entry(self, entry: LockedFile) -> bool:
        """Say whether the locked file is there with its locked size."""
        try:
            return self.path(entry.sha256).stat().st_size == entry.size
        except OSError:
            return False

    def require(self, entry: LockedFile) -> Path:
        """Return the path of a locked file.

        Raises:
            FetchFailed: the cache does not hold it.
        """
        if not self.has_entry(entry):
            raise FetchFailed(
                f"{entry.filename} is not in the cache",
                expected=f"{entry.kind} {entry.name} {entry.version} as {self.path(entry.sha256)}",
                hint="run `moat fetch` with the same profile and target",
                path=entry.filename,
            )
        return self.path(entry.sha256)

    def built_dir(self, key: str) -> Path:
        """Return the folder of a built thing; its parent exists, the folder itself may not.

        Write into a sibling (``built/<key>.tmp...``) and rename, so that nothing half-built is ever visible.
        """
        if not key or key.startswith(".") or "/" in key:
            raise ValueError(f"not a key: {key!r}")
        built = self.root / "built"
        built.mkdir(parents=True, exist_ok=True)
        return built / key

    def adopt(self, source: Path, *, sha256: str, size: int | None = None) -> Path:
        """Move a finished download into its place: check, fsync, rename.

        Raises:
            HashMismatch: the content is not what was expected; the file is deleted.
        """
        found_size, found = source.stat().st_size, sha256_file(source)
        if found != sha256 or (size is not None and found_size != size):
            source.unlink()
            raise HashMismatch(
                f"{source.name} is not the file that the lock names",
                found=f"sha256 {found}, {found_size} bytes",
                expected=f"sha256 {sha256}, {size if size is not None else 'any number of'} bytes",
                hint="the place that served it altered it, or the lock is wrong: see docs/locks-and-policy.md",
                path=str(source),
            )
        target = self.path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as f:
            os.fsync(f.fileno())
        source.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return target
