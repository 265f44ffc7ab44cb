# SPDX-License-Identifier: Apache-2.0
"""The file formats of minisign: public keys, signatures, secret keys.

Moat writes and reads these formats so that a reviewer can check a bundle with the distribution's
own ``minisign`` and trust none of our code. Everything here reads untrusted bytes: a parser
returns a value or raises the one error that it names, and accepts one spelling of each value
(strict base64, exact lengths, no blank lines).

Layout (integers little-endian, all of it base64 in the file)::

    public key   "Ed" | key id 8 | key 32
    signature    "ED" (BLAKE2b-512 of the file is signed) or "Ed" (the file is) | key id 8 | signature 64
                 second base64 line: global signature 64 over (signature | trusted comment)
    secret key   "Ed" | "Sc" (scrypt) or 0 0 (none) | "B2" | salt 32 | opslimit 8 | memlimit 8
                 | [key id 8 | seed 32 | key 32 | checksum 32], the bracket XORed with the scrypt stream
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Final

from moat import ed25519
from moat.errors import BadSignature, KeyProblem

#: The comment that minisign itself writes; no signature covers this line.
SIGNATURE_COMMENT: Final = "signature from minisign secret key"
#: Real files are below 400 bytes; minisign's own limit for comments is 1024 and 8192.
MAX_BYTES: Final = 16 * 1024

_UNTRUSTED: Final = "untrusted comment: "
_TRUSTED: Final = "trusted comment: "
_LEGACY, _PREHASHED = b"Ed", b"ED"
_KDF_SCRYPT, _KDF_NONE = b"Sc", b"\0\0"
_CHECKSUM_BLAKE2B: Final = b"B2"
#: libsodium's *_SENSITIVE constants, which minisign uses: one gibibyte, some seconds.
OPSLIMIT: Final = 33_554_432
MEMLIMIT: Final = 1_073_741_824
_SECRET_BYTES: Final = 8 + 64 + 32


def _lines(data: bytes, count: int) -> list[str]:
    """Return exactly ``count`` lines without their ends, or raise ValueError."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    lines = data.decode("utf-8").split("\n")
    if lines[-1] == "":
        lines.pop()
    if len(lines) != count:
        raise ValueError(f"{len(lines)} lines instead of {count}")
    lines = [line.removesuffix("\r") for line in lines]
    # minisign's own default trusted comment separates its parts by tabs.
    if any(not line.replace("\t", " ").isprintable() for line in lines):
        raise ValueError("control characters")
    return lines


