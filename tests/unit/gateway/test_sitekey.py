# SPDX-License-Identifier: Apache-2.0
"""Proves that site keys and signatures are minisign's own (against its program), and that nothing else is accepted."""

from __future__ import annotations

import base64
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moat_gateway import sitekey
from moat_gateway.errors import BadSignature, BadSiteKey
from moat_gateway.sitekey import PublicKey, SigningKey

MINISIGN = shutil.which("minisign")
needs_minisign = pytest.mark.skipif(MINISIGN is None, reason="minisign is not installed")
KEY = SigningKey.generate()
DATA = b'{"revision":7}\n'
SIGNATURE = KEY.sign(DATA, "moat-config revision=7")


def minisign(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    assert MINISIGN is not None
    return subprocess.run([MINISIGN, *args], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_a_signature_holds() -> None:
    found = sitekey.verify(DATA, SIGNATURE, [SigningKey.generate().public, KEY.public])
    assert found.key_id == KEY.public.key_id
    assert found.trusted_comment == "moat-config revision=7"


def test_files_are_written_once_with_their_modes(tmp_path: Path) -> None:
    secret, public = tmp_path / "site_key", tmp_path / "site_key.pub"
    KEY.write(secret, public)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert SigningKey.read(secret) == KEY
    assert sitekey.read_trusted(tmp_path) == (KEY.public,)
    with pytest.raises(BadSiteKey, match="in the way"):
        SigningKey.generate().write(secret, tmp_path / "other.pub")
    with pytest.raises(BadSiteKey, match="in the way"):
        SigningKey.generate().write(tmp_path / "other", public)
    assert not (tmp_path / "other").exists()
    assert SigningKey.read(secret) == KEY


def test_the_secret_is_in_no_repr() -> None:
    assert KEY.seed.hex() not in repr(KEY)
    assert repr(KEY.seed) not in repr(KEY)


@needs_minisign
def test_minisign_accepts_our_signature_and_our_key(tmp_path: Path) -> None:
    KEY.write(tmp_path / "k", tmp_path / "k.pub")
    (tmp_path / "x").write_bytes(DATA)
    (tmp_path / "x.minisig").write_bytes(SIGNATURE)
    done = minisign("-Vm", "x", "-p", "k.pub", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Trusted comment: moat-config revision=7" in done.stdout
    (tmp_path / "y").write_bytes(b"signed by minisign with our secret key")
    assert minisign("-Sm", "y", "-s", "k", "-t", "t", cwd=tmp_path).returncode == 0
    assert sitekey.verify((tmp_path / "y").read_bytes(), (tmp_path / "y.minisig").read_bytes(), [KEY.public])


@needs_minisign
@pytest.mark.parametrize("algorithm", [[], ["-l"]], ids=["prehashed", "legacy"])
def test_we_accept_minisigns_own_key_and_signatures(tmp_path: Path, algorithm: list[str]) -> None:
    assert minisign("-G", "-W", "-p", "k.pub", "-s", "k", cwd=tmp_path).returncode == 0
    (tmp_path / "x").write_bytes(DATA)
    assert minisign("-Sm", "x", "-s", "k", "-t", "why not", *algorithm, cwd=tmp_path).returncode == 0
    trusted = sitekey.read_trusted(tmp_path)
    found = sitekey.verify(DATA, (tmp_path / "x.minisig").read_bytes(), trusted)
    assert found.trusted_comment == "why not"
    assert SigningKey.read(tmp_path / "k").public == trusted[0]


@needs_minisign
def test_a_key_with_a_passphrase_is_named_as_such(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(MINISIGN), "-G", "-p", "k.pub", "-s", "k"], cwd=tmp_path, input=b"pass\npass\n", capture_output=True
    )
    if done.returncode != 0:
        pytest.skip("minisign asks for a terminal or for more memory than there is")
    with pytest.raises(BadSiteKey, match="passphrase"):
        SigningKey.read(tmp_path / "k")


def test_another_signer_is_named() -> None:
    other = SigningKey.generate()
    with pytest.raises(BadSignature, match="not trusted") as caught:
        sitekey.verify(DATA, SIGNATURE, [other.public])
    assert KEY.public.key_id in str(caught.value.found)
    assert other.public.key_id in str(caught.value.expected)


def test_another_key_of_the_same_id_does_not_count() -> None:
    imposter = SigningKey.generate()
    twin = SigningKey(PublicKey(KEY.public.raw_id, imposter.public.key), imposter.seed)
    with pytest.raises(BadSignature, match="does not match"):
        sitekey.verify(DATA, twin.sign(DATA, "moat-config revision=7"), [KEY.public])
    # Two trusted keys with one id: each is tried.
    assert sitekey.verify(DATA, SIGNATURE, [twin.public, KEY.public])


@hypothesis_settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(SIGNATURE) - 1), bits=st.integers(1, 255))
def test_no_changed_byte_of_a_signature_is_accepted(at: int, bits: int) -> None:
    changed = bytearray(SIGNATURE)
    changed[at] ^= bits
    with pytest.raises(BadSignature):
        sitekey.verify(DATA, bytes(changed), [KEY.public])


