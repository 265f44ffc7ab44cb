# SPDX-License-Identifier: Apache-2.0
"""Proves what is inside the built images, by reading the archives and not by asking the builder.

Every file of every image is owned by a locked Debian package (and has its md5), a locked wheel (and has the hash of its
RECORD; or is the ``.pyc`` of such a file), a compiled program, our own code, or an overlay that the recipe names. There
is no shell, nothing is setuid, every library that a program asks for is there.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import posixpath
import re
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as memoize
from pathlib import Path

import pytest

from moat.build.cache import Cache
from moat.build.locks import Locks
from moat.build.recipe import Recipe, read_recipes

ROOT = Path(__file__).resolve().parents[3]
RECIPES = {r.name: r for r in read_recipes("demo")}
SHELLS = {"sh", "ash", "bash", "dash", "busybox", "csh", "fish", "ksh", "mksh", "tcsh", "zsh", "toybox", "perl"}


@dataclass(frozen=True)
class File:
    """One entry of an unpacked image."""

    kind: bytes
    mode: int
    uid: int
    gid: int
    target: str
    sha256: str
    md5: str
    needed: tuple[str, ...]
    runpath: tuple[str, ...]


def elf_dynamic(data: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return DT_NEEDED and RPATH/RUNPATH of a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        return (), ()
    offset, (size, count) = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    loads = [(va, off, length) for t, _, off, va, _, length in headers if t == 1]
    dynamic = next(((off, length) for t, _, off, _, _, length in headers if t == 2), None)
    if dynamic is None:
        return (), ()
    entries = [struct.unpack_from("<qQ", data, o) for o in range(dynamic[0], sum(dynamic), 16)]
    address = next(v for tag, v in entries if tag == 5)
    strings = next(off + address - va for va, off, length in loads if va <= address < va + length)

    def text(at: int) -> str:
        return data[strings + at : data.index(b"\0", strings + at)].decode()

    paths = [p for tag, v in entries if tag in (15, 29) for p in text(v).split(":")]
    return tuple(text(v) for tag, v in entries if tag == 1), tuple(paths)


def read_image(archive: Path) -> Iterator[tuple[str, File]]:
    """Yield the entries of an archive's layers, bottom first."""
    with tarfile.open(archive) as outer:
        manifest = json.load(outer.extractfile("manifest.json"))  # type: ignore[arg-type]
        for name in manifest[0]["Layers"]:
            raw = gzip.decompress(outer.extractfile(name).read())  # type: ignore[union-attr]
            with tarfile.open(fileobj=io.BytesIO(raw)) as layer:
                for m in layer:
                    data = layer.extractfile(m).read() if m.isfile() else b""  # type: ignore[union-attr]
                    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
                    needed, runpath = elf_dynamic(data)
                    sha256 = hashlib.sha256(data).hexdigest()
                    yield m.name, File(m.type, m.mode, m.uid, m.gid, m.linkname, sha256, md5, needed, runpath)


@memoize
def image(bundle: Path, name: str) -> dict[str, File]:
    return dict(read_image(bundle / "images" / f"{name}.tar"))


def merged(path: str) -> str:
    path = path.removeprefix("./").rstrip("/")
    return re.sub(r"^(bin|sbin|lib|lib64)/", r"usr/\1/", path)


def deb_listing(path: Path) -> tuple[set[str], dict[str, str]]:
    """Return the paths of a package (dpkg-deb's own listing) and the md5 sums that it carries."""
    names = subprocess.run(["dpkg-deb", "--contents", str(path)], capture_output=True, text=True, check=True).stdout
    paths = {merged(line.split(None, 5)[5].split(" -> ")[0].split(" link to ")[0]) for line in names.splitlines()}
    sums = subprocess.run(["dpkg-deb", "--info", str(path), "md5sums"], capture_output=True, text=True).stdout
    return paths, {merged(line[34:]): line[:32] for line in sums.splitlines()}


def wheel_listing(path: Path) -> dict[str, str]:
    """Return a wheel's files with their sha256 (empty for RECORD itself)."""
    with zipfile.ZipFile(path) as z:
        record = next(n for n in z.namelist() if n.endswith(".dist-info/RECORD"))
        rows = csv.reader(io.StringIO(z.read(record).decode()))
    listed = {}
    for name, field, *_ in rows:
        digest = field.removeprefix("sha256=")
        place = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)
        listed[place] = base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()
    return listed


def owned(recipe: Recipe, bundle: Path, locks: Locks, cache: Cache) -> tuple[set[str], dict[str, str], dict[str, str]]:
    """Return the paths that have an owner, and the sha256 and md5 that their owners give."""
    paths: set[str] = set()
    sha256: dict[str, str] = {}
    md5: dict[str, str] = {}
    as_files = {m.file for part in recipe.layers for m in part.members}

    def wheel(path: Path, into: str) -> None:
        for name, digest in wheel_listing(path).items():
            paths.add(f"{into}/{name}")
            if digest:
                sha256[f"{into}/{name}"] = digest

    for part in recipe.layers:
        if part.packages:
            for e in locks.used_by(part.packages):
                if e.kind == "deb":
                    names, sums = deb_listing(cache.require(e))
                    paths |= names | {f"var/lib/dpkg/status.d/{e.name}"}
                    md5.update(sums)
        if part.wheels:
            for e in locks.used_by(part.wheels.use):
                if e.kind == "wheel" and e.name not in as_files:
                    wheel(cache.require(e), part.wheels.into)
        if part.project:
            wheel(next((bundle / "wheels").glob("moat_gateway-*.whl")), part.project.into)
        for f in part.folders:
            for p in (ROOT / f.folder).rglob("*.py"):
                paths.add(f"{f.into}/{p.relative_to(ROOT / f.folder).as_posix()}")
        paths |= {p.to for p in part.programs} | {m.to for m in part.members} | {o.path for o in part.overlays}
    overlaid = {o.path for part in recipe.layers for o in part.overlays}
    return paths, sha256, {p: d for p, d in md5.items() if p not in overlaid}


