# SPDX-License-Identifier: Apache-2.0
"""Proves that the parts of a built bundle serve: SBOMs, notices, wheel house, apt repository, tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from moat.build.locks import Locks
from moat.manifest import parse_manifest


def sboms(bundle: Path) -> dict[str, dict[str, object]]:
    return {p.name: json.loads(p.read_text("utf-8")) for p in sorted((bundle / "sbom").glob("*.cdx.json"))}


def test_there_is_a_valid_sbom_for_every_image_and_for_both_package_houses(bundle: Path) -> None:
    names = {i.name for i in parse_manifest((bundle / "manifest.json").read_bytes()).images}
    found = sboms(bundle)
    assert set(found) == {f"image-{n}.cdx.json" for n in names} | {"wheels.cdx.json", "debs.cdx.json"}
    for path in (bundle / "sbom").glob("*.cdx.json"):
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(path.read_text("utf-8")) is None, path.name


def test_the_image_sboms_name_the_image_and_all_its_locked_packages(bundle: Path, locks: Locks) -> None:
    ids = {i.name: i.id for i in parse_manifest((bundle / "manifest.json").read_bytes()).images}
    for name, image_id in ids.items():
        document = json.loads((bundle / f"sbom/image-{name}.cdx.json").read_text("utf-8"))
        assert document["metadata"]["component"]["hashes"] == [
            {"alg": "SHA-256", "content": image_id.removeprefix("sha256:")}
        ]
        parts = {(c["name"], c["version"]) for c in document["components"]}
        assert {(e.name, e.version) for e in locks.used_by(f"image:{name}") if e.kind == "deb"} <= parts
        assert all(c["purl"] and c["licenses"] for c in document["components"])
    minio = json.loads((bundle / "sbom/image-minio.cdx.json").read_text("utf-8"))
    by_name = {c["name"]: c for c in minio["components"]}
    assert by_name["minio"]["licenses"] == [{"license": {"id": "AGPL-3.0-only"}}]
    assert len([c for c in by_name if "/" in c]) > 100, "the modules that MinIO was linked from"


def test_notices_name_every_component_and_hold_the_main_licences(bundle: Path) -> None:
    text = (bundle / "THIRD-PARTY-NOTICES.txt").read_text("utf-8")
    for document in sboms(bundle).values():
        for c in document["components"]:  # type: ignore[attr-defined]
            assert f" {c['name']} {c['version']}: " in text, c["purl"]
    for line in ("GNU AFFERO GENERAL PUBLIC LICENSE", "Apache License", "MIT License", "Mozilla Public License"):
        assert line in text


def test_the_source_of_what_the_agpl_covers_is_there(bundle: Path, locks: Locks) -> None:
    source = next((bundle / "sources").glob("minio-*.zip"))
    entry = next(e for e in locks.go if e.kind == "go-module" and e.name == "github.com/minio/minio")
    assert hashlib.sha256(source.read_bytes()).hexdigest() == entry.sha256


def test_the_wheel_house_installs_by_hash_with_no_network(bundle: Path, tmp_path: Path) -> None:
    """Resolved and unpacked for the target's Python by uv, in a namespace without a network."""
    uv = Path(sys.executable).parent / "uv"
    wheels = bundle / "wheels"
    argv = [str(uv), "pip", "install", "--no-config", "--no-cache", "--offline", "--no-index", "--no-deps"]
    argv += ["--require-hashes", "--find-links", str(wheels), "--python-version", "3.13"]
    argv += ["--python-platform", "x86_64-manylinux_2_40", "--only-binary", ":all:"]
    argv += ["--target", str(tmp_path / "site"), "-r", str(wheels / "requirements.txt")]
    done = subprocess.run(["unshare", "--net", *argv], capture_output=True, text=True, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "site/litellm/__init__.py").is_file()
    assert (tmp_path / "site/moat_gateway/__init__.py").is_file()
    hashes = {hashlib.sha256(p.read_bytes()).hexdigest(): p.name for p in wheels.glob("*.whl")}
    listed = {
        name: re.findall(r"^[a-z0-9.-]+==\S+ --hash=sha256:([0-9a-f]{64})$", (wheels / name).read_text("utf-8"), re.M)
        for name in ("requirements.txt", "control-requirements.txt")
    }
    # Every wheel is in one of the two lists, but for pip, which installs them.
    (pip,) = [name for name in hashes.values() if name.startswith("pip-")]
    assert {hashes[h] for of in listed.values() for h in of} == set(hashes.values()) - {pip}
    assert len(listed["requirements.txt"]) > 100
    assert "ansible" not in (wheels / "requirements.txt").read_text("utf-8")
    assert not any("litellm_enterprise" in name for name in hashes.values())


