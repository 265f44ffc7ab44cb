# SPDX-License-Identifier: Apache-2.0
"""The release store of a host: ``<store>/releases/<id>/``, and the links that say what runs.

A release is named by its version and the hash of its manifest, so one name is one set of bytes.
``bundle/`` below it is the verified copy of the medium and appears whole or not at all; what else
lies there (``venv``, ``bin``, ``apt``) is made from it. Whatever begins with a dot was left by a run
that was interrupted, and the next run clears it away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from moat.console import human_bytes
from moat.errors import MoatError, StageFailed
from moat.manifest import MANIFEST_NAME, MAX_BYTES, SIGNATURE_NAME, FileEntry, Manifest, parse_manifest, version_key

DEFAULT_STORE: Final = Path("/opt/moat")
BUNDLE: Final = "bundle"
_LOCK: Final = ".stage.lock"
#: Copies nothing: the release that runs is there already.
PRUNE: Final = f"moat stage {DEFAULT_STORE}/current/{BUNDLE} --prune 2"
#: Left free beside what is written: a full root file system harms more than our install.
SLACK: Final = 64 * 1024 * 1024

#: What a part holds, by the beginning of the path. Files at the top (moat.pyz, the licences) go with every part.
PARTS: Final = {
    "ansible": "ansible/",
    "wheels": "wheels/",
    "debs": "debs/",
    "minio": "images/minio.tar",
    "images": "images/",
    "compose": "compose/",
    "docs": "docs/",
    "tokenizers": "tokenizers/",
    "sbom": "sbom/",
    "sources": "sources/",
}
#: What an installation without containers needs; the images and the corresponding sources stay on the medium.
DEFAULT_PARTS: Final = ("ansible", "wheels", "debs", "minio", "compose", "docs", "tokenizers", "sbom")
_PROGRAMS: Final = frozenset({"install.sh", "ansible/install.sh", "ansible/moat-site"})


def parse_parts(text: str) -> tuple[str, ...]:
    """Return the parts that a comma-separated list names.

    Raises:
        StageFailed: a part that does not exist.
    """
    parts = tuple(dict.fromkeys(p.strip() for p in text.split(",") if p.strip()))
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise StageFailed(
            f"there is no part {unknown[0]!r} of a bundle",
            found=unknown[0],
            expected=", ".join(PARTS),
            hint="name the parts with commas between them: --parts debs,wheels",
        )
    return parts


def is_wanted(path: str, parts: Sequence[str]) -> bool:
    """Tell whether a listed file belongs to ``parts``."""
    return "/" not in path or any(path.startswith(PARTS[p]) for p in parts)


def mode_of(path: str) -> int:
    """Return the mode of a file in the store; the medium's own says nothing (FAT has none)."""
    return 0o755 if path in _PROGRAMS else 0o644


def release_id(manifest: Manifest, manifest_sha256: str) -> str:
    """Return the name of a release: its version and the beginning of its manifest's sha256."""
    return f"{manifest.bundle.version}-{manifest_sha256[:12]}"


def refused(what: str, e: OSError, path: Path) -> StageFailed:
    """Return the refusal for a system call that failed in the store."""
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    return StageFailed(
        f"{path}: {what}",
        found=e.strerror or str(e),
        expected="room on the disk" if full else "a folder of root's that can be written",
        hint="make room, then run the same command again: it starts from what is complete"
        if full
        else "run as root, and look for a read-only file system (mount, dmesg)",
        path=str(path),
    )


