# SPDX-License-Identifier: Apache-2.0
"""Proves the pure Python Ed25519 against RFC 8032's vectors, against another implementation, and on forged input."""

from __future__ import annotations

import time

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from moat import ed25519

#: RFC 8032, section 7.1: public key, message, signature.
RFC_8032 = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]
ORDER = 2**252 + 27742317777372353535851937790883648493
#: Points of order 1, 2, 4 and 8 (RFC 8032's curve), and encodings that are not canonical.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
]
NOT_CANONICAL = [
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


@pytest.mark.parametrize(("key", "message", "signature"), RFC_8032)
def test_the_rfcs_own_signatures_verify(key: str, message: str, signature: str) -> None:
    assert ed25519.verify(bytes.fromhex(key), bytes.fromhex(message), bytes.fromhex(signature))
    assert not ed25519.verify(bytes.fromhex(key), bytes.fromhex(message) + b"\0", bytes.fromhex(signature))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=300), st.integers(0, 511))
def test_it_agrees_with_another_implementation(seed: bytes, message: bytes, bit: int) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    public = private.public_key().public_bytes_raw()
    signature = private.sign(message)
    assert ed25519.verify(public, message, signature)
    assert ed25519.public_of(seed) == ed25519.public_of(seed) == public  # whatever the blinding was
    flipped = bytearray(signature)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not ed25519.verify(public, message, bytes(flipped))
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(public).verify(bytes(flipped), message)


@given(st.binary(max_size=80), st.binary(max_size=20), st.binary(max_size=80))
def test_any_bytes_give_an_answer(key: bytes, message: bytes, signature: bytes) -> None:
    assert ed25519.verify(key, message, signature) is False


@settings(max_examples=50)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=64, max_size=64))
def test_bytes_of_the_right_length_give_an_answer(key: bytes, signature: bytes) -> None:
    assert ed25519.verify(key, b"message", signature) is False


def test_a_second_spelling_of_a_signature_is_refused() -> None:
    """S and S + L satisfy the same equation; accepting both would let anyone alter a signature unseen."""
    key, message, signature = (bytes.fromhex(x) for x in RFC_8032[1])
    s = int.from_bytes(signature[32:], "little") + ORDER
    assert not ed25519.verify(key, message, signature[:32] + s.to_bytes(32, "little"))


@pytest.mark.parametrize("point", SMALL_ORDER + NOT_CANONICAL)
def test_keys_that_would_verify_every_message_are_refused(point: str) -> None:
    """With A of small order, R = identity and S = 0 satisfies S*B = R + k*A for one message in eight at least."""
    key = bytes.fromhex(point)
    for r in (bytes.fromhex(SMALL_ORDER[0]), key):
        for message in (bytes([i]) for i in range(32)):
            assert not ed25519.verify(key, message, r + bytes(32))


@pytest.mark.parametrize("point", SMALL_ORDER + NOT_CANONICAL)
def test_a_small_or_misspelt_r_is_refused(point: str) -> None:
    key, message, signature = (bytes.fromhex(x) for x in RFC_8032[1])
    assert not ed25519.verify(key, message, bytes.fromhex(point) + signature[32:])


def test_one_verification_takes_well_under_a_tenth_of_a_second() -> None:
    key, message, signature = (bytes.fromhex(x) for x in RFC_8032[2])
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert ed25519.verify(key, message, signature)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1
