# SPDX-License-Identifier: Apache-2.0
"""Proves that the minisign formats are read strictly: right values round-trip, all else is one documented error.

That the real program agrees is shown in tests/integration/site/test_minisign_program.py.
"""

from __future__ import annotations

import base64
import contextlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from moat import minisign
from moat.build.sign import make_signature
from moat.errors import BadSignature, KeyProblem

SEED = bytes(range(32))
KEY = minisign.SecretKey(
    b"\x01\x02\x03\x04\x05\x06\x07\x08",
    SEED,
    Ed25519PrivateKey.from_private_bytes(SEED).public_key().public_bytes_raw(),
)
DATA = b"the file\n"
SIGNATURE = make_signature(KEY, DATA, "moat version=1")

#: Written by minisign 0.11 itself: `minisign -G -W`.
MADE_PUBLIC = (
    b"untrusted comment: minisign public key 2AA9EE771B97D847\n"
    b"RWRH2Jcbd+6pKn2AjzQ5Nm9PA7LuHO0bHwq5s3eUPdCv8rZaJ8SjkIYV\n"
)


def test_a_signature_verifies_and_round_trips() -> None:
    data = SIGNATURE.to_bytes()
    parsed = minisign.parse_signature(data)
    assert parsed == SIGNATURE
    assert parsed.to_bytes() == data
    minisign.verify(KEY.public_key, DATA, parsed)


def test_signing_twice_gives_the_same_bytes() -> None:
    assert make_signature(KEY, DATA, "c").to_bytes() == make_signature(KEY, DATA, "c").to_bytes()


def test_a_public_key_of_the_real_program_round_trips() -> None:
    key = minisign.parse_public_key_file(MADE_PUBLIC, "moat.pub")
    assert key.to_bytes() == MADE_PUBLIC
    assert key.id_text == "2AA9EE771B97D847"
    assert minisign.parse_public_key(key.to_string()) == key


@pytest.mark.parametrize(
    "altered",
    [
        replace(SIGNATURE, signature=bytes(64)),
        replace(SIGNATURE, global_signature=bytes(64)),
        replace(SIGNATURE, trusted_comment="moat version=2"),
        replace(SIGNATURE, prehashed=False),
    ],
)
def test_an_altered_signature_does_not_verify(altered: minisign.Signature) -> None:
    with pytest.raises(BadSignature):
        minisign.verify(KEY.public_key, DATA, minisign.parse_signature(altered.to_bytes()))


def test_a_signature_of_another_file_does_not_verify() -> None:
    with pytest.raises(BadSignature):
        minisign.verify(KEY.public_key, DATA + b"x", SIGNATURE)


def _lines(signature: minisign.Signature = SIGNATURE) -> list[bytes]:
    return signature.to_bytes().split(b"\n")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n" * 4,
        b"\xff" * 100,
        b"x" * (minisign.MAX_BYTES + 1),
        b"\n".join(_lines()[:3]),
        SIGNATURE.to_bytes() + b"more\n",
        b"\n" + SIGNATURE.to_bytes(),
        SIGNATURE.to_bytes().replace(b"untrusted comment: ", b"comment: "),
        SIGNATURE.to_bytes().replace(b"\ntrusted comment: ", b"\n"),
        SIGNATURE.to_bytes().replace(b"moat version", b"\x1b[2Jmoat version"),
        SIGNATURE.to_bytes().replace(_lines()[1], _lines()[1] + b"AAAA"),
        SIGNATURE.to_bytes().replace(_lines()[1], b" " + _lines()[1]),
        SIGNATURE.to_bytes().replace(_lines()[1], b"QQ" + _lines()[1][2:]),
        SIGNATURE.to_bytes().replace(_lines()[3], _lines()[3][:-3] + b"B=="),
    ],
)
def test_a_malformed_signature_file_is_a_bad_signature(data: bytes) -> None:
    with pytest.raises(BadSignature):
        minisign.parse_signature(data)


