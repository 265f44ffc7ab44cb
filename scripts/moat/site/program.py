# SPDX-License-Identifier: Apache-2.0
"""``moat program``: take one program out of an image of the bundle, for a host without containers.

Nothing is unpacked by trust. The signed manifest names the image's id, which is the hash of its
configuration; that names the hash of every layer's content; and the program is one ordinary file
of the uppermost layer that has its path. Each link of this chain is checked, and the file gets its
name only when the layer's last byte was.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any, Final, cast

from moat.console import Console, human_bytes
from moat.errors import ChangedFile, MissingFile, StageFailed
from moat.manifest import FileEntry, ImageEntry
from moat.site import scan
from moat.site.load import checked_blocks
from moat.site.source import FolderSource, open_source
from moat.site.store import BUNDLE, check_room, fsync_folder, refused
from moat.site.trust import COPY_AGAIN
from moat.site.verify import add_trust_arguments, installed_of, keys_of

NAME = "program"
HELP = "take one program out of an image of a verified bundle"

_CHUNK: Final = 1024 * 1024
_MAX_JSON: Final = 4 * 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", type=Path, metavar="BUNDLE_OR_RELEASE", help="a bundle's folder, or a release's")
    parser.add_argument("name", metavar="NAME", help="the image's name, e.g. minio")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="where to write the program")
    parser.add_argument("--path", metavar="PATH", help="its path in the image; default is what the image starts")
    add_trust_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Find, check, write."""
    path: Path = args.source
    if (path / BUNDLE).is_dir() and not (path / "manifest.json").exists():
        path = path / BUNDLE
    keys = keys_of(args, path, console)
    with open_source(path, keys, target=args.target, installed=installed_of(args)) as source:
        if not isinstance(source, FolderSource):
            raise StageFailed(f"{path} is a file", expected="a bundle's folder, or a release's", hint="stage it first")
        manifest = source.signed.manifest
    images = {i.name: i for i in manifest.images}
    if args.name not in images:
        raise StageFailed(
            f"there is no image {args.name} in the bundle",
            found=", ".join(images),
            expected=args.name,
            hint="name one of those that are found",
        )
    image = images[args.name]
    archive = next(f for f in manifest.files if f.path == image.archive)
    with scan.open_root(path) as root:
        for _ in checked_blocks(root, archive, lambda n: None):
            pass  # the archive is what was signed, before anything in it is looked at
        taken, digest, size, changed = take(root, archive, image, args.to, args.path)
    console.result(
        {
            "ok": True, "exit": 0, "program": taken, "path": str(args.to), "sha256": digest, "bytes": size,
            "changed": changed, "problems": [],
        },
        f"{args.to}: /{taken} of {image.reference}, {human_bytes(size)}{'' if changed else ', was there'}",
    )  # fmt: skip
    return 0


def take(
    root: int, archive: FileEntry, image: ImageEntry, to: Path, wanted: str | None = None
) -> tuple[str, str, int, bool]:
    """Write one program of ``image`` to ``to`` with mode 0755.

    Args:
        root: descriptor of the bundle's folder.
        archive: the image's file on the medium, already compared with the manifest.
        image: with the id that everything else follows from.
        to: the file to write; one that has these bytes already stays.
        wanted: path in the image; default the first word of its entry point.

    Returns:
        Its path in the image, its sha256, its size in bytes, and whether ``to`` was written.

    Raises:
        ChangedFile: a link of the chain does not hold.
        MissingFile: no layer has that path.
        StageFailed: it is no ordinary file, or ``to`` cannot be written.
    """
    with scan.open_file(root, archive.path) as fd, os.fdopen(os.dup(fd), "rb") as f:
        try:
            with tarfile.open(fileobj=f, mode="r:") as outer:
                config, layers = _chain(outer, image)
                path = (wanted or _entry_point(config, image)).strip("/")
                for blob, diff_id in reversed(layers):
                    found = _from_layer(outer, blob, diff_id, path, to, image)
                    if found:
                        return path, *found
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, KeyError, ValueError, TypeError) as e:
            raise _broken(image, f"{type(e).__name__}: {e}", "an image archive of `moat build`") from e
    raise MissingFile(
        f"there is no /{path} in the image {image.reference}",
        hint="give the right path with --path, without it the program that the image starts is taken",
        path=image.archive,
    )


def _broken(image: ImageEntry, found: str, expected: str) -> ChangedFile:
    return ChangedFile(
        f"{image.archive} is not the image of the manifest",
        found=found,
        expected=expected,
        hint=COPY_AGAIN,
        path=image.archive,
    )


