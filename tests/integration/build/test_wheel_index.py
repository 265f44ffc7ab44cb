# SPDX-License-Identifier: Apache-2.0
"""`moat lock` of wheels against a package index on loopback, with the real resolver (uv).

The index holds small real wheels made here. Proved: exact files for both Pythons, their sizes, hashes and licences; an
override takes a package out; a wheel with a start-up hook, a denied version, a release of source archives alone, a
licence that is not allowed and an upload of yesterday stop the lock with the rule and the file; what is locked stays
until an upgrade is asked for; a fetch finds the files by hash alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tests.integration.build.standin import StandIn

from moat.build import definitions, fetch, lock
from moat.build.cache import Cache
from moat.build.definitions import WheelSet
from moat.build.downloads import Downloader
from moat.build.locks import LockedFile, write_lock
from moat.build.policy import read_policy
from moat.console import Console
from moat.errors import FetchFailed, LockFailed, PolicyRefused

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OLD = NOW - timedelta(days=90)


def wheel(
    name: str, version: str, tag: str, *, requires: tuple[str, ...] = (), extra: dict[str, str] | None = None
) -> bytes:
    """Return a small wheel; ``extra`` are further files, ``License-Expression`` among them sets the licence."""
    extra = dict(extra or {})
    license_ = extra.pop("License-Expression", "MIT")
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "x = 1\n",
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: {license_}\n"
        + "".join(f"Requires-Dist: {r}\n" for r in requires),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
        **extra,
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for path, text in files.items():
            z.writestr(path, text)
    return out.getvalue()


@dataclass
class Index:
    """A package index in JSON on loopback."""

    server: StandIn
    files: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def add(self, filename: str, content: bytes, *, uploaded: datetime | None = OLD, yanked: bool = False) -> None:
        self.server.files[f"/files/{filename}"] = content
        row: dict[str, object] = {
            "filename": filename,
            "url": f"../../files/{filename}",
            "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
            "size": len(content),
            "yanked": yanked,
        }
        if uploaded is not None:
            row["upload-time"] = uploaded.isoformat().replace("+00:00", "Z")
        name = filename.split("-")[0].replace("_", "-").lower()
        self.files.setdefault(name, []).append(row)

    def wheel(self, name: str, version: str, *tags: str, uploaded: datetime | None = OLD, **more: object) -> None:
        for tag in tags or ("py3-none-any",):
            content = wheel(name, version, tag, **more)  # type: ignore[arg-type]
            self.add(f"{name}-{version}-{tag}.whl", content, uploaded=uploaded)

    def answer(self, _: str, path: str) -> tuple[int, dict[str, str], bytes] | None:
        if not path.startswith("/simple/"):
            return None
        name = path.removeprefix("/simple/").strip("/")
        if name not in self.files:
            return 404, {}, b""
        body = {"meta": {"api-version": "1.1"}, "name": name, "files": self.files[name]}
        body["versions"] = sorted({str(f["filename"]).split("-")[1].removesuffix(".tar.gz") for f in self.files[name]})
        return 200, {"Content-Type": "application/vnd.pypi.simple.v1+json"}, json.dumps(body).encode()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    with StandIn() as server:
        i = Index(server)
        server.dynamic = i.answer
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{server.url}/simple")
        monkeypatch.setenv("MOAT_LOCKS", str(tmp_path / "locks"))
        yield i


@pytest.fixture
def context(tmp_path: Path) -> Iterator[lock.Context]:
    components = definitions.read_components()
    wanted = WheelSet("gateway", ("app>=1",), (), ("image:gateway", "wheelhouse"), no_deps=False)
    with httpx.Client() as client:
        yield lock.Context(
            replace(components, wheels=(wanted,)),
            read_policy(),
            Cache(tmp_path / "cache"),
            Console(quiet=True, err=io.StringIO()),
            client,
            NOW,
        )


def changed(context: lock.Context, **values: object) -> lock.Context:
    """Return the context with its one wheel set changed."""
    (only,) = context.components.wheels
    return replace(context, components=replace(context.components, wheels=(replace(only, **values),)))  # type: ignore[arg-type]


def test_exact_files_for_both_pythons(index: Index, context: lock.Context) -> None:
    index.wheel("app", "1.0", requires=("native>=2", 'only_old ; python_version < "3.12"'))
    linux = ("cp311-cp311-manylinux_2_28_x86_64", "cp313-cp313-manylinux_2_28_x86_64")
    others = ("cp311-cp311-win_amd64", "cp313-cp313-manylinux_2_28_aarch64", "cp313-cp313-manylinux_2_40_x86_64")
    index.wheel("native", "2.0", *linux, *others, "py3-none-any")
    index.wheel(
        "only_old", "1.0", "cp310-abi3-manylinux2014_x86_64", extra={"License-Expression": "ISC OR GPL-3.0-only"}
    )
    locked = {e.filename: e for e in lock.lock_wheels(context)}
    assert {name: e.pythons for name, e in locked.items()} == {
        "app-1.0-py3-none-any.whl": ("3.11", "3.13"),
        f"native-2.0-{linux[0]}.whl": ("3.11",),
        f"native-2.0-{linux[1]}.whl": ("3.13",),
        "only_old-1.0-cp310-abi3-manylinux2014_x86_64.whl": ("3.11",),
    }
    app = locked["app-1.0-py3-none-any.whl"]
    content = index.server.files["/files/app-1.0-py3-none-any.whl"]
    assert (app.sha256, app.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (app.source, app.license, app.uses) == ("pypi:app", "MIT", ("image:gateway", "wheelhouse"))
    assert locked["only_old-1.0-cp310-abi3-manylinux2014_x86_64.whl"].license == "ISC OR GPL-3.0-only"
    assert "3.12" in locked["only_old-1.0-cp310-abi3-manylinux2014_x86_64.whl"].marker
    asked = {p for _, p, _ in index.server.asked if p.startswith("/files/")}
    assert not [p for p in asked if "win_amd64" in p or "aarch64" in p], "files of other platforms are not downloaded"


def test_an_override_takes_a_package_out(index: Index, context: lock.Context) -> None:
    index.wheel("app", "1.0", requires=("litellm-enterprise",))
    index.wheel("litellm_enterprise", "0.1")
    with pytest.raises(PolicyRefused, match="rule deny: litellm-enterprise"):
        lock.lock_wheels(context)
    without = changed(context, overrides=('litellm-enterprise ; python_version < "0"',))
    assert [e.name for e in lock.lock_wheels(without)] == ["app"]


def test_a_startup_hook_stops_the_lock(index: Index, context: lock.Context) -> None:
    index.wheel("app", "1.0", extra={"app_init.pth": "import os\n"})
    with pytest.raises(PolicyRefused, match=r"rule startup-hook: app-1\.0-py3-none-any\.whl ships app_init\.pth"):
        lock.lock_wheels(context)


def test_a_denied_version_is_refused_and_not_kept(index: Index, context: lock.Context) -> None:
    index.wheel("litellm", "1.82.8")
    with pytest.raises(PolicyRefused, match=r"rule deny: litellm 1\.82\.8"):
        lock.lock_wheels(changed(context, requirements=("litellm==1.82.8",)))
    assert not (context.cache.root / "files").exists()


def test_a_source_archive_is_not_taken(index: Index, context: lock.Context) -> None:
    index.add("app-1.0.tar.gz", b"not looked at")
    with pytest.raises(LockFailed, match="resolving the wheels"):
        lock.lock_wheels(context)
    assert not [p for _, p, _ in index.server.asked if p.endswith(".tar.gz")]


def test_a_licence_that_is_not_allowed_stops_the_lock(index: Index, context: lock.Context) -> None:
    index.wheel("app", "1.0", extra={"License-Expression": "SSPL-1.0"})
    with pytest.raises(PolicyRefused, match=r"rule license: app-1\.0-py3-none-any\.whl is under SSPL-1\.0"):
        lock.lock_wheels(context)


def test_a_fresh_upload_is_passed_over_or_refused(index: Index, context: lock.Context) -> None:
    index.wheel("app", "1.0")
    index.wheel("app", "1.1", uploaded=NOW - timedelta(days=1))
    assert [e.version for e in lock.lock_wheels(context)] == ["1.0"]
    with pytest.raises(LockFailed):  # nothing old enough is left to resolve to
        lock.lock_wheels(changed(context, requirements=("app==1.1",)))


def test_an_index_without_upload_times_is_usable(index: Index, context: lock.Context) -> None:
    index.wheel("app", "1.0", uploaded=None)
    err = io.StringIO()
    told = replace(context, console=Console(quiet=True, err=err))
    assert [e.version for e in lock.lock_wheels(told)] == ["1.0"]
    assert "minimum age is not checked: app-1.0-py3-none-any.whl" in err.getvalue()


def test_what_is_locked_stays_until_an_upgrade(index: Index, context: lock.Context, tmp_path: Path) -> None:
    index.wheel("app", "1.0")
    write_lock(tmp_path / "locks" / "wheels.jsonl", lock.lock_wheels(context))
    index.wheel("app", "2.0")
    later = replace(context, cache=Cache(tmp_path / "later"))
    assert [e.version for e in lock.lock_wheels(later)] == ["1.0"]
    assert [e.version for e in lock.lock_wheels(replace(later, upgrade=True))] == ["2.0"]


def _fetch(entries: list[LockedFile], cache: Cache, client: httpx.Client) -> None:
    quiet = Console(quiet=True, err=io.StringIO())
    fetch._fetch_wheels(entries, Downloader(cache, client, quiet, sleep=lambda _: None), client)


def test_a_fetch_finds_wheels_by_hash(index: Index, context: lock.Context, tmp_path: Path) -> None:
    index.wheel("app", "1.0")
    entries = lock.lock_wheels(context)
    other = Cache(tmp_path / "other")
    _fetch(entries, other, context.client)
    assert other.has_entry(entries[0])
    index.files["app"].clear()
    with pytest.raises(FetchFailed) as failed:
        _fetch(entries, Cache(tmp_path / "third"), context.client)
    assert failed.value.found == "app-1.0-py3-none-any.whl"
