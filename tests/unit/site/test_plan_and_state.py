# SPDX-License-Identifier: Apache-2.0
"""Proves what ``moat plan`` says, what is recorded, and that an archive which changes is never fed whole."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.site.bundles import SMALL, entry, image, manifest_of

from moat.errors import ChangedFile, LoadFailed, MissingFile, Unreadable, UnsafePath
from moat.site import scan
from moat.site.engine import Container
from moat.site.load import checked_blocks
from moat.site.plan import deployment_changes, make_plan
from moat.site.state import read_installed, read_installed_manifest, write_atomically, write_installed
from moat.site.trust import Installed

OLD = manifest_of(SMALL)
NEW_FILES = {**SMALL, "images/gateway.tar": b"another gateway", "docs/new.md": b"new"}
del NEW_FILES["empty.txt"]
GATEWAY = replace(image("gateway", "images/gateway.tar"), reference="moat/gateway:0.2.0-x", id="sha256:" + "1" * 64)
NEW = manifest_of(NEW_FILES, version="0.2.0", images=[GATEWAY, image("nginx", "images/nginx.tar")])
IDS = {i.reference: i.id for i in OLD.images}
RUNNING = [
    Container(OLD.images[0].reference, "moat", "gateway-1", ()),
    Container(OLD.images[0].reference, "moat", "gateway-2", ()),
    Container(OLD.images[1].reference, "moat", "nginx", (8443,)),
    Container("other:1", "shop", "web", ()),
]


def test_an_upgrade_names_what_is_added_changed_and_removed() -> None:
    plan = make_plan(NEW, OLD, IDS, RUNNING, [])
    assert plan.load == ("moat/gateway:0.2.0-x",)
    assert plan.present == (OLD.images[1].reference,)
    assert plan.unused == (OLD.images[0].reference,)
    assert plan.load_bytes == len(b"another gateway")
    assert plan.restart == ("gateway-1", "gateway-2")
    assert plan.keep == ("nginx",)
    assert {c.action for c in plan.changes} == {"add", "remove"}
    assert sum(c.size for c in plan.changes) == len(b"another gateway") + len(b"new"), "new bytes only"


def test_the_same_release_changes_nothing() -> None:
    plan = make_plan(OLD, OLD, IDS, RUNNING, [])
    assert (plan.load, plan.changes, plan.restart, plan.unused) == ((), (), (), ())
    assert plan.keep == ("gateway-1", "gateway-2", "nginx")


def test_a_first_installation_adds_everything() -> None:
    plan = make_plan(OLD, None, {}, [], [])
    assert len(plan.load) == 2
    assert {c.action for c in plan.changes} == {"add"}
    assert sum(c.size for c in plan.changes) == sum(len(c) for c in SMALL.values())


def test_a_component_with_another_version_is_a_change() -> None:
    before = replace(OLD, files=tuple(replace(f, component="same", kind="wheels") for f in OLD.files[:1]))
    after = replace(OLD, files=(replace(entry("x", b"y"), component="same", kind="wheels", version="2.0"),), images=())
    (change,) = make_plan(after, before, {}, [], []).changes
    assert (change.action, change.before, change.after) == ("change", "1.0", "2.0")


def test_a_taken_reference_stops_the_plan() -> None:
    with pytest.raises(LoadFailed):
        make_plan(OLD, None, {OLD.images[0].reference: "sha256:" + "9" * 64}, [], [])


def test_the_deployment_folder_is_compared_by_content(tmp_path: Path) -> None:
    assert deployment_changes(OLD, tmp_path) == [("add", str(tmp_path / "nginx/nginx.conf"))]
    (tmp_path / "nginx").mkdir()
    (tmp_path / "nginx/nginx.conf").write_bytes(b"edited")
    assert deployment_changes(OLD, tmp_path) == [("change", str(tmp_path / "nginx/nginx.conf"))]
    (tmp_path / "nginx/nginx.conf").write_bytes(SMALL["compose/nginx/nginx.conf"])
    assert deployment_changes(OLD, tmp_path) == []


def test_files_that_prepare_does_not_copy_are_not_foretold(tmp_path: Path) -> None:
    paths = {"compose/config/site.yaml": b"a", "compose/nginx/site.conf": b"b", "compose/nginx/maps.conf": b"c"}
    assert deployment_changes(manifest_of(paths), tmp_path) == [("add", str(tmp_path / "nginx/maps.conf"))]


# --- the record ---

INSTALLED = Installed("0.1.0", "site", "debian13-amd64", "0" * 64, 1)


def test_the_record_round_trips(tmp_path: Path) -> None:
    assert read_installed(tmp_path) is None
    assert read_installed_manifest(tmp_path) is None
    write_installed(tmp_path / "new", INSTALLED, OLD.to_bytes())
    assert read_installed(tmp_path / "new") == INSTALLED
    assert read_installed_manifest(tmp_path / "new") == OLD


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"version": "0.1.0"}'],
)
def test_a_damaged_record_is_an_error_and_never_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "installed.json").write_bytes(content)
    with pytest.raises(Unreadable):
        read_installed(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("version", "x"), ("version", 1), ("created", "1"), ("created", True)])
def test_each_field_of_the_record_is_checked(tmp_path: Path, field: str, value: object) -> None:
    write_installed(tmp_path, INSTALLED, b"")
    raw = json.loads((tmp_path / "installed.json").read_bytes())
    (tmp_path / "installed.json").write_text(json.dumps({**raw, field: value}))
    with pytest.raises(Unreadable):
        read_installed(tmp_path)
    with pytest.raises(Unreadable):
        read_installed_manifest(tmp_path)


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "f"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, "not bytes")  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


# --- the second reading of an archive ---

CONTENT = os.urandom(2 * scan.CHUNK_BYTES + 5)
WANTED = entry("images/x.tar", CONTENT)


def blocks(root: Path) -> tuple[int, Exception | None]:
    """Read the archive as ``load`` does; return how many bytes the engine would have got, and how it ended."""
    fed = 0
    with scan.open_root(root) as fd:
        try:
            for block in checked_blocks(fd, WANTED, lambda n: None):
                fed += len(block)
        except (ChangedFile, UnsafePath, Unreadable, MissingFile) as e:
            return fed, e
    return fed, None


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.tar").write_bytes(CONTENT)
    return tmp_path / "images/x.tar"


def test_an_unchanged_archive_is_fed_whole(archive: Path, tmp_path: Path) -> None:
    assert blocks(tmp_path) == (len(CONTENT), None)


@pytest.mark.parametrize(
    "changed",
    [
        b"",
        CONTENT[:-1],
        CONTENT + b"x",
        b"x" + CONTENT[1:],
        CONTENT[:-1] + b"\0\0",
        CONTENT[: scan.CHUNK_BYTES],
        CONTENT * 3,
    ],
    ids=["empty", "short", "long", "first", "last", "half", "three times"],
)
def test_a_changed_archive_never_reaches_the_engine_whole(archive: Path, tmp_path: Path, changed: bytes) -> None:
    archive.write_bytes(changed)
    fed, error = blocks(tmp_path)
    assert isinstance(error, ChangedFile)
    assert fed < len(CONTENT)


def test_an_archive_that_became_something_else_is_refused(archive: Path, tmp_path: Path) -> None:
    archive.rename(tmp_path / "moved")
    assert isinstance(blocks(tmp_path)[1], MissingFile)
    archive.symlink_to(tmp_path / "moved")
    assert isinstance(blocks(tmp_path)[1], UnsafePath)
