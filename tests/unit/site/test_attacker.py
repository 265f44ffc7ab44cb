# SPDX-License-Identifier: Apache-2.0
"""Proves that each thing an attacker may do to a medium meets its own refusal, through the real command line.

``moat.pyz`` runs in a process of its own, isolated, on the distribution's Python, as it would at a site. That an
untouched bundle passes is part of it: a verifier that refuses everything would pass every other test here.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.site.attacker import WITH_KEY, WITHOUT_KEY, Attack, flip
from tests.unit.site.bundles import CREATED, SMALL, Made, make_bundle

from moat.console import Console
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME
from moat.minisign import parse_public_key_file
from moat.site.verify import examine_bundle

FIELDS = {"kind", "path", "message", "found", "expected", "hint"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("original")
    return make_bundle(folder / "bundle", folder / "keys")


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """A fresh copy of the bundle for one attack."""
    shutil.copytree(original.path, tmp_path / "medium" / "bundle")
    return Made(tmp_path / "medium" / "bundle", original.keys)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the one object on stdout; anything else there fails."""
    assert "Traceback" not in done.stderr, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    assert value["exit"] == done.returncode
    return value


def refused(made: Made, kind: str, code: int, *more: str, path: str | None = None) -> dict[str, Any]:
    """Verify and assert that the worst refusal is of ``kind``; return the answer."""
    done = made.verify("--json", *more)
    result = answer(done)
    assert (result["ok"], done.returncode) == (False, code), done.stdout + done.stderr
    first = result["problems"][0]
    assert first["kind"] == kind
    for problem in result["problems"]:
        assert set(problem) == FIELDS
        assert problem["message"]
        assert problem["hint"], f"no word on what to do: {problem}"
    if path is not None:
        assert path in [p["path"] for p in result["problems"]]
    return result


def test_an_untouched_bundle_passes(made: Made) -> None:
    done = made.verify("--json")
    result = answer(done)
    assert (done.returncode, result["ok"], result["problems"]) == (0, True, [])
    assert result["bundle"] == {"version": "0.1.0", "profile": "demo", "target": "debian13-amd64"}
    assert result["files"] == len(SMALL) + 1


def test_a_clean_bundle_is_one_line(made: Made) -> None:
    done = made.verify()
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("verified: moat-0.1.0-demo-debian13-amd64, 8 files, ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("attack", WITHOUT_KEY, ids=lambda a: a.name)
def test_whoever_holds_the_medium_is_refused(attack: Attack, made: Made) -> None:
    attack.do(made, random.Random(attack.name))
    refused(made, attack.kind, attack.code, path=attack.path)


@pytest.mark.parametrize("attack", WITH_KEY, ids=lambda a: a.name)
def test_what_the_key_signed_is_still_checked(attack: Attack, made: Made) -> None:
    attack.do(made, random.Random(attack.name))
    refused(made, attack.kind, attack.code, path=attack.path)


def test_no_byte_of_manifest_or_signature_is_free(original: Made, tmp_path: Path) -> None:
    """A bit of every byte of the signature and of every fifth of the manifest, in this process (some 800 times)."""
    shutil.copytree(original.path, tmp_path / "b")
    keys = [parse_public_key_file(original.public.read_bytes(), "moat.pub")]
    for name in (SIGNATURE_NAME, MANIFEST_NAME):
        path = tmp_path / "b" / name
        good = path.read_bytes()
        for offset in range(0, len(good), 1 if name == SIGNATURE_NAME else 5):
            flip(path, offset, offset % 8)
            report = examine_bundle(tmp_path / "b", keys, Console(quiet=True))
            assert report.exit_code in (3, 4), f"{name} byte {offset}"
            assert report.signed is None, "nothing unsigned may be shown"
            path.write_bytes(good)
    assert examine_bundle(tmp_path / "b", keys, Console(quiet=True)).exit_code == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*SMALL, "moat.pyz"]), st.integers(0, 2**32), st.integers(0, 7))