def test_base64_has_one_spelling() -> None:
    """The last character of 64 bytes carries four bits that mean nothing: only zeros are read."""
    lines = _lines()
    last = lines[3].rstrip(b"=")[-1:]
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twin = alphabet[alphabet.index(last) + 1 : alphabet.index(last) + 2]
    spelt = lines[3].rstrip(b"=")[:-1] + twin + b"=="
    assert base64.b64decode(spelt) == base64.b64decode(lines[3])
    with pytest.raises(BadSignature):
        minisign.parse_signature(b"\n".join([*lines[:3], spelt, b""]))


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_value_or_the_documented_error(data: bytes) -> None:
    for parse, error in (
        (minisign.parse_signature, BadSignature),
        (lambda d: minisign.parse_public_key_file(d, "x"), KeyProblem),
        (lambda d: minisign.parse_secret_key(d, None), KeyProblem),
        (minisign.is_encrypted, KeyProblem),
    ):
        with contextlib.suppress(error):
            parse(data)


@settings(max_examples=300)
@given(st.text(max_size=120))
def test_any_text_is_a_key_or_the_documented_error(text: str) -> None:
    with contextlib.suppress(KeyProblem):
        minisign.parse_public_key(text)


@settings(max_examples=200)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_signature_with_one_byte_replaced_never_verifies_as_another(offset: int, value: int) -> None:
    data = bytearray(SIGNATURE.to_bytes())
    data[offset % len(data)] = value
    try:
        parsed = minisign.parse_signature(bytes(data))
        minisign.verify(KEY.public_key, DATA, parsed)
    except BadSignature:
        return
    # What no signature covers: the untrusted comment, the key id (it only selects a key), the line ends' spelling.
    covered = ("signature", "trusted_comment", "global_signature", "prehashed")
    assert all(getattr(parsed, name) == getattr(SIGNATURE, name) for name in covered)


# --- secret keys ---


@pytest.mark.parametrize(
    ("opslimit", "memlimit", "expected"),
    [
        (minisign.OPSLIMIT, minisign.MEMLIMIT, (2**20, 8, 1)),  # libsodium's SENSITIVE
        (524_288, 16_777_216, (2**14, 8, 1)),  # libsodium's INTERACTIVE
        (0, 16_777_216, (2**10, 8, 1)),  # below the least operations
        (2**25, 2**24, (2**14, 8, 64)),  # bounded by memory: more rounds instead
    ],
)
def test_limits_map_to_scrypts_parameters_as_in_libsodium(
    opslimit: int, memlimit: int, expected: tuple[int, int, int]
) -> None:
    assert minisign.scrypt_parameters(opslimit, memlimit) == expected


def test_a_key_without_passphrase_round_trips() -> None:
    data = minisign.serialise_secret_key(KEY, passphrase=None, salt=b"")
    assert not minisign.is_encrypted(data)
    assert minisign.parse_secret_key(data, None) == KEY


def test_a_passphrase_protects_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """With libsodium's interactive limits here, for speed; the integration test uses minisign's own."""
    monkeypatch.setattr(minisign, "OPSLIMIT", 524_288)
    monkeypatch.setattr(minisign, "MEMLIMIT", 16_777_216)
    data = minisign.serialise_secret_key(KEY, passphrase=b"correct horse", salt=bytes(32))
    assert minisign.is_encrypted(data)
    assert SEED not in base64.b64decode(data.split(b"\n")[1])
    assert minisign.parse_secret_key(data, b"correct horse") == KEY
    for wrong in (b"", b"correct horsf", b"correct horse\n"):
        with pytest.raises(KeyProblem, match="passphrase is wrong"):
            minisign.parse_secret_key(data, wrong)
    with pytest.raises(KeyProblem, match="protected by a passphrase"):
        minisign.parse_secret_key(data, None)


def test_a_key_file_cannot_ask_for_all_memory() -> None:
    raw = bytearray(base64.b64decode(minisign.serialise_secret_key(KEY, passphrase=None, salt=b"").split(b"\n")[1]))
    raw[2:4] = b"Sc"
    for ops, mem in ((2**60, 2**60), (2**63 - 1, 2**40), (2**64 - 1, 2**64 - 1), (2**62, 0), (0, 0)):
        raw[38:46], raw[46:54] = ops.to_bytes(8, "little"), mem.to_bytes(8, "little")
        data = b"untrusted comment: x\n" + base64.b64encode(raw) + b"\n"
        with pytest.raises(KeyProblem):
            minisign.parse_secret_key(data, b"passphrase")


def test_a_seed_never_shows_in_a_repr() -> None:
    assert repr(SEED) not in repr(KEY)
    assert SEED.hex() not in repr(KEY)


def test_a_key_whose_halves_differ_does_not_sign() -> None:
    with pytest.raises(KeyProblem):
        make_signature(replace(KEY, public=bytes(32)), DATA, "c")
