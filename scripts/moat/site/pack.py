# SPDX-License-Identifier: Apache-2.0
"""``moat pack``: parts of a bundle as one tar, for a node that has no medium in it.

The node trusts nothing of it: ``moat stage`` there checks the signature and every file again. The
same bundle and parts give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from moat.console import Console, human_bytes
from moat.errors import StageFailed
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME
from moat.site import ustar
from moat.site.source import FolderSource, open_source
from moat.site.store import DEFAULT_PARTS, check_room, fsync_folder, parse_parts, refused, release_id, wanted_files
from moat.site.verify import add_trust_arguments, installed_of, keys_of

NAME = "pack"
HELP = "pack parts of a verified bundle into a tar for another node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", type=Path, metavar="BUNDLE", help="the bundle's folder, on a medium or in a store")
    parser.add_argument("out", type=Path, metavar="OUT.tar", help="the tar to write, or - for stdout")
    parser.add_argument(
        "--parts", default=",".join(DEFAULT_PARTS), metavar="PART,...", help="what to pack; default %(default)s"
    )
    add_trust_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Verify and pack."""
    parts = parse_parts(args.parts)
    keys = keys_of(args, args.source, console)
    with open_source(args.source, keys, target=args.target, installed=installed_of(args)) as source:
        if not isinstance(source, FolderSource):
            raise StageFailed(
                f"{args.source} is a file", expected="a bundle's folder", hint="a packed bundle is packed already"
            )
        names = {f.path for f in wanted_files(source.signed.manifest, parts)}
        problems = sorted(source.problems(lambda f: f.path in names), key=lambda p: (p.exit_code, p.path or ""))
        for problem in problems[1:40]:
            console.problem(problem)
        if problems:
            raise problems[0]
        if str(args.out) == "-":
            if args.json:
                raise StageFailed("--json and a tar on stdout do not go together", hint="write the tar into a file")
            size = write(source, names, sys.stdout.buffer.write)
            sys.stdout.buffer.flush()
        else:
            size = _write_file(source, names, args.out)
        release = release_id(source.signed.manifest, source.signed.manifest_sha256)
    if str(args.out) != "-":
        console.result(
            {
                "ok": True, "exit": 0, "release": release, "path": str(args.out), "files": len(names) + 2,
                "bytes": size, "parts": list(parts), "problems": [],
            },
            f"packed: {release}, {len(names) + 2} files, {human_bytes(size)} in {args.out}",
        )  # fmt: skip
    return 0


def write(source: FolderSource, names: set[str], sink: Callable[[bytes | memoryview], object]) -> int:
    """Hand the tar's bytes to ``sink`` and return their count; the manifest and its signature come first.

    Raises:
        MoatError: a file is not as the manifest says.
    """
    size = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal size
        sink(data)
        size += len(data)

    own = ((MANIFEST_NAME, source.signed.manifest_bytes), (SIGNATURE_NAME, source.signed.signature))
    for path, data in own:
        put(ustar.header(path, len(data)) + data + ustar.padding(len(data)))
    for entry, blocks in source.files(lambda f: f.path in names):
        put(ustar.header(entry.path, entry.size))
        for block in blocks:
            put(block)
        put(ustar.padding(entry.size))
    put(ustar.END)
    return size


def _write_file(source: FolderSource, names: set[str], out: Path) -> int:
    """Write beside ``out``, then rename: a tar that has its name is whole."""
    check_room(out.parent.resolve(), sum(f.size for f in source.signed.manifest.files if f.path in names))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with _create(temporary) as f:
            size = write(source, names, f.write)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(out)
        fsync_folder(out.parent.resolve())
    except OSError as e:
        raise refused("the tar cannot be written", e, out) from e
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "wb")
