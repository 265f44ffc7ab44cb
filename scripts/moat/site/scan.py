# SPDX-License-Identifier: Apache-2.0
"""Reading a medium: what lies on it, and the sha256 of its files, on all cores.

The medium is hostile until it is verified. Nothing is followed: every folder and file is opened
component by component with ``O_NOFOLLOW``, below one file descriptor of the bundle's folder.
Nothing blocks: a pipe is refused by its type, and opened with ``O_NONBLOCK`` should it replace a
file between two looks. Nothing is held: a file streams through one buffer a thread.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moat.errors import BadManifest, ChangedFile, MoatError, Unreadable, UnsafePath
from moat.manifest import FileEntry
from moat.paths import MAX_PATH_BYTES
from moat.site.trust import COPY_AGAIN, KEEP, Digest, Entry, EntryType, hard_linked

#: A buffer a thread. hashlib lets go of the interpreter lock while it digests, so threads do run at once.
CHUNK_BYTES = 1024 * 1024
#: A bundle has some hundred files; somebody who gives ``/`` should not wait for a day.
MAX_ENTRIES = 100_000
#: More threads than this only make a spinning disk or a stick seek.
MAX_THREADS = 8

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextmanager
def open_root(path: Path) -> Iterator[int]:
    """Yield a descriptor of the bundle's folder.

    Raises:
        Unreadable: there is no such folder, or it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise Unreadable(
            f"{path} cannot be opened as a folder",
            found=e.strerror,
            expected="the bundle's folder, which holds manifest.json",
            hint="mount the medium and give the path of the folder moat-<version>-<profile>-<target>",
            path=str(path),
        ) from e
    try:
        yield fd
    finally:
        os.close(fd)


def _open_below(root: int, parts: list[bytes], flags: int) -> int:
    """Open ``parts`` below ``root``, following no link in any component."""
    fd = root
    try:
        for i, part in enumerate(parts):
            below = os.open(part, flags if i == len(parts) - 1 else _FOLDER_FLAGS, dir_fd=fd)
            if fd != root:
                os.close(fd)
            fd = below
    except OSError:
        if fd != root:
            os.close(fd)
        raise
    return fd


@contextmanager
def open_file(root: int, path: str) -> Iterator[int]:
    """Yield a descriptor of an ordinary file of the bundle.

    Raises:
        FileNotFoundError: it is not there.
        UnsafePath: it is a link, has further names, lies below a link, or is no ordinary file.
        Unreadable: the system refuses to open it.
    """
    try:
        fd = _open_below(root, [part.encode("utf-8") for part in path.split("/")], _FILE_FLAGS)
    except FileNotFoundError:
        raise
    except OSError as e:
        # A link is ELOOP (or ENOTDIR for a folder's), a socket ENXIO.
        if e.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise _not_ordinary(path, e.strerror) from e
        raise _unreadable(path, e) from e
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _not_ordinary(path, "a folder, device, pipe or socket")
        if status.st_nlink > 1:
            raise hard_linked(path, status.st_nlink)
        yield fd
    finally:
        os.close(fd)


def _not_ordinary(path: str, found: str | None) -> UnsafePath:
    return UnsafePath(f"{path} is not an ordinary file", found=found, expected="an ordinary file", hint=KEEP, path=path)


def _unreadable(path: str, e: OSError, at: int | None = None) -> Unreadable:
    where = "" if at is None else f" at byte {at}"
    return Unreadable(
        f"{path} cannot be read{where}",
        found=e.strerror or str(e),
        expected="a readable file",
        hint="check the medium (dmesg) and that you may read it, then copy the bundle to another one",
        path=path,
    )


def read_small(root: int, path: str, limit: int) -> bytes:
    """Return the content of one small file of the bundle's folder.

    Raises:
        FileNotFoundError: it is not there.
        BadManifest: it is larger than ``limit`` bytes.
        UnsafePath, Unreadable: as :func:`open_file`.
    """
    with open_file(root, path) as fd:
        data = bytearray()
        try:
            while chunk := os.read(fd, min(CHUNK_BYTES, limit + 1 - len(data))):
                data += chunk
                if len(data) > limit:
                    break
        except OSError as e:
            raise _unreadable(path, e, len(data)) from e
    if len(data) > limit:
        raise BadManifest(
            f"{path} is too large",
            found=f"more than {limit} bytes",
            expected=f"at most {limit} bytes",
            hint=KEEP,
            path=path,
        )
    return bytes(data)