def test_no_bit_of_any_file_is_free(original: Made, name: str, offset: int, bit: int) -> None:
    path = original.path / name
    good = path.read_bytes()
    if not good:
        return
    keys = [parse_public_key_file(original.public.read_bytes(), "moat.pub")]
    try:
        flip(path, offset % len(good), bit)
        report = examine_bundle(original.path, keys, Console(quiet=True))
    finally:
        path.write_bytes(good)
    assert [(p.kind, p.path) for p in report.problems] == [("changed", name)]


# --- keys ---


def test_a_key_on_the_medium_never_counts(made: Made) -> None:
    shutil.copy(made.public, made.path / "moat.pub")
    done = made.verify("--json", key=made.path / "moat.pub")
    assert answer(done)["problems"][0]["kind"] == "unknown-key"
    assert done.returncode == 4
    assert "does not count" in done.stderr


def test_a_link_to_a_key_on_the_medium_does_not_count_either(made: Made, tmp_path: Path) -> None:
    (tmp_path / "innocent.pub").symlink_to(made.path / "moat.pub")
    shutil.copy(made.public, made.path / "moat.pub")
    assert made.verify("--json", key=tmp_path / "innocent.pub").returncode == 4


def test_pinned_keys_count_when_none_is_given(made: Made, tmp_path: Path) -> None:
    argv = made.verify_argv("--json", "--trusted-keys", str(tmp_path / "trusted"))
    i = argv.index("--key")
    del argv[i : i + 2]
    assert subprocess.run(argv, capture_output=True, text=True).returncode == 4
    (tmp_path / "trusted").mkdir()
    shutil.copy(made.public, tmp_path / "trusted" / "release.pub")
    assert subprocess.run(argv, capture_output=True, text=True).returncode == 0


def test_the_key_may_be_given_as_its_string(made: Made) -> None:
    string = made.public.read_text().splitlines()[1]
    assert made.verify(key=string).returncode == 0
    flipped = string[:20] + ("A" if string[20] != "A" else "B") + string[21:]
    assert made.verify(key=flipped).returncode == 3


def test_an_unusable_key_is_said_in_the_same_object(made: Made) -> None:
    result = answer(made.verify("--json", key="/nonexistent/moat.pub"))
    assert (result["exit"], result["bundle"], result["problems"][0]["kind"]) == (36, None, "key-problem")


# --- age and target ---


def _state(folder: Path, version: str, created: int) -> tuple[str, str]:
    folder.mkdir(exist_ok=True)
    record = {"version": version, "profile": "demo", "target": "debian13-amd64", "manifest_sha256": "0" * 64}
    (folder / "installed.json").write_text(json.dumps({**record, "created": created}))
    return "--state-dir", str(folder)


@pytest.mark.parametrize(
    ("installed", "created", "code"),
    [
        ("0.1.0", CREATED, 0),
        ("0.0.9", CREATED + 1, 0),
        ("0.1.0-rc.1", CREATED, 0),
        ("0.1.1", CREATED, 11),
        ("0.10.0", CREATED, 11),
        ("0.1.0", CREATED + 1, 11),
    ],
)
def test_a_replayed_older_bundle_is_refused(
    made: Made, tmp_path: Path, installed: str, created: int, code: int
) -> None:
    state = _state(tmp_path / "state", installed, created)
    done = made.verify("--json", *state)
    assert done.returncode == code, done.stdout
    if code:
        result = answer(done)
        assert result["problems"][0]["kind"] == "older"
        assert result["bundle"]["version"] == "0.1.0"
        assert made.verify("--allow-older", *state).returncode == 0


def test_a_damaged_record_does_not_switch_the_age_check_off(made: Made, tmp_path: Path) -> None:
    (tmp_path / "installed.json").write_text("{}")
    refused(made, "unreadable", 12, "--state-dir", str(tmp_path))


def test_another_target_is_refused_only_if_one_is_asked_for(made: Made) -> None:
    refused(made, "wrong-target", 10, "--target", "debian12-amd64")
    assert made.verify("--target", "debian13-amd64").returncode == 0


