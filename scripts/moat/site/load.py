# SPDX-License-Identifier: Apache-2.0
"""``moat load``: bring a verified bundle's images into the engine, and record what is installed.

Two phases: first everything is verified and compared, nothing is changed; then one archive at a
time is fed to the engine. An archive is hashed once more while it is fed, since a medium can answer
differently the second time, and the engine must show the manifest's id in the end. The record
is written last, so an interrupted run is repeated simply by running the command again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moat.console import Console, human_bytes
from moat.errors import ChangedFile, LoadFailed, MissingFile, Unreadable
from moat.manifest import FileEntry, ImageEntry
from moat.site import scan
from moat.site.engine import Engine, EngineError
from moat.site.state import INSTALLED_NAME, write_installed
from moat.site.trust import COPY_AGAIN
from moat.site.verify import VerifiedBundle, add_trust_arguments, installed_of, keys_of, verify_bundle

NAME = "load"
HELP = "verify a bundle, then bring its images into the container engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the bundle's folder on the medium")
    add_trust_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Verify, load, record."""
    keys = keys_of(args, args.path, console)
    with console.step("verify the medium (nothing is changed yet)"):
        bundle = verify_bundle(args.path, keys, console, target=args.target, installed=installed_of(args))
    loaded, present = load_images(bundle, Engine(), console)
    record(args.state_dir, bundle)
    name = bundle.manifest.bundle.name
    console.result(
        {
            "ok": True,
            "exit": 0,
            "bundle": {k: getattr(bundle.manifest.bundle, k) for k in ("version", "profile", "target")},
            "loaded": [i.reference for i in loaded],
            "present": [i.reference for i in present],
            "installed": str(args.state_dir / INSTALLED_NAME),
            "problems": [],
        },
        f"loaded: {name}, {len(loaded)} images loaded, {len(present)} were there; ids as in the manifest",
    )
    return 0


def to_load(images: Sequence[ImageEntry], present: dict[str, str]) -> tuple[list[ImageEntry], list[ImageEntry]]:
    """Split a bundle's images into those that the engine lacks and those it has, by id.

    Args:
        images: of the manifest.
        present: the engine's ids by reference.

    Raises:
        LoadFailed: a reference of the bundle is taken by another image. Loading would move the name
            silently, away from what somebody runs.
    """
    lacking, there = [], []
    for image in images:
        found = present.get(image.reference)
        if found is None:
            lacking.append(image)
        elif found == image.id:
            there.append(image)
        else:
            raise _wrong_id(image, found)
    return lacking, there


def _wrong_id(image: ImageEntry, found: str) -> LoadFailed:
    return LoadFailed(
        f"the engine's image {image.reference} is not the one of the bundle",
        found=found,
        expected=image.id,
        hint=f"find out who made it; `docker image rm {image.reference}` removes it, then run the command again",
        path=image.archive,
    )


def load_images(bundle: VerifiedBundle, engine: Engine, console: Console) -> tuple[list[ImageEntry], list[ImageEntry]]:
    """Load the images that the engine lacks, one archive at a time.

    Returns:
        The images loaded now, and those that were there.

    Raises:
        LoadFailed: the engine cannot be asked, refuses an archive, or shows another id than the manifest.
        ChangedFile, Unreadable, MissingFile: the medium changed or failed after it was verified.
    """
    try:
        lacking, there = to_load(bundle.manifest.images, engine.image_ids())
    except EngineError as e:
        raise _unreachable(e) from e
    archives = {f.path: f for f in bundle.manifest.files}
    for image in lacking:
        archive = archives[image.archive]
        with console.step(f"load {image.reference} ({human_bytes(archive.size)})"):
            _load_one(bundle, image, archive, engine, console)
    return lacking, there


def _unreachable(e: EngineError) -> LoadFailed:
    return LoadFailed(
        "the container engine does not answer",
        found=str(e),
        expected="a running docker engine that you may use",
        hint="start it, or run as root or a member of the group docker; `moat doctor` checks it",
    )


def checked_blocks(root: int, wanted: FileEntry, count: Callable[[int], None]) -> Iterator[memoryview]:
    """Yield a file's blocks, the last one only if all of them together have the manifest's sha256.

    So an archive that changed after it was verified never reaches the engine whole.

    Args:
        root: descriptor of the bundle's folder.
        wanted: the archive.
        count: told the bytes as they go.

    Raises:
        ChangedFile, UnsafePath, Unreadable, MissingFile: the medium changed or failed since.
    """
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(scan.CHUNK_BYTES))
    try:
        with scan.open_file(root, wanted.path) as fd:
            while n := os.readv(fd, [buffer]):
                digest.update(buffer[:n])
                done += n
                if done > wanted.size or (done == wanted.size and digest.hexdigest() != wanted.sha256):
                    break
                count(n)
                yield buffer[:n]
    except FileNotFoundError as e:
        raise MissingFile(f"{wanted.path} is gone since it was verified", hint=COPY_AGAIN, path=wanted.path) from e
    except OSError as e:
        raise Unreadable(
            f"{wanted.path} cannot be read",
            found=e.strerror,
            hint="check the medium (dmesg), then run the command again",
            path=wanted.path,
        ) from e
    if done != wanted.size or digest.hexdigest() != wanted.sha256:
        raise ChangedFile(
            f"{wanted.path} changed after it was verified",
            found=f"{done} bytes read, sha256 {digest.hexdigest()}",
            expected=f"{wanted.size} bytes, sha256 {wanted.sha256}",
            hint="do not use this medium: it answers differently each time",
            path=wanted.path,
        )


def _load_one(bundle: VerifiedBundle, image: ImageEntry, archive: FileEntry, engine: Engine, console: Console) -> None:
    with scan.open_root(bundle.path) as root, console.progress("loading", archive.size) as bar:
        try:
            engine.load(checked_blocks(root, archive, bar.add))
        except LoadFailed as e:
            e.message, e.path = f"{e.message} {image.reference}", image.archive
            raise
    try:
        found = engine.image_id(image.reference)
    except EngineError as e:
        raise _unreachable(e) from e
    if found != image.id:
        raise _wrong_id(image, found or "no image of that name after loading")


def record(state_dir: Path, bundle: VerifiedBundle) -> None:
    """Write ``installed.json`` and the manifest's copy.

    Raises:
        LoadFailed: the folder cannot be written; the images are in the engine all the same.
    """
    try:
        write_installed(state_dir, bundle.as_installed, bundle.manifest_bytes)
    except OSError as e:
        raise LoadFailed(
            f"the record of what is installed cannot be written to {state_dir}",
            found=e.strerror,
            expected="a folder that can be written",
            hint="run as root, or give --state-dir; the images are loaded, so the next run is short",
            path=str(state_dir),
        ) from e