@hypothesis_settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=600))
def test_nothing_else_is_a_signature_or_a_key(raw: bytes) -> None:
    with pytest.raises(BadSignature):
        sitekey.verify(DATA, raw, [KEY.public])
    with pytest.raises(BadSiteKey):
        PublicKey.parse(raw, "k.pub")
    with pytest.raises(BadSiteKey):
        SigningKey.parse(raw, "k")


def test_spellings_that_mean_the_same_are_refused() -> None:
    for other in (
        SIGNATURE.replace(b"\n", b"\r\n"),
        SIGNATURE + b"\n",
        SIGNATURE[:-1],
        SIGNATURE.replace(b"signature from", b"signature  from"),
        SIGNATURE + SIGNATURE,
        b"",
    ):
        with pytest.raises(BadSignature):
            sitekey.verify(DATA, other, [KEY.public])


def test_the_folder_of_trusted_keys(tmp_path: Path) -> None:
    with pytest.raises(BadSiteKey, match="no site key"):
        sitekey.read_trusted(tmp_path)
    with pytest.raises(BadSiteKey, match="cannot be read"):
        sitekey.read_trusted(tmp_path / "missing")
    (tmp_path / "README").write_text("not a key")
    (tmp_path / "a.pub").write_bytes(KEY.public.to_bytes())
    (tmp_path / "b.pub").write_text(SigningKey.generate().public.text)  # the key alone
    assert len(sitekey.read_trusted(tmp_path)) == 2
    (tmp_path / "c.pub").write_text("RWnot a key")
    with pytest.raises(BadSiteKey, match="not a minisign public key") as caught:
        sitekey.read_trusted(tmp_path)
    assert str(caught.value.path).endswith("c.pub")
    (tmp_path / "c.pub").unlink()
    (tmp_path / "d.pub").mkdir()
    with pytest.raises(BadSiteKey, match="cannot be read"):
        sitekey.read_trusted(tmp_path)


def test_a_damaged_secret_key_is_not_shown(tmp_path: Path) -> None:
    lines = KEY.to_bytes().decode().splitlines()
    raw = bytearray(base64.b64decode(lines[1]))
    raw[100] ^= 1  # the public half in it
    (tmp_path / "k").write_text(f"{lines[0]}\n{base64.b64encode(raw).decode()}\n")
    with pytest.raises(BadSiteKey, match="damaged") as caught:
        SigningKey.read(tmp_path / "k")
    assert lines[1][20:40] not in caught.value.one_line()
    (tmp_path / "p").write_bytes(KEY.public.to_bytes())
    with pytest.raises(BadSiteKey, match="not a minisign secret key"):
        SigningKey.read(tmp_path / "p")
