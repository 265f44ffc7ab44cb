# SPDX-License-Identifier: Apache-2.0
"""Proves that a bundle for Debian 12 is of Debian 12 where a host installs it, and the same where a container brings
its own system; that the control environment of the bundle for this host's Python installs and runs with no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename
from tests.integration.build.building import ROOT, moat_build

from moat.build.locks import TARGETS, Locks, active_locks
from moat.build.wheeltags import target_tags
from moat.manifest import Manifest, parse_manifest

TARGET = TARGETS["debian12-amd64"]


def manifest_of(bundle: Path) -> Manifest:
    return parse_manifest((bundle / "manifest.json").read_bytes())


def test_the_images_are_those_of_the_other_target(bundle: Path, bundle12: Path, locks: Locks) -> None:
    if locks.local_debs or os.environ.get("MOAT_TEST_BUNDLE"):
        pytest.skip("the other bundle is not of the committed locks")
    images = {i.name: i.id for i in manifest_of(bundle12).images}
    assert set(images) == {"gateway", "minio", "nginx", "valkey"}
    assert images == {i.name: i.id for i in manifest_of(bundle).images if i.name in images}


def test_what_hosts_install_is_of_the_target(bundle12: Path) -> None:
    files = manifest_of(bundle12).files
    debs = {f.component: f for f in files if f.kind == "deb"}
    assert {"nginx", "redis-server", "nftables", "openssl", "python3-venv", "iproute2", "docker.io"} <= set(debs)
    assert not {"valkey-server", "docker-cli"} & set(debs)
    other = [f.component for f in debs.values() if not re.match(r"debian(-security)?:bookworm(-security)?/", f.source)]
    assert other == ["docker-compose"], "Compose 2 is not in Debian 12"
    release = (bundle12 / "debs" / "Release").read_text("utf-8")
    assert "\nCodename: bookworm\n" in release
    sbom = (bundle12 / "sbom" / "debs.cdx.json").read_text("utf-8")
    assert "distro=debian-12" in sbom
    assert "distro=debian-13" not in sbom


def test_every_wheel_loads_in_the_targets_python(bundle12: Path) -> None:
    tags = set(target_tags(TARGET))
    wheels = [p.name for p in (bundle12 / "wheels").glob("*.whl")]
    assert len(wheels) > 100
    assert [name for name in wheels if not parse_wheel_filename(name)[3] & tags] == []
    assert any("-cp311-cp311-" in name for name in wheels)


@pytest.mark.parametrize(("asked", "code"), [("debian12-amd64", 0), ("debian13-amd64", 10)])
def test_verify_takes_each_target_for_what_it_is(bundle12: Path, tmp_path: Path, asked: str, code: int) -> None:
    """By moat.pyz alone: signed here with a throwaway key, verified by the program that travels."""
    moat = [sys.executable, "-m", "moat"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    made = [*moat, "keys", "new", "--dir", str(tmp_path), "--no-passphrase"]
    subprocess.run(made, env=env, check=True, capture_output=True)
    sign = [*moat, "sign", str(bundle12), "--key", str(tmp_path / "moat.key")]
    subprocess.run(sign, env=env, check=True, capture_output=True)
    argv = [sys.executable, "-I", str(bundle12 / "moat.pyz"), "verify", str(bundle12)]
    argv += ["--key", str(tmp_path / "moat.pub")]
    done = subprocess.run([*argv, "--target", asked, "--json"], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    said = json.loads(done.stdout)
    if code == 0:
        assert said["bundle"]["target"] == "debian12-amd64"
    else:
        assert said["problems"][0]["found"] == "debian12-amd64"


def test_two_builds_for_debian_12_are_identical(bundle12: Path, tmp_path: Path) -> None:
    again = moat_build(tmp_path, profile="site", target=TARGET.name, env={"TZ": "Asia/Kolkata", "LC_ALL": "C"})
    assert (again / "manifest.json").read_bytes() == (bundle12 / "manifest.json").read_bytes()
    subprocess.run(["rm", "-rf", str(again)], check=True)


def test_the_control_environment_installs_and_runs_with_no_network(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As on a site: this host's own Python, pip from its wheel file, every wheel by hash, ansible run once."""
    ours = "{}.{}".format(*sys.version_info)
    target = next((t for t in TARGETS.values() if t.python == ours), None)
    if target is None:
        pytest.skip(f"no target has Python {ours}")
    name = {"debian13-amd64": "bundle", "debian12-amd64": "bundle12"}[target.name]
    wheels = request.getfixturevalue(name) / "wheels"
    (pip,) = wheels.glob("pip-*.whl")
    venv = tmp_path / "control"
    # The base interpreter: a virtual environment made from another one would share its packages' place.
    python = str(Path(sys.base_prefix) / "bin" / f"python{ours}")
    subprocess.run([python, "-m", "venv", "--without-pip", str(venv)], check=True)
    offline = ["unshare", "--net"]
    install = [str(venv / "bin/python"), f"{pip}/pip", "install", "--no-index", "--require-hashes", "--no-deps"]
    install += ["--disable-pip-version-check", "--find-links", str(wheels)]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    asked = [*offline, *install, "-r", str(wheels / "control-requirements.txt")]
    done = subprocess.run(asked, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = [*offline, str(venv / "bin/ansible"), "localhost", "-i", "localhost,", "-c", "local"]
    said = subprocess.run([*run, "-m", "ansible.builtin.ping"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert '"ping": "pong"' in said.stdout
    locked = {e.name: e.version for e in active_locks("site", target.name).wheels if "control" in e.uses}
    freeze = [str(venv / "bin/python"), f"{pip}/pip", "freeze", "--all"]
    found = subprocess.run(freeze, capture_output=True, text=True, env=env, check=True).stdout.lower()
    assert f"ansible-core=={locked['ansible-core']}" in found
    assert len(found.split()) == len(locked)
