# SPDX-License-Identifier: Apache-2.0
"""Ed25519 signature checking (RFC 8032) in pure Python, for hosts without a crypto library.

A site verifies a bundle before anything may be installed there, with the distribution's Python
and nothing else, and the standard library has no Ed25519. This module signs nothing, and need not
run in constant time: of a key that lasts it sees the seed alone, once, whose public half
:func:`public_of` tells with blinded scalars; what :func:`times_base` is given belongs to a key that
is made for one signature (``moat.site.openpgp``). Keys that last sign with the ``cryptography`` package.

The rules are libsodium's, hence minisign's, so that the two always agree: the scalar S must be
canonical (below the group order), the public key must be canonically encoded, and neither it nor
R may be a point of small order (a key that verifies every message, or a signature that fits many
keys). The comparison is the cofactorless one, on the bytes of R.

Points are in extended homogeneous coordinates (X, Y, Z, T) with x = X/Z, y = Y/Z, xy = T/Z
(Hisil, Wong, Carter, Dawson: "Twisted Edwards Curves Revisited", 2008, sections 3.1 and 3.3).
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final, TypeAlias

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

_P: Final = 2**255 - 19
_L: Final = 2**252 + 27742317777372353535851937790883648493
_D: Final = -121665 * pow(121666, -1, _P) % _P
_2D: Final = 2 * _D % _P
_SQRT_M1: Final = pow(2, (_P - 1) // 4, _P)

_Point: TypeAlias = tuple[int, int, int, int]
_IDENTITY: Final[_Point] = (0, 1, 1, 0)
_WINDOW: Final = 4  # bits a step: 64 steps of 4 doublings and at most two additions


def _add(p: _Point, q: _Point) -> _Point:
    """Return p + q; the formula is complete, so it holds for every pair of points."""
    x1, y1, z1, t1 = p
    x2, y2, z2, t2 = q
    a = (y1 - x1) * (y2 - x2) % _P
    b = (y1 + x1) * (y2 + x2) % _P
    c = t1 * _2D * t2 % _P
    d = 2 * z1 * z2 % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _double(p: _Point) -> _Point:
    x1, y1, z1, _ = p
    a = x1 * x1 % _P
    b = y1 * y1 % _P
    c = 2 * z1 * z1
    h = a + b
    e = h - (x1 + y1) ** 2
    g = a - b
    f = c + g
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _decode(data: bytes) -> _Point | None:
    """Return the point of its 32 bytes, or ``None`` unless it is the canonical encoding of one."""
    y = int.from_bytes(data, "little")
    sign = y >> 255
    y &= (1 << 255) - 1
    if y >= _P:
        return None
    # x^2 = (y^2 - 1) / (d y^2 + 1); a square root by RFC 8032, section 5.1.3.
    u = (y * y - 1) % _P
    v = (_D * y * y + 1) % _P
    x = u * pow(v, 3, _P) * pow(u * pow(v, 7, _P) % _P, (_P - 5) // 8, _P) % _P
    root = v * x * x % _P
    if root == (-u) % _P:
        x = x * _SQRT_M1 % _P
    elif root != u:
        return None
    if x == 0 and sign:
        return None
    if x & 1 != sign:
        x = _P - x
    return x, y, 1, x * y % _P


def _encode(p: _Point) -> bytes:
    x, y, z, _ = p
    inverse = pow(z, -1, _P)
    x, y = x * inverse % _P, y * inverse % _P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _has_small_order(p: _Point) -> bool:
    x, y, z, _ = _double(_double(_double(p)))
    return x == 0 and y == z


def _table(p: _Point) -> list[_Point]:
    """Return the multiples 0..15 of ``p``."""
    multiples = [_IDENTITY]
    for _ in range((1 << _WINDOW) - 1):
        multiples.append(_add(multiples[-1], p))
    return multiples


def _base_point() -> _Point:
    point = _decode((4 * pow(5, -1, _P) % _P).to_bytes(32, "little"))
    if point is None:
        raise AssertionError("the base point is on the curve")
    return point


_BASE_TABLE: Final = _table(_base_point())


def _two_scalars(s: int, k: int, table: list[_Point]) -> _Point:
    """Return s * B + k * A, where ``table`` holds the multiples of A (Straus's interleaving)."""
    mask = (1 << _WINDOW) - 1
    result = _IDENTITY
    for shift in range(256 - _WINDOW, -1, -_WINDOW):
        for _ in range(_WINDOW):
            result = _double(result)
        if digit := s >> shift & mask:
            result = _add(result, _BASE_TABLE[digit])
        if digit := k >> shift & mask:
            result = _add(result, table[digit])
    return result


def times_base(scalar: int) -> bytes:
    """Return the 32 bytes of ``scalar`` * B; not in constant time, so for no key that lasts (moat.site.openpgp)."""
    return _encode(_two_scalars(scalar % _L, 0, [_IDENTITY]))


def public_of(seed: bytes) -> bytes:
    """Return the public half (32 bytes) of a secret key's ``seed`` (32 bytes).

    The scalar is split into two parts, each of them random on its own: the time that the two multiplications take says
    nothing about the key.
    """
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | (1 << 254)
    mask = secrets.randbelow(_L)
    parts = [_two_scalars(part, 0, [_IDENTITY]) for part in ((scalar - mask) % _L, mask)]
    return _encode(_add(*parts))


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Tell whether ``signature`` is one of ``message`` under ``public_key``.

    Args:
        public_key: 32 bytes.
        message: any length; it is held in memory (large files are hashed first, see minisign).
        signature: 64 bytes, R then S.

    Returns:
        True only for a valid signature; False for everything else, whatever the lengths.
    """
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    r_bytes, s = signature[:32], int.from_bytes(signature[32:], "little")
    if s >= _L:
        return False
    a, r = _decode(public_key), _decode(r_bytes)
    if a is None or r is None or _has_small_order(a) or _has_small_order(r):
        return False
    digest = hashlib.sha512(r_bytes + public_key + message).digest()
    k = int.from_bytes(digest, "little") % _L
    x, y, z, t = a
    minus_a = ((-x) % _P, y, z, (-t) % _P)
    return _encode(_two_scalars(s, k, _table(minus_a))) == r_bytes