def test_the_installer_and_the_playbooks_travel(bundle: Path) -> None:
    listed = {f.path: f for f in parse_manifest((bundle / "manifest.json").read_bytes()).files}
    assert (listed["install.sh"].kind, listed["install.sh"].component) == ("program", "install")
    assert (bundle / "install.sh").stat().st_mode & 0o777 == 0o755
    assert (bundle / "install.sh").read_bytes().startswith(b"#!/bin/sh\n")
    playbooks = {path for path, f in listed.items() if f.kind == "ansible"}
    assert playbooks == {path for path in listed if path.startswith("ansible/")}
    assert {"ansible/site.yml", "ansible/ansible.cfg", "ansible/inventory/localhost.yml"} <= playbooks
    assert not [p for p in playbooks if "/tests/" in p or p.endswith((".pyc", "install.sh"))]


@pytest.fixture
def apt(bundle: Path, tmp_path: Path) -> list[str]:
    """apt-get with a private state whose only source is the bundle's folder, as README.txt writes it."""
    for name in ("state/lists/partial", "cache/archives/partial", "etc"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "status").write_text("", "utf-8")
    (tmp_path / "etc/moat.list").write_text(f"deb [trusted=yes] file:{bundle / 'debs'} ./\n", "utf-8")
    options = {
        "Dir::Etc::sourcelist": tmp_path / "etc/moat.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": tmp_path / "state",
        "Dir::State::status": tmp_path / "status",
        "Dir::Cache": tmp_path / "cache",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
    }
    return ["unshare", "--net", "apt-get", *[x for k, v in options.items() for x in ("-o", f"{k}={v}")]]


def test_apt_reads_the_repository_and_takes_a_package_from_it(apt: list[str], bundle: Path, tmp_path: Path) -> None:
    update = subprocess.run([*apt, "update"], capture_output=True, text=True)
    assert update.returncode == 0, update.stderr
    assert "W:" not in update.stderr, update.stderr
    got = subprocess.run([*apt, "download", "docker.io", "nftables"], capture_output=True, text=True, cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    for path in tmp_path.glob("*.deb"):
        assert (bundle / "debs" / path.name).read_bytes() == path.read_bytes()
    assert len(list(tmp_path.glob("*.deb"))) == 2


def test_apt_refuses_a_package_that_was_changed(apt: list[str], bundle: Path, tmp_path: Path) -> None:
    """``trusted=yes`` trusts the index; each package is still compared with it."""
    copy = tmp_path / "debs"
    copy.mkdir()
    for path in (bundle / "debs").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    changed = next(copy.glob("nftables_*.deb"))
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    (tmp_path / "etc/moat.list").write_text(f"deb [trusted=yes] file:{copy} ./\n", "utf-8")
    assert subprocess.run([*apt, "update"], capture_output=True).returncode == 0
    got = subprocess.run([*apt, "download", "nftables"], capture_output=True, text=True, cwd=tmp_path / "state")
    assert got.returncode != 0


def test_tokenizers_are_the_ones_that_the_index_names(bundle: Path) -> None:
    index = json.loads((bundle / "tokenizers/index.json").read_text("utf-8"))
    assert set(index) >= {"cl100k_base", "o200k_base", "p50k_base"}
    for entry in index.values():
        data = (bundle / "tokenizers" / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert len(data) > 500_000


def test_the_manifest_gives_every_file_a_kind_a_licence_and_a_source(bundle: Path) -> None:
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    assert all(f.kind and f.component and f.version and f.license and f.source for f in manifest.files)
    assert not [f.path for f in manifest.files if "://" in f.source]
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert on_disk - {f.path for f in manifest.files} <= {"manifest.json", "manifest.json.minisig"}


def test_the_readme_names_files_that_are_there(bundle: Path) -> None:
    text = (bundle / "README.txt").read_text("utf-8")
    assert max(len(line) for line in text.splitlines()) <= 120
    for name in re.findall(r"^   ([a-z.A-Z-]+)[/ ]", text.split("What is here")[1], re.MULTILINE):
        assert (bundle / name).exists(), name
