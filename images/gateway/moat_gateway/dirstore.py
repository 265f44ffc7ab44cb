# SPDX-License-Identifier: Apache-2.0
"""Revisions in a folder: a USB drive carried to the site, or a share that the nodes mount.

Reading needs no right to write. What is read comes from outside: links, devices and pipes are refused, and nothing is
read beyond its limit. Writers exclude each other with a lock and replace files only by renaming.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from moat_gateway import revstore
from moat_gateway.errors import BadRevision, StoreFailed
from moat_gateway.revstore import NodeReport, Pointer, Stored

_LOCK = ".lock"
_TEMPORARY = ".tmp-"
_REVISIONS, _NODES = revstore.PREFIX.rstrip("/"), revstore.NODES.rstrip("/")


class DirectoryStore:
    """A folder as source and store.

    Args:
        folder: where ``current`` and ``revisions`` lie or shall lie.
        limit: of one archive, bytes.
    """

    kind = "directory"

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def describe(self) -> str:
        """Say where this is."""
        return f"folder {self._folder}"

    def pointer(self, etag: str | None = None) -> Pointer | None:
        """See :class:`revstore.Source`."""
        with self._open() as top:
            raw = self._read(top, revstore.POINTER, revstore.MAX_POINTER, cut=True)
        if raw is None:
            raise revstore.no_revision(self.describe())
        found = _etag(raw)
        return None if found == etag else revstore.parse_pointer(raw, found, self.describe())

    def fetch(self, pointer: Pointer, limit_bytes: int) -> bytes:
        """See :class:`revstore.Source`."""
        limit = min(limit_bytes, pointer.size)
        if pointer.size > limit_bytes:
            raise revstore.too_large(self.describe(), pointer.object, pointer.size, limit_bytes)
        raw = self._archive(pointer.revision, limit, revstore.PUSH_AGAIN)
        revstore.check(raw, pointer, self.describe())
        return raw

    def get(self, number: int) -> bytes:
        """See :class:`revstore.Store`."""
        return self._archive(number, self._limit)

    def _archive(self, number: int, limit: int, *hint: str) -> bytes:
        name = revstore.object_name(number)
        with self._open() as top, self._below(top, _REVISIONS) as folder:
            raw = self._read(folder, str(number), limit) if folder is not None else None
        if raw is None:
            raise revstore.missing(self.describe(), name, *hint)
        return raw

    def list(self) -> list[Stored]:
        """See :class:`revstore.Store`."""
        found = []
        with self._open() as top, self._below(top, _REVISIONS) as folder:
            for name in _names(folder):
                number = revstore.number_of(name)
                if number is not None:
                    state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    found.append(Stored(number, state.st_size, state.st_mtime))
        return sorted(found, key=lambda s: s.number)

    def probe(self) -> None:
        """A folder holds to conditions by its lock; see that it can be written and locked."""
        with self._locked():
            pass

    def upload(self, number: int, raw: bytes) -> None:
        """See :class:`revstore.Store`."""
        with self._locked() as top, self._below(top, _REVISIONS, make=True) as folder:
            assert folder is not None  # noqa: S101 - it was just made
            for name in _names(folder):
                if name.startswith(_TEMPORARY):  # of a push that died: nobody else holds the lock
                    os.unlink(name, dir_fd=folder)
            if _exists(folder, str(number)):
                raise revstore.taken(self.describe(), number)
            _replace(folder, str(number), raw)

    def move(self, pointer: Pointer, etag: str | None) -> Pointer:
        """See :class:`revstore.Store`."""
        raw = pointer.to_bytes()
        with self._locked() as top:
            there = self._read(top, revstore.POINTER, revstore.MAX_POINTER, cut=True)
            if (None if there is None else _etag(there)) != etag:
                winner = None
                if there is not None:
                    with suppress(BadRevision):
                        winner = revstore.parse_pointer(there, "", self.describe())
                raise revstore.conflict(self.describe(), winner)
            _replace(top, revstore.POINTER, raw)
        return revstore.parse_pointer(raw, _etag(raw), self.describe())

    def report(self, node: str, raw: bytes) -> None:
        """See :class:`revstore.Store`."""
        with self._open() as top, self._below(top, _NODES, make=True) as folder:
            assert folder is not None  # noqa: S101 - it was just made
            _replace(folder, f"{node}.json", raw, sync=False)

    def reports(self) -> Mapping[str, NodeReport]:
        """See :class:`revstore.Store`; the age is by the clock that dates the folder's files, maybe another host's."""
        found: dict[str, NodeReport] = {}
        with self._open() as top, self._below(top, _NODES) as folder:
            names = [(node, name) for name in _names(folder) if (node := revstore.node_of(name)) is not None]
            if folder is None or not names:
                return found
            now = _time_of(folder)
            for node, name in names:
                # Another node may take its report away, or lay something else there: that is no fault of the others.
                with suppress(FileNotFoundError):
                    state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    try:
                        raw = self._read(folder, name, revstore.MAX_REPORT)
                    except (BadRevision, PermissionError):
                        raw = revstore.UNREADABLE
                    if raw is not None:
                        age = None if now is None else max(0.0, now - state.st_mtime)
                        found[node] = NodeReport(raw, age)
        return found

    def forget(self, node: str) -> bool:
        """See :class:`revstore.Store`."""
        with self._open() as top, self._below(top, _NODES) as folder:
            if folder is None or not _exists(folder, f"{node}.json"):
                return False
            os.unlink(f"{node}.json", dir_fd=folder)
            return True

    def replica_of(self) -> str | None:
        """A folder is nobody's replica."""
        return None

    @contextmanager
    def _open(self) -> Iterator[int]:
        """Hold the folder open; what goes wrong inside is the folder's failure."""
        try:
            fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield fd
            finally:
                os.close(fd)
        except OSError as e:
            raise StoreFailed(
                "the folder of revisions cannot be used",
                found=e.strerror or str(e),
                expected="a folder, and files, that this user may use",
                hint="plug the drive in or mount it, or correct MOAT_SOURCE_DIR",
                path=str(self._folder),
            ) from e

    @contextmanager
    def _below(self, top: int, name: str, *, make: bool = False) -> Iterator[int | None]:
        """Hold a folder inside open, never through a link; ``None`` if there is none."""
        if make:
            with suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=top)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        except FileNotFoundError:
            yield None
            return
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.ENOTDIR):
                raise self._odd(name) from e
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        with self._open() as top:
            # A file, not the folder itself: network file systems lock only what is open for writing.
            lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644, dir_fd=top)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield top
            finally:
                os.close(lock)

    def _read(self, folder: int, name: str, limit: int, *, cut: bool = False) -> bytes | None:
        """Return a file's bytes, ``None`` if there is none; of one that is too large the beginning, if ``cut``."""
        try:
            # Without waiting: opening a pipe would wait for its writer for ever.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except FileNotFoundError:
            return None
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.ENXIO):
                raise self._odd(name) from e
            raise
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            os.close(fd)
            raise self._odd(name)
        with os.fdopen(fd, "rb") as f:
            raw = f.read(limit + 1)
        if len(raw) > limit and not cut:
            raise revstore.too_large(self.describe(), name, max(len(raw), state.st_size), limit)
        return raw

    def _odd(self, name: str) -> BadRevision:
        return BadRevision(
            f"{name} is a link or a special file",
            expected="a plain file or folder",
            hint="remove it; see who else writes to the folder",
            path=str(self._folder),
        )


def _etag(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _names(folder: int | None) -> list[str]:
    if folder is None:
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries)


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _time_of(folder: int) -> float | None:
    """Return the time by which a folder's files are dated, seconds since 1970; ``None`` if it cannot be written."""
    temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=folder)
        try:
            os.write(fd, b"\n")
            # A share's server dates what it was sent.
            os.fsync(fd)
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
    except OSError:
        return None


def _replace(folder: int, name: str, raw: bytes, *, sync: bool = True) -> None:
    """Write beside, fsync, rename, fsync the folder."""
    temporary = f"{_TEMPORARY}{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=folder)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(raw)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    if sync:
        os.fsync(folder)
