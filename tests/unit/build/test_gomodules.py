# SPDX-License-Identifier: Apache-2.0
"""Go's ``h1:`` sums and path escapes, against values that Go itself published, and files that were altered."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat.build import gomodules
from moat.build.locks import LockedFile
from moat.errors import HashMismatch, LockFailed

#: go.mod of github.com/pkg/errors v0.9.1 does not exist; Go synthesises this one, and every go.sum that names the
#: module carries the sum below.
GO_MOD = b"module github.com/pkg/errors\n"
GO_MOD_SUM = "h1:bwawxfHBFNV+L2hUp1rHADufV3IMtnDRdf1r5NINEl0="


def entry(kind: str) -> LockedFile:
    return LockedFile(kind, "github.com/pkg/errors", "v0.9.1", "errors@v0.9.1.x", "0" * 64, 1, "MIT", "goproxy:x")


def module(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(f"github.com/pkg/errors@v0.9.1/{name}", content)
    return path


def test_the_sum_of_a_mod_file_is_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "errors.mod"
    path.write_bytes(GO_MOD)
    assert gomodules.h1_mod(path) == GO_MOD_SUM
    sums = gomodules.read_go_sum(f"github.com/pkg/errors v0.9.1/go.mod {GO_MOD_SUM}\n")
    gomodules.check_sum(entry("go-mod"), path, sums)
    path.write_bytes(GO_MOD + b"// altered\n")
    with pytest.raises(HashMismatch):
        gomodules.check_sum(entry("go-mod"), path, sums)


def test_an_archives_sum_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    first = module(tmp_path / "1.zip", a=b"1", b=b"2")
    stored = tmp_path / "2.zip"
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as z:  # other order, other compression
        z.writestr("github.com/pkg/errors@v0.9.1/b", b"2")
        z.writestr("github.com/pkg/errors@v0.9.1/a", b"1")
    expected = gomodules.h1_zip(first)
    assert gomodules.h1_zip(stored) == expected
    assert gomodules.h1_zip(module(tmp_path / "3.zip", a=b"1", b=b"3")) != expected
    assert gomodules.h1_zip(module(tmp_path / "4.zip", a=b"1", c=b"2")) != expected
    sums = {("github.com/pkg/errors", "v0.9.1"): expected}
    gomodules.check_sum(entry("go-module"), stored, sums)
    with pytest.raises(HashMismatch):
        gomodules.check_sum(entry("go-module"), module(tmp_path / "5.zip", a=b"x", b=b"2"), sums)


def test_a_module_that_go_sum_does_not_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LockFailed, match=r"go\.sum of the program does not name"):
        gomodules.check_sum(entry("go-module"), module(tmp_path / "1.zip", a=b"1"), {})


@pytest.mark.parametrize("text", ["a b", "a v1 sha256:x", "a v1 h1:x=\na v1 h1:y="])
def test_a_malformed_go_sum_is_refused(text: str) -> None:
    with pytest.raises(LockFailed):
        gomodules.read_go_sum(text)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="!")))
def test_escaping_is_reversible_and_leaves_no_upper_case(path: str) -> None:
    escaped = gomodules.escape(path)
    assert escaped == escaped.lower()
    assert gomodules.unescape(escaped) == path


def test_escapes_as_proxies_spell_them() -> None:
    assert gomodules.escape("github.com/Azure/azure-sdk") == "github.com/!azure/azure-sdk"


@pytest.mark.parametrize("member", ["../x", "m@v1/../../x", "m@v1//etc/x", "other@v1/x", "/m@v1/x"])
def test_an_archive_that_escapes_is_not_unpacked(tmp_path: Path, member: str) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("m@v1/fine", b"1")
        z.writestr(member, b"2")
    archive = tmp_path / "m.zip"
    archive.write_bytes(out.getvalue())
    with pytest.raises(LockFailed, match="unsafe path"):
        gomodules.unzip(archive, "m@v1/", tmp_path / "deep" / "out")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"m.zip", "fine"}


def test_a_licence_is_read_from_the_top_of_the_module_alone(tmp_path: Path) -> None:
    mit = b"Permission is hereby granted, free of charge, to any person obtaining a copy"
    path = module(
        tmp_path / "m.zip", LICENSE=mit, **{"vendor/x/LICENSE": b"GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007"}
    )
    assert gomodules.module_license(path) == "MIT"
    assert gomodules.module_license(module(tmp_path / "n.zip", README=b"x")) == "NOASSERTION"
