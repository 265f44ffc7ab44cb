# SPDX-License-Identifier: Apache-2.0
"""As much of OpenPGP as a package index on this host needs: one key, one cleartext signature.

apt trusts an index only by an OpenPGP signature, checked by ``gpgv`` (Debian 12) or ``sqv`` (Debian
13), and a site may have no program that makes one. A version 4 key with EdDSA over Ed25519
(algorithm 22) and SHA-512 is understood by both. Formats: RFC 4880; algorithm 22 as in RFC 9580,
sections 5.5.5.5 and 5.2.3.3 (EdDSALegacy).

The key is made for one signature, and its private half never leaves this process: what the
signature says is "written by the run that verified the bundle", and nobody needs to say that twice.
So it does not matter that the arithmetic takes a time that depends on the secret.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from moat import ed25519

#: Ed25519 as curve of algorithm 22: 1.3.6.1.4.1.11591.15.1.
_CURVE: Final = bytes.fromhex("092b06010401da470f01")
_EDDSA, _SHA512 = 22, 10
_TEXT_SIGNATURE, _CERTIFICATION = 0x01, 0x13
_SIGNATURE, _PUBLIC_KEY, _USER_ID = 2, 6, 13
_CREATED, _ISSUER, _KEY_FLAGS, _FEATURES, _FINGERPRINT = 2, 16, 27, 30, 33
_MAY_CERTIFY_AND_SIGN: Final = b"\x03"
_L: Final = 2**252 + 27742317777372353535851937790883648493


@dataclass(frozen=True, repr=False)
class SigningKey:
    """An Ed25519 key from 32 random bytes, as RFC 8032, section 5.1.5 makes one."""

    seed: bytes

    def _expand(self) -> tuple[int, bytes]:
        digest = hashlib.sha512(self.seed).digest()
        scalar = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | 1 << 254
        return scalar, digest[32:]

    @property
    def public(self) -> bytes:
        """The 32 bytes of the public half."""
        return ed25519.times_base(self._expand()[0])

    def sign(self, message: bytes) -> bytes:
        """Return the 64 bytes of the signature (RFC 8032, section 5.1.6)."""
        scalar, prefix = self._expand()
        public = self.public
        r = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little") % _L
        point = ed25519.times_base(r)
        k = int.from_bytes(hashlib.sha512(point + public + message).digest(), "little") % _L
        return point + ((r + k * scalar) % _L).to_bytes(32, "little")


def _packet(tag: int, body: bytes) -> bytes:
    """Return a packet with a new-format header."""
    size = len(body)
    if size < 192:
        length = bytes([size])
    elif size < 8384:
        length = bytes([(size - 192 >> 8) + 192, size - 192 & 0xFF])
    else:
        length = b"\xff" + struct.pack(">I", size)
    return bytes([0xC0 | tag]) + length + body


def _mpi(data: bytes) -> bytes:
    """Return a number as OpenPGP writes it: its bits, then its bytes without leading zeros."""
    number = int.from_bytes(data, "big")
    bits = number.bit_length()
    return struct.pack(">H", bits) + number.to_bytes((bits + 7) // 8, "big")


def _subpacket(kind: int, data: bytes) -> bytes:
    return bytes([len(data) + 1, kind]) + data


class Key:
    """A version 4 key with one user id.

    Args:
        signing: the key.
        user: its user id; a person sees it in apt's messages.
        created: when, in seconds since 1970. A key or signature of the future is refused.
    """

    def __init__(self, signing: SigningKey, user: str, created: int) -> None:
        self._signing = signing
        self._user = user.encode("utf-8")
        self._created = created
        point = _mpi(b"\x40" + signing.public)
        self._body = b"\x04" + struct.pack(">I", created) + bytes([_EDDSA]) + _CURVE + point

    @property
    def fingerprint(self) -> bytes:
        """The 20 bytes that name the key."""
        return hashlib.sha1(self._hashed_body(), usedforsecurity=False).digest()

    def _hashed_body(self) -> bytes:
        return b"\x99" + struct.pack(">H", len(self._body)) + self._body

    def public(self) -> bytes:
        """Return the public key as a binary keyring: key, user id, and the key's own signature over both."""
        user = b"\xb4" + struct.pack(">I", len(self._user)) + self._user
        flags = _subpacket(_KEY_FLAGS, _MAY_CERTIFY_AND_SIGN) + _subpacket(_FEATURES, b"\x01")
        certification = self._signature(_CERTIFICATION, self._hashed_body() + user, flags)
        return _packet(_PUBLIC_KEY, self._body) + _packet(_USER_ID, self._user) + certification

    def _signature(self, kind: int, data: bytes, more: bytes = b"") -> bytes:
        hashed = (
            _subpacket(_CREATED, struct.pack(">I", self._created))
            + _subpacket(_FINGERPRINT, b"\x04" + self.fingerprint)
            + more
        )
        head = bytes([4, kind, _EDDSA, _SHA512]) + struct.pack(">H", len(hashed)) + hashed
        digest = _digest(data, head)
        signature = self._signing.sign(digest)
        unhashed = _subpacket(_ISSUER, self.fingerprint[-8:])
        body = head + struct.pack(">H", len(unhashed)) + unhashed + digest[:2]
        return _packet(_SIGNATURE, body + _mpi(signature[:32]) + _mpi(signature[32:]))

    def clear_sign(self, text: str) -> bytes:
        """Return ``text`` with a cleartext signature (RFC 4880, section 7).

        The signature is over the lines without blanks at their ends, with CR LF between them and none
        after the last; a line that begins with a dash is shown with ``- `` before it.
        """
        lines = _lines(text)
        signature = self._signature(_TEXT_SIGNATURE, "\r\n".join(lines).encode("utf-8"))
        return _frame(lines) + _armour(signature)


