# SPDX-License-Identifier: Apache-2.0
"""The cache: a name in ``files/`` is proof of the content; what is absent is said with what to do."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from moat.build.cache import Cache, cache_root
from moat.build.lockdiff import changes, render
from moat.build.locks import LockedFile
from moat.errors import FetchFailed, HashMismatch

BODY = b"content"
SHA256 = hashlib.sha256(BODY).hexdigest()
ENTRY = LockedFile(
    "deb", "thing", "1", "thing_1.deb", SHA256, len(BODY), "MIT", "debian:trixie/main/pool/t.deb", ("host",)
)


def test_the_root_follows_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOAT_CACHE", str(tmp_path / "c"))
    assert Cache().root == cache_root() == tmp_path / "c"
    monkeypatch.delenv("MOAT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "moat"


def test_a_checked_file_is_adopted_and_required(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(FetchFailed) as absent:
        cache.require(ENTRY)
    assert "moat fetch" in (absent.value.hint or "")
    source = tmp_path / "download"
    source.write_bytes(BODY)
    cache.adopt(source, sha256=SHA256, size=len(BODY))
    assert cache.require(ENTRY) == tmp_path / "files" / SHA256[:2] / SHA256
    assert not source.exists()


@pytest.mark.parametrize(("body", "size"), [(b"Content", 7), (BODY, 8), (b"", 7)])
def test_another_content_or_size_is_refused_and_deleted(tmp_path: Path, body: bytes, size: int) -> None:
    source = tmp_path / "download"
    source.write_bytes(body)
    with pytest.raises(HashMismatch):
        Cache(tmp_path).adopt(source, sha256=SHA256, size=size)
    assert not source.exists()
    assert not Cache(tmp_path).has(SHA256)


def test_a_truncated_file_in_the_cache_is_not_taken(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    path = cache.path(SHA256)
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY[:-1])
    with pytest.raises(FetchFailed):
        cache.require(ENTRY)


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "/etc"])
def test_keys_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        Cache(tmp_path).built_dir(name)
    with pytest.raises(ValueError, match="not a sha256"):
        Cache(tmp_path).path("../../etc/passwd")


def test_a_difference_is_told_by_name_and_version() -> None:
    def deb(name: str, version: str, sha256: str = SHA256) -> LockedFile:
        return LockedFile("deb", name, version, f"{name}_{version}.deb", sha256, 7, "MIT", "debian:x", ("host",))

    old = [deb("same", "1"), deb("up", "1"), deb("gone", "1"), deb("bytes", "1")]
    new = [deb("same", "1"), deb("up", "2"), deb("new", "1"), deb("bytes", "1", "0" * 64)]
    text = {line.split()[0]: " ".join(line.split()[1:]) for line in render(changes(old, new)).splitlines()}
    assert text == {
        "up": "1 -> 2",
        "gone": "1 -> removed",
        "new": "- -> 1",
        "bytes": "1 -> 1 (other bytes under the same version)",
    }
    assert render(changes(old, old)) == "nothing changed"
