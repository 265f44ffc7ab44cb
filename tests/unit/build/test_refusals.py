# SPDX-License-Identifier: Apache-2.0
"""Proves what a build refuses: a damaged cache, a full disk, a folder in the way; and that it leaves no debris."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moat.build.build import _may_replace, out_of_space, replace_folder
from moat.build.built import key_of, made, sweep, tree_hash
from moat.build.cache import Cache
from moat.build.layers import Node, Tree, write_layer
from moat.build.oci import ImageConfig, write_archive
from moat.console import Console
from moat.errors import BuildFailed

CONFIG = ImageConfig("amd64", 1, "1:1", ("/x",), (), "/", (), (), "SIGTERM", ())


def test_a_damaged_layer_in_the_cache_is_noticed(tmp_path: Path) -> None:
    tree = Tree()
    tree.add(Node("x", 0o644, "code", data=b"content"))
    layer = write_layer("base", tree, tmp_path / "layer", source_date_epoch=1)
    data = bytearray(layer.blob.read_bytes())
    data[-1] ^= 1
    layer.blob.write_bytes(data)
    with pytest.raises(BuildFailed, match="damaged in the cache") as caught:
        write_archive(tmp_path / "x.tar", name="x", version="1", config=CONFIG, layers=[layer])
    assert str(layer.blob.parent) in (caught.value.hint or "")


def test_a_full_disk_is_a_refusal_and_other_errors_stay_defects(tmp_path: Path) -> None:
    full = out_of_space(OSError(errno.ENOSPC, "No space left on device", "big.tar"), tmp_path, tmp_path)
    assert isinstance(full, BuildFailed)
    assert "free" in (full.found or "")
    other = OSError(errno.EIO, "Input/output error")
    assert out_of_space(other, tmp_path, tmp_path) is other


def test_only_a_bundle_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "moat-1"
    _may_replace(final)
    final.mkdir()
    (final / "my-notes.txt").write_text("keep", "utf-8")
    with pytest.raises(BuildFailed, match="in the way"):
        _may_replace(final)
    (final / "manifest.json").write_text("{}", "utf-8")
    _may_replace(final)
    link = tmp_path / "moat-2"
    link.symlink_to(final)
    with pytest.raises(BuildFailed, match="in the way"):
        _may_replace(link)


def test_the_new_bundle_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    final, new = tmp_path / "moat-1", tmp_path / ".new"
    for folder, text in ((final, "old"), (new, "new")):
        folder.mkdir()
        (folder / "manifest.json").write_text(text, "utf-8")
    replace_folder(new, final)
    assert (final / "manifest.json").read_text("utf-8") == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["moat-1"]


def test_a_failed_thing_leaves_nothing_and_a_made_one_is_made_once(tmp_path: Path) -> None:
    cache, console = Cache(tmp_path), Console(quiet=True)
    calls: list[Path] = []

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x", "utf-8")
        raise BuildFailed("no")

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "whole").write_text("x", "utf-8")

    key = key_of("thing", ["input"])
    with pytest.raises(BuildFailed):
        made(cache, key, "thing", console, fail)
    assert list((tmp_path / "built").iterdir()) == []
    for _ in range(2):
        assert (made(cache, key, "thing", console, make) / "whole").is_file()
    assert len(calls) == 1


def test_debris_of_killed_builds_is_removed_and_running_ones_are_not(tmp_path: Path) -> None:
    old, young = tmp_path / "built/a.tmp.1", tmp_path / "built/b.tmp.2"
    whole = tmp_path / "built/a"
    for folder in (old, young, whole):
        folder.mkdir(parents=True)
        os.utime(folder, (1_000_000, 1_000_000))
    os.utime(young, (1_999_000, 1_999_000))
    sweep(Cache(tmp_path), now=2_000_000)
    assert sorted(p.name for p in (tmp_path / "built").iterdir()) == ["a", "b.tmp.2"]


def test_keys_follow_content_names_and_executable_bits(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1", "utf-8")
    first = tree_hash(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.pyc").write_text("x", "utf-8")
    assert tree_hash(tmp_path) == first
    (tmp_path / "a.py").chmod(0o755)
    assert tree_hash(tmp_path) != first
    assert key_of("x", {"a": 1, "b": 2}) == key_of("x", {"b": 2, "a": 1})
    assert key_of("x", 1) != key_of("x", 2)
