# SPDX-License-Identifier: Apache-2.0
"""One spelling of an uncompressed ustar archive of plain files: written here, and read by comparison with it.

Mode 0644, owner 0, time 0, no folders, links, devices or second headers, names of at most 100 bytes, two blocks of
zeros and then zeros up to a whole record of 10240 bytes, as ``tar`` and Python's ``tarfile`` end an archive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moat_gateway.errors import BadRevision

AGAIN = "push the configuration again; do not repair the archive"
_BLOCK, _RECORD = 512, 10240  # bytes
#: Kinds of member of other tar files, for the message.
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
    b"5": "a folder", b"6": "a named pipe", b"7": "a contiguous file", b"x": "a pax header",
    b"g": "a global pax header", b"L": "a GNU long name", b"K": "a GNU long link", b"S": "a GNU sparse file",
}  # fmt: skip


def build(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the archive of these files, in this order.

    Raises:
        BadRevision: a file of 8 GiB or more.
    """
    out = b"".join(_header(path, len(data)) + data + bytes(-len(data) % _BLOCK) for path, data in members)
    return out + bytes(_tail(len(out)))


def _header(path: str, size: int) -> bytes:
    """Return the one ustar header of a file. By hand: what ``tarfile`` writes differs between Python's versions."""
    if size >= 8**11:
        raise _bad(f"{path} is too large for the archive", f"{size} bytes", "less than 8 GiB")
    parts = (
        path.encode("ascii").ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2 + f"{size:011o}\0".encode("ascii") + b"00000000000\0",  # mode, owner, time
        b" " * 8,  # the checksum counts itself as blanks
        b"0".ljust(101, b"\0"),  # a plain file; no link
        b"ustar\x0000".ljust(72, b"\0"),  # magic, version; no names of owners
        b"0000000\0" * 2,  # no device
    )
    block = b"".join(parts).ljust(_BLOCK, b"\0")
    return block[:148] + f"{sum(block):06o}\0 ".encode("ascii") + block[156:]


def _tail(position: int) -> int:
    """Return how many zeros follow the last member: two blocks, then up to a whole record."""
    end = position + 2 * _BLOCK
    return 2 * _BLOCK + -end % _RECORD


class Reader:
    """Compares an archive, piece by piece, with the one that :func:`build` writes.

    Args:
        raw: from an untrusted place.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw = memoryview(raw)
        self._at = 0

    def first(self, path: str, most: int) -> bytes:
        """Return a member whose size only its header tells; nothing is verified yet."""
        header = self._block()
        digits = header[124:135]
        size = int(digits, 8) if re.fullmatch(rb"[0-7]{11}", digits) else 0
        self._expect(header, path, size)
        if size > most:
            raise _bad(f"{path} is too large", f"{size} bytes", f"at most {most}")
        return self._data(path, size)

    def member(self, path: str, size: int) -> bytes:
        """Return a member that the verified manifest lists."""
        self._expect(self._block(), path, size)
        return self._data(path, size)

    def end(self) -> None:
        """Refuse anything but the zeros at the end."""
        rest = self._raw[self._at :]
        if bytes(rest[:_BLOCK]).strip(b"\0"):
            raise _bad("the archive holds more than is listed", self._kind(bytes(rest[:_BLOCK])), "its end")
        tail = _tail(self._at)
        if len(rest) < tail:
            raise _bad("the archive is cut short", f"{len(self._raw)} bytes", f"{self._at + tail}")
        if len(rest) > tail or any(rest):
            raise _bad(
                "bytes follow the end of the archive", f"{len(self._raw)} bytes", f"{self._at + tail}, then zeros"
            )

    def _block(self) -> bytes:
        if len(self._raw) - self._at < _BLOCK:
            raise _bad("the archive is cut short", f"{len(self._raw)} bytes", "a whole archive")
        self._at += _BLOCK
        return bytes(self._raw[self._at - _BLOCK : self._at])

    def _data(self, path: str, size: int) -> bytes:
        end = self._at + size
        if len(self._raw) < end + -size % _BLOCK:
            raise _bad(f"the archive is cut short in {path}", f"{len(self._raw)} bytes", "a whole archive")
        data = bytes(self._raw[self._at : end])
        self._at = end + -size % _BLOCK
        if any(self._raw[end : self._at]):
            raise _bad(f"bytes hide behind {path}", "bytes that are not zero", "zeros up to the next block")
        return data

    def _expect(self, header: bytes, path: str, size: int) -> None:
        if header == _header(path, size):
            return
        if not header.strip(b"\0"):
            raise _bad(f"{path} is missing from the archive", "the end of the archive", path)
        if header[257:262] != b"ustar":
            raise _bad("this is not a ustar archive of a revision", None, f"the header of {path}")
        if header[156:157] in _KINDS:
            raise _bad(f"the archive holds {_KINDS[header[156:157]]}", self._kind(header), "plain files only")
        name = header[:100].rstrip(b"\0")
        if name != path.encode("ascii") or any(header[345:500]):
            raise _bad("a member of the archive is not the one that belongs here", self._kind(header), path)
        raise _bad(
            f"the header of {path} is not in its one spelling",
            "another size, mode, owner, time, or checksum",
            f"{size} bytes, mode 0644, owner 0, time 0",
        )

    @staticmethod
    def _kind(header: bytes) -> str:
        name = (header[345:500].rstrip(b"\0") + b"/" if any(header[345:500]) else b"") + header[:100].rstrip(b"\0")
        return f"{_KINDS.get(header[156:157], 'a member')} named {name.decode('ascii', 'backslashreplace')!a}"


def _bad(message: str, found: str | None, expected: str | None) -> BadRevision:
    return BadRevision(message, found=found, expected=expected, hint=AGAIN)
