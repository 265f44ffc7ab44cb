# SPDX-License-Identifier: Apache-2.0
"""Files that other processes read while they are written, and the clock that a node's processes share.

A file is replaced whole: written beside under a fixed name, then renamed. Where a loss of power must not undo it, the
file and its folder are synchronised too. Readers take regular files of a bounded size only.
"""

from __future__ import annotations

import json
import math
import os
import stat
import time
import uuid
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

#: No setting: nobody chooses it.
BOOT_ID_VARIABLE = "BOOT_ID"
FILE_MODE = 0o640
FOLDER_MODE = 0o750
_JSON_MAX = 32 << 20  # bytes
_LARGEST = 2**53 - 1  # the largest whole number that every JSON reader keeps

Stamp = tuple[int, int, int, int]


class Unusable(Exception):
    """A file of the node cannot be used; the text says why, in one line without its path."""


def boottime() -> float:
    """Return the seconds since this machine was started: the same for all processes, and nobody can set it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot_id() -> str:
    """Return the name of this run of the machine; times of :func:`boottime` are compared within one only.

    A unit of systemd with ``ProcSubset=pid`` does not see the file, and is given the same name by the variable.
    """
    given = os.environ.get(BOOT_ID_VARIABLE)
    return str(uuid.UUID(given or Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()))


def timestamp() -> str:
    """Return the moment for a person to read (UTC, milliseconds). Nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stamp(path: Path) -> Stamp | None:
    """Return what changes whenever a file is replaced, written or swapped behind a link, or ``None``."""
    try:
        s = path.stat()
    except OSError:
        return None
    return s.st_mtime_ns, s.st_ino, s.st_size, s.st_ctime_ns


def read_bytes(path: Path, limit: int = _JSON_MAX) -> bytes:
    """Return a regular file's content.

    Raises:
        FileNotFoundError: there is none.
        Unusable: it is something else, too large (``limit`` in bytes), or cannot be read.
    """
    try:
        # Not blocking: a pipe in the file's place would hold the reader for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(fd, "rb") as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise Unusable("is not a regular file")
            raw = f.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise Unusable(f"cannot be read: {e.strerror or e}") from e
    if len(raw) > limit:
        raise Unusable(f"is larger than {limit} bytes")
    return raw


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: there is none.
        Unusable: it cannot be read, or holds no JSON object of format 1.
    """
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise Unusable("is not JSON") from e
    if not isinstance(value, dict):
        raise Unusable("is not a JSON object")
    if value.get("format") != 1:
        raise Unusable(f"has the format {value.get('format')!r}; 1 is known")
    return value


def whole(value: Any) -> int:
    """Return a number that others wrote: of a revision, a process or the like. Python's JSON reads `Infinity`, too.

    Raises:
        ValueError: it is something else, below 0, or beyond what every JSON reader keeps.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError("no whole number")
    return value


def seconds(value: Any) -> float:
    """Return a length of time that others wrote (s).

    Raises:
        ValueError: it is something else, below 0, or not finite.
    """
    if type(value) not in (int, float) or not 0 <= value <= _LARGEST or not math.isfinite(value):
        raise ValueError("no number of seconds")
    return float(value)


def object_bytes(value: dict[str, Any]) -> bytes:
    """Return an object as this module writes it."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=True) + "\n").encode("ascii")


def replace(path: Path, content: bytes, *, durable: bool) -> None:
    """Replace a file by one with this content; whoever reads sees the old or the new one.

    There must be one writer: the name beside is fixed, so that an interrupted one leaves nothing that grows.

    Args:
        path: the file.
        content: of the file.
        durable: it survives a loss of power when this returns.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    beside = path.with_name(f".{path.name}.tmp")
    write_new(beside, content, durable=durable, over=True)
    beside.rename(path)
    if durable:
        sync_folder(path.parent)


def write_new(path: Path, content: bytes, *, durable: bool, over: bool = False) -> None:
    """Write a file that nobody reads yet.

    Args:
        path: the file.
        content: of the file.
        durable: synchronise it.
        over: a file of that name is written over instead of refused.

    Raises:
        OSError: it could not be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_TRUNC if over else os.O_EXCL)
    fd = os.open(path, flags, FILE_MODE)
    try:
        # The umask of whoever started the process is not ours to know.
        os.fchmod(fd, FILE_MODE)
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder, if it is not there, with the mode of the node's folders.

    Raises:
        OSError: it cannot be made, or is something else.
    """
    try:
        path.mkdir(mode=FOLDER_MODE)
    except FileExistsError:
        if path.is_dir():
            return
        raise
    path.chmod(FOLDER_MODE)


def sync_folder(path: Path) -> None:
    """Synchronise a folder's list of names.

    Raises:
        OSError: it failed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
