# SPDX-License-Identifier: Apache-2.0
"""Proves that the real ``minisign`` and Moat agree: each verifies what the other signed, with keys of either.

The passphrase goes to minisign on its standard input, which it reads when that is no terminal.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.site.bundles import Made, make_bundle, run_moat

from moat import minisign
from moat.build.keys import new_keys
from moat.build.sign import make_signature, sign_manifest
from moat.errors import BadSignature, KeyProblem
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME

pytestmark = pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")

PASSPHRASE = b"correct horse battery staple"
COMMENT = "moat version=0.1.0 profile=demo target=debian13-amd64"


def program(*argv: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["minisign", *map(str, argv)], input=stdin, capture_output=True, timeout=120)


def must(*argv: str | Path, stdin: bytes = b"") -> None:
    done = program(*argv, stdin=stdin)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys made by minisign: open.* without a passphrase, locked.* with one."""
    folder = tmp_path_factory.mktemp("theirs")
    must("-G", "-W", "-p", folder / "open.pub", "-s", folder / "open.key")
    must("-G", "-p", folder / "locked.pub", "-s", folder / "locked.key", stdin=(PASSPHRASE + b"\n") * 2)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys made by moat, the same way; zero/ is an open one whose id begins with a zero (one in 16 does)."""
    folder = tmp_path_factory.mktemp("ours")
    new_keys(folder / "open", None)
    new_keys(folder / "locked", PASSPHRASE)
    while not new_keys(folder / "zero", None).id_text.startswith("0"):
        shutil.rmtree(folder / "zero")
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_bundle(tmp_path / "bundle", tmp_path / "keys")


def test_minisign_verifies_our_bundle(made: Made) -> None:
    must("-V", "-H", "-p", made.public, "-m", made.path / MANIFEST_NAME)
    with (made.path / MANIFEST_NAME).open("ab") as f:
        f.write(b" ")
    assert program("-V", "-p", made.public, "-m", made.path / MANIFEST_NAME).returncode != 0


@pytest.mark.parametrize("name", ["open", "locked", "zero"])
def test_our_keys_work_in_minisign(ours: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content\n")
    secret = PASSPHRASE + b"\n" if name == "locked" else b""
    must("-S", "-s", ours / name / "moat.key", "-m", file, "-t", COMMENT, stdin=secret)
    public = minisign.parse_public_key_file((ours / name / "moat.pub").read_bytes(), "moat.pub")
    signature = minisign.parse_signature((tmp_path / "file.minisig").read_bytes())
    minisign.verify(public, b"content\n", signature)
    assert signature.trusted_comment == COMMENT
    must("-V", "-p", ours / name / "moat.pub", "-m", file)
    # The public half that minisign derives from our secret key is our file, but for zeros at the front of its id.
    must("-R", "-s", ours / name / "moat.key", "-p", tmp_path / "derived.pub", stdin=secret)
    short = public.id_text.lstrip("0")
    assert (tmp_path / "derived.pub").read_text() == (ours / name / "moat.pub").read_text().replace(
        public.id_text, short, 1
    )


@pytest.mark.parametrize("name", ["open", "locked"])
def test_their_keys_sign_a_bundle_byte_for_byte_as_they_do(theirs: Path, made: Made, name: str) -> None:
    passphrase = PASSPHRASE if name == "locked" else None
    sign_manifest(made.path, theirs / f"{name}.key", passphrase)
    mine = (made.path / SIGNATURE_NAME).read_bytes()
    must("-V", "-H", "-p", theirs / f"{name}.pub", "-m", made.path / MANIFEST_NAME)
    (made.path / SIGNATURE_NAME).unlink()
    stdin = PASSPHRASE + b"\n" if passphrase else b""
    must("-S", "-s", theirs / f"{name}.key", "-m", made.path / MANIFEST_NAME, "-t", COMMENT, stdin=stdin)
    assert (made.path / SIGNATURE_NAME).read_bytes() == mine
    done = made.verify("--json", key=theirs / f"{name}.pub")
    assert done.returncode == 0, done.stdout


def test_a_wrong_passphrase_opens_no_key(theirs: Path, ours: Path) -> None:
    for key in (theirs / "locked.key", ours / "locked" / "moat.key"):
        with pytest.raises(KeyProblem, match="passphrase is wrong"):
            minisign.parse_secret_key(key.read_bytes(), PASSPHRASE + b"!")
    assert program("-S", "-s", ours / "locked/moat.key", "-m", theirs / "open.pub", stdin=b"wrong\n").returncode != 0


def test_the_command_line_takes_a_passphrase_file(made: Made, ours: Path, tmp_path: Path) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_bytes(PASSPHRASE + b"\n")
    phrase.chmod(0o600)
    key = str(ours / "locked/moat.key")
    done = run_moat("sign", str(made.path), "--key", key, "--passphrase-file", str(phrase))
    assert done.returncode == 0, done.stderr
    must("-V", "-H", "-p", ours / "locked/moat.pub", "-m", made.path / MANIFEST_NAME)
    assert run_moat("sign", str(made.path), "--key", key).returncode == KeyProblem.exit_code
    phrase.chmod(0o644)
    assert run_moat("sign", str(made.path), "--key", key, "--passphrase-file", str(phrase)).returncode == 36


@pytest.mark.parametrize("size", [0, 1, 64, 1_000_000])
def test_every_size_and_both_forms(theirs: Path, tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    file = tmp_path / "file"
    file.write_bytes(content)
    public = minisign.parse_public_key_file((theirs / "open.pub").read_bytes(), "open.pub")
    secret = minisign.parse_secret_key((theirs / "open.key").read_bytes(), None)
    for form, prehashed in (([], True), (["-l"], False)):
        must("-S", *form, "-s", theirs / "open.key", "-m", file, "-x", tmp_path / "sig")
        raw = (tmp_path / "sig").read_bytes()
        signature = minisign.parse_signature(raw)
        assert (signature.prehashed, signature.to_bytes()) == (prehashed, raw)
        minisign.verify(public, content, signature)
        with pytest.raises(BadSignature):
            minisign.verify(public, content + b"x", signature)
    (tmp_path / "ours").write_bytes(make_signature(secret, content, "a comment of ours").to_bytes())
    must("-V", "-H", "-p", theirs / "open.pub", "-m", file, "-x", tmp_path / "ours")


def test_a_bundle_in_the_old_form_is_refused_in_words(theirs: Path, made: Made) -> None:
    must("-S", "-l", "-s", theirs / "open.key", "-m", made.path / MANIFEST_NAME, "-t", COMMENT)
    done = made.verify(key=theirs / "open.pub")
    assert done.returncode == 3
    assert "old form" in done.stderr
