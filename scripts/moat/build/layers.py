# SPDX-License-Identifier: Apache-2.0
"""Image layers: a tree of files with known owners, written as the same bytes every time.

Everything that differs between two machines or two runs is fixed: names are sorted, times are
``SOURCE_DATE_EPOCH``, owners are numbers (0 unless the recipe says), modes lose setuid and
setgid and what the umask left, user names are empty, the tar format is GNU, gzip has no name, no
time and a fixed level. The *diff_id* is the sha256 of the tar, the *digest* that of the gzip blob.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from moat.errors import BuildFailed

#: zlib's own default; 9 gained 0.6 % on the wheels layer for twice the time.
GZIP_LEVEL = 6


@dataclass(frozen=True)
class Node:
    """One entry of a layer.

    ``source`` is where a file's bytes are, ``data`` the bytes themselves, ``target`` a symbolic
    link's target; a node with none of them is a folder. ``owner`` says who brought it:
    ``deb:NAME``, ``wheel:NAME``, ``program:NAME``, ``overlay`` or ``code``.
    """

    path: str
    mode: int
    owner: str
    uid: int = 0
    gid: int = 0
    source: Path | None = None
    data: bytes | None = None
    target: str | None = None

    @property
    def is_directory(self) -> bool:
        """Whether this is a folder."""
        return self.source is None and self.data is None and self.target is None


class Tree:
    """The entries of one layer by path; the same path twice must be the same folder, or is an error."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def __iter__(self) -> Iterator[Node]:
        """Yield the nodes sorted by path."""
        return (self._nodes[p] for p in sorted(self._nodes))

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, node: Node, *, replace: bool = False) -> None:
        """Add one entry and, where they are missing, its parent folders (0755, root).

        Args:
            node: what to add.
            replace: an overlay may take the place of a package's entry.

        Raises:
            BuildFailed: two sources bring the same path.
        """
        path = node.path
        if path.startswith("/") or ".." in PurePosixPath(path).parts or str(PurePosixPath(path)) != path:
            raise BuildFailed(f"unsafe path in an image: {path!r}", path=path)
        there = self._nodes.get(path)
        if there is not None and not replace:
            if there.is_directory and node.is_directory:
                return
            raise BuildFailed(
                f"two sources bring the same file: {path}", found=f"{there.owner} and {node.owner}", path=path
            )
        for parent in reversed(PurePosixPath(path).parents):
            p = str(parent)
            if p != "." and p not in self._nodes:
                self._nodes[p] = Node(p, 0o755, node.owner)
            elif p != "." and not self._nodes[p].is_directory:
                raise BuildFailed(f"{path} lies below {p}, which is not a folder", path=path)
        self._nodes[path] = node

    def without(self, dropped: Iterable[tuple[str, str]]) -> Tree:
        """Return a tree without the paths that match (with everything below them).

        Args:
            dropped: pairs of a pattern and the name of files that stay nevertheless (or ``""``);
                where something stays, so do links.

        Raises:
            BuildFailed: a pattern matches nothing: the recipe names something that is not there.
        """
        result = Tree()
        patterns = dict(dropped)
        unused = set(patterns)
        for node in self:
            hit = {d for d in patterns if _matches(node.path, d)}
            unused -= hit
            keeps = {patterns[d] for d in hit} - {""}
            if not hit or (keeps and (node.target is not None or PurePosixPath(node.path).name in keeps)):
                result.add(node, replace=True)
        if unused:
            raise BuildFailed(
                "the recipe drops what is not there",
                found=", ".join(sorted(unused)),
                hint="remove the line from the recipe's `drop`, or correct its path",
            )
        return result


def _matches(path: str, pattern: str) -> bool:
    """Whether the whole path, or one of its parents, matches; ``*`` does not cross a slash."""
    parts, wanted = PurePosixPath(path).parts, PurePosixPath(pattern).parts
    return len(parts) >= len(wanted) and all(fnmatch.fnmatchcase(a, b) for a, b in zip(parts, wanted, strict=False))


@dataclass(frozen=True)
class Layer:
    """A written layer. Sizes are in bytes; ``unpacked`` is the sum of its files'."""

    name: str
    digest: str
    diff_id: str
    size: int
    unpacked: int
    blob: Path


class _GzipDigest(io.RawIOBase):
    """A write-only file that hashes, compresses, and hashes again in one pass."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._gzip = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)  # 31: gzip header with time 0
        self.diff = hashlib.sha256()
        self.blob = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def _put(self, data: bytes) -> None:
        self.blob.update(data)
        self.size += len(data)
        self._out.write(data)

    def write(self, data: object) -> int:
        b = bytes(cast("bytes", data))
        self.diff.update(b)
        self._put(self._gzip.compress(b))
        return len(b)

    def finish(self) -> None:
        self._put(self._gzip.flush())


def add_to_tar(tar: tarfile.TarFile, node: Node, mtime: int) -> int:
    """Write one node and return its number of bytes."""
    info = tarfile.TarInfo(node.path + ("/" if node.is_directory else ""))
    info.mtime, info.uid, info.gid, info.uname, info.gname = mtime, node.uid, node.gid, "", ""
    info.mode = node.mode & 0o1777
    if node.target is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, node.target, 0o777
        tar.addfile(info)
        return 0
    if node.is_directory:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        return 0
    if node.data is not None:
        info.size = len(node.data)
        tar.addfile(info, io.BytesIO(node.data))
        return info.size
    assert node.source is not None  # noqa: S101 - excluded by is_directory
    info.size = node.source.stat().st_size
    with node.source.open("rb") as f:
        tar.addfile(info, f)
    return info.size


def write_layer(name: str, tree: Tree, folder: Path, *, source_date_epoch: int) -> Layer:
    """Write ``tree`` as ``folder/layer.tar.gz`` with ``folder/layer.json`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    blob = folder / "layer.tar.gz"
    unpacked = 0
    with blob.open("wb") as out:
        sink = _GzipDigest(out)
        stream = io.BufferedWriter(sink, 1 << 20)
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar:
            for node in tree:
                unpacked += add_to_tar(tar, node, source_date_epoch)
        stream.flush()
        sink.finish()
    layer = Layer(name, f"sha256:{sink.blob.hexdigest()}", f"sha256:{sink.diff.hexdigest()}", sink.size, unpacked, blob)
    record = {k: v for k, v in asdict(layer).items() if k != "blob"}
    (folder / "layer.json").write_text(json.dumps(record, sort_keys=True) + "\n", "utf-8")
    return layer


def read_layer(folder: Path) -> Layer:
    """Return the layer that :func:`write_layer` left in ``folder``."""
    return Layer(blob=folder / "layer.tar.gz", **json.loads((folder / "layer.json").read_text("utf-8")))
