# SPDX-License-Identifier: Apache-2.0
"""The deployment folder as data: what should be in it, what has to change, and the changing.

:func:`plan` compares and touches nothing; :func:`apply` does exactly what the plan says. Three kinds
of files: *managed* ones follow the bundle and the options; *kept* ones are made once and are the
operator's from then on; *secrets* are kept too and never read aloud.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from moat.errors import PrepareFailed

#: User ids of the images (docs/architecture.md, section 6).
NGINX: Final = 10101
GATEWAY: Final = 10102
MINIO: Final = 10103
VALKEY: Final = 10104

#: Certificate and key, which are replaced together.
PAIR: Final = frozenset({"tls/cert.pem", "tls/key.pem"})
#: Leads to ``now`` or ``before``, two empty folders: by its end nginx knows which pair it is to read.
SWITCH: Final = "tls/switch/use"
#: The pair before, while the two files are being replaced.
BEFORE: Final = "tls/before"
_HANDSHAKE: Final = 0.5  # seconds; between looking up the place and reading both files there are microseconds

#: Changes the owner of an open file or of a path (a parameter, so that tests run without root).
Chown = Callable[[int | Path, int, int], None]


class Kind(Enum):
    """Who owns a path's content after the first run; the value is the word in the plan."""

    FOLDER = "folder"
    MANAGED = "managed"
    KEPT = "kept"
    SECRET = "secret"  # noqa: S105 - a word, not one
    LINK = "link"


@dataclass(frozen=True)
class Item:
    """One path of the deployment folder as it should be.

    Attributes:
        path: relative to the deployment folder.
        kind: see :class:`Kind`.
        mode: permission bits.
        uid: owner; the group is the same number.
        content: of a file; where a link leads. For ``KEPT`` and ``SECRET`` it counts only where the file is not there.
    """

    path: str
    kind: Kind
    mode: int
    uid: int = 0
    content: bytes = b""


@dataclass(frozen=True)
class Change:
    """One thing that :func:`apply` will do. ``action`` is ``make``, ``replace`` or ``set owner and mode``."""

    action: str
    item: Item

    @property
    def text(self) -> str:
        """One line for the operator; never any content."""
        i = self.item
        if i.kind is Kind.LINK:
            return f"{self.action:<18} {i.path} (link to {i.content.decode()})"
        what = "folder" if i.kind is Kind.FOLDER else f"{i.kind.value} file" if i.kind is not Kind.SECRET else "secret"
        return f"{self.action:<18} {i.path} ({what}, mode {i.mode:04o}, owner {i.uid})"