def _armour(data: bytes) -> bytes:
    encoded = base64.b64encode(data).decode("ascii")
    lines = [encoded[i : i + 64] for i in range(0, len(encoded), 64)]
    check = "=" + base64.b64encode(_crc24(data).to_bytes(3, "big")).decode("ascii")
    text = ["-----BEGIN PGP SIGNATURE-----", "", *lines, check, "-----END PGP SIGNATURE-----", ""]
    return "\n".join(text).encode("ascii")


def _crc24(data: bytes) -> int:
    """Return the checksum of the armour (RFC 4880, section 6.1)."""
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc & 0xFFFFFF


def _frame(lines: list[str]) -> bytes:
    """Return the cleartext as it is shown, up to the signature."""
    shown = "".join(f"- {line}\n" if line.startswith("-") else f"{line}\n" for line in lines)
    return ("-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n" + shown).encode("utf-8")


def _lines(text: str) -> list[str]:
    return [line.rstrip(" \t\r") for line in text.removesuffix("\n").split("\n")]


def is_signed(text: str, signed: bytes, keyring: bytes) -> bool:
    """Tell whether ``signed`` is what :meth:`Key.clear_sign` made of ``text`` with the key of ``keyring``.

    It knows this module's own form and no other: it answers "must this be made again?", while whether
    to trust the index is for apt to say.
    """
    lines = _lines(text)
    frame = _frame(lines)
    if not signed.startswith(frame):
        return False
    try:
        start = keyring.index(_CURVE) + len(_CURVE)
        point, _ = _read_mpi(keyring[start:], 33)
        armour = signed[len(frame) :].decode("ascii").split("\n")
        packet = base64.b64decode("".join(armour[2:-3]), validate=True)
        if _armour(packet) != signed[len(frame) :] or packet[0] != 0xC0 | _SIGNATURE or packet[1] >= 192:
            return False
        body = packet[2:]
        head = body[: 6 + struct.unpack(">H", body[4:6])[0]]
        skip = len(head) + 2 + struct.unpack(">H", body[len(head) : len(head) + 2])[0] + 2
        r, rest = _read_mpi(body[skip:], 32)
        s, rest = _read_mpi(rest, 32)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError, OverflowError):
        return False
    digest = _digest("\r\n".join(lines).encode("utf-8"), head)
    return not rest and ed25519.verify(point[1:], digest, r + s)


def _read_mpi(data: bytes, size: int) -> tuple[bytes, bytes]:
    """Return a number as ``size`` bytes, and what follows it."""
    length = (struct.unpack(">H", data[:2])[0] + 7) // 8
    return int.from_bytes(data[2 : 2 + length], "big").to_bytes(size, "big"), data[2 + length :]


def _digest(data: bytes, head: bytes) -> bytes:
    """Return what is signed: the data, the hashed part of the signature, and its length (RFC 4880, 5.2.4)."""
    return hashlib.sha512(data + head + b"\x04\xff" + struct.pack(">I", len(head))).digest()
