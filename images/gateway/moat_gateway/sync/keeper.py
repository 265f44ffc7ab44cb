# SPDX-License-Identifier: Apache-2.0
"""The writing side of ``<sync_dir>``: one process, and a protocol that can be killed between any two steps.

A revision is written below ``tmp/``, each file and each folder synchronised, then renamed to ``revisions/<n>``, and
``revisions/`` synchronised. Only then is ``current.json`` replaced, which makes it the one in force. What is removed
is renamed to ``tmp/`` first. So ``revisions/`` never holds half a revision, and what lies in ``tmp/`` at a start is
waste.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from moat_gateway.errors import SyncFolderFailed
from moat_gateway.revision import MANIFEST, SIGNATURE, Revision
from moat_gateway.sync.files import make_folder, object_bytes, replace, sync_folder, timestamp, write_new
from moat_gateway.sync.nodefolder import CURRENT, PREPARED, REVISIONS, SYNC, Current, SyncState, kept, revision_folder

_LOCK = "lock"
_TMP = "tmp"


class Keeper:
    """Holds ``<sync_dir>`` for this process and writes it.

    Args:
        folder: ``<sync_dir>``; made if it is not there.

    Raises:
        SyncFolderFailed: it cannot be written, or another config-sync holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _writing("the folder of config-sync cannot be used", folder):
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        try:
            self._hold()
            with _writing("the folder of config-sync cannot be written", folder):
                make_folder(folder / REVISIONS)
                make_folder(folder / _TMP)
                self._clean()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._lock)

    def keep(self, revision: Revision, prepared: bytes) -> None:
        """Write a revision completely; it is not in force yet.

        Raises:
            SyncFolderFailed: it could not be written; what was there is as it was.
        """
        with _writing(f"revision {revision.number} cannot be kept", self.folder):
            new = self.folder / _TMP / f"new-{revision.number}"
            self._remove(new)
            make_folder(new)
            try:
                folders = {new}
                self._write(new, MANIFEST, revision.manifest, folders)
                self._write(new, SIGNATURE, revision.signature, folders)
                for path, content in revision.files.items():
                    self._write(new, path, content, folders)
                self._write(new, PREPARED, prepared, folders)
                # The deepest first: a name counts once the folder that holds it is on the disk.
                for folder in sorted(folders, key=lambda f: len(f.parts), reverse=True):
                    sync_folder(folder)
                self.drop(revision.number)
                new.rename(revision_folder(self.folder, revision.number))
                sync_folder(self.folder / REVISIONS)
            except BaseException:
                # A full disk must not stay full because of what could not be finished.
                with suppress(OSError):
                    self._remove(new)
                raise

    def commit(self, revision: Revision) -> Current:
        """Put a kept revision in force.

        Raises:
            SyncFolderFailed: ``current.json`` could not be replaced; the one before is in force.
        """
        current = Current(revision.number, revision.sha256, timestamp())
        with _writing(f"revision {revision.number} cannot be put in force", self.folder):
            replace(self.folder / CURRENT, current.to_bytes(), durable=True)
        return current

    def write_prepared(self, number: int, prepared: bytes) -> None:
        """Replace the prepared form of a kept revision.

        Raises:
            SyncFolderFailed: it could not be written.
        """
        with _writing(f"the prepared form of revision {number} cannot be written", self.folder):
            beside = self.folder / _TMP / f"prepared-{number}"
            write_new(beside, prepared, durable=True, over=True)
            folder = revision_folder(self.folder, number)
            beside.rename(folder / PREPARED)
            sync_folder(folder)

    def drop(self, number: int) -> None:
        """Remove a kept revision, in one step as far as anybody can see.

        Raises:
            OSError: it could not be removed.
        """
        waste = self.folder / _TMP / f"old-{number}"
        self._remove(waste)
        with suppress(FileNotFoundError):
            revision_folder(self.folder, number).rename(waste)
        self._remove(waste)

    def prune(self, keep: int, current: int) -> None:
        """Remove all but the newest ``keep`` revisions, and never the current one.

        Raises:
            SyncFolderFailed: one could not be removed.
        """
        with _writing("an old revision cannot be removed", self.folder):
            numbers = [n for n in kept(self.folder) if n != current]
            for number in numbers[keep - 1 :]:
                self.drop(number)

    def tell(self, state: SyncState) -> None:
        """Replace ``sync.json``.

        Raises:
            SyncFolderFailed: it could not be written.
        """
        with _writing("the note of config-sync cannot be written", self.folder):
            replace(self.folder / SYNC, object_bytes(state.to_dict()), durable=False)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.pread(self._lock, 100, 0).decode("ascii", "replace").strip()
            raise SyncFolderFailed(
                "another config-sync holds the folder",
                found=f"process {holder}" if holder.isdigit() else e.strerror,
                expected="one config-sync a node",
                hint="stop the other one, or set another MOAT_SYNC_DIR",
                path=str(self.folder),
            ) from e
        with suppress(OSError):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode("ascii"), 0)

    def _clean(self) -> None:
        for path in (self.folder / _TMP).iterdir():
            self._remove(path)
        for path in self.folder.glob(".*.tmp"):
            path.unlink()

    @staticmethod
    def _write(root: Path, path: str, content: bytes, folders: set[Path]) -> None:
        place = root
        # Paths were verified by revision.check_path: plain names only.
        for name in PurePosixPath(path).parts[:-1]:
            place /= name
            if place not in folders:
                make_folder(place)
                folders.add(place)
        write_new(root / path, content, durable=True)

    @staticmethod
    def _remove(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _writing(message: str, folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise SyncFolderFailed(
            message,
            found=e.strerror or str(e),
            expected="a folder that config-sync's user may write, with room",
            hint="make room on its file system" if full else "correct its owner and mode, or its file system",
            path=str(folder),
        ) from e