# --- media that cannot be read ---


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_file_without_permission_is_unreadable(made: Made) -> None:
    (made.path / "README.txt").chmod(0)
    argv = made.verify_argv("--json")
    for folder in (made.path, *made.path.parents, made.keys, *made.keys.parents):
        if folder.stat().st_uid == 0 and folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    done = subprocess.run(argv, capture_output=True, text=True, user=65534, group=65534, extra_groups=[])
    result = answer(done)
    assert [(p["kind"], p["path"], p["found"]) for p in result["problems"]] == [
        ("unreadable", "README.txt", "Permission denied")
    ]
    assert done.returncode == 12


def _can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a mount namespace")
def test_an_input_output_error_is_unreadable(made: Made) -> None:
    """A real EIO: the memory of a process, which has no page at 0, is bound over a file of the same size (0)."""
    script = 'mount --bind /proc/$$/mem "$1/empty.txt" && shift && exec "$@"'
    argv = ["unshare", "-m", "sh", "-c", script, "sh", str(made.path), *made.verify_argv("--json")]
    done = subprocess.run(argv, capture_output=True, text=True)
    result = answer(done)
    assert [(p["kind"], p["path"], p["found"]) for p in result["problems"]] == [
        ("unreadable", "empty.txt", "Input/output error")
    ]
    assert done.returncode == 12


@pytest.mark.parametrize("path", ["nowhere", "bundle/README.txt"])
def test_a_path_that_is_no_folder_is_unreadable(made: Made, path: str) -> None:
    elsewhere = Made(made.path.parent / path, made.keys)
    refused(elsewhere, "unreadable", 12)


# --- several at once, and what the operator's terminal sees ---


def test_every_bad_file_has_its_row_and_the_worst_names_the_exit_code(made: Made) -> None:
    (made.path / "README.txt").unlink()
    flip(made.path / "images/gateway.tar", 5, 5)
    (made.path / "evil").write_bytes(b"x")
    (made.path / "link").symlink_to("evil")
    result = refused(made, "missing", 5)
    assert [(p["kind"], p["path"]) for p in result["problems"]] == [
        ("missing", "README.txt"),
        ("changed", "images/gateway.tar"),
        ("extra", "evil"),
        ("unsafe-path", "link"),
    ]
    text = made.verify()
    assert text.returncode == 5
    assert text.stderr.count("error: ") == 4
    assert "NOT verified: 4 problems" in text.stdout


def test_file_names_cannot_draw_on_the_terminal(made: Made) -> None:
    names = [
        "\x1b]0;pwned\x07\x1b[2J\x1b[1;1Hverified",
        "a\nverified: all is well",
        "b\rverified",
        "c\u202etxt.exe",
        "\x9b2J",
    ]
    for name in names:
        (made.path / name).write_bytes(b"x")
    done = made.verify()
    shown = done.stdout + done.stderr
    assert done.returncode == 7
    for character in "\x1b\x07\r\u202e\x9b":
        assert character not in shown
    assert not any(line.startswith("verified") for line in shown.splitlines())
    rows = answer(made.verify("--json"))["problems"]
    assert {p["path"] for p in rows} == set(names), "machines get the exact name"


def test_a_huge_manifest_takes_little_memory(made: Made) -> None:
    os.truncate(made.path / MANIFEST_NAME, 8 * 1024**3)
    argv = ["/bin/sh", "-c", 'ulimit -v 400000; exec "$@"', "sh", *made.verify_argv("--json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert answer(done)["problems"][0]["kind"] == "bad-manifest"


def test_a_folder_with_far_too_many_entries_ends(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from moat.site import scan

    monkeypatch.setattr(scan, "MAX_ENTRIES", 50)
    for i in range(100):
        (made.path / f"x{i}").write_bytes(b"")
    keys = [parse_public_key_file(made.public.read_bytes(), "moat.pub")]
    report = examine_bundle(made.path, keys, Console(quiet=True))
    assert report.problems[0].kind == "extra"
    assert any("more than a bundle" in p.message for p in report.problems)


def test_an_attack_list_without_gaps() -> None:
    """Every kind of refusal that a medium can cause is caused by one attack at least."""
    kinds = {a.kind for a in WITHOUT_KEY + WITH_KEY}
    assert kinds == {"bad-signature", "unknown-key", "missing", "changed", "extra", "unsafe-path", "bad-manifest"}
    names = [a.name for a in WITHOUT_KEY + WITH_KEY]
    assert len(set(names)) == len(names)
