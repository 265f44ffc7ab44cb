# SPDX-License-Identifier: Apache-2.0
"""Proves that the same locks give the same bundle, byte for byte.

The second build starts from an empty cache of built things, in another folder, with another umask, time zone, locale
and home. Shared are the downloads, MinIO's program, whose second compilation takes minutes, and what this test has
built twice and found the same on this machine before (its name holds the hash of all that it is made of). With
``MOAT_LONG_TESTS=1`` only the downloads are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.build.building import Built, copy_checkout, moat_build

from moat.build.cache import Cache

FULL = "MOAT_LONG_TESTS" in os.environ


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def is_proven(proof: Path, made: Path) -> bool:
    """Whether this is, byte for byte, what was built twice: another build of the same name is none of it."""
    return proof.exists() and proof.read_text("utf-8") == json.dumps(digests(made))


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest would keep gigabytes of the last three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_two_builds_are_identical(space: Path, cache: Cache, built: Built) -> None:
    first, other = built.bundle, copy_checkout(built.checkout, space / "a-longer-name" / "two")
    fresh = space / "cache"
    (fresh / "built").mkdir(parents=True)
    (fresh / "files").symlink_to(cache.root / "files")
    if (cache.root / "locks").exists():
        (fresh / "locks").symlink_to(cache.root / "locks")
    proven = cache.root / "built-twice"
    proven.mkdir(exist_ok=True)
    ours = [p for p in (cache.root / "built").iterdir() if ".tmp." not in p.name]
    for made in ours:
        if not FULL and (made.name.startswith("program-minio-") or is_proven(proven / made.name, made)):
            (fresh / "built" / made.name).symlink_to(made)
    (space / "out-two").mkdir()
    (space / "home").mkdir()
    env = {"MOAT_CACHE": str(fresh), "TZ": "Asia/Kolkata", "LC_ALL": "C", "HOME": str(space / "home")}
    old = os.umask(0o077)
    try:
        second = moat_build(space / "out-two", checkout=other, env=env)
    finally:
        os.umask(old)

    anew = [p.name for p in (fresh / "built").iterdir() if not p.is_symlink()]
    known = [p.name for p in (fresh / "built").iterdir()]
    assert any(n.startswith("layer-gateway-wheels-") for n in known), "the second build took layers from the first"
    a, b = digests(first), digests(second)
    assert sorted(a) == sorted(b)
    assert [p for p in a if a[p] != b[p]] == []
    assert len(a) > 100
    # One file with two names in one place could change behind the manifest's back.
    assert {p.stat().st_nlink for p in second.rglob("*") if p.is_file()} == {1}
    assert not [p for p in second.rglob("*") if p.is_symlink()]
    for name in anew:
        (proven / name).write_text(json.dumps(digests(fresh / "built" / name)), "utf-8")


def test_a_changed_line_of_the_gateway_changes_one_small_layer(space: Path, built: Built) -> None:
    checkout = copy_checkout(built.checkout, space / "checkout")
    (space / "out").mkdir()
    old = blobs(built.bundle)
    manifest = json.loads((built.bundle / "manifest.json").read_text("utf-8"))
    references = {i["name"]: i["id"] for i in manifest["images"]}
    source = checkout / "images/gateway/moat_gateway/__init__.py"
    source.write_text(source.read_text("utf-8") + "\n#: A change.\nCHANGED = True\n", "utf-8")
    after = moat_build(space / "out", checkout=checkout)
    new = {d: size for d, size in blobs(after).items() if d not in old}
    changed = {
        i["name"]
        for i in json.loads((after / "manifest.json").read_text("utf-8"))["images"]
        if references[i["name"]] != i["id"]
    }
    assert changed == {"gateway"}
    # The code's layer, the image's configuration and its manifest.
    assert len(new) == 3
    # A site that takes the next release over a slow line or a small stick is told: under one hundredth of all images.
    assert sum(new.values()) * 100 < sum(old.values()), (new, sum(old.values()))


def blobs(bundle: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for archive in sorted((bundle / "images").glob("*.tar")):
        with tarfile.open(archive) as tar:
            found.update({m.name: m.size for m in tar if m.name.startswith("blobs/") and m.isfile()})
    return found
