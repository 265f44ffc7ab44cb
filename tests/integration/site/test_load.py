# SPDX-License-Identifier: Apache-2.0
"""Proves ``moat load``, ``plan`` and ``doctor`` against the real container engine, with small images made here.

The images hold one file each and are removed at the end; nothing is started from them. Nothing is ever pulled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.unit.site.attacker import flip
from tests.unit.site.bundles import ROOT, Made, make_bundle, manifest_of, run_moat, write_signed

from moat.manifest import ImageEntry


def engine_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not engine_answers(), reason="no docker engine answers")


def _tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@dataclass(frozen=True)
class Image:
    """A docker archive with one layer, and what the manifest says of it."""

    archive: bytes
    entry: ImageEntry


def make_image(name: str, reference: str, content: bytes) -> Image:
    layer = _tar({"file": content})
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
        }
    ).encode()
    digest = hashlib.sha256(config).hexdigest()
    index = [{"Config": f"{digest}.json", "RepoTags": [reference], "Layers": ["layer.tar"]}]
    archive = _tar({"manifest.json": json.dumps(index).encode(), f"{digest}.json": config, "layer.tar": layer})
    return Image(archive, ImageEntry(name, reference, "sha256:" + digest, f"images/{name}.tar", len(layer)))


@dataclass(frozen=True)
class Site:
    """A signed bundle with real images, and a state folder of its own."""

    made: Made
    images: tuple[Image, ...]
    state: Path

    def argv(self, command: str, *more: str) -> list[str]:
        return [command, str(self.made.path), "--key", str(self.made.public), "--state-dir", str(self.state), *more]

    def run(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        return run_moat(*self.argv(command, *more))

    def references(self) -> list[str]:
        return [i.entry.reference for i in self.images]


def image_id(reference: str) -> str | None:
    done = subprocess.run(["docker", "image", "inspect", "-f", "{{.Id}}", reference], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def remove(*references: str) -> None:
    subprocess.run(["docker", "image", "rm", *references], capture_output=True)


def resign(site: Site, images: list[ImageEntry]) -> None:
    """Write the manifest anew with other image lines."""
    files = {p.relative_to(site.made.path).as_posix(): p.read_bytes() for p in site.made.path.rglob("*") if p.is_file()}
    files = {n: c for n, c in files.items() if not n.startswith("manifest.json")}
    write_signed(site.made.path, manifest_of(files, images=images), site.made.secret)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    nonce = secrets.token_hex(6)
    images = tuple(
        make_image(name, f"moat/test-{name}:0.1.0-{nonce}", os.urandom(size))
        for name, size in (("large", 8 * 1024 * 1024), ("small", 1000))
    )
    files = {i.entry.archive: i.archive for i in images}
    made = make_bundle(tmp_path / "bundle", tmp_path / "keys", files)
    site = Site(made, images, tmp_path / "state")
    resign(site, [i.entry for i in images])
    yield site
    remove(*site.references())


def test_images_are_loaded_and_the_record_is_written(site: Site) -> None:
    done = site.run("load", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert sorted(answer["loaded"]) == sorted(site.references())
    assert [image_id(r) for r in site.references()] == [i.entry.id for i in site.images]
    installed = json.loads((site.state / "installed.json").read_bytes())
    manifest = (site.made.path / "manifest.json").read_bytes()
    assert installed == {
        "version": "0.1.0",
        "profile": "demo",
        "target": "debian13-amd64",
        "created": 1_760_000_000,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
    assert (site.state / "manifest.json").read_bytes() == manifest
    assert sorted(p.name for p in site.state.iterdir()) == ["installed.json", "manifest.json"]


def test_a_second_run_loads_nothing(site: Site) -> None:
    assert site.run("load").returncode == 0
    answer = json.loads(site.run("load", "--json").stdout)
    assert (answer["loaded"], sorted(answer["present"])) == ([], sorted(site.references()))


def test_a_run_goes_on_where_the_last_one_ended(site: Site) -> None:
    assert site.run("load").returncode == 0
    remove(site.images[1].entry.reference)
    answer = json.loads(site.run("load", "--json").stdout)
    assert answer["loaded"] == [site.images[1].entry.reference]


def test_nothing_is_loaded_from_a_bundle_with_any_bad_file(site: Site) -> None:
    flip(site.made.path / "images/small.tar", 700, 1)
    done = site.run("load", "--json")
    assert done.returncode == 6
    assert json.loads(done.stdout)["problems"][0]["path"] == "images/small.tar"
    assert [image_id(r) for r in site.references()] == [None, None]
    assert not site.state.exists()


def test_an_image_whose_id_is_not_the_manifests_is_refused(site: Site) -> None:
    wrong = replace(site.images[0].entry, id="sha256:" + "0" * 64)
    resign(site, [wrong, site.images[1].entry])
    done = site.run("load", "--json")
    assert done.returncode == 21
    problem = json.loads(done.stdout)["problems"][0]
    assert (problem["found"], problem["expected"]) == (site.images[0].entry.id, wrong.id)
    assert "docker image rm" in problem["hint"]
    assert not (site.state / "installed.json").exists()


def test_a_name_taken_by_another_image_is_refused_before_anything_is_loaded(site: Site) -> None:
    reference = site.images[1].entry.reference
    other = make_image("other", reference, b"somebody else's")
    subprocess.run(["docker", "load", "-q"], input=other.archive, check=True, capture_output=True)
    done = site.run("load")
    assert done.returncode == 21
    assert f"docker image rm {reference}" in done.stderr
    assert image_id(reference) == other.entry.id, "the name was not moved"
    assert image_id(site.images[0].entry.reference) is None
    assert site.run("plan").returncode == 21


def test_an_archive_that_is_no_image_shows_the_engines_words(site: Site) -> None:
    (site.made.path / "images/small.tar").write_bytes(b"not a tar" * 100_000)
    resign(site, [i.entry for i in site.images])
    done = site.run("load", "--json")
    assert done.returncode == 21, done.stderr
    problem = json.loads(done.stdout)["problems"][0]
    assert problem["path"] == "images/small.tar"
    assert problem["found"]


def test_an_engine_that_does_not_answer_is_said_in_words(site: Site, tmp_path: Path) -> None:
    env = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/nothing.sock", "PYTHONPATH": str(ROOT / "scripts")}
    codes = {"load": 21, "plan": 20, "doctor": 20}
    for command, code in codes.items():
        argv = site.argv(command)
        if command == "doctor":
            argv = argv[:4]
        done = subprocess.run([sys.executable, "-m", "moat", *argv], env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "nothing.sock" in done.stderr


def test_ctrl_c_leaves_no_record_and_the_next_run_works(site: Site, tmp_path: Path) -> None:
    """A docker that never ends stands in for a slow engine, so that the signal certainly comes in the middle."""
    slow = tmp_path / "bin" / "docker"
    slow.parent.mkdir()
    real = shutil.which("docker")
    slow.write_text(f'#!/bin/sh\n[ "$1" = load ] || exec {real} "$@"\ntouch {tmp_path}/started\nexec sleep 600\n')
    slow.chmod(0o755)
    env = {**os.environ, "PATH": f"{slow.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "scripts")}
    child = subprocess.Popen(
        [sys.executable, "-m", "moat", *site.argv("load")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, "no image is being loaded"
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert b"run the same command again" in err
    assert b"Traceback" not in err
    with pytest.raises(ProcessLookupError):  # no docker is left behind
        os.killpg(child.pid, 0)
    assert not site.state.exists()
    assert site.run("load").returncode == 0


def test_a_client_that_prints_without_end_does_not_block(site: Site, tmp_path: Path) -> None:
    """Output far larger than a pipe while its input is still fed: with two pipes both sides would wait for ever."""
    noisy = tmp_path / "bin" / "docker"
    noisy.parent.mkdir()
    real = shutil.which("docker")
    noisy.write_text(
        f'#!/bin/sh\n[ "$1" = load ] || exec {real} "$@"\n'
        "head -c 3000000 /dev/zero | tr '\\0' x; head -c 3000000 /dev/zero | tr '\\0' y >&2\n"
        "cat >/dev/null; echo; echo 'no space left on device' >&2; exit 1\n"
    )
    noisy.chmod(0o755)
    env = {**os.environ, "PATH": f"{noisy.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "scripts")}
    argv = [sys.executable, "-m", "moat", *site.argv("load", "--json")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 21
    problem = json.loads(done.stdout)["problems"][0]
    assert len(problem["found"]) < 1000
    assert "no space left on device" in problem["found"]
    assert "make room" in problem["hint"]


def test_plan_says_what_would_happen_and_changes_nothing(site: Site) -> None:
    before = json.loads(site.run("plan", "--json").stdout)
    assert sorted(before["load"]) == sorted(site.references())
    assert before["installed"] is None
    assert not site.state.exists()
    assert site.run("load").returncode == 0
    after = json.loads(site.run("plan", "--json").stdout)
    assert (after["load"], after["changes"]) == ([], [])
    assert sorted(after["present"]) == sorted(site.references())
    assert after["installed"]["version"] == "0.1.0"
    text = site.run("plan")
    assert "images to load: 0" in text.stdout


def test_doctor_sees_a_port_that_is_taken(site: Site) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        taken = s.getsockname()[1]
        argv = ["doctor", str(site.made.path), "--key", str(site.made.public), "--https-port", str(taken), "--json"]
        done = run_moat(*argv)
    assert done.returncode == 20
    answer = json.loads(done.stdout)
    checks = {c["name"]: c for c in answer["checks"]}
    assert checks[f"port {taken}"]["ok"] is False
    assert "--https-port" in checks[f"port {taken}"]["hint"]
    assert checks["engine"]["ok"] is True
    for check in answer["checks"]:
        assert set(check) == {"name", "ok", "found", "expected", "hint"}
        assert bool(check["hint"]) is not check["ok"]
