# SPDX-License-Identifier: Apache-2.0
"""The envelope in which MinIO's admin interface wants secrets: readable only with the caller's own secret key.

``salt (32) | algorithm (1) | nonce (8) | fragments``. The key is Argon2id of the secret key. The content is cut into
fragments of 16 KiB; each is sealed with the 8 bytes of nonce and a counter of 4 (little endian), fragment 0 being an
empty one that is not sent: its tag is part of what every other fragment authenticates, with a byte in front that marks
the last. So fragments can be neither reordered nor dropped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

FRAGMENT = 1 << 14  # bytes of content
_TAG = 16
_HEADER = 32 + 1 + 8
_AES_GCM, _CHACHA = 0, 1
_MORE, _LAST = b"\x00", b"\x80"


class NotSealed(Exception):
    """The bytes are no envelope, or not one of this secret key."""


def seal(secret_key: str, content: bytes, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return ``content`` in an envelope for the holder of ``secret_key``."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = random(32), random(8)
    cipher = AESGCM(_key(secret_key, salt))
    bound = cipher.encrypt(nonce + struct.pack("<I", 0), b"", b"")
    pieces = [content[i : i + FRAGMENT] for i in range(0, len(content), FRAGMENT)] or [b""]
    out = [salt, bytes([_AES_GCM]), nonce]
    for number, piece in enumerate(pieces, 1):
        mark = _LAST if number == len(pieces) else _MORE
        out.append(cipher.encrypt(nonce + struct.pack("<I", number), piece, mark + bound))
    return b"".join(out)


def unseal(secret_key: str, envelope: bytes) -> bytes:
    """Return the content of an envelope.

    Raises:
        NotSealed: it is cut short, changed, of another algorithm, or sealed for another secret key.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

    if len(envelope) < _HEADER + _TAG or envelope[32] not in (_AES_GCM, _CHACHA):
        raise NotSealed("no envelope of a known kind")
    salt, kind, nonce, rest = envelope[:32], envelope[32], envelope[33:_HEADER], envelope[_HEADER:]
    key = _key(secret_key, salt)
    # A server without AES in its processor answers with the other one.
    cipher = AESGCM(key) if kind == _AES_GCM else ChaCha20Poly1305(key)
    bound = cipher.encrypt(nonce + struct.pack("<I", 0), b"", b"")
    size = FRAGMENT + _TAG
    pieces = [rest[i : i + size] for i in range(0, len(rest), size)]
    out = []
    try:
        for number, piece in enumerate(pieces, 1):
            mark = _LAST if number == len(pieces) else _MORE
            out.append(cipher.decrypt(nonce + struct.pack("<I", number), piece, mark + bound))
    except InvalidTag:
        raise NotSealed("it does not open with this secret key") from None
    return b"".join(out)


def _key(secret_key: str, salt: bytes) -> bytes:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    derivation = Argon2id(salt=salt, length=32, iterations=1, lanes=4, memory_cost=64 * 1024)  # KiB
    return derivation.derive(secret_key.encode("utf-8"))