def source_of(pyc: str) -> str | None:
    m = re.fullmatch(r"(.*)/__pycache__/([^/]+)\.cpython-313\.pyc", pyc)
    return f"{m[1]}/{m[2]}.py" if m else None


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_file_has_an_owner(name: str, bundle: Path, locks: Locks, cache: Cache) -> None:
    files = image(bundle, name)
    paths, _, _ = owned(RECIPES[name], bundle, locks, cache)
    parents = {str(q) for p in files if source_of(p) or p in paths for q in Path(p).parents}
    strays = [
        p for p, f in files.items() if not (p in paths or source_of(p) in paths or (f.kind == b"5" and p in parents))
    ]
    assert strays == []
    assert len(files) > 5


def test_the_search_for_strays_finds_one(bundle: Path, locks: Locks, cache: Cache) -> None:
    paths, _, _ = owned(RECIPES["nginx"], bundle, locks, cache)
    assert "usr/sbin/nginx" in paths
    assert "usr/bin/curl" not in paths
    assert source_of("usr/lib/a/__pycache__/b.cpython-313.pyc") == "usr/lib/a/b.py"
    assert source_of("usr/lib/a/b.cpython-311.pyc") is None


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_file_has_the_content_that_its_owner_gives(name: str, bundle: Path, locks: Locks, cache: Cache) -> None:
    files = image(bundle, name)
    _, sha256, md5 = owned(RECIPES[name], bundle, locks, cache)
    changed = [p for p, d in sha256.items() if p in files and files[p].sha256 != d]
    changed += [p for p, d in md5.items() if p in files and files[p].kind == b"0" and files[p].md5 != d]
    assert changed == []
    checked = sum(1 for p in (*sha256, *md5) if p in files)
    assert checked > 100 or name == "minio"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_no_shell_no_setuid_no_devices_no_foreign_owners(name: str, bundle: Path) -> None:
    files = image(bundle, name)
    named = {o.path: o.owner for part in RECIPES[name].layers for o in part.overlays}
    assert [p for p, f in files.items() if posixpath.basename(p) in SHELLS and f.kind != b"5"] == []
    assert [p for p, f in files.items() if f.mode & 0o6000] == []
    assert [p for p, f in files.items() if f.kind not in (b"0", b"2", b"5")] == []
    assert [p for p, f in files.items() if f"{f.uid}:{f.gid}" != named.get(p, "0:0")] == []
    writable = [p for p, f in files.items() if f.mode & 0o002 and f.kind != b"2"]
    assert writable == ["tmp"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_library_that_is_asked_for_is_there(name: str, bundle: Path) -> None:
    files = image(bundle, name)
    system = {posixpath.basename(p) for p in files if p.startswith(("usr/lib/x86_64-linux-gnu/", "usr/lib64/"))}
    missing = []
    for path, f in files.items():
        beside = {posixpath.normpath(r.replace("$ORIGIN", posixpath.dirname(path))) for r in f.runpath}
        missing += [
            f"{path}: {n}"
            for n in f.needed
            if n not in system and not any(f"{folder}/{n}" in files for folder in beside)
        ]
    assert missing == []
    assert name == "minio" or any(f.needed for f in files.values())


def test_python_is_compiled_ahead_in_the_read_only_images(bundle: Path) -> None:
    for name in ("gateway", "model"):
        files = image(bundle, name)
        sources = [p for p in files if p.endswith(".py") and p.startswith(("usr/lib/python3.13/", "opt/moat/"))]
        compiled = {source_of(p) for p in files if p.endswith(".pyc")}
        without = [p for p in sources if p not in compiled]
        # Templates and the like are no Python; everything else must not be compiled at each start.
        assert len(without) < 0.01 * len(sources), without[:20]


def test_licences_stay_with_the_packages(bundle: Path, locks: Locks) -> None:
    for name in ("gateway", "nginx", "valkey", "model"):
        files = image(bundle, name)
        for e in locks.used_by(f"image:{name}"):
            if e.kind == "deb":
                doc = f"usr/share/doc/{e.name}"
                assert f"{doc}/copyright" in files or files[doc].kind == b"2", (name, e.name)


def test_the_manifest_names_the_images_by_their_config(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    assert {i["name"] for i in manifest["images"]} == set(RECIPES)
    for entry in manifest["images"]:
        with tarfile.open(bundle / entry["archive"]) as tar:
            docker = json.load(tar.extractfile("manifest.json"))[0]  # type: ignore[arg-type]
            config = tar.extractfile(docker["Config"]).read()  # type: ignore[union-attr]
        assert entry["id"] == "sha256:" + hashlib.sha256(config).hexdigest()
        assert docker["RepoTags"] == [entry["reference"]]
        assert json.loads(config)["config"]["User"] == RECIPES[entry["name"]].user
        assert entry["unpacked"] == unpacked_size(bundle / entry["archive"])


def unpacked_size(archive: Path) -> int:
    total = 0
    with tarfile.open(archive) as outer:
        for name in json.load(outer.extractfile("manifest.json"))[0]["Layers"]:  # type: ignore[arg-type]
            with tarfile.open(fileobj=outer.extractfile(name), mode="r|gz") as layer:
                total += sum(m.size for m in layer)
    return total
