# SPDX-License-Identifier: Apache-2.0
"""The lock format: canonical and sorted; damage is refused; a local Debian lock counts for a demo only, and only while
the reviewed lock is the one it was made from. Images are of one release for every target, hosts of the target's own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat.build.locks import (
    TARGETS,
    LockedFile,
    active_locks,
    debs_lock_name,
    local_debs_dir,
    read_lock,
    write_index,
    write_lock,
)
from moat.errors import LockFailed

TARGET = TARGETS["debian13-amd64"]
OTHER = TARGETS["debian12-amd64"]


def deb(name: str, version: str, *uses: str, suite: str = "trixie") -> LockedFile:
    sha256 = hashlib.sha256(f"{name}{version}".encode()).hexdigest()
    source = f"debian:{suite}/main/pool/main/{name[0]}/{name}/{name}_{version}_amd64.deb"
    return LockedFile("deb", name, version, f"{name}_{version}_amd64.deb", sha256, 10, "MIT", source, uses)


def wheel(name: str, *pythons: str, uses: tuple[str, ...] = ("image:gateway",)) -> LockedFile:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return LockedFile("wheel", name, "1", f"{name}-1.whl", sha256, 5, "MIT", f"pypi:{name}", uses, "", pythons)


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    folder = tmp_path / "locks"
    write_lock(
        folder / debs_lock_name(TARGET),
        [deb("nginx", "1", "host"), deb("libgomp1", "1", "image:model", "profile:demo")],
    )
    write_lock(
        folder / debs_lock_name(OTHER), [deb("nginx", "0.9", "host", suite="bookworm"), deb("libgomp1", "1", "host")]
    )
    write_lock(folder / "wheels.jsonl", [wheel("both", "3.11", "3.13"), wheel("old", "3.11")])
    write_lock(folder / "go-minio.jsonl", [])
    write_lock(folder / "files.jsonl", [])
    write_index(folder, 1_700_000_000)
    return folder


_text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(
    st.lists(
        st.builds(LockedFile, _text, _text, _text, _text, _text, st.integers(0, 2**60), _text, _text, st.tuples(_text))
    )
)
def test_what_is_written_is_read_back_sorted(
    tmp_path_factory: pytest.TempPathFactory, entries: list[LockedFile]
) -> None:
    path = tmp_path_factory.mktemp("lock") / "x.jsonl"
    write_lock(path, entries)
    assert read_lock(path) == sorted(entries)


def _line(path: Path, number: int) -> dict[str, object]:
    value: dict[str, object] = json.loads(path.read_text("utf-8").splitlines()[number])
    return value


@pytest.mark.parametrize("damage", ["reorder", "extra field", "missing field", "no json"])
def test_a_damaged_lock_is_refused(locks: Path, damage: str) -> None:
    path = locks / debs_lock_name(TARGET)
    lines = path.read_text("utf-8").splitlines()
    if damage == "reorder":
        lines.reverse()
    elif damage == "extra field":
        lines[0] = json.dumps({**_line(path, 0), "url": "x"})
    elif damage == "missing field":
        lines[0] = json.dumps({k: v for k, v in _line(path, 0).items() if k != "sha256"})
    else:
        lines[0] = "{"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(LockFailed):
        read_lock(path)


def test_a_profile_and_a_target_choose_the_entries(locks: Path, tmp_path: Path) -> None:
    demo = active_locks("demo", TARGET.name, directory=locks, cache_root=tmp_path)
    site = active_locks("site", TARGET.name, directory=locks, cache_root=tmp_path)
    assert {e.name for e in demo.debs} == {"nginx", "libgomp1"}
    assert {e.name for e in site.debs} == {"nginx"}
    assert {e.name for e in demo.wheels} == {"both"}  # the other one is for Python 3.11
    assert demo.used_by("host") == site.used_by("host")
    assert demo.locked_at == 1_700_000_000


@pytest.mark.parametrize(
    ("profile", "target"), [("demo", "debian12-arm64"), ("demo", "plan9"), ("live", "debian13-amd64")]
)
def test_what_cannot_be_built_is_said(locks: Path, tmp_path: Path, profile: str, target: str) -> None:
    with pytest.raises(LockFailed) as refused:
        active_locks(profile, target, directory=locks, cache_root=tmp_path)
    assert target in refused.value.message or profile in refused.value.message


def test_another_target_takes_hosts_from_its_own_lock_and_images_from_the_images(locks: Path, tmp_path: Path) -> None:
    """A package that its hosts and an image of the demo both take is no longer the demo's alone."""
    demo = active_locks("demo", OTHER.name, directory=locks, cache_root=tmp_path)
    site = active_locks("site", OTHER.name, directory=locks, cache_root=tmp_path)
    assert [(e.name, e.version, e.uses) for e in demo.debs] == [
        ("libgomp1", "1", ("host", "image:model")),
        ("nginx", "0.9", ("host",)),
    ]
    assert site.debs == demo.debs
    assert {e.name for e in demo.wheels} == {"both", "old"}, "wheels of both Pythons: the host's and the images'"
    write_lock(locks / debs_lock_name(OTHER), [deb("nginx", "0.9", "host", suite="bookworm")])
    demo = active_locks("demo", OTHER.name, directory=locks, cache_root=tmp_path)
    assert {e.name: e.uses for e in demo.debs}["libgomp1"] == ("image:model", "profile:demo")
    site = active_locks("site", OTHER.name, directory=locks, cache_root=tmp_path)
    assert {e.name for e in site.debs} == {"nginx"}


