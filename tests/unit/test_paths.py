# SPDX-License-Identifier: Apache-2.0
"""Proves which paths a bundle may hold: what passes is one file on every file system and stays below its folder."""

from __future__ import annotations

import os
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moat.errors import UnsafePath
from moat.paths import check_path, check_paths, fold

GOOD = [
    "README.txt",
    "moat.pyz",
    "wheels/litellm-1.106.2-py3-none-any.whl",
    "debs/libc6_2.41-12+deb13u1_amd64.deb",
    "debs/x_1.0~rc1-1%3a2.deb",
    "models/smol/model-00001-of-00002.gguf",
    "docs/größe.md",
    "a/" * 100 + "b",
    "x" * 255,
]
BAD = [
    "",
    "/",
    "/etc/passwd",
    "//host/share",
    "..",
    "../x",
    "a/..",
    "a/../b",
    ".",
    "./a",
    "a/./b",
    "a//b",
    "a/",
    "a\\b",
    "\\\\host\\share",
    "C:",
    "C:/x",
    "c:x",
    "a\0b",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x1b[2J",
    "a\x7f",
    "a\x9b",
    "a\u202eb",
    "a\u200bb",
    "a\ufeff",
    "e\u0301",
    "a.",
    "a ",
    " a",
    "a./b",
    "a /b",
    "a/ b",
    "con",
    "NUL",
    "aux.txt",
    "COM1",
    "lpt9.log",
    "a<b",
    "a>b",
    'a"b',
    "a|b",
    "a?b",
    "a*b",
    "x" * 256,
    "ä" * 128,
    "a/" * 600 + "b",
    "\ud800",
]


@pytest.mark.parametrize("path", GOOD)
def test_ordinary_paths_pass(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize("path", BAD, ids=ascii)
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(UnsafePath) as caught:
        check_path(path)
    assert caught.value.hint


@settings(max_examples=500)
@given(st.text(max_size=40) | st.text(alphabet="./\\aA: \0\n", max_size=12))
def test_what_passes_stays_below_its_folder(path: str) -> None:
    try:
        check_path(path)
    except UnsafePath:
        return
    assert os.path.normpath(path) == path
    assert not os.path.isabs(path)  # noqa: PTH117 (text, not a file)
    assert ".." not in path.split("/")
    assert path.isprintable()
    assert unicodedata.normalize("NFC", path) == path


@pytest.mark.parametrize(
    "pair",
    [
        ("a", "A"),
        ("wheels/a", "Wheels/a"),
        ("wheels/a", "WHEELS/b"),
        ("straße", "strasse"),
        ("ﬁle", "file"),
        ("K", "\u212a"),
        ("µ", "μ"),
        ("ſ", "s"),
        ("a", "a/b"),
        ("a", "A/b"),
        ("a/b", "a/b/c"),
        ("é", "É"),
        ("x", "x"),
    ],
    ids=ascii,
)
def test_twins_are_refused_in_either_order(pair: tuple[str, str]) -> None:
    for paths in (pair, pair[::-1]):
        with pytest.raises(UnsafePath):
            check_paths(paths)


def test_paths_that_differ_pass() -> None:
    check_paths(["a", "b", "c/a", "c/b", "d/a", "ab"], reserved=["manifest.json"])


@pytest.mark.parametrize("path", ["manifest.json", "MANIFEST.json", "manifest.json/x"])
def test_reserved_names_are_refused(path: str) -> None:
    with pytest.raises(UnsafePath):
        check_paths([path], reserved=["manifest.json"])


@given(st.text(max_size=20))
def test_the_fold_is_stable_under_case_and_form(text: str) -> None:
    assert fold(unicodedata.normalize("NFD", text)) == fold(text)
    assert fold(text.casefold()) == fold(text)