def _unbase64(text: str, size: int) -> bytes:
    """Decode ``text`` to exactly ``size`` bytes; refuse every spelling but the canonical one."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as e:
        raise ValueError("not base64") from e
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    if base64.b64encode(data).decode("ascii") != text:
        raise ValueError("base64 with stray bits")
    return data


def _comment(line: str, prefix: str) -> str:
    if not line.startswith(prefix):
        raise ValueError(f"no {prefix.strip()!r}")
    return line.removeprefix(prefix)


def _id_text(key_id: bytes) -> str:
    return f"{int.from_bytes(key_id, 'little'):016X}"


@dataclass(frozen=True)
class PublicKey:
    """A key that may be trusted. ``key_id`` is 8 bytes that only select a key; ``key`` is 32."""

    key_id: bytes
    key: bytes

    @property
    def id_text(self) -> str:
        """The id in 16 digits, e.g. ``2AA9EE771B97D847``; minisign itself leaves leading zeros out."""
        return _id_text(self.key_id)

    def to_string(self) -> str:
        """Return the 56 characters that begin with ``RW``."""
        return base64.b64encode(_LEGACY + self.key_id + self.key).decode("ascii")

    def to_bytes(self) -> bytes:
        """Return the public key file as minisign writes it, with the id in all its digits."""
        return f"{_UNTRUSTED}minisign public key {self.id_text}\n{self.to_string()}\n".encode()


def parse_public_key(text: str) -> PublicKey:
    """Parse the key's string (``RW...``).

    Raises:
        KeyProblem: it is anything else.
    """
    try:
        data = _unbase64(text.strip(), 2 + 8 + 32)
        if data[:2] != _LEGACY:
            raise ValueError("not an Ed25519 key")
    except ValueError as e:
        raise KeyProblem(
            "this is not a minisign public key",
            found=str(e),
            expected="56 characters that begin with RW",
            hint="copy the last line of moat.pub, whole",
        ) from e
    return PublicKey(data[2:10], data[10:])


def parse_public_key_file(data: bytes, name: str) -> PublicKey:
    """Parse a public key file: a comment line and the key, or the key alone.

    Raises:
        KeyProblem: it is anything else; ``name`` says which file.
    """
    try:
        text = data[: MAX_BYTES + 1].decode("utf-8").strip()
        if not text.startswith(_UNTRUSTED):
            return parse_public_key(text)
        return parse_public_key(_lines(data.strip(), 2)[1])
    except (ValueError, KeyProblem) as e:
        raise KeyProblem(
            f"{name} is not a minisign public key",
            found=(e.found if isinstance(e, KeyProblem) else None) or str(e),
            expected="an `untrusted comment:` line and a line that begins with RW",
            hint="use the moat.pub that `moat keys new` wrote",
            path=name,
        ) from e


@dataclass(frozen=True)
class Signature:
    """A parsed signature file.

    Attributes:
        prehashed: the signed message is the BLAKE2b-512 of the file (``ED``), not the file (``Ed``).
        key_id: 8 bytes; which key is said to have signed. No signature covers it.
        signature: 64 bytes.
        trusted_comment: covered by the global signature.
        global_signature: 64 bytes over ``signature`` and the trusted comment.
        untrusted_comment: covered by nothing.
    """

    prehashed: bool
    key_id: bytes
    signature: bytes
    trusted_comment: str
    global_signature: bytes
    untrusted_comment: str = SIGNATURE_COMMENT

    @property
    def id_text(self) -> str:
        """The key id as minisign prints it."""
        return _id_text(self.key_id)

    def to_bytes(self) -> bytes:
        """Return the signature file, byte for byte as minisign writes it."""
        algorithm = _PREHASHED if self.prehashed else _LEGACY
        first = base64.b64encode(algorithm + self.key_id + self.signature).decode("ascii")
        second = base64.b64encode(self.global_signature).decode("ascii")
        return (f"{_UNTRUSTED}{self.untrusted_comment}\n{first}\n{_TRUSTED}{self.trusted_comment}\n{second}\n").encode()


def signed_message(data: bytes, *, prehashed: bool) -> bytes:
    """Return what the Ed25519 signature of a file with content ``data`` is made over."""
    return hashlib.blake2b(data).digest() if prehashed else data


def parse_signature(data: bytes) -> Signature:
    """Parse a ``.minisig`` file.

    Raises:
        BadSignature: it is not one. Whether it matches anything is :func:`verify`'s question.
    """
    try:
        lines = _lines(data, 4)
        untrusted = _comment(lines[0], _UNTRUSTED)
        raw = _unbase64(lines[1], 2 + 8 + 64)
        if raw[:2] not in (_LEGACY, _PREHASHED):
            raise ValueError("not an Ed25519 signature")
        return Signature(
            prehashed=raw[:2] == _PREHASHED,
            key_id=raw[2:10],
            signature=raw[10:],
            trusted_comment=_comment(lines[2], _TRUSTED),
            global_signature=_unbase64(lines[3], 64),
            untrusted_comment=untrusted,
        )
    except ValueError as e:
        raise BadSignature(
            "the signature file is malformed",
            found=str(e),
            expected="four lines as written by `moat sign` or minisign",
            hint="copy the bundle again from the build host",
        ) from e


def verify(key: PublicKey, data: bytes, signature: Signature) -> None:
    """Check ``signature`` of a file with content ``data``, and its trusted comment.

    Raises:
        BadSignature: either signature does not match. The caller has selected ``key`` by its id.
    """
    message = signed_message(data, prehashed=signature.prehashed)
    if not ed25519.verify(key.key, message, signature.signature):
        what = "the signature does not match the file"
    elif not ed25519.verify(
        key.key, signature.signature + signature.trusted_comment.encode(), signature.global_signature
    ):
        what = "the signature's trusted comment was altered"
    else:
        return
    raise BadSignature(
        what,
        found=f"a file or signature that key {key.id_text} never signed",
        expected=f"a valid signature by key {key.id_text}",
        hint="do not use this medium; copy the bundle again from the build host and ask who had the medium",
    )


@dataclass(frozen=True)
class SecretKey:
    """An unlocked secret key. ``seed`` (32 bytes) never appears in a repr, log or message."""

    key_id: bytes
    seed: bytes = field(repr=False)
    public: bytes

    @property
    def public_key(self) -> PublicKey:
        """The public half."""
        return PublicKey(self.key_id, self.public)


def scrypt_parameters(opslimit: int, memlimit: int) -> tuple[int, int, int]:
    """Map libsodium's two limits to scrypt's (N, r, p), as its ``pickparams`` does.

    Args:
        opslimit: operations, at least 32768 is taken.
        memlimit: bytes.
    """
    opslimit = max(opslimit, 32768)
    r = 8
    by_operations = opslimit < memlimit // 32
    max_n = opslimit // (r * 4) if by_operations else memlimit // (r * 128)
    n_log2 = 1
    while n_log2 < 63 and (1 << n_log2) <= max_n // 2:
        n_log2 += 1
    if by_operations:
        return 1 << n_log2, r, 1
    return 1 << n_log2, r, min((opslimit // 4) >> n_log2, 0x3FFFFFFF) // r


def _stream(passphrase: bytes, salt: bytes, opslimit: int, memlimit: int) -> bytes:
    n, r, p = scrypt_parameters(opslimit, memlimit)
    # A forged key file must not make us allocate without bound; minisign's own needs 1 GiB.
    if n * r * 128 > MEMLIMIT or n * r * p > 4 * OPSLIMIT:
        raise ValueError("scrypt limits above minisign's own")
    if p < 1:
        raise ValueError("impossible scrypt limits")
    return hashlib.scrypt(passphrase, salt=salt, n=n, r=r, p=p, maxmem=2**31 - 1, dklen=_SECRET_BYTES)


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def _checksum(key_id: bytes, pair: bytes) -> bytes:
    return hashlib.blake2b(_LEGACY + key_id + pair, digest_size=32).digest()


def is_encrypted(data: bytes) -> bool:
    """Tell whether a secret key file needs a passphrase.

    Raises:
        KeyProblem: it is not a secret key file.
    """
    return _secret_fields(data)[0] == _KDF_SCRYPT


def _secret_fields(data: bytes) -> tuple[bytes, bytes, int, int, bytes]:
    try:
        lines = _lines(data, 2)
        _comment(lines[0], _UNTRUSTED)
        raw = _unbase64(lines[1], 2 + 2 + 2 + 32 + 8 + 8 + _SECRET_BYTES)
        if raw[:2] != _LEGACY or raw[2:4] not in (_KDF_SCRYPT, _KDF_NONE) or raw[4:6] != _CHECKSUM_BLAKE2B:
            raise ValueError("unknown algorithm")
    except ValueError as e:
        raise KeyProblem(
            "this is not a minisign secret key",
            found=str(e),
            expected="the moat.key that `moat keys new` wrote, or one of minisign",
        ) from e
    return raw[2:4], raw[6:38], int.from_bytes(raw[38:46], "little"), int.from_bytes(raw[46:54], "little"), raw[54:]


def parse_secret_key(data: bytes, passphrase: bytes | None) -> SecretKey:
    """Unlock a secret key file.

    Args:
        data: the file.
        passphrase: without its line end; ``None`` for a key without one.

    Raises:
        KeyProblem: malformed, the passphrase is missing or wrong, or the halves do not fit together.
    """
    kdf, salt, opslimit, memlimit, secret = _secret_fields(data)
    encrypted = kdf == _KDF_SCRYPT
    if encrypted:
        if passphrase is None:
            raise KeyProblem(
                "this secret key is protected by a passphrase",
                hint="give it with --passphrase-file, or run the command on a terminal",
            )
        try:
            secret = _xor(secret, _stream(passphrase, salt, opslimit, memlimit))
        except (ValueError, MemoryError) as e:
            raise KeyProblem(
                "the secret key cannot be unlocked",
                found=str(e) or "out of memory",
                expected="scrypt with 1 GiB of free memory",
            ) from e
    key_id, pair, checksum = secret[:8], secret[8:72], secret[72:]
    # minisign -W leaves the checksum of a key without passphrase zero; nothing was encrypted.
    if checksum != _checksum(key_id, pair) and (encrypted or any(checksum)):
        raise KeyProblem(
            "the passphrase is wrong" if encrypted else "the secret key is damaged",
            hint="try again, or restore the key file from its backup",
        )
    return SecretKey(key_id=key_id, seed=pair[:32], public=pair[32:])


def serialise_secret_key(key: SecretKey, *, passphrase: bytes | None, salt: bytes) -> bytes:
    """Return the secret key file, as minisign writes it.

    Args:
        key: what to store.
        passphrase: ``None`` stores it unprotected.
        salt: 32 random bytes, used once (ignored without a passphrase).
    """
    pair = key.seed + key.public
    if passphrase is None:
        head = _LEGACY + _KDF_NONE + _CHECKSUM_BLAKE2B + bytes(32 + 8 + 8)
        body = key.key_id + pair + bytes(32)
    else:
        head = (
            _LEGACY
            + _KDF_SCRYPT
            + _CHECKSUM_BLAKE2B
            + salt
            + OPSLIMIT.to_bytes(8, "little")
            + MEMLIMIT.to_bytes(8, "little")
        )
        secret = key.key_id + pair + _checksum(key.key_id, pair)
        body = _xor(secret, _stream(passphrase, salt, OPSLIMIT, MEMLIMIT))
    text = base64.b64encode(head + body).decode("ascii")
    return f"{_UNTRUSTED}minisign encrypted secret key\n{text}\n".encode()
