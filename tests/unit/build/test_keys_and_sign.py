# SPDX-License-Identifier: Apache-2.0
"""Proves how the release key is made, kept and used: modes, no overwriting, no secret in outputs, equal signatures."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest
from tests.unit.site.bundles import make_bundle, run_moat

from moat import minisign
from moat.build.keys import new_keys
from moat.build.sign import sign_manifest
from moat.errors import BadManifest, KeyProblem, UnsafePath
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_key_is_private_and_complete(tmp_path: Path) -> None:
    done = run_moat("keys", "new", "--dir", str(tmp_path / "keys"), "--no-passphrase", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert mode(tmp_path / "keys") == 0o700
    assert mode(tmp_path / "keys/moat.key") == 0o600
    secret = minisign.parse_secret_key((tmp_path / "keys/moat.key").read_bytes(), None)
    assert secret.public_key.to_string() == told["public_key"]
    assert (tmp_path / "keys/moat.pub").read_bytes() == secret.public_key.to_bytes()
    shown = run_moat("keys", "show", "--dir", str(tmp_path / "keys"), "--json")
    assert json.loads(shown.stdout) == told


def test_no_output_holds_the_secret(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle", tmp_path / "keys")
    seed = made.secret.seed
    outputs = [
        run_moat("keys", "show", "--dir", str(made.keys)),
        run_moat("sign", str(made.path), "--key", str(made.keys / "moat.key")),
        run_moat("sign", str(made.path), "--key", str(made.keys / "moat.key"), "--json"),
        run_moat("sign", "/nonexistent", "--key", str(made.keys / "moat.key"), "--debug"),
    ]
    line = (made.keys / "moat.key").read_text().splitlines()[1]
    for done in outputs:
        text = done.stdout + done.stderr
        for secret in (seed.hex(), base64.b64encode(seed).decode()[:40], repr(seed), line):
            assert secret not in text


@pytest.mark.parametrize("there", ["moat.key", "moat.pub"])
def test_a_key_is_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"precious")
    done = run_moat("keys", "new", "--dir", str(tmp_path), "--no-passphrase", "--json")
    assert done.returncode == KeyProblem.exit_code
    assert json.loads(done.stdout)["problems"][0]["kind"] == "key-problem"
    assert (tmp_path / there).read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == [there], "nothing half-made is left"


def test_a_dangling_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "moat.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyProblem):
        new_keys(tmp_path, None)
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_terminal_a_passphrase_must_come_from_a_file(tmp_path: Path) -> None:
    done = run_moat("keys", "new", "--dir", str(tmp_path))
    assert done.returncode == KeyProblem.exit_code
    assert "--passphrase-file" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\n", b"\nsecond line"])
def test_an_empty_passphrase_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "phrase"
    file.write_bytes(content)
    file.chmod(0o600)
    done = run_moat("keys", "new", "--dir", str(tmp_path / "keys"), "--passphrase-file", str(file))
    assert done.returncode == KeyProblem.exit_code
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("open_mode", [0o640, 0o604, 0o620, 0o644, 0o610])
def test_a_secret_key_that_others_may_touch_is_refused(tmp_path: Path, open_mode: int) -> None:
    made = make_bundle(tmp_path / "bundle", tmp_path / "keys")
    (made.keys / "moat.key").chmod(open_mode)
    with pytest.raises(KeyProblem, match="open to others"):
        sign_manifest(made.path, made.keys / "moat.key", None)


def test_signing_twice_gives_the_same_file(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle", tmp_path / "keys")
    first = (made.path / SIGNATURE_NAME).read_bytes()
    (made.path / SIGNATURE_NAME).unlink()
    done = run_moat("sign", str(made.path), "--key", str(made.keys / "moat.key"), "--json")
    assert done.returncode == 0, done.stderr
    assert (made.path / SIGNATURE_NAME).read_bytes() == first
    assert b"\ntrusted comment: moat version=0.1.0 profile=demo target=debian13-amd64\n" in first
    assert mode(made.path / SIGNATURE_NAME) & 0o044 == 0o044, "the site's users read it"


def test_nothing_is_signed_that_a_site_would_refuse(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle", tmp_path / "keys")
    (made.path / SIGNATURE_NAME).unlink()
    good = (made.path / MANIFEST_NAME).read_bytes()
    for data, error in (
        (good[:-1], BadManifest),
        (b"{}", BadManifest),
        (good.replace(b"README.txt", b"../ADME.txt"), UnsafePath),
    ):
        (made.path / MANIFEST_NAME).write_bytes(data)
        with pytest.raises(error):
            sign_manifest(made.path, made.keys / "moat.key", None)
        assert not (made.path / SIGNATURE_NAME).exists()
    (made.path / MANIFEST_NAME).unlink()
    with pytest.raises(BadManifest):
        sign_manifest(made.path, made.keys / "moat.key", None)


@pytest.mark.parametrize("content", [b"", b"x\ny\n", b"\xff" * 200, b"untrusted comment: x\n" + b"A" * 212 + b"\n"])
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    made = make_bundle(tmp_path / "bundle", tmp_path / "keys")
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    done = run_moat("sign", str(made.path), "--key", str(file), "--no-passphrase")
    assert done.returncode == KeyProblem.exit_code
    assert "Traceback" not in done.stderr