def read_existing(path: Path) -> bytes | None:
    """Return a file's content, or ``None`` where there is no such file.

    Raises:
        PrepareFailed: something else than an ordinary file is there, or it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as e:
        found = "a symbolic link" if e.errno == errno.ELOOP else e.strerror
        raise _refused(path, found, "an ordinary file", "find out who made it; move it away and run it again") from e
    with os.fdopen(fd, "rb") as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            raise _refused(path, "no ordinary file", "an ordinary file", "move it away and run it again")
        return f.read()


def _refused(path: Path, found: str | None, expected: str, hint: str) -> PrepareFailed:
    return PrepareFailed(f"{path} cannot be used", found=found, expected=expected, hint=hint, path=str(path))


def plan(root: Path, items: Iterable[Item]) -> list[Change]:
    """Return what has to change, in the order in which it is to be done; nothing is touched.

    Raises:
        PrepareFailed: a link, a device or a folder stands where a file should be, or the other way round.
    """
    changes: list[Change] = []
    for item in items:
        path = root / item.path
        try:
            status = path.lstat()
        except FileNotFoundError:
            changes.append(Change("make", item))
            continue
        except OSError as e:
            raise _refused(path, e.strerror, "a readable path", "run it as root") from e
        if item.kind is Kind.LINK and stat.S_ISLNK(status.st_mode):
            if os.readlink(path) != item.content.decode():  # noqa: PTH115 - as it is, not as a path
                changes.append(Change("replace", item))
            continue
        right = stat.S_ISDIR if item.kind is Kind.FOLDER else stat.S_ISREG
        if not right(status.st_mode) or item.kind is Kind.LINK:
            raise _refused(
                path,
                "a symbolic link" if stat.S_ISLNK(status.st_mode) else "something else",
                "a folder" if item.kind is Kind.FOLDER else "an ordinary file",
                "find out who made it; move it away and run it again",
            )
        if item.kind is Kind.MANAGED and read_existing(path) != item.content:
            changes.append(Change("replace", item))
        elif stat.S_IMODE(status.st_mode) != item.mode or (status.st_uid, status.st_gid) != (item.uid, item.uid):
            changes.append(Change("set owner and mode", item))
    return changes


def apply(root: Path, changes: Sequence[Change], chown: Chown = os.chown) -> None:
    """Carry the changes out. Each file appears whole or not at all.

    Raises:
        PrepareFailed: the disk is full or the folder cannot be written; what was done so far stays,
            and the next run goes on from there.
    """
    root.mkdir(parents=True, exist_ok=True)
    pair = [c for c in changes if c.item.path in PAIR and c.action != "set owner and mode"]
    for change in changes:
        item, path = change.item, root / change.item.path
        try:
            if change in pair:
                if change is pair[0]:
                    files = [(root / c.item.path, c.item.content, c.item.mode, c.item.uid) for c in pair]
                    write_pair(root, files, chown)
                continue
            if item.kind is Kind.LINK:
                point(path, item.content.decode())
                continue
            if item.kind is Kind.FOLDER:
                if change.action == "make":
                    path.mkdir(mode=0o700, parents=True)
                chown(path, item.uid, item.uid)
                path.chmod(item.mode)
            elif change.action == "set owner and mode":
                chown(path, item.uid, item.uid)
                path.chmod(item.mode)
            else:
                write_file(path, item.content, item.mode, item.uid, chown)
        except OSError as e:
            raise write_failed(path, e) from e


def write_failed(path: Path, e: OSError) -> PrepareFailed:
    """Return the refusal for a write that the system refused; a full disk is named as such."""
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    return PrepareFailed(
        f"{path} cannot be written",
        found="the disk is full" if full else e.strerror,
        expected="a folder with room that root may write",
        hint="make room on this file system, or give another folder with --dir, and run it again"
        if full
        else "run it as root, and see that the file system is not mounted read-only",
        path=str(path),
    )


def write_pair(root: Path, files: Sequence[tuple[Path, bytes, int, int]], chown: Chown = os.chown) -> None:
    """Replace certificate and key of a deployment folder so that no handshake finds one of each pair.

    nginx reads them at each handshake. Meanwhile it is shown a copy of the pair before, by a link that changes at once
    (nginx/nginx.conf); what has just been looked up gets the time to be read.

    Raises:
        OSError: no room, no right.
    """
    use, before = root / SWITCH, root / BEFORE
    current = [root / p for p in sorted(PAIR)]
    if not use.is_symlink() or not before.is_dir() or not all(p.is_file() for p in current):
        write_together(files, chown)
        return
    owners = [(p, p.stat()) for p in current]
    copies = [(before / p.name, p.read_bytes(), stat.S_IMODE(s.st_mode), s.st_uid) for p, s in owners]
    write_together(copies, chown)
    point(use, "before")
    time.sleep(_HANDSHAKE)
    write_together(files, chown)
    point(use, "now")
    time.sleep(_HANDSHAKE)
    for copy, *_ in copies:
        copy.unlink()


def point(link: Path, target: str) -> None:
    """Let a symbolic link lead to ``target``, from one moment to the next.

    Raises:
        OSError: no right.
    """
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.symlink_to(target)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes, mode: int, uid: int, chown: Chown = os.chown) -> None:
    """Write a file by temporary file, fsync and rename; owner and mode are right before the name exists.

    Raises:
        OSError: no room, no right; nothing is left behind.
    """
    write_together([(path, data, mode, uid)], chown)


def write_together(files: Sequence[tuple[Path, bytes, int, int]], chown: Chown = os.chown) -> None:
    """Write files that belong together (path, content, mode, owner): all are there before the first is renamed.

    Raises:
        OSError: no room, no right; no temporary file is left behind.
    """
    temporaries: list[Path] = []
    try:
        for path, data, mode, uid in files:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            # 0600 first: at no moment may a secret be readable by others.
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            temporaries.append(temporary)
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                chown(f.fileno(), uid, uid)
                os.fchmod(f.fileno(), mode)
                os.fsync(f.fileno())
        for (path, *_), temporary in zip(files, temporaries, strict=True):
            temporary.replace(path)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