def walk(root: int) -> list[Entry]:
    """Return everything below ``root``, in a fixed order, without following or opening any file."""
    entries: list[Entry] = []
    pending: list[list[bytes]] = [[]]
    while pending:
        parts = pending.pop()
        try:
            fd = _open_below(root, parts, _FOLDER_FLAGS) if parts else os.dup(root)
        except OSError as e:
            entries.append(Entry(_text(parts), EntryType.UNREADABLE, why=e.strerror or str(e)))
            continue
        try:
            with os.scandir(fd) as found:  # bounded: a folder may hold millions of names
                names = sorted(os.fsencode(e.name) for e in itertools.islice(found, MAX_ENTRIES + 1))
            for name in names:
                entry = _look(fd, name, [*parts, name])
                if len(entries) >= MAX_ENTRIES:
                    entries.append(Entry(entry.path, EntryType.TOO_MANY, why=f"more than {MAX_ENTRIES} entries"))
                    return entries
                entries.append(entry)
                if entry.type is EntryType.FOLDER:
                    pending.append([*parts, name])
        except OSError as e:
            entries.append(Entry(_text(parts) or ".", EntryType.UNREADABLE, why=e.strerror or str(e)))
        finally:
            os.close(fd)
    return entries


def _text(parts: list[bytes]) -> str:
    return b"/".join(parts).decode("utf-8", "backslashreplace")


def _look(folder: int, name: bytes, parts: list[bytes]) -> Entry:
    path = _text(parts)
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return Entry(path, EntryType.BAD_NAME)
    if len(path) > MAX_PATH_BYTES:
        return Entry(path, EntryType.TOO_DEEP)
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as e:
        return Entry(path, EntryType.UNREADABLE, why=e.strerror or str(e))
    if stat.S_ISREG(status.st_mode):
        return Entry(path, EntryType.FILE, size=status.st_size, links=status.st_nlink)
    if stat.S_ISDIR(status.st_mode):
        return Entry(path, EntryType.FOLDER)
    return Entry(path, EntryType.LINK if stat.S_ISLNK(status.st_mode) else EntryType.SPECIAL)


class _Stopped(Exception):
    """The run was interrupted; the file in work is left."""


def _digest(
    root: int, wanted: FileEntry, buffer: memoryview, count: Callable[[int], None], stop: threading.Event
) -> str:
    digest = hashlib.sha256()
    done = 0
    with open_file(root, wanted.path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        try:
            while n := os.readv(fd, [buffer]):
                digest.update(buffer[:n])
                done += n
                count(n)
                if done > wanted.size:
                    break  # it grows while it is read
                if stop.is_set():
                    raise _Stopped
        except OSError as e:
            raise _unreadable(wanted.path, e, done) from e
    if done != wanted.size:
        raise ChangedFile(
            f"{wanted.path} changed while it was read",
            found=f"{done} bytes or more" if done > wanted.size else f"{done} bytes",
            expected=f"{wanted.size} bytes",
            hint=COPY_AGAIN,
            path=wanted.path,
        )
    return digest.hexdigest()


def hash_files(
    root: int,
    files: Iterable[FileEntry],
    *,
    count: Callable[[int], None] = lambda n: None,
    threads: int | None = None,
) -> dict[str, Digest]:
    """Return the sha256 of each file, or the refusal that reading it ended with.

    The largest files go first, so that no thread is left with a long one at the end.

    Args:
        root: descriptor of the bundle's folder.
        files: what to read; more bytes than an entry's ``size`` are never read.
        count: told the bytes as they are done, from any thread.
        threads: default one a usable core, eight at most.
    """
    work: queue.SimpleQueue[FileEntry] = queue.SimpleQueue()
    total = 0
    for wanted in sorted(files, key=lambda f: (-f.size, f.path)):
        work.put(wanted)
        total += 1
    usable = len(os.sched_getaffinity(0)) if threads is None else threads
    results: dict[str, Digest] = {}
    defects: list[BaseException] = []
    stop = threading.Event()

    def run() -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            while not stop.is_set():
                wanted = work.get_nowait()
                try:
                    results[wanted.path] = Digest(sha256=_digest(root, wanted, buffer, count, stop))
                except FileNotFoundError as e:
                    results[wanted.path] = Digest(error=_unreadable(wanted.path, e))
                except MoatError as e:
                    results[wanted.path] = Digest(error=e)
        except (queue.Empty, _Stopped):
            return
        except BaseException as e:
            defects.append(e)
            stop.set()

    team = [threading.Thread(target=run, name=f"hash-{i}") for i in range(max(1, min(usable, MAX_THREADS, total)))]
    try:
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
    finally:
        # Ctrl-C lands here: without it the threads would read the medium to its end first.
        stop.set()
        for thread in team:
            if thread.ident is not None:
                thread.join()
    if defects:
        raise defects[0]
    return results