def _member(outer: tarfile.TarFile, name: str, limit: int) -> bytes:
    info = outer.getmember(name)
    stream = outer.extractfile(info)  # a stream of its bytes; nothing is written
    if not info.isreg() or info.size > limit or stream is None:
        raise ValueError(f"{name} is no ordinary file of at most {limit} bytes")
    return stream.read()


def _chain(outer: tarfile.TarFile, image: ImageEntry) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the image's configuration, and ``(member, sha256 of its content)`` of its layers, lowest first."""
    described = json.loads(_member(outer, "manifest.json", _MAX_JSON))
    if len(described) != 1:
        raise ValueError("the archive holds several images")
    raw = _member(outer, described[0]["Config"], _MAX_JSON)
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    if digest != image.id:
        raise _broken(image, f"a configuration with {digest}", image.id)
    config = json.loads(raw)
    diff_ids = config["rootfs"]["diff_ids"]
    blobs = described[0]["Layers"]
    if len(blobs) != len(diff_ids):
        raise ValueError(f"{len(blobs)} layers, but {len(diff_ids)} in the configuration")
    return config, list(zip(blobs, diff_ids, strict=True))


def _entry_point(config: dict[str, Any], image: ImageEntry) -> str:
    words = config.get("config", {}).get("Entrypoint") or []
    if not words or not isinstance(words[0], str):
        raise StageFailed(
            f"the image {image.reference} starts no program of its own", hint="name the program's path with --path"
        )
    return str(words[0])


class _Hashed:
    """A layer's content, hashed while it is read, and bounded."""

    def __init__(self, source: IO[bytes], limit: int) -> None:
        self._source = source
        self._left = limit
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size, _CHUNK) if size >= 0 else _CHUNK)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("the layer unpacks to more than the manifest says")
        self.digest.update(data)
        return data


def _from_layer(
    outer: tarfile.TarFile, blob: str, diff_id: str, path: str, to: Path, image: ImageEntry
) -> tuple[str, int, bool] | None:
    """Write ``path`` of one layer to ``to``, and return its sha256, size and whether it was written."""
    info = outer.getmember(blob)
    stream = outer.extractfile(info)
    if not info.isreg() or stream is None:
        raise ValueError(f"{blob} is no ordinary file")
    # Folders' headers and padding are on top of the sum of the files.
    content = _Hashed(cast("IO[bytes]", gzip.GzipFile(fileobj=stream)), image.unpacked + 64 * 1024 * 1024)
    to.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    found: tuple[str, int] | None = None
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", content), mode="r|", bufsize=_CHUNK) as layer:
            for member in layer:
                if member.name.lstrip("./").rstrip("/") != path or found:
                    continue
                if not member.isreg():
                    raise StageFailed(
                        f"/{path} of {image.reference} is no ordinary file",
                        expected="a program",
                        hint="name the file itself with --path, not a link to it",
                        path=image.archive,
                    )
                file = layer.extractfile(member)
                if file is None:
                    raise ValueError(f"{path} has no content")
                found = _save(file, member.size, temporary)
        while content.read():
            pass  # to the end: the layer's hash covers what comes after the tar, too
        if "sha256:" + content.digest.hexdigest() != diff_id:
            raise _broken(image, f"a layer of sha256:{content.digest.hexdigest()}", diff_id)
        if found is None:
            return None
        return (*found, _put(temporary, to, found[0]))
    finally:
        temporary.unlink(missing_ok=True)


def _save(file: IO[bytes], size: int, temporary: Path) -> tuple[str, int]:
    check_room(temporary.parent.resolve(), size)
    digest, done = hashlib.sha256(), 0
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:
            while data := file.read(_CHUNK):
                digest.update(data)
                done += len(data)
                out.write(data)
            os.fchmod(out.fileno(), 0o755)
            out.flush()
            os.fsync(out.fileno())
    except OSError as e:
        raise refused("the program cannot be written", e, temporary.parent) from e
    if done != size:
        raise ValueError(f"{done} bytes of the program instead of {size}")
    return digest.hexdigest(), done


def _put(temporary: Path, to: Path, digest: str) -> bool:
    """Give the checked file its name; one with the same bytes and mode stays as it is."""
    try:
        if to.is_file() and not to.is_symlink() and to.stat().st_mode & 0o7777 == 0o755:
            with to.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() == digest:
                    return False
        temporary.replace(to)
        fsync_folder(to.parent.resolve())
    except OSError as e:
        raise refused("the program cannot be written", e, to) from e
    return True
