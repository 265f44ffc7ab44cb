# SPDX-License-Identifier: Apache-2.0
"""Proves that the OpenPGP signature of `moat apt-sign` is one that gpgv accepts, and only over the bytes that it

signed; that its Ed25519 is that of the cryptography package; and that the command makes what apt needs and no more.
What apt itself says on Debian 13 (sqv) is shown by the Molecule scenarios, which install from such a repository.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.unit.site.bundles import run_moat

from moat import ed25519
from moat.errors import ChangedFile, StageFailed
from moat.site import apt_sign
from moat.site.openpgp import Key, SigningKey, is_signed

GPGV = shutil.which("gpgv")
needs_gpgv = pytest.mark.skipif(GPGV is None, reason="needs gpgv, which every Debian 12 has")
DATE = "Mon, 23 Nov 2026 12:51:49 UTC"


def release(packages: bytes, date: str = DATE) -> str:
    digest = hashlib.sha256(packages).hexdigest()
    return f"Origin: Moat\nSuite: trixie\nDate: {date}\nSHA256:\n {digest} {len(packages)} Packages\n"


def gpgv(keyring: Path, signed: Path) -> tuple[int, str]:
    done = subprocess.run([str(GPGV), "--keyring", str(keyring), "--output", "-", str(signed)], capture_output=True)
    return done.returncode, done.stdout.decode() + done.stderr.decode()


def repository(folder: Path, packages: bytes = b"Package: a\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "Packages").write_bytes(packages)
    (folder / "Release").write_text(release(packages))
    (folder / "a_1_all.deb").write_bytes(b"a package")
    (folder / "notes.txt").write_bytes(b"no package")
    return folder


# --- Ed25519 ---


def test_signing_is_that_of_another_implementation() -> None:
    rng = random.Random(1)
    for length in [0, 1, 63, 64, 65, 1000]:
        seed, message = rng.randbytes(32), rng.randbytes(length)
        theirs = Ed25519PrivateKey.from_private_bytes(seed)
        ours = SigningKey(seed)
        assert ours.public == theirs.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        assert ours.sign(message) == theirs.sign(message)
        assert ed25519.verify(ours.public, message, ours.sign(message))


def test_the_private_half_is_not_in_the_repr() -> None:
    seed = bytes(range(32))
    assert seed.hex() not in repr(SigningKey(seed))
    assert repr(seed) not in repr(SigningKey(seed))


# --- OpenPGP ---

TEXTS = [
    "Origin: Moat\n",
    "- a line with a dash\n-----BEGIN\nplain\n",
    "blanks at the end  \t\nand none\n",
    "no line end",
    "umlauts äöü and 漢字\n",
    "\nempty lines\n\n\n",
]


@needs_gpgv
@pytest.mark.parametrize("text", TEXTS)
def test_gpgv_accepts_the_signature_and_returns_the_text(text: str, tmp_path: Path) -> None:
    for seed in range(8):  # leading zeros in R, S and the point come by chance
        key = Key(
            SigningKey(hashlib.sha256(text.encode() + bytes([seed])).digest()), "Test <test@example.net>", 1_795_438_309
        )
        (tmp_path / "key.gpg").write_bytes(key.public())
        (tmp_path / "signed").write_bytes(key.clear_sign(text))
        code, out = gpgv(tmp_path / "key.gpg", tmp_path / "signed")
        assert code == 0, out
        assert "Good signature" in out
        assert key.fingerprint.hex().upper() in out
        assert is_signed(text, key.clear_sign(text), key.public())


@needs_gpgv
def test_leading_zeros_of_every_number_are_left_out(tmp_path: Path) -> None:
    """One signature in 256 has an R or an S whose first byte is zero; OpenPGP numbers have no leading zeros."""
    short = 0
    for seed in range(400):
        key = Key(SigningKey(hashlib.sha256(b"%d" % seed).digest()), "t", 1)
        signed = key.clear_sign("x\n")
        assert is_signed("x\n", signed, key.public())
        raw = key._signing.sign(b"")
        if 0 in (raw[0], raw[32], key._signing.public[0]) or short < 1:
            short += 1
            (tmp_path / "key.gpg").write_bytes(key.public())
            (tmp_path / "signed").write_bytes(signed)
            assert gpgv(tmp_path / "key.gpg", tmp_path / "signed")[0] == 0
    assert short > 1


@needs_gpgv
def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    text = release(b"Package: a\n")
    key = Key(SigningKey(bytes(32)), "Test", 1_795_438_309)
    keyring, signed = tmp_path / "key.gpg", tmp_path / "signed"
    keyring.write_bytes(key.public())
    good = key.clear_sign(text)
    start = good.index(b"Origin")
    end = good.index(b"-----BEGIN PGP SIGNATURE")
    rng = random.Random(2)
    for place in rng.sample(range(start, end - 1), 25):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(7)
        signed.write_bytes(bad)
        assert gpgv(keyring, signed)[0] != 0, f"byte {place}"
        assert not is_signed(text, bytes(bad), key.public())
    other = Key(SigningKey(bytes([1] * 32)), "Test", 1_795_438_309)
    signed.write_bytes(other.clear_sign(text))
    assert gpgv(keyring, signed)[0] != 0
    assert not is_signed(text, other.clear_sign(text), key.public())


def test_the_own_check_survives_anything() -> None:
    text = "Origin: Moat\n"
    key = Key(SigningKey(bytes(32)), "Test", 5)
    good, ring = key.clear_sign(text), key.public()
    assert is_signed(text, good, ring)
    rng = random.Random(3)
    for _ in range(1500):
        bad, bad_ring = bytearray(good), bytearray(ring)
        target = rng.choice([bad, bad_ring])
        at = rng.randrange(len(target))
        if rng.random() < 0.5:
            del target[at : at + rng.randrange(1, 5)]
        else:
            target[at] ^= 1 << rng.randrange(8)
        result = is_signed(text, bytes(bad), bytes(bad_ring))
        assert result in (True, False)
        # Outside of the point nothing of the keyring is looked at; the signed file is accepted in one spelling.
        assert not result or bad == good
    assert not is_signed(text, b"", b"")


# --- the command ---


@needs_gpgv
def test_the_repository_is_made_signed_and_left_alone_afterwards(tmp_path: Path) -> None:
    debs, apt = repository(tmp_path / "bundle/debs"), tmp_path / "apt"
    done = run_moat("apt-sign", str(apt), "--debs", str(debs), "--json")
    assert json.loads(done.stdout)["changed"] is True, done.stderr
    assert {p.name for p in apt.iterdir()} == {"Packages", "Release", "InRelease", "moat.gpg", "a_1_all.deb"}
    assert str((apt / "a_1_all.deb").readlink()) == "../bundle/debs/a_1_all.deb"
    assert gpgv(apt / "moat.gpg", apt / "InRelease")[0] == 0
    before = {p.name: p.read_bytes() for p in apt.iterdir()}
    done = run_moat("apt-sign", str(apt), "--debs", str(debs), "--json")
    assert json.loads(done.stdout)["changed"] is False
    assert {p.name: p.read_bytes() for p in apt.iterdir()} == before
    # A key is for one signature: a new index has a new one.
    (debs / "Packages").write_bytes(b"Package: b\n")
    (debs / "Release").write_text(release(b"Package: b\n"))
    (apt / "old.deb").symlink_to("nowhere")
    assert json.loads(run_moat("apt-sign", str(apt), "--debs", str(debs), "--json").stdout)["changed"] is True
    assert (apt / "moat.gpg").read_bytes() != before["moat.gpg"]
    assert not (apt / "old.deb").is_symlink()
    assert gpgv(apt / "moat.gpg", apt / "InRelease")[0] == 0


def test_a_changed_signature_is_made_again(tmp_path: Path) -> None:
    apt = repository(tmp_path / "apt")
    text = apt_sign.check_index(apt)
    assert apt_sign.sign(apt, text) is True
    assert apt_sign.sign(apt, text) is False
    data = (apt / "InRelease").read_bytes()
    (apt / "InRelease").write_bytes(data.replace(b"trixie", b"trixi3"))
    assert apt_sign.sign(apt, text) is True
    (apt / "moat.gpg").unlink()
    assert apt_sign.sign(apt, text) is True


def test_what_cannot_be_signed_is_named(tmp_path: Path) -> None:
    apt = repository(tmp_path / "apt")
    (apt / "Packages").write_bytes(b"Package: other\n")
    with pytest.raises(ChangedFile, match="not the index"):
        apt_sign.check_index(apt)
    done = run_moat("apt-sign", str(tmp_path / "nowhere"), "--debs", str(tmp_path), "--json")
    assert json.loads(done.stdout)["problems"][0]["kind"] == "missing"
    with pytest.raises(StageFailed, match="clock") as caught:
        apt_sign.sign(apt, release(b"x"), now=1_600_000_000)
    assert caught.value.found == "2020-09-13 12:26 UTC"
    no_date: Any = release(b"x").replace("Date:", "Dote:")
    with pytest.raises(ChangedFile, match="no date"):
        apt_sign.sign(apt, no_date)