class Store:
    """One release store.

    Args:
        root: its folder; made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.releases = self.root / "releases"

    def release(self, name: str) -> Path:
        """Return the folder of a release."""
        return self.releases / name

    def bundle(self, name: str) -> Path:
        """Return the folder of a release's verified copy."""
        return self.releases / name / BUNDLE

    def check_folders(self) -> None:
        """Check that nobody else could change what is about to be trusted.

        Raises:
            StageFailed: the store or ``releases`` is a link, or may be written by others.
        """
        for folder in (self.root, self.releases):
            try:
                status = folder.lstat()
            except FileNotFoundError:
                continue
            except OSError as e:
                raise refused("cannot be examined", e, folder) from e
            mine = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not stat.S_ISDIR(status.st_mode) or not mine:
                raise StageFailed(
                    f"{folder} is not a folder that only root can change",
                    found=f"{stat.filemode(status.st_mode)} of user {status.st_uid}",
                    expected=f"a folder of user {os.geteuid()}, not writable by others",
                    hint=f"find out why; then: chown root:root {folder}; chmod 755 {folder}",
                    path=str(folder),
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folders where they are missing, and keep other runs out.

        Raises:
            StageFailed: the folders cannot be made, or another run is at work.
        """
        self.check_folders()
        try:
            self.releases.mkdir(parents=True, exist_ok=True, mode=0o755)
            for folder in (self.root, self.releases):  # whatever the umask was
                folder.chmod(0o755)
            fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise refused("the store cannot be made", e, self.root) from e
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StageFailed(
                    f"another run works on {self.root}",
                    expected="one at a time",
                    hint="wait until it ends, then run the same command again",
                    path=str(self.root),
                ) from None
            yield
        finally:
            os.close(fd)

    def leftovers(self) -> list[Path]:
        """Return what interrupted runs left; call it with the lock held before clearing them away."""
        if not self.releases.is_dir():
            return []
        hidden = [p for p in self.releases.iterdir() if p.name.startswith(".")]
        for release in self.names():
            hidden += [p for p in self.release(release).iterdir() if p.name.startswith(f".{BUNDLE}.")]
        return sorted(hidden)

    def clean(self) -> list[str]:
        """Clear away what interrupted runs left; a copy that was being swapped out is put back first.

        Returns:
            The paths that were removed.
        """
        removed = []
        for path in self.leftovers():
            bundle = path.parent / BUNDLE
            if path.name.startswith(f".{BUNDLE}.old") and not bundle.exists():
                path.rename(bundle)  # it is verified by whoever asks for it
                continue
            remove(path)
            removed.append(str(path))
        for name in self.names():
            folder = self.release(name)
            if not any(folder.iterdir()):
                folder.rmdir()
        return removed

    def names(self) -> list[str]:
        """Return the names of the releases, whole or not."""
        if not self.releases.is_dir():
            return []
        return sorted(p.name for p in self.releases.iterdir() if p.is_dir() and not p.name.startswith("."))

    def pinned(self) -> dict[str, str]:
        """Return the releases that a link points to, with one such link each."""
        found: dict[str, str] = {}
        for folder in (self.root, self.root / "instances"):
            if not folder.is_dir():
                continue
            for link in sorted(folder.iterdir()):
                if link.is_symlink():
                    target = link.resolve()
                    if target.is_relative_to(self.releases) and target != self.releases:
                        found.setdefault(target.relative_to(self.releases).parts[0], str(link))
        return found

    def point(self, name: str, *, check: bool = False) -> bool:
        """Make ``current`` name a release and ``previous`` the one before, and tell whether it did not yet.

        Raises:
            StageFailed: something else than a link stands there, or it cannot be written.
        """
        current, previous = self.root / "current", self.root / "previous"
        target = f"releases/{name}"
        try:
            before = str(current.readlink()) if current.is_symlink() else None
            if before == target:
                return False
            if not check:
                if before is not None:
                    _link(previous, before)
                _link(current, target)
                fsync_folder(self.root)
        except OSError as e:
            raise refused("cannot be linked", e, current) from e
        return True

    def prunable(self, keep: int, staged: str) -> list[str]:
        """Return the releases that are neither among the newest ``keep``, nor linked to, nor ``staged``."""
        age: dict[str, tuple[object, ...]] = {}
        for name in self.names():
            try:
                with (self.bundle(name) / MANIFEST_NAME).open("rb") as f:
                    info = parse_manifest(f.read(MAX_BYTES + 1)).bundle
                age[name] = (1, version_key(info.version), info.created, name)
            except (OSError, MoatError):
                age[name] = (0, name)  # not whole: the first to go
        newest = sorted(age, key=lambda n: age[n], reverse=True)
        stay = {*newest[:keep], *self.pinned(), staged}
        return [n for n in newest if n not in stay]

    def prune(self, names: Iterable[str]) -> None:
        """Remove releases; each is out of sight before its first file goes.

        Raises:
            StageFailed: one cannot be removed.
        """
        for name in names:
            hidden = self.releases / f".removed.{name}"
            try:
                if hidden.exists():
                    remove(hidden)
                self.release(name).rename(hidden)
                remove(hidden)
            except OSError as e:
                raise refused("cannot be removed", e, self.release(name)) from e


def _link(link: Path, target: str) -> None:
    """Make or move a symbolic link in one step."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; links below it are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_room(folder: Path, needed: int) -> None:
    """Check that a file system has room for ``needed`` bytes and some more.

    Raises:
        StageFailed: it has not; nothing was written.
    """
    there = folder
    while not there.exists():
        there = there.parent
    stats = os.statvfs(there)
    free = stats.f_bavail * stats.f_frsize
    if free < needed + SLACK:
        raise StageFailed(
            f"there is not enough room below {there}",
            found=f"{human_bytes(free)} free",
            expected=f"{human_bytes(needed)} for the release and {human_bytes(SLACK)} to spare",
            hint=f"make room ({PRUNE} removes old releases that nothing uses), then run the command again",
            path=str(there),
        )


def fsync_folder(folder: Path) -> None:
    """Make a folder's names outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make every file and folder below ``root`` outlive a power cut, the deepest first."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fd = os.open(Path(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_folder(Path(folder))


def wanted_files(manifest: Manifest, parts: Sequence[str]) -> tuple[FileEntry, ...]:
    """Return the files of ``parts``, in the manifest's order."""
    return tuple(f for f in manifest.files if is_wanted(f.path, parts))


OWN_NAMES: Final = (MANIFEST_NAME, SIGNATURE_NAME)
