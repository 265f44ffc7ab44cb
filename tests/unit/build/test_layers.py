# SPDX-License-Identifier: Apache-2.0
"""Proves that a layer's bytes depend on its content alone, and that two owners of one path are refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from pathlib import Path

import pytest

from moat.build.layers import Node, Tree, read_layer, write_layer
from moat.errors import BuildFailed

EPOCH = 1_700_000_000


def tree_of(folder: Path, *, reverse: bool = False) -> Tree:
    folder.mkdir(parents=True)
    (folder / "b").write_bytes(b"hello" * 1000)
    nodes = [
        Node("usr/bin/tool", 0o4755, "deb:x", source=folder / "b"),
        Node("etc/passwd", 0o644, "overlay", data=b"root:x:0:0::/:/\n"),
        Node("usr/lib/liba.so", 0o777, "deb:x", target="liba.so.1"),
        Node("data", 0o750, "overlay", uid=10103, gid=10103),
        Node("tmp", 0o1777, "overlay"),
        Node("opt/" + "deep/" * 30 + "name.py", 0o644, "wheel:y", data=b"x = 1\n"),
    ]
    tree = Tree()
    for node in reversed(nodes) if reverse else nodes:
        tree.add(node)
    return tree


def test_same_content_gives_the_same_bytes_whatever_the_order_times_and_umask(tmp_path: Path) -> None:
    first = write_layer("base", tree_of(tmp_path / "a"), tmp_path / "1", source_date_epoch=EPOCH)
    old = os.umask(0o077)
    try:
        tree = tree_of(tmp_path / "b", reverse=True)
        os.utime(tmp_path / "b" / "b", (1, 1))
        second = write_layer("base", tree, tmp_path / "2", source_date_epoch=EPOCH)
    finally:
        os.umask(old)
    assert first.blob.read_bytes() == second.blob.read_bytes()
    other = write_layer("base", tree_of(tmp_path / "c"), tmp_path / "3", source_date_epoch=EPOCH + 1)
    assert other.digest != first.digest


def test_digest_is_of_the_blob_and_diff_id_of_the_tar(tmp_path: Path) -> None:
    layer = write_layer("base", tree_of(tmp_path / "a"), tmp_path / "1", source_date_epoch=EPOCH)
    blob = layer.blob.read_bytes()
    raw = gzip.decompress(blob)
    assert layer.digest == "sha256:" + hashlib.sha256(blob).hexdigest()
    assert layer.diff_id == "sha256:" + hashlib.sha256(raw).hexdigest()
    assert layer.size == len(blob)
    assert blob[4:8] == b"\0\0\0\0", "the gzip header carries a time"
    assert zlib.decompressobj(31).decompress(blob) == raw
    assert read_layer(tmp_path / "1") == layer


def test_members_have_fixed_owners_modes_and_times(tmp_path: Path) -> None:
    layer = write_layer("base", tree_of(tmp_path / "a"), tmp_path / "1", source_date_epoch=EPOCH)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(layer.blob.read_bytes()))) as tar:
        members = {m.name: m for m in tar}
    assert list(members) == sorted(members)
    assert {m.mtime for m in members.values()} == {EPOCH}
    assert {m.uname + m.gname for m in members.values()} == {""}
    assert members["usr/bin/tool"].mode == 0o755, "setuid must not survive"
    assert members["tmp"].mode == 0o1777
    assert (members["data"].uid, members["data"].gid, members["data"].mode) == (10103, 10103, 0o750)
    assert members["usr/lib"].uid == 0
    assert members["usr/lib/liba.so"].issym()
    assert "opt/" + "deep/" * 30 + "name.py" in members


def test_two_sources_of_one_file_are_refused() -> None:
    tree = Tree()
    tree.add(Node("etc/x", 0o644, "deb:a", data=b"1"))
    with pytest.raises(BuildFailed) as caught:
        tree.add(Node("etc/x", 0o644, "deb:b", data=b"1"))
    assert caught.value.found == "deb:a and deb:b"
    tree.add(Node("etc/x", 0o644, "overlay", data=b"2"), replace=True)


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "a//b", "./a", ""])
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(BuildFailed):
        Tree().add(Node(path, 0o644, "deb:a", data=b""))


def test_nothing_lies_below_a_link_or_a_file() -> None:
    tree = Tree()
    tree.add(Node("lib", 0o777, "overlay", target="usr/lib"))
    with pytest.raises(BuildFailed):
        tree.add(Node("lib/x", 0o644, "deb:a", data=b""))


def test_dropping_keeps_the_named_files_and_refuses_patterns_without_effect() -> None:
    tree = Tree()
    for path in ("usr/share/doc/a/copyright", "usr/share/doc/a/changelog.gz", "usr/bin/x"):
        tree.add(Node(path, 0o644, "deb:a", data=b""))
    tree.add(Node("usr/share/doc/b", 0o777, "deb:b", target="a"))
    kept = tree.without([("usr/share/doc", "copyright")])
    files = [n.path for n in kept if not n.is_directory]
    assert files == ["usr/bin/x", "usr/share/doc/a/copyright", "usr/share/doc/b"]
    with pytest.raises(BuildFailed) as caught:
        tree.without([("usr/share/man", "")])
    assert caught.value.found == "usr/share/man"