def test_a_local_lock_of_the_images_release_counts_for_a_demo_of_another_target(locks: Path, tmp_path: Path) -> None:
    name = debs_lock_name(TARGET)
    folder = local_debs_dir(tmp_path, TARGET)
    write_lock(folder / name, [deb("libssl", "3", "image:nginx")])
    write_index(folder, 1_800_000_000, replaces=hashlib.sha256((locks / name).read_bytes()).hexdigest())
    demo = active_locks("demo", OTHER.name, directory=locks, cache_root=tmp_path)
    assert {e.name for e in demo.debs} == {"libgomp1", "libssl", "nginx"}
    assert (demo.local_debs, demo.locked_at) == (True, 1_800_000_000)
    site = active_locks("site", OTHER.name, directory=locks, cache_root=tmp_path)
    assert (site.local_debs, site.locked_at) == (False, 1_700_000_000)


def _overlay(locks: Path, cache: Path) -> None:
    name = debs_lock_name(TARGET)
    folder = local_debs_dir(cache, TARGET)
    write_lock(folder / name, [deb("nginx", "2", "host")])
    write_index(folder, 1_800_000_000, replaces=hashlib.sha256((locks / name).read_bytes()).hexdigest())


def test_the_local_debian_lock_counts_for_a_demo_and_never_for_a_site(locks: Path, tmp_path: Path) -> None:
    _overlay(locks, tmp_path)
    demo = active_locks("demo", TARGET.name, directory=locks, cache_root=tmp_path)
    assert [e.version for e in demo.debs] == ["2"]
    assert (demo.local_debs, demo.locked_at) == (True, 1_800_000_000)
    site = active_locks("site", TARGET.name, directory=locks, cache_root=tmp_path)
    assert [e.version for e in site.debs] == ["1"]
    assert (site.local_debs, site.locked_at) == (False, 1_700_000_000)


def test_a_newer_reviewed_lock_wins_over_the_local_one(locks: Path, tmp_path: Path) -> None:
    _overlay(locks, tmp_path)
    path = locks / debs_lock_name(TARGET)
    write_lock(path, [replace(e, version="3") for e in read_lock(path)])
    demo = active_locks("demo", TARGET.name, directory=locks, cache_root=tmp_path)
    assert not demo.local_debs
    assert {e.version for e in demo.debs} == {"3"}
