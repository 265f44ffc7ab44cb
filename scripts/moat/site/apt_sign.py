# SPDX-License-Identifier: Apache-2.0
"""``moat apt-sign``: a signed apt repository on this host, from packages that the bundle's manifest vouches for.

The bundle's ``debs/`` has no OpenPGP signature: the manifest covers it, and the build keeps no second
key. apt asks for one all the same, so this command signs the index with a key that is made for this
one signature and forgotten; ``moat.gpg`` is its public half, for ``Signed-By`` of one source and of
nothing else on the host.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import ChangedFile, MissingFile, StageFailed
from moat.site import scan
from moat.site.openpgp import Key, SigningKey, is_signed
from moat.site.state import write_atomically
from moat.site.store import check_room, fsync_folder, refused

NAME = "apt-sign"
HELP = "sign an apt repository on this host with a fresh key"

KEYRING: Final = "moat.gpg"
INDEX: Final = ("Packages", "Release")
_USER: Final = "Moat package index of this host"
_MAX_INDEX: Final = 64 * 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the repository; it holds Packages and Release")
    parser.add_argument(
        "--debs",
        type=Path,
        metavar="DIR",
        help="first make the repository from this folder: copies of its index, links to its packages",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Make the repository where asked, and sign it unless it is signed."""
    folder: Path = args.folder
    changed = False
    try:
        if args.debs is not None:
            changed = mirror(args.debs, folder)
        release = check_index(folder)
        signed = sign(folder, release)
    except OSError as e:
        raise refused("the repository cannot be written", e, folder) from e
    console.result(
        {
            "ok": True, "exit": 0, "path": str(folder), "keyring": str(folder / KEYRING),
            "changed": changed or signed, "problems": [],
        },
        f"{folder}: {'signed' if signed else 'signed before, nothing to do'}",
    )  # fmt: skip
    return 0


def mirror(debs: Path, folder: Path) -> bool:
    """Make ``folder`` a repository of the packages in ``debs``, and tell whether anything was written.

    The packages stay where they were verified; a relative link for each keeps the release movable.

    Raises:
        MissingFile: ``debs`` has no index.
        OSError: ``folder`` cannot be written.
    """
    changed = False
    old = os.umask(0o022)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, _size(debs))
        wanted = {p.name for p in debs.iterdir() if p.suffix == ".deb"} if debs.is_dir() else set()
        for name in INDEX:
            data = _read(debs, name)
            if not (folder / name).is_file() or (folder / name).read_bytes() != data:
                write_atomically(folder / name, data)
                changed = True
        for entry in sorted(folder.iterdir()):
            if entry.name not in {*wanted, *INDEX, "InRelease", KEYRING}:
                entry.unlink()
                changed = True
        for name in sorted(wanted):
            link, target = folder / name, os.path.relpath(debs.resolve() / name, folder.resolve())
            if not link.is_symlink() or str(link.readlink()) != target:
                temporary = folder / f".{name}.tmp"
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(target)
                temporary.replace(link)
                changed = True
        fsync_folder(folder)
    finally:
        os.umask(old)
    return changed


def _size(debs: Path) -> int:
    return sum((debs / n).stat().st_size for n in INDEX if (debs / n).is_file())


def _read(folder: Path, name: str) -> bytes:
    with scan.open_root(folder) as root:
        try:
            return scan.read_small(root, name, _MAX_INDEX)
        except FileNotFoundError as e:
            raise MissingFile(
                f"{folder / name} is missing",
                expected="an apt repository with Packages and Release",
                hint="give the folder debs/ of a staged release with --debs",
                path=str(folder / name),
            ) from e


def check_index(folder: Path) -> str:
    """Return the text of ``Release``, after comparing ``Packages`` with the hash that it states.

    Raises:
        MissingFile: one of them is not there.
        ChangedFile: they do not belong together, or ``Release`` is not one of ours.
    """
    packages, release = _read(folder, INDEX[0]), _read(folder, INDEX[1])
    digest = hashlib.sha256(packages).hexdigest()
    try:
        text = release.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if f" {digest} {len(packages)} Packages\n" not in text:
        raise ChangedFile(
            f"{folder}/Packages is not the index that Release states",
            found=f"sha256 {digest}, {len(packages)} bytes",
            expected="the line of Release",
            hint="stage the release again (moat stage), then run the command again",
            path=str(folder / "Packages"),
        )
    return text


def sign(folder: Path, release: str, *, now: float | None = None) -> bool:
    """Write ``InRelease`` and the keyring, and tell whether they had to be.

    The signature bears the time of ``Release``, which is the locks' own: a host whose clock is set
    back a little still accepts it. The keyring comes first: between the two, apt refuses.

    Raises:
        StageFailed: the clock is before the time of ``Release``.
        OSError: the folder cannot be written.
    """
    target, keyring = folder / "InRelease", folder / KEYRING
    if target.is_file() and keyring.is_file() and is_signed(release, target.read_bytes(), keyring.read_bytes()):
        return False
    created = _date(release)
    clock = int(time.time() if now is None else now)
    if created > clock:
        raise StageFailed(
            "this host's clock is before the time when the packages were locked",
            found=_utc(clock),
            expected=f"{_utc(created)} or later",
            hint="set the clock (date -s), then run the command again",
        )
    key = Key(SigningKey(secrets.token_bytes(32)), _USER, created)
    write_atomically(keyring, key.public())
    write_atomically(target, key.clear_sign(release))
    return True


def _utc(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _date(release: str) -> int:
    found = re.search(r"^Date: (.+)$", release, re.MULTILINE)
    try:
        if found is None:
            raise ValueError
        return int(datetime.strptime(found[1], "%a, %d %b %Y %H:%M:%S UTC").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise ChangedFile(
            "Release has no date",
            found=found[1][:80] if found else "no such line",
            expected="Date: Mon, 23 Nov 2026 12:00:00 UTC",
            hint="stage the release again (moat stage)",
        ) from None
