# SPDX-License-Identifier: Apache-2.0
"""DNS messages (RFC 1035), as much as a sinkhole needs: read one question, write one answer.

What is read comes from any program on the host: every length is checked, a pointer in a question (never
needed) is refused, and nothing here can loop.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import Final

TYPES: Final = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV", 35: "NAPTR",
    43: "DS", 48: "DNSKEY", 52: "TLSA", 64: "SVCB", 65: "HTTPS", 255: "ANY",
}  # fmt: skip
A: Final = 1
AAAA: Final = 28
_HEADER: Final = struct.Struct(">HHHHHH")
_RESPONSE, _RECURSION_AVAILABLE, _NO_SUCH_NAME = 0x8000, 0x0080, 3
_MAX_NAME: Final = 255


@dataclass(frozen=True)
class Question:
    """The question of a query. ``raw`` is the question section as it came, for the answer."""

    identity: int
    flags: int
    name: str
    kind: int
    raw: bytes

    @property
    def kind_name(self) -> str:
        """``A``, ``AAAA``, ...; ``TYPE123`` (RFC 3597) for a rare one."""
        return TYPES.get(self.kind, f"TYPE{self.kind}")


def parse(data: bytes) -> Question | None:
    """Read a query; ``None`` if it is malformed, a response, or holds other than one question."""
    if len(data) < _HEADER.size:
        return None
    identity, flags, questions, _, _, _ = _HEADER.unpack_from(data)
    if flags & _RESPONSE or questions != 1:
        return None
    at, labels = _HEADER.size, []
    while True:
        if at >= len(data) or at - _HEADER.size > _MAX_NAME:
            return None
        size = data[at]
        if size == 0:
            at += 1
            break
        if size > 63 or at + 1 + size > len(data):
            return None
        labels.append(_label(data[at + 1 : at + 1 + size]))
        at += 1 + size
    if at + 4 > len(data):
        return None
    kind = int.from_bytes(data[at : at + 2], "big")
    return Question(identity, flags, ".".join(labels) or ".", kind, data[_HEADER.size : at + 4])


def _label(raw: bytes) -> str:
    """Return a label as text: printable ASCII as it is, lower case, the rest (and the dot) as ``\\DDD``."""
    return "".join(chr(b).lower() if 33 <= b <= 126 and b not in b".\\" else f"\\{b:03d}" for b in raw)


def query(identity: int, name: str, kind: int) -> bytes:
    """Return a query for one name."""
    labels = b"".join(bytes([len(x)]) + x.encode("ascii") for x in name.split("."))
    return _HEADER.pack(identity, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def answer(question: Question, addresses: list[str] | None) -> bytes:
    """Return the response: the addresses that fit the question's type; ``None`` says that there is no such name."""
    flags = _RESPONSE | _RECURSION_AVAILABLE | (question.flags & 0x7900)
    if addresses is None:
        return _HEADER.pack(question.identity, flags | _NO_SUCH_NAME, 1, 0, 0, 0) + question.raw
    version = {A: 4, AAAA: 6}.get(question.kind)
    fitting = [a for a in map(ipaddress.ip_address, addresses) if a.version == version]
    # 0xc00c points to the question's name; one second to live: nothing of it may outlast the capture.
    records = b"".join(struct.pack(">HHHIH", 0xC00C, question.kind, 1, 1, len(a.packed)) + a.packed for a in fitting)
    return _HEADER.pack(question.identity, flags, 1, len(fitting), 0, 0) + question.raw + records
