# SPDX-License-Identifier: Apache-2.0
"""The site's keys, which sign revisions of the configuration: minisign's own files, Ed25519 by ``cryptography``.

Layout (integers little-endian, all of it base64 in the file)::

    public key   "Ed" | key id 8 | key 32
    signature    "ED" (BLAKE2b-512 of the data is signed) or "Ed" (the data is) | key id 8 | signature 64
                 second base64 line: global signature 64 over (signature | trusted comment)
    secret key   "Ed" | 0 0 (no passphrase) | "B2" | 48 zeros | key id 8 | seed 32 | key 32 | 32 zeros or checksum

Signatures come from outside: one spelling of each is accepted (exact comments, strict base64), so that a signature
that was altered in any byte is refused, even where no signature covers that byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from moat_gateway.errors import BadSignature, BadSiteKey

MAX_BYTES = 4096  # of one key file or signature; real ones are below 400
#: What minisign itself writes there; no signature covers it, so nothing else is accepted.
SIGNATURE_COMMENT = "signature from minisign secret key"
PUBLIC_SUFFIX = ".pub"

_UNTRUSTED = "untrusted comment: "
_TRUSTED = "trusted comment: "
_LEGACY, _PREHASHED = b"Ed", b"ED"
_KDF_NONE, _KDF_SCRYPT = b"\0\0", b"Sc"
_CHECKSUM_BLAKE2B = b"B2"
_RAW_PUBLIC, _RAW_SECRET, _RAW_SIGNATURE = 42, 158, 74  # bytes before base64


@dataclass(frozen=True)
class PublicKey:
    """A key that may be trusted.

    Attributes:
        raw_id: 8 bytes that only select a key.
        key: 32 bytes.
    """

    raw_id: bytes
    key: bytes

    @property
    def key_id(self) -> str:
        """The id in 16 hex digits (minisign itself leaves leading zeros out)."""
        return f"{int.from_bytes(self.raw_id, 'little'):016X}"

    @property
    def text(self) -> str:
        """The 56 characters that begin with ``RW``."""
        return base64.b64encode(_LEGACY + self.raw_id + self.key).decode("ascii")

    def to_bytes(self) -> bytes:
        """Return the public key file as minisign writes it."""
        return f"{_UNTRUSTED}minisign public key {self.key_id}\n{self.text}\n".encode("ascii")

    @classmethod
    def parse(cls, raw: bytes, name: str) -> PublicKey:
        """Parse a public key file: a comment line and the key, or the key alone.

        Raises:
            BadSiteKey: it is anything else.
        """
        try:
            lines = _lines(raw)
            if lines and lines[0].startswith(_UNTRUSTED):
                lines = lines[1:]
            if len(lines) != 1:
                raise ValueError(f"{len(lines)} lines")
            data = _unbase64(lines[0], _RAW_PUBLIC)
            if data[:2] != _LEGACY:
                raise ValueError("not an Ed25519 key")
        except ValueError as e:
            raise BadSiteKey(
                "is not a minisign public key",
                found=str(e),
                expected="an `untrusted comment:` line, and a line that begins with RW",
                hint="use the .pub file that was written with the secret key",
                path=name,
            ) from e
        return cls(data[2:10], data[10:])

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """Say whether an Ed25519 signature (64 bytes) of ``message`` is by this key."""
        try:
            Ed25519PublicKey.from_public_bytes(self.key).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


def read_trusted(folder: Path) -> tuple[PublicKey, ...]:
    """Return the keys that may sign here: every ``*.pub`` of the folder, by name.

    Raises:
        BadSiteKey: the folder or a key cannot be read, a key is malformed, or there is none.
    """
    try:
        paths = sorted(p for p in folder.iterdir() if p.name.endswith(PUBLIC_SUFFIX))
    except OSError as e:
        raise BadSiteKey(
            "the folder of site keys cannot be read",
            found=e.strerror or str(e),
            hint="make the folder with the site's public keys in it (*.pub), or correct MOAT_SITE_KEYS_DIR",
            path=str(folder),
        ) from e
    if not paths:
        raise BadSiteKey(
            "there is no site key: no revision can be trusted",
            found="no file *.pub",
            expected="the site's public keys",
            hint="copy the .pub file of the site key there, or correct MOAT_SITE_KEYS_DIR",
            path=str(folder),
        )
    return tuple(PublicKey.parse(_read(path), str(path)) for path in paths)


@dataclass(frozen=True)
class SigningKey:
    """A secret site key; the seed never appears in a repr, log or message.

    Attributes:
        public: its public half.
        seed: 32 bytes.
    """

    public: PublicKey
    seed: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> SigningKey:
        """Make a new key."""
        seed = secrets.token_bytes(32)
        return cls(PublicKey(secrets.token_bytes(8), _public_of(seed)), seed)

    @classmethod
    def read(cls, path: Path) -> SigningKey:
        """Read a secret key file without a passphrase (``minisign -G -W``).

        Raises:
            BadSiteKey: missing, unreadable, malformed, or protected by a passphrase.
        """
        return cls.parse(_read(path), str(path))

    @classmethod
    def parse(cls, raw: bytes, name: str) -> SigningKey:
        """Parse the bytes of a secret key file; see :meth:`read`."""
        try:
            lines = _lines(raw)
            if len(lines) != 2 or not lines[0].startswith(_UNTRUSTED):
                raise ValueError("not two lines, the first of them a comment")
            data = _unbase64(lines[1], _RAW_SECRET)
            if data[:2] != _LEGACY or data[4:6] != _CHECKSUM_BLAKE2B or data[2:4] not in (_KDF_NONE, _KDF_SCRYPT):
                raise ValueError("an unknown algorithm")
        except ValueError as e:
            # What stands there may be a secret: its text is not shown.
            raise BadSiteKey(
                "is not a minisign secret key",
                found=str(e),
                expected="the file that `moat-gateway config init --key-out` or `minisign -G -W` wrote",
                hint="give the secret key's file; the public one ends in .pub",
                path=name,
            ) from None
        if data[2:4] == _KDF_SCRYPT:
            raise BadSiteKey(
                "the secret key is protected by a passphrase",
                expected="a key without one: it is used without a person at the keyboard",
                hint="make the site key with `moat-gateway config init --key-out` or `minisign -G -W`",
                path=name,
            )
        key_id, seed, public, checksum = data[54:62], data[62:94], data[94:126], data[126:]
        # minisign leaves the checksum of a key without passphrase zero.
        if _public_of(seed) != public or (any(checksum) and checksum != _checksum(key_id, seed + public)):
            raise BadSiteKey(
                "the secret key is damaged",
                found="two halves that do not belong together",
                hint="restore it from its backup, or make a new one and let the nodes trust its public half",
                path=name,
            )
        return cls(PublicKey(key_id, public), seed)

    def to_bytes(self) -> bytes:
        """Return the secret key file as ``minisign -G -W`` writes it."""
        head = _LEGACY + _KDF_NONE + _CHECKSUM_BLAKE2B + bytes(48)
        body = self.public.raw_id + self.seed + self.public.key + bytes(32)
        text = base64.b64encode(head + body).decode("ascii")
        return f"{_UNTRUSTED}minisign secret key {self.public.key_id}\n{text}\n".encode("ascii")

    def write(self, secret_path: Path, public_path: Path) -> None:
        """Write both halves: the secret one with mode 0600, the public one with 0644; nothing is overwritten.

        Raises:
            BadSiteKey: a file is in the way, or cannot be written.
        """
        for path in (secret_path, public_path):
            if os.path.lexists(path):
                raise BadSiteKey(
                    "a file is in the way of the site key",
                    hint="choose another name, or move the old key away yourself: it is never overwritten",
                    path=str(path),
                )
        _write_new(secret_path, self.to_bytes(), 0o600)
        _write_new(public_path, self.public.to_bytes(), 0o644)

    def sign(self, data: bytes, trusted_comment: str) -> bytes:
        """Return a signature file over ``data``.

        Args:
            data: what is signed (its BLAKE2b-512, in fact).
            trusted_comment: one line of ASCII; signed too.
        """
        if not (trusted_comment.isascii() and trusted_comment.isprintable()):
            raise ValueError("a trusted comment is one line of ASCII")
        private = Ed25519PrivateKey.from_private_bytes(self.seed)
        signature = private.sign(hashlib.blake2b(data).digest())
        overall = private.sign(signature + trusted_comment.encode("ascii"))
        return _signature_file(_PREHASHED + self.public.raw_id + signature, trusted_comment, overall)


@dataclass(frozen=True)
class Verified:
    """A signature that holds: by which key, and what its trusted comment says."""

    key_id: str
    trusted_comment: str


def verify(data: bytes, signature: bytes, trusted: Iterable[PublicKey]) -> Verified:
    """Check a signature file over ``data``.

    Raises:
        BadSignature: malformed, by a key that is not trusted, or not of these bytes.
    """
    try:
        algorithm, key_id, first, comment, overall = _parse_signature(signature)
    except ValueError as e:
        raise BadSignature(
            "the signature is malformed",
            found=str(e),
            expected="four lines as minisign writes them",
            hint="push the configuration again; if it was not you who changed it, ask who may write to the source",
        ) from e
    keys = tuple(trusted)
    named = [k for k in keys if k.raw_id == key_id]
    if not named:
        raise BadSignature(
            "the revision is signed by a key that is not trusted here",
            found=f"key {PublicKey(key_id, b'').key_id}",
            expected=" or ".join(sorted({k.key_id for k in keys})) or "a trusted key",
            hint="sign with the site's key, or put the signer's .pub file into the folder of site keys",
        )
    message = hashlib.blake2b(data).digest() if algorithm == _PREHASHED else data
    for key in named:
        if key.verifies(message, first) and key.verifies(first + comment.encode("ascii"), overall):
            return Verified(key.key_id, comment)
    raise BadSignature(
        "the signature does not match",
        found=f"a revision that key {named[0].key_id} never signed",
        expected=f"a valid signature by key {named[0].key_id}",
        hint="push the configuration again; if it was not you who changed it, ask who may write to the source",
    )


def _parse_signature(raw: bytes) -> tuple[bytes, bytes, bytes, str, bytes]:
    lines = _lines(raw)
    if len(lines) != 4:
        raise ValueError(f"{len(lines)} lines")
    data = _unbase64(lines[1], _RAW_SIGNATURE)
    if data[:2] not in (_LEGACY, _PREHASHED):
        raise ValueError("not an Ed25519 signature")
    comment = lines[2].removeprefix(_TRUSTED)
    overall = _unbase64(lines[3], 64)
    if _signature_file(data, comment, overall) != raw:
        raise ValueError("comments or line ends that minisign does not write")
    return data[:2], data[2:10], data[10:], comment, overall


def _signature_file(signature: bytes, comment: str, overall: bytes) -> bytes:
    first, second = (base64.b64encode(b).decode("ascii") for b in (signature, overall))
    return f"{_UNTRUSTED}{SIGNATURE_COMMENT}\n{first}\n{_TRUSTED}{comment}\n{second}\n".encode("ascii")


def _lines(raw: bytes) -> list[str]:
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    lines = raw.decode("ascii").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not all(line.removesuffix("\r").replace("\t", " ").isprintable() for line in lines):
        raise ValueError("control characters")
    return [line.removesuffix("\r") for line in lines]


def _unbase64(text: str, size: int) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    if base64.b64encode(data).decode("ascii") != text:
        raise ValueError("base64 with stray bits")
    return data


def _public_of(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def _checksum(key_id: bytes, pair: bytes) -> bytes:
    return hashlib.blake2b(_LEGACY + key_id + pair, digest_size=32).digest()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(MAX_BYTES + 1)
    except OSError as e:
        raise BadSiteKey(
            "the site key cannot be read",
            found=e.strerror or str(e),
            hint="check that the file exists and that this user may read it",
            path=str(path),
        ) from e


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(fd, "wb") as f:
            os.fchmod(fd, mode)
            f.write(data)
            f.flush()
            os.fsync(fd)
    except OSError as e:
        raise BadSiteKey(
            "the site key cannot be written",
            found=e.strerror or str(e),
            expected="a new file in a folder that may be written",
            hint="choose another place, or make its folder",
            path=str(path),
        ) from e
