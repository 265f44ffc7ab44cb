# SPDX-License-Identifier: Apache-2.0
"""Proves that the manifest's parser accepts exactly the canonical form and answers everything else with one error."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moat.errors import BadManifest, UnsafePath
from moat.manifest import MAX_BYTES, BundleInfo, FileEntry, ImageEntry, Manifest, parse_manifest, version_key

HASH = "0123456789abcdef" * 4
FILES = (
    FileEntry("images/nginx.tar", 10, HASH, "image", "nginx", "1.26.3-3+deb13u1", "BSD-2-Clause", "recipe:nginx"),
    FileEntry("moat.pyz", 0, HASH, "tool", "moat", "0.1.0", "Apache-2.0", "code"),
)
IMAGES = (ImageEntry("nginx", "moat/nginx:0.1.0-0123456789ab", "sha256:" + HASH, "images/nginx.tar", 2**33),)
MANIFEST = Manifest(BundleInfo("0.1.0", "site", "debian13-amd64", 1_760_000_000), FILES, IMAGES)


def document() -> dict[str, Any]:
    value = json.loads(MANIFEST.to_bytes())
    assert isinstance(value, dict)
    return value


def encode(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def test_the_canonical_form_round_trips() -> None:
    assert parse_manifest(MANIFEST.to_bytes()) == MANIFEST
    assert encode(document()) == MANIFEST.to_bytes()


def test_a_bundle_without_images_is_one() -> None:
    bare = Manifest(MANIFEST.bundle, FILES[1:], ())
    assert parse_manifest(bare.to_bytes()) == bare


def _changed(path: tuple[str | int, ...], value: object) -> bytes:
    """Return the canonical manifest with one value replaced; ``...`` removes it."""
    whole = document()
    place: Any = whole
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return encode(whole)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "moat-bundle/2"),
        (("format",), None),
        (("format",), ["moat-bundle/1"]),
        (("format",), ...),
        (("bundle",), []),
        (("files",), {}),
        (("images",), None),
        (("files",), ...),
        (("extra",), 1),
        (("bundle", "version"), "0.1"[:1]),
        (("bundle", "version"), "01.0.0"),
        (("bundle", "version"), "1.0.0\n"),
        (("bundle", "version"), "1.0.0+x"),
        (("bundle", "version"), "1.0.0.0.0"),
        (("bundle", "version"), 1),
        (("bundle", "profile"), "../x"),
        (("bundle", "profile"), ""),
        (("bundle", "target"), "a b"),
        (("bundle", "created"), -1),
        (("bundle", "created"), True),
        (("bundle", "created"), 1.5),
        (("bundle", "created"), "1"),
        (("bundle", "created"), 10**20),
        (("bundle", "name"), "x"),
        (("bundle", "created"), ...),
        (("files", 0, "size"), True),
        (("files", 0, "size"), -1),
        (("files", 0, "size"), 1.0),
        (("files", 0, "size"), None),
        (("files", 0, "size"), 2**60),
        (("files", 0, "sha256"), HASH.upper()),
        (("files", 0, "sha256"), HASH[:-1]),
        (("files", 0, "sha256"), HASH + "\n"),
        (("files", 0, "kind"), ""),
        (("files", 0, "kind"), "Image"),
        (("files", 0, "component"), "a\x1b[0m"),
        (("files", 0, "component"), "x" * 1025),
        (("files", 0, "license"), None),
        (("files", 0, "source"), {}),
        (("files", 0, "mode"), 0o777),
        (("files", 0, "version"), ...),
        (("files", 0), "x"),
        (("files", 0, "path"), 1),
        (("files", 0, "path"), None),
        (("images", 0, "id"), HASH),
        (("images", 0, "reference"), "-v:x"),
        (("images", 0, "reference"), "moat/nginx"),
        (("images", 0, "reference"), "a b:c"),
        (("images", 0, "name"), "--x"),
        (("images", 0, "archive"), "images/other.tar"),
        (("images", 0, "unpacked"), "1"),
        (("images", 0), []),
    ],
)
def test_each_field_is_checked(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(BadManifest):
        parse_manifest(_changed(path, value))


@pytest.mark.parametrize("value", ["/x", "../x", "a/../x", "x\0", "CON"])
def test_an_unsafe_path_is_named_as_such(value: str) -> None:
    with pytest.raises(UnsafePath):
        parse_manifest(_changed(("files", 0, "path"), value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b'"x"\n',
        MANIFEST.to_bytes()[:-1],
        MANIFEST.to_bytes() + b"\n",
        b" " + MANIFEST.to_bytes(),
        b"\xef\xbb\xbf" + MANIFEST.to_bytes(),
        MANIFEST.to_bytes().replace(b'"files"', b'"\\u0066iles"'),
        MANIFEST.to_bytes().replace(b":10,", b":1e1,"),
        MANIFEST.to_bytes().replace(b":10,", b":NaN,"),
        MANIFEST.to_bytes().replace(b":10,", b":Infinity,"),
        MANIFEST.to_bytes().replace(b":10,", b":-0,"),
        MANIFEST.to_bytes().replace(b":10,", b":" + b"9" * 5000 + b","),
        MANIFEST.to_bytes().replace(b'"size":10,', b'"size":10,"size":10,'),
        MANIFEST.to_bytes().replace(b"recipe:nginx", b"\\ud800"),
        MANIFEST.to_bytes().replace(b"recipe:nginx", b"\xff"),
        MANIFEST.to_bytes().decode().encode("utf-16"),
    ],
)
def test_every_other_spelling_is_refused(data: bytes) -> None:
    with pytest.raises(BadManifest):
        parse_manifest(data)


def test_the_order_of_files_is_part_of_the_form() -> None:
    whole = document()
    whole["files"].reverse()
    with pytest.raises(BadManifest):
        parse_manifest(encode(whole))
    whole["files"] = [whole["files"][0]] * 2
    with pytest.raises(BadManifest):
        parse_manifest(encode(whole))


@pytest.mark.parametrize("same", ["reference", "archive"])
def test_two_images_never_share_a_name_or_archive(same: str) -> None:
    whole = document()
    other = {**whole["images"][0], "name": "other", "reference": "moat/other:1", "archive": "moat.pyz"}
    other[same] = whole["images"][0][same]
    whole["images"].append(other)
    with pytest.raises(BadManifest):
        parse_manifest(encode(whole))


@pytest.mark.parametrize("data", [b"[" * 10**6, b'{"a":' * 10**6, b"[" * 10**6 + b"]" * 10**6])
def test_deep_nesting_is_refused_at_once(data: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(BadManifest, match="nested"):
        parse_manifest(data)
    assert time.monotonic() - started < 5


def test_a_manifest_above_the_limit_is_not_parsed() -> None:
    with pytest.raises(BadManifest, match="too large"):
        parse_manifest(b" " * (MAX_BYTES + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300)
@given(st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_refused_with_the_documented_error(data: bytes) -> None:
    with pytest.raises(BadManifest):
        parse_manifest(data)


@settings(max_examples=300)
@given(st.data())
def test_any_replaced_value_is_a_manifest_or_the_documented_error(data: st.DataObject) -> None:
    whole = document()
    part = data.draw(st.sampled_from(["format", "bundle", "files", "images"]))
    place = whole if part == "format" else whole[part] if part == "bundle" else whole[part][0]
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(JSON)
    try:
        encoded = encode(whole)
    except UnicodeEncodeError:
        return
    try:
        parsed = parse_manifest(encoded)
    except (BadManifest, UnsafePath):
        return
    assert parsed.to_bytes() == encoded


@settings(max_examples=300)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_one_replaced_byte_is_a_manifest_or_the_documented_error(offset: int, value: int) -> None:
    data = bytearray(MANIFEST.to_bytes())
    data[offset % len(data)] = value
    with contextlib.suppress(BadManifest, UnsafePath):
        assert parse_manifest(bytes(data)).to_bytes() == bytes(data)


def test_versions_are_ordered_by_number() -> None:
    ascending = [
        "0.1.0-dev",
        "0.1.0-rc.1",
        "0.1.0-rc.2",
        "0.1.0-rc.10",
        "0.1.0",
        "0.1.1",
        "0.2.0",
        "0.9.1",
        "0.10.0",
        "1.0",
    ]
    assert sorted(set(ascending), key=version_key) == ascending
    assert version_key("1.0") == version_key("1.0.0")
    for wrong in ("", "1", "v1.0.0", "1.0.0 ", "1..0"):
        with pytest.raises(ValueError, match="not a version"):
            version_key(wrong)
