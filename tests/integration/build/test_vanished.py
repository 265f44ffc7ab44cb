# SPDX-License-Identifier: Apache-2.0
"""A Debian mirror that has dropped locked packages, as Debian's mirrors do: who may go on, and with what.

The mirror is real: a signed archive made with apt-ftparchive and a throwaway key, served on loopback, with the three
suites that the target has. Proved: a lock from it; a fetch of it; after a security update replaced one package the
fetch names it and its successor and stops (exit 32); a snapshot archive still serves the old one by the time of the
lock; a demo takes the successor on request and says so, the reviewed lock untouched; a site never does; an archive
signed by another key is refused whatever is asked.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from tests.integration.build.standin import StandIn

from moat.build import debian, definitions, fetch, lock
from moat.build.cache import Cache
from moat.build.definitions import DebianSet
from moat.build.locks import TARGETS, LockedFile, active_locks, debs_lock_name, read_lock, write_index, write_lock
from moat.build.mirrors import debian_mirrors
from moat.build.policy import read_policy
from moat.console import Console
from moat.errors import LockFailed, LockStale, MoatError

pytestmark = pytest.mark.skipif(
    not all(shutil.which(p) for p in ("apt-get", "apt-ftparchive", "gpg", "dpkg-deb")), reason="needs apt and gpg"
)
TARGET = TARGETS["debian13-amd64"]
SETS = (DebianSet("host", ("thing",), ()), DebianSet("image:gateway", ("libthing",), ()))


@dataclass
class Archive:
    """A signed Debian archive below ``root`` (``debian/`` and ``debian-security/``)."""

    root: Path
    gnupg: Path
    suites: tuple[str, ...] = ("trixie",)

    def key(self, name: str) -> Path:
        """Make a signing key and return its public half as a keyring."""
        ring = self.root / f"{name}.gpg"
        env = self._gpg_env(name)
        user = f"{name} <{name}@invalid>"
        generate = ["gpg", "--batch", "--quick-gen-key", "--passphrase", "", user, "ed25519", "sign", "never"]
        subprocess.run(generate, env=env, check=True, capture_output=True)
        with ring.open("wb") as f:
            subprocess.run(["gpg", "--export", user], env=env, check=True, stdout=f)
        return ring

    def _gpg_env(self, name: str) -> dict[str, str]:
        home = self.gnupg / name
        home.mkdir(mode=0o700, exist_ok=True, parents=True)
        return {**os.environ, "GNUPGHOME": str(home)}

    def deb(self, archive: str, name: str, version: str, *, depends: str = "", priority: str = "optional") -> Path:
        """Build a package into the pool of ``debian`` or ``debian-security``."""
        updates = "updates/" if archive == "debian-security" else ""
        pool = self.root / archive / "pool" / f"{updates}main" / name[0] / name
        pool.mkdir(parents=True, exist_ok=True)
        tree = self.root / "build" / f"{name}-{version.replace(':', '-')}"
        (tree / "DEBIAN").mkdir(parents=True)
        doc = tree / "usr/share/doc" / name
        doc.mkdir(parents=True)
        (doc / "copyright").write_text(
            "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
            "Files: *\nCopyright: nobody\nLicense: Expat\n"
        )
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: a <a@invalid>\n"
        control += f"Priority: {priority}\nSection: misc\n" + (f"Depends: {depends}\n" if depends else "")
        (tree / "DEBIAN" / "control").write_text(control + "Description: made by a test\n")
        out = pool / f"{name}_{version.split(':')[-1]}_amd64.deb"
        subprocess.run(["dpkg-deb", "-b", "--root-owner-group", str(tree), str(out)], check=True, capture_output=True)
        shutil.rmtree(tree)
        return out

    def publish(self, key: str) -> None:
        """Write and sign the indexes of every suite from what the pools hold now."""
        suites = [
            suite
            for name in self.suites
            for suite in (
                ("debian", name, True),
                ("debian", f"{name}-updates", False),
                ("debian-security", f"{name}-security", True),
            )
        ]
        for archive, suite, listed in suites:
            base = self.root / archive
            binary = base / "dists" / suite / "main" / "binary-amd64"
            binary.mkdir(parents=True, exist_ok=True)
            packages = b""
            if listed and (base / "pool").is_dir():
                scan = ["apt-ftparchive", "packages", "pool"]
                packages = subprocess.run(scan, cwd=base, check=True, capture_output=True).stdout
            (binary / "Packages").write_bytes(packages)
            (binary / "Packages.gz").write_bytes(gzip.compress(packages, mtime=0))
            folder = base / "dists" / suite
            (folder / "Release").unlink(missing_ok=True)
            (folder / "InRelease").unlink(missing_ok=True)
            options = [f"APT::FTPArchive::Release::{k}={v}" for k, v in (("Suite", suite), ("Codename", suite))]
            release = ["apt-ftparchive", *(x for o in options for x in ("-o", o)), "release", "."]
            text = subprocess.run(release, cwd=folder, check=True, capture_output=True).stdout
            (folder / "Release").write_bytes(text)
            sign = ["gpg", "--batch", "--yes", "--clearsign", "--output", "InRelease", "Release"]
            subprocess.run(sign, cwd=folder, env=self._gpg_env(key), check=True, capture_output=True)


@dataclass
class World:
    """The mirror, the reviewed locks and the cache of one test."""

    archive: Archive
    server: StandIn
    locks: Path
    cache: Cache

    def debs(self) -> list[LockedFile]:
        return read_lock(self.locks / debs_lock_name(TARGET))

    def fetch(self, *arguments: str) -> dict[str, object]:
        """Run `moat fetch` and return its JSON result."""
        parser = argparse.ArgumentParser()
        fetch.add_arguments(parser)
        out = io.StringIO()
        console = Console(json_mode=True, out=out, err=io.StringIO())
        assert fetch.run(parser.parse_args(list(arguments)), console) == 0
        result: dict[str, object] = json.loads(out.getvalue())
        return result

    def replace_by_update(self) -> LockedFile:
        """A security update of libthing arrives and the mirror drops the locked one; return the locked one."""
        (old,) = [e for e in self.debs() if e.name == "libthing"]
        (self.archive.root / "debian-security" / debian.pool_path(old)[1]).unlink()
        self.archive.deb("debian-security", "libthing", "1.1")
        self.archive.publish("archive")
        return old


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    archive = Archive(
        tmp_path / "mirror", Path(os.environ.get("TMPDIR", "/tmp")) / f"moat-gpg-{tmp_path.name[-20:]}-{os.getpid()}"
    )
    archive.root.mkdir()
    keyring = archive.key("archive")
    archive.deb("debian", "base", "1.0", priority="required")
    archive.deb("debian", "thing", "2:1.0+x~1", depends="libthing (>= 1.0), base")
    archive.deb("debian-security", "libthing", "1.0")
    archive.publish("archive")
    locks, cache = tmp_path / "locks", Cache(tmp_path / "cache")
    components = definitions.read_components()
    small = definitions.Components(components.wheels, SETS, components.go, components.hub)
    with StandIn(archive.root) as server:
        monkeypatch.setenv("MOAT_DEBIAN_MIRROR", f"{server.url}/debian")
        monkeypatch.setenv("MOAT_DEBIAN_SECURITY_MIRROR", f"{server.url}/debian-security")
        monkeypatch.setenv("MOAT_DEBIAN_KEYRING", str(keyring))
        monkeypatch.delenv("MOAT_DEBIAN_SNAPSHOT", raising=False)
        monkeypatch.setenv("MOAT_LOCKS", str(locks))
        monkeypatch.setenv("MOAT_CACHE", str(cache.root))
        monkeypatch.setattr(fetch, "read_components", lambda: small)
        monkeypatch.setattr(lock, "read_components", lambda: small)
        for name in ("wheels.jsonl", "go-minio.jsonl", "files.jsonl"):
            write_lock(locks / name, [])
        quiet = Console(quiet=True, err=io.StringIO())
        with httpx.Client() as client:
            elsewhere = Cache(tmp_path / "lock-cache")  # what locking downloads must not help the fetch
            context = lock.Context(small, read_policy(), elsewhere, quiet, client, datetime.now(UTC))
            write_lock(locks / debs_lock_name(TARGET), lock.lock_debs(context, TARGET))
        write_index(locks, int(time.time()))
        try:
            yield World(archive, server, locks, cache)
        finally:
            for home in archive.gnupg.iterdir():
                kill = ["gpgconf", "--homedir", str(home), "--kill", "gpg-agent"]
                subprocess.run(kill, check=False, capture_output=True)
            shutil.rmtree(archive.gnupg, ignore_errors=True)


def test_the_lock_is_the_closure_without_the_base(world: World) -> None:
    locked = {e.name: e for e in world.debs()}
    assert set(locked) == {"thing", "libthing"}  # `base` is on every host
    assert locked["thing"].version == "2:1.0+x~1"
    assert locked["thing"].source == "debian:trixie/main/pool/main/t/thing/thing_1.0+x~1_amd64.deb"
    assert locked["libthing"].source.startswith("debian-security:trixie-security/main/pool/updates/main/")
    assert locked["thing"].uses == ("host",)
    assert locked["libthing"].uses == ("host", "image:gateway")


@pytest.mark.parametrize("profile", ["demo", "site"])
def test_a_mirror_that_has_everything(world: World, profile: str) -> None:
    assert world.fetch("--profile", profile)["files"] == 2
    for e in world.debs():
        assert hashlib.sha256(world.cache.require(e).read_bytes()).hexdigest() == e.sha256
    asked = len(world.server.asked)
    world.fetch("--profile", profile)
    assert len(world.server.asked) == asked, "a second fetch asks for nothing"


@pytest.mark.parametrize(
    "arguments", [("--profile", "demo"), ("--profile", "site"), ("--profile", "site", "--relock-vanished")]
)
def test_a_vanished_package_is_named_with_its_successor(world: World, arguments: tuple[str, ...]) -> None:
    world.replace_by_update()
    with pytest.raises(LockStale) as stale:
        world.fetch(*arguments)
    assert stale.value.exit_code == 32
    row = [line.split() for line in (stale.value.found or "").splitlines() if "libthing" in line]
    assert row == [["libthing", "1.0", "->", "1.1"]]
    assert "moat lock --only debs" in (stale.value.hint or "")
    assert ("--relock-vanished" in (stale.value.hint or "")) == ("demo" in arguments)
    assert not (world.cache.root / "locks").exists(), "nothing was re-locked"


def test_the_snapshot_archive_serves_the_state_of_the_lock(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = [e for e in world.debs() if e.name == "libthing"]
    pool = debian.pool_path(old)[1]
    content = (world.archive.root / "debian-security" / pool).read_bytes()
    world.replace_by_update()
    with StandIn() as snapshot:
        monkeypatch.setenv("MOAT_DEBIAN_SNAPSHOT", f"{snapshot.url}/archive")
        locked_at = active_locks("site", TARGET.name).locked_at
        # The package was locked before the archive took its next state: only the second moment has it.
        (_, second) = fetch.snapshot_urls(old, debian_mirrors(), locked_at)
        snapshot.files[second.removeprefix(snapshot.url)] = content
        assert world.fetch("--profile", "site")["files"] == 2
        paths = [path for _, path, _ in snapshot.asked]
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(locked_at))
        assert paths[0] == f"/archive/debian-security/{stamp}/{pool}"
    assert world.cache.has_entry(old)


def test_a_snapshot_archive_out_of_reach_does_not_hide_what_vanished(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.replace_by_update()
    monkeypatch.setenv("MOAT_DEBIAN_SNAPSHOT", "http://127.0.0.1:1/archive")  # nothing listens there
    monkeypatch.setattr("moat.build.downloads._TRIES", 1)
    with pytest.raises(LockStale, match="dropped 1 of the locked packages"):
        world.fetch("--profile", "site")


def test_a_demo_takes_the_successor_and_a_site_still_stops(world: World) -> None:
    old = world.replace_by_update()
    reviewed = (world.locks / debs_lock_name(TARGET)).read_bytes()
    result = world.fetch("--profile", "demo", "--relock-vanished")
    assert result["relocked"] == [{"name": "libthing", "old": "1.0", "new": "1.1"}]
    assert result["local_debs"] is True
    assert (world.locks / debs_lock_name(TARGET)).read_bytes() == reviewed, "the checkout stays clean"

    demo = active_locks("demo", TARGET.name)
    new = [e for e in demo.debs if e.name == "libthing"]
    assert [e.version for e in new] == ["1.1"]
    assert new[0].license == "MIT"
    for e in demo.debs:
        world.cache.require(e)
    # The next fetch of the demo needs no flag; a site still wants the reviewed bytes.
    assert world.fetch("--profile", "demo")["local_debs"] is True
    site = active_locks("site", TARGET.name)
    assert old in site.debs
    assert not site.local_debs
    with pytest.raises(LockStale):
        world.fetch("--profile", "site", "--relock-vanished")


def test_an_archive_signed_by_another_key_is_refused(world: World) -> None:
    world.replace_by_update()
    world.archive.key("attacker")
    world.archive.publish("attacker")
    with pytest.raises(MoatError) as refused:
        world.fetch("--profile", "demo", "--relock-vanished")
    assert refused.type is LockFailed
    assert "NO_PUBKEY" in (refused.value.found or "")
    assert not (world.cache.root / "locks").exists()


def test_a_package_altered_on_the_mirror_is_refused(world: World) -> None:
    (thing,) = [e for e in world.debs() if e.name == "thing"]
    path = world.archive.root / "debian" / debian.pool_path(thing)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MoatError) as refused:
        world.fetch("--profile", "demo")
    assert refused.value.exit_code == 34
    assert not world.cache.has_entry(thing)


def test_the_lock_command_writes_only_what_changed(world: World) -> None:
    """`moat lock --only debs` itself, before and after the update."""

    def run(*arguments: str) -> dict[str, object]:
        parser = argparse.ArgumentParser()
        lock.add_arguments(parser)
        out = io.StringIO()
        lock.run(parser.parse_args(["--only", "debs", *arguments]), Console(json_mode=True, out=out, err=io.StringIO()))
        result: dict[str, object] = json.loads(out.getvalue())
        return result

    assert {e.license for e in world.debs()} == {"MIT"}
    assert run("--check")["changed"] == []
    world.replace_by_update()
    with pytest.raises(LockStale) as stale:
        run("--check")
    assert "1.0 -> 1.1" in " ".join((stale.value.found or "").split())
    assert run()["changed"] == [debs_lock_name(TARGET)]
    assert {e.version for e in world.debs() if e.name == "libthing"} == {"1.1"}
    assert run("--check")["changed"] == []


def test_another_target_takes_what_is_named_from_the_images_release_if_it_installs_there(world: World) -> None:
    """The same archive under a second code name stands for the older release."""
    other = TARGETS["debian12-amd64"]
    world.archive.suites = ("trixie", "bookworm")
    world.archive.publish("archive")
    components = definitions.read_components()
    quiet = Console(quiet=True, err=io.StringIO())

    def resolve(*sets: DebianSet) -> list[LockedFile]:
        small = definitions.Components(components.wheels, sets, components.go, components.hub)
        with httpx.Client() as client:
            context = lock.Context(small, read_policy(), world.cache, quiet, client, datetime.now(UTC))
            return lock.lock_debs(context, other, world.debs())

    (taken,) = resolve(*SETS, DebianSet("host", (), (), other.name, ("libthing",)))
    assert taken.source.startswith("debian-security:trixie-security/")
    assert taken.uses == ("host",), "the images' use of it stays in the images' lock"
    own = {e.name: e for e in resolve(DebianSet("host", ("thing",), (), other.name))}
    assert {debian.suite_of(e) for e in own.values()} == {"bookworm"}
    with pytest.raises(LockFailed, match="absent: not among the packages of debian13-amd64"):
        resolve(DebianSet("host", (), (), other.name, ("absent",)))

    # The older release loses what `thing` needs: apt says so when it is tried there.
    (lib,) = [e for e in world.debs() if e.name == "libthing"]
    (world.archive.root / "debian-security" / debian.pool_path(lib)[1]).unlink()
    world.archive.publish("archive")
    with pytest.raises(LockFailed, match=r"^trying thing_") as refused:
        resolve(DebianSet("host", (), (), other.name, ("thing",)))
    assert "libthing" in (refused.value.found or "")
