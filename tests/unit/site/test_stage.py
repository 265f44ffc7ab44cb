# SPDX-License-Identifier: Apache-2.0
"""Proves `moat stage` and `moat pack` on real signed bundles, in processes of their own: what arrives in the store is

what was signed, whole or not at all, whatever was there, whatever was interrupted and whatever the medium holds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.site.bundles import HOST_PYTHON, ROOT, SMALL, Made, make_bundle

FILES = {**SMALL, "images/minio.tar": b"minio" * 500, "debs/a_1_all.deb": b"deb" * 100, "install.sh": b"#!/bin/sh\n",
         "docs/index.md": b"# x\n", "ansible/" + "d" * 60 + "/" + "n" * 110 + ".yml": b"long\n"}  # fmt: skip


def moat(*argv: str | Path, stdin: bytes | None = None, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    """Run moat as a site does: the host's Python, isolated."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from moat.cli import main; sys.exit(main())"
    return subprocess.run(
        [HOST_PYTHON, "-I", "-B", "-c", code, str(ROOT / "scripts"), *map(str, argv)],
        input=stdin,
        capture_output=True,
        timeout=timeout,
    )


class Site:
    """A store and a bundle beside it."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.store = tmp / "store"
        self.bundle = make_bundle(tmp / "medium", tmp / "keys", FILES)

    def run(self, source: Path | str, *more: str | Path, made: Made | None = None, stdin: bytes | None = None) -> Any:
        key = (made or self.bundle).public
        argv = [
            "stage",
            source,
            "--store",
            self.store,
            "--key",
            key,
            "--state-dir",
            self.tmp / "state",
            "--json",
            *more,
        ]
        done = moat(*argv, stdin=stdin)
        assert done.stdout.count(b"\n") == 1, done.stderr.decode()
        result = json.loads(done.stdout)
        assert result["exit"] == done.returncode, done.stderr.decode()
        return result

    def stage(self, *more: str | Path) -> Any:
        result = self.run(self.bundle.path, *more)
        assert result["ok"], result
        return result

    @property
    def copy(self) -> Path:
        return next((self.store / "releases").glob("[0-9]*/bundle"))

    def hidden(self) -> list[str]:
        return sorted(p.name for p in (self.store / "releases").rglob(".*"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes() if p.is_file() else b"", p.lstat().st_mode & 0o7777)
        for p in sorted(folder.rglob("*"))
    }


# --- the ordinary case ---


def test_what_is_staged_is_what_was_signed_with_fixed_modes(site: Site) -> None:
    for path in site.bundle.path.rglob("*"):
        path.chmod(0o777)  # as a FAT medium shows it
    result = site.stage()
    assert result["changed"] is True
    assert result["path"] == str(site.copy)
    found = tree(site.copy)
    assert found["install.sh"] == (b"#!/bin/sh\n", 0o755)
    assert found["README.txt"] == (FILES["README.txt"], 0o644)
    assert found["debs"] == (b"", 0o755)
    # The images and the sources stay on the medium; the store's program comes along.
    assert "images/minio.tar" in found
    assert "images/gateway.tar" not in found
    assert {p for p in FILES if not p.startswith("images/")} <= set(found)
    assert result["release"].startswith("0.1.0-")
    assert len(result["release"]) == len("0.1.0-") + 12


def test_a_second_run_writes_nothing(site: Site) -> None:
    site.stage()
    before = {p: p.stat().st_mtime_ns for p in site.store.rglob("*")}
    result = site.stage()
    assert result["changed"] is False
    assert {p: p.stat().st_mtime_ns for p in site.store.rglob("*")} == before


def test_only_the_parts_that_are_asked_for_come(site: Site) -> None:
    site.stage("--parts", "debs")
    assert {p.name for p in site.copy.iterdir() if p.is_dir()} == {"debs"}
    result = site.stage("--parts", "wheels")
    assert result["why"] == ["2 files are not there yet"]
    # What an earlier run brought stays.
    assert {p.name for p in site.copy.iterdir() if p.is_dir()} == {"debs", "wheels"}
    assert site.stage("--parts", "debs,wheels")["changed"] is False
    assert site.run(site.bundle.path, "--parts", "deps")["problems"][0]["kind"] == "stage-failed"


def test_check_says_what_would_be_and_writes_nothing(site: Site) -> None:
    assert site.stage("--check")["changed"] is True
    assert not site.store.exists()
    site.stage()
    before = tree(site.store)
    assert site.stage("--check")["changed"] is False
    (site.copy / "README.txt").write_bytes(b"Read me never.\n")
    assert site.stage("--check")["why"] == ["README.txt has other content"]
    assert tree(site.store).keys() == before.keys()


def test_a_read_only_medium_is_enough(site: Site) -> None:
    for path in [*site.bundle.path.rglob("*"), site.bundle.path]:
        path.chmod(path.stat().st_mode & ~0o222)
    assert site.stage()["changed"] is True


# --- a store that was changed later ---


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: (c / "README.txt").write_bytes(b"Read me never.\n"), "README.txt has other content"),
        (lambda c: (c / "README.txt").write_bytes(b"x"), "README.txt has another size"),
        (lambda c: (c / "debs/evil.deb").write_bytes(b"x"), "debs/evil.deb is not part of the bundle"),
        (lambda c: (c / "README.txt").chmod(0o666), "README.txt has mode 0666 instead of 0644"),
        (lambda c: (c / "debs").chmod(0o777), "debs has mode 0777 instead of 0755"),
        (lambda c: c.parent.chmod(0o777), "the release's folder has mode 0777 instead of 0755"),
        (lambda c: (c / "manifest.json").write_bytes(b"{}"), "manifest.json is another"),
        (lambda c: (c / "README.txt").unlink(), "1 files are not there yet"),
    ],
)
def test_a_changed_copy_is_found_and_staged_anew(site: Site, change: Any, why: str) -> None:
    site.stage()
    good = tree(site.copy)
    change(site.copy)
    result = site.stage()
    assert result["changed"] is True
    assert why in result["why"]
    assert tree(site.copy) == good
    assert site.copy.parent.stat().st_mode & 0o777 == 0o755
    assert site.stage()["changed"] is False


def test_a_link_in_the_copy_is_not_followed(site: Site, tmp_path: Path) -> None:
    site.stage()
    good = tree(site.copy)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a_1_all.deb").write_bytes(FILES["debs/a_1_all.deb"])
    shutil.rmtree(site.copy / "debs")
    (site.copy / "debs").symlink_to(outside)
    assert "debs is a symbolic link" in site.stage()["why"]
    assert tree(site.copy) == good
    assert (outside / "a_1_all.deb").exists()


def test_the_stores_own_copy_is_checked_but_cannot_mend_itself(site: Site) -> None:
    site.stage()
    assert site.run(site.copy)["changed"] is False
    (site.copy / "README.txt").write_bytes(b"Read me never.\n")
    result = site.run(site.copy)
    assert result["exit"] == 6
    assert "bring the medium" in result["problems"][0]["hint"]
    (site.copy / "README.txt").unlink()
    assert site.run(site.copy)["exit"] == 5


# --- what a hostile medium holds ---


def test_a_damaged_medium_leaves_nothing_in_the_store(site: Site) -> None:
    (site.bundle.path / "wheels/b-1.0-py3-none-any.whl").write_bytes(b"wheel c" * 100)
    result = site.run(site.bundle.path)
    assert result["exit"] == 6
    assert list((site.store / "releases").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: (m / "extra.txt").write_bytes(b"x"), 7),
        (lambda m: (m / "README.txt").unlink(), 5),
        (lambda m: ((m / "README.txt").unlink(), (m / "README.txt").symlink_to("/etc/passwd")), 8),
        (lambda m: (m / "manifest.json.minisig").write_bytes(b"x"), 3),
        (lambda m: (m / "images/nginx.tar").write_bytes(b"short"), 6),  # not wanted here, and yet refused
    ],
)
def test_a_medium_that_verify_refuses_is_not_staged(site: Site, change: Any, code: int) -> None:
    change(site.bundle.path)
    assert site.run(site.bundle.path)["exit"] == code
    assert not list((site.store / "releases").iterdir())


def test_another_key_and_an_older_bundle_are_refused(site: Site, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", tmp_path / "other-keys", FILES)
    assert site.run(site.bundle.path, made=other)["exit"] == 4
    newer = make_bundle(tmp_path / "newer", tmp_path / "keys", FILES, version="0.2.0")
    assert site.run(newer.path, "--record")["recorded"] is True
    assert site.run(site.bundle.path)["exit"] == 11
    assert site.run(site.bundle.path, "--allow-older")["ok"] is True


def test_a_store_that_others_may_write_is_refused(site: Site) -> None:
    site.store.mkdir()
    site.store.chmod(0o777)
    result = site.run(site.bundle.path)
    assert result["exit"] == 26
    assert "chmod 755" in result["problems"][0]["hint"]


# --- interruption ---


def test_killed_at_any_moment_it_leaves_all_or_nothing_and_goes_on(tmp_path: Path) -> None:
    """SIGKILL after 20 to 400 ms: the copy has its name only when it is whole, and the next run mends the rest."""
    files = {f"wheels/w{i:03}.whl": os.urandom(200_000) for i in range(60)}
    made = make_bundle(tmp_path / "medium", tmp_path / "keys", files)
    site = Site.__new__(Site)
    site.tmp, site.store, site.bundle = tmp_path, tmp_path / "store", made
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from moat.cli import main; sys.exit(main())"
    argv = [HOST_PYTHON, "-I", "-B", "-c", code, str(ROOT / "scripts"), "stage", str(made.path)]
    argv += ["--store", str(site.store), "--key", str(made.public), "--state-dir", str(tmp_path / "state")]
    caught = 0
    for delay in [0.02 * i for i in range(1, 21)]:
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        caught += process.wait() == -signal.SIGKILL
        copies = list((site.store / "releases").glob("[0-9]*/bundle")) if site.store.exists() else []
        for copy in copies:
            assert len(list((copy / "wheels").iterdir())) == len(files)
            shutil.rmtree(copy)  # so that the next run has work to do
    assert caught > 5
    assert site.stage()["ok"]
    assert site.hidden() == []
    assert site.stage()["changed"] is False


def test_a_swap_that_was_cut_in_two_is_mended(site: Site) -> None:
    site.stage()
    copy = site.copy
    good = tree(copy)
    copy.rename(copy.with_name(".bundle.old.1"))
    (copy.parent / ".bundle.new.xyz").mkdir()
    (site.store / "releases/.removed.0.0.9-0").mkdir()
    assert site.stage()["changed"] is False
    assert tree(copy) == good
    assert site.hidden() == []


def test_two_runs_at_once_are_not_mixed(site: Site) -> None:
    import fcntl

    site.stage()
    with (site.store / ".stage.lock").open("rb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        result = site.run(site.bundle.path)
    assert result["exit"] == 26
    assert "another run" in result["problems"][0]["message"]


def test_too_little_room_is_said_before_anything_is_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from moat.errors import StageFailed
    from moat.site import store

    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr("moat.site.store.os.statvfs", lambda p: Full)
    with pytest.raises(StageFailed) as caught:
        store.check_room(site.tmp, 1000)
    assert caught.value.found == "40.0 KiB free"
    assert "64.0 MiB to spare" in str(caught.value.expected)
    # What it says to do is what the command takes, and nothing is copied for it.
    assert f"make room ({store.PRUNE} removes" in str(caught.value.hint)
    site.run(site.bundle.path, "--record")
    program, command, source, *more = store.PRUNE.split()
    assert (program, command, source) == ("moat", "stage", "/opt/moat/current/bundle")
    result = site.run(site.store / Path(source).relative_to("/opt/moat"), *more)
    assert (result["exit"], result["staged"]) == (0, False)


# --- pruning, links ---


def test_prune_keeps_the_newest_and_whatever_a_link_names(site: Site, tmp_path: Path) -> None:
    names = []
    for i in range(1, 7):
        made = make_bundle(tmp_path / f"m{i}", tmp_path / "keys", FILES, version=f"0.{i}.0")
        names.append(site.run(made.path)["release"])
    (site.store / "current").symlink_to(f"releases/{names[1]}")
    (site.store / "instances").mkdir()
    (site.store / "instances/1").symlink_to(f"../releases/{names[2]}")
    would = site.run(tmp_path / "m6", "--prune", "2", "--check")
    assert would["pruned"] == [names[3], names[0]]
    result = site.run(tmp_path / "m6", "--prune", "2")
    assert result["pruned"] == would["pruned"]
    assert sorted(p.name for p in (site.store / "releases").iterdir()) == sorted([names[1], names[2], *names[4:]])
    # The one that was just staged stays, though two others are newer.
    old = make_bundle(tmp_path / "m0", tmp_path / "keys", FILES, version="0.0.1")
    assert site.run(old.path, "--prune", "2")["pruned"] == []
    assert site.run(old.path, "--prune", "0")["exit"] == 26


def test_record_links_the_release_and_remembers_the_one_before(site: Site, tmp_path: Path) -> None:
    first = site.stage("--record")
    assert first["recorded"] is True
    assert site.stage("--record")["changed"] is False
    assert (site.store / "current").readlink() == Path("releases") / first["release"]
    assert not (site.store / "previous").exists()
    newer = make_bundle(tmp_path / "newer", tmp_path / "keys", FILES, version="0.2.0")
    second = site.run(newer.path, "--record", "--prune", "1")
    assert (site.store / "current").resolve().name == second["release"]
    assert (site.store / "previous").resolve().name == first["release"]
    assert json.loads((tmp_path / "state/installed.json").read_text())["version"] == "0.2.0"


# --- packed ---


def test_a_packed_release_arrives_the_same(site: Site, tmp_path: Path) -> None:
    key: list[str | Path] = ["--key", site.bundle.public, "--state-dir", tmp_path / "state"]
    tar = tmp_path / "r.tar"
    done = moat("pack", site.bundle.path, tar, "--json", *key)
    assert json.loads(done.stdout)["bytes"] == tar.stat().st_size
    again = tmp_path / "again.tar"
    moat("pack", site.bundle.path, again, *key)
    assert again.read_bytes() == tar.read_bytes()
    with tarfile.open(tar) as archive:  # any tar reads it
        assert {m.name for m in archive} >= {"manifest.json", *(p for p in FILES if not p.startswith("images/"))}
    site.stage()
    direct = tree(site.copy)
    shutil.rmtree(site.store)
    assert site.run(tar)["changed"] is True
    assert tree(site.copy) == direct
    assert site.run(tar)["changed"] is False
    # Staged from there, it can be packed again, and travels through a pipe as well.
    piped = moat("pack", site.copy, "-", *key).stdout
    assert piped == tar.read_bytes()
    shutil.rmtree(site.store)
    assert site.run("-", stdin=piped)["changed"] is True
    assert tree(site.copy) == direct


def test_a_tar_with_too_few_parts_says_which(site: Site, tmp_path: Path) -> None:
    key: list[str | Path] = ["--key", site.bundle.public, "--state-dir", tmp_path / "state"]
    tar = tmp_path / "r.tar"
    moat("pack", site.bundle.path, tar, "--parts", "debs", *key)
    result = site.run(tar)
    assert result["exit"] == 5
    assert "--parts" in result["problems"][0]["hint"]
    assert site.hidden() == []
    assert site.run(tar, "--parts", "debs")["ok"] is True


def test_every_flipped_byte_of_a_tar_is_refused_or_harmless(site: Site, tmp_path: Path) -> None:
    """One bit of every 97th byte, and every cut at a block: never another file than the signed ones in the store."""
    import random

    small = make_bundle(tmp_path / "small", tmp_path / "keys", {"README.txt": b"a" * 700, "debs/x.deb": b"b" * 300})
    key: list[str | Path] = ["--key", small.public, "--state-dir", tmp_path / "state"]
    tar = tmp_path / "r.tar"
    moat("pack", small.path, tar, "--parts", "debs", *key)
    # moat.pyz is large and of no interest here: in-process, with the bytes around the small files.
    from moat.console import Console
    from moat.errors import MoatError
    from moat.minisign import parse_public_key_file
    from moat.site.source import open_source
    from moat.site.stage import stage
    from moat.site.store import Store

    good = tar.read_bytes()
    trusted = (parse_public_key_file(small.public.read_bytes(), "moat.pub"),)
    console = Console(quiet=True, json_mode=True)
    rng = random.Random(1)
    places = [*range(0, 8 * 512), *range(len(good) - 6 * 512, len(good))]
    refused = 0
    for i in rng.sample(places, 300):
        damaged = bytearray(good)
        damaged[i] ^= 1 << rng.randrange(8)
        bad = tmp_path / "bad.tar"
        bad.write_bytes(damaged)
        store = Store(tmp_path / f"s{i}")
        try:
            with store.locked(), open_source(bad, trusted) as source:
                stage(source, bad, store, ("debs",), console)
        except MoatError:
            refused += 1
            assert not list(store.releases.iterdir())
        else:
            copy = next(store.releases.glob("*/bundle"))
            assert (copy / "README.txt").read_bytes() == b"a" * 700
        shutil.rmtree(store.root)
    assert refused > 200
