# SPDX-License-Identifier: Apache-2.0
"""Proves that a wheel is unpacked by its RECORD alone, and which wheels a target takes."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

import pytest

from moat.build.layers import Tree
from moat.build.locks import TARGETS, LockedFile
from moat.build.pywheels import select, unpack, wheel_files
from moat.errors import BuildFailed

TARGET = TARGETS["debian13-amd64"]


def record(files: dict[str, bytes]) -> str:
    rows = [
        f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(b).digest()).rstrip(b'=').decode()},{len(b)}"
        for n, b in files.items()
    ]
    return "\n".join([*rows, "x-1.dist-info/RECORD,,"]) + "\n"


def wheel(path: Path, files: dict[str, bytes], *, listed: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
        z.writestr("x-1.dist-info/RECORD", record(files if listed is None else listed))
    return path


FILES = {"x/__init__.py": b"A = 1\n", "x-1.dist-info/METADATA": b"Name: x\n", "x-1.data/purelib/y.py": b"B = 1\n"}


def test_files_go_where_the_wheel_says(tmp_path: Path) -> None:
    tree = Tree()
    unpack(wheel(tmp_path / "x.whl", FILES), "x-1", tmp_path / "site", "opt/site", tree)
    paths = [n.path for n in tree if not n.is_directory]
    assert paths == [
        "opt/site/x-1.dist-info/METADATA",
        "opt/site/x-1.dist-info/RECORD",
        "opt/site/x/__init__.py",
        "opt/site/y.py",
    ]
    assert (tmp_path / "site" / "y.py").read_bytes() == b"B = 1\n"


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "x.whl", {**FILES, "x/__init__.py": b"A = 2\n"}, listed=FILES)
    with pytest.raises(BuildFailed, match="not what its RECORD says"):
        unpack(path, "x-1", tmp_path / "site", "opt/site", Tree())


def test_an_unlisted_file_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "x.whl", {**FILES, "evil.pth": b"import os\n"}, listed=FILES)
    with pytest.raises(BuildFailed, match="RECORD does not list"):
        wheel_files(path, "x-1")


@pytest.mark.parametrize("name", ["../x.py", "/x.py", "a/../../x.py"])
def test_a_path_that_climbs_is_refused(tmp_path: Path, name: str) -> None:
    path = wheel(tmp_path / "x.whl", {**FILES, name: b""})
    with pytest.raises(BuildFailed):
        wheel_files(path, "x-1")


def test_what_goes_outside_site_packages_must_be_dropped_by_name(tmp_path: Path) -> None:
    path = wheel(tmp_path / "x.whl", {**FILES, "x-1.data/scripts/tool": b"#!python\n"})
    with pytest.raises(BuildFailed, match="outside site-packages"):
        unpack(path, "x-1", tmp_path / "a", "opt/site", Tree())
    used = unpack(path, "x-1", tmp_path / "b", "opt/site", Tree(), dropped=["*.data/scripts", "*.data/headers"])
    assert used == {"*.data/scripts"}


def test_two_wheels_with_different_files_of_one_name_are_refused(tmp_path: Path) -> None:
    first = wheel(tmp_path / "a.whl", {"shared.py": b"1\n", **FILES})
    tree = Tree()
    unpack(first, "a-1", tmp_path / "site", "opt/site", tree)
    second = wheel(tmp_path / "b.whl", {"shared.py": b"2\n"})
    with pytest.raises(BuildFailed, match="two wheels"):
        unpack(second, "b-1", tmp_path / "site", "opt/site", tree)


def locked(filename: str, marker: str = "") -> LockedFile:
    name, version = filename.split("-")[:2]
    return LockedFile("wheel", name, version, filename, "0" * 64, 1, "MIT", f"pypi:{name}", marker=marker)


def test_the_best_wheel_of_each_package_is_taken() -> None:
    entries = [
        locked("a-1-py3-none-any.whl"),
        locked("a-1-cp313-cp313-manylinux_2_28_x86_64.whl"),
        locked("a-1-cp311-cp311-manylinux_2_28_x86_64.whl"),
        locked("b-1-py3-none-any.whl", "python_full_version < '3.12'"),
        locked("c-1-cp310-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", "sys_platform == 'linux'"),
    ]
    assert [e.filename for e in select(entries, TARGET)] == [
        "a-1-cp313-cp313-manylinux_2_28_x86_64.whl",
        "c-1-cp310-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    ]


@pytest.mark.parametrize(
    "filename",
    [
        "a-1-cp313-cp313-manylinux_2_42_x86_64.whl",  # a newer C library than the target's
        "a-1-cp313-cp313-musllinux_1_2_x86_64.whl",
        "a-1-cp313-cp313-manylinux_2_28_aarch64.whl",
        "a-1-cp311-cp311-manylinux_2_28_x86_64.whl",
        "a-1-cp313-cp313t-manylinux_2_28_x86_64.whl",
    ],
)
def test_a_package_without_a_wheel_for_the_target_stops_the_build(filename: str) -> None:
    with pytest.raises(BuildFailed, match="no wheel for debian13-amd64"):
        select([locked(filename)], TARGET)


def test_two_versions_of_one_package_stop_the_build() -> None:
    with pytest.raises(BuildFailed, match="two versions"):
        select([locked("a-1-py3-none-any.whl"), locked("a-2-py3-none-any.whl")], TARGET)
