# SPDX-License-Identifier: Apache-2.0
"""Proves the shape of image archives: both descriptions point at the same blobs, and the ID is the config's digest."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from moat.build.layers import Node, Tree, write_layer
from moat.build.oci import Archive, ImageConfig, write_archive

EPOCH = 1_700_000_000
CONFIG = ImageConfig(
    architecture="amd64",
    created=EPOCH,
    user="10101:10101",
    entrypoint=("/usr/bin/x",),
    command=("serve",),
    workdir="/",
    env=(("PATH", "/usr/bin"),),
    ports=(8080,),
    stop_signal="SIGTERM",
    labels=(("org.opencontainers.image.title", "moat/x"),),
)


def make(folder: Path) -> Archive:
    layers = []
    for name in ("base", "code"):
        tree = Tree()
        tree.add(Node(f"opt/{name}", 0o644, "code", data=name.encode()))
        layers.append(write_layer(name, tree, folder / name, source_date_epoch=EPOCH))
    return write_archive(folder / "x.tar", name="x", version="0.1.0", config=CONFIG, layers=layers)


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Archive, dict[str, bytes]]:
    made = make(tmp_path)
    with tarfile.open(made.path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    return made, members


def test_every_blob_is_named_by_its_hash_and_reached_from_both_sides(archive: tuple[Archive, dict[str, bytes]]) -> None:
    made, members = archive
    blobs = {n: b for n, b in members.items() if n.startswith("blobs/")}
    assert all(n == "blobs/sha256/" + hashlib.sha256(b).hexdigest() for n, b in blobs.items())
    index = json.loads(members["index.json"])
    descriptor = index["manifests"][0]
    manifest = json.loads(members["blobs/" + descriptor["digest"].replace(":", "/")])
    docker: list[dict[str, Any]] = json.loads(members["manifest.json"])
    assert docker[0]["RepoTags"] == [made.reference]
    assert docker[0]["Config"] == "blobs/" + manifest["config"]["digest"].replace(":", "/")
    assert docker[0]["Layers"] == ["blobs/" + x["digest"].replace(":", "/") for x in manifest["layers"]]
    reached = {docker[0]["Config"], *docker[0]["Layers"], "blobs/" + descriptor["digest"].replace(":", "/")}
    assert reached == set(blobs)
    assert [x["size"] for x in manifest["layers"]] == [len(blobs[n]) for n in docker[0]["Layers"]]


def test_the_id_is_the_config_digest_and_is_in_the_reference(archive: tuple[Archive, dict[str, bytes]]) -> None:
    made, members = archive
    hexid = made.image_id.removeprefix("sha256:")
    config = json.loads(members[f"blobs/sha256/{hexid}"])
    assert made.reference == f"moat/x:0.1.0-{hexid[:12]}"
    assert config["config"]["User"] == "10101:10101"
    assert config["created"] == "2023-11-14T22:13:20Z"
    assert len(config["rootfs"]["diff_ids"]) == len(config["history"]) == 2


def test_two_archives_are_identical(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert make(tmp_path / "a").path.read_bytes() == make(tmp_path / "b").path.read_bytes()
