# SPDX-License-Identifier: Apache-2.0
"""The tar of ``moat pack``: plain POSIX ustar, ordinary files only, written and read as one stream.

A packed bundle reaches a node before anything in it is trusted, so the reader knows nothing but
what the writer writes: no links, no folders, no sparse files, no extended header but that of a long
path, and never more memory than one block. Names are only text here; which of them are wanted is the caller's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from moat.errors import StageFailed

BLOCK: Final = 512
_CHUNK: Final = 1024 * 1024
#: Eleven octal digits of the size field.
MAX_SIZE: Final = 8**11 - 1
#: The name of an extended header, which names no file.
_EXTENDED: Final = b"extended"
#: The longest path of a bundle and its record's other bytes.
_MAX_RECORD: Final = 1100
PACK_AGAIN: Final = "make the tar again with `moat pack`, and copy it again"


def not_ours(what: str, *, found: str | None = None, expected: str | None = None) -> StageFailed:
    """Return the refusal of a tar that ``moat pack`` did not write."""
    return StageFailed(f"the packed bundle {what}", found=found, expected=expected, hint=PACK_AGAIN)


def _split(path: bytes) -> tuple[bytes, bytes] | None:
    """Return ``(prefix, name)`` of a path as ustar stores it, or ``None`` where it does not fit."""
    if len(path) <= 100:
        return b"", path
    cut = path.rfind(b"/", 0, 156)
    return (path[:cut], path[cut + 1 :]) if cut > 0 and len(path) - cut - 1 <= 100 else None


def header(path: str, size: int) -> bytes:
    """Return what stands before a file's bytes: mode 0644, owner 0, time 0, so that two tars of one bundle are equal.

    A path that ustar has no room for (some wheels have one) gets a POSIX extended header with the
    path and nothing else.

    Raises:
        StageFailed: the size does not fit.
    """
    if size > MAX_SIZE:
        raise StageFailed(f"{path} is too large for a tar", found=f"{size} bytes", expected=f"at most {MAX_SIZE}")
    raw = path.encode("utf-8")
    parts = _split(raw)
    if parts is not None:
        return _block(*parts, size, b"0")
    record = _path_record(raw)
    return (
        _block(b"", _EXTENDED, len(record), b"x") + record + padding(len(record)) + _block(b"", raw[:100], size, b"0")
    )


def _path_record(raw: bytes) -> bytes:
    """Return ``<length> path=<path>`` and a line end; the length counts its own digits."""
    length = len(raw) + 8
    while len(b"%d" % length) + len(raw) + 7 != length:
        length += 1
    return b"%d path=%s\n" % (length, raw)


def _block(prefix: bytes, name: bytes, size: int, kind: bytes) -> bytes:
    block = bytearray(BLOCK)
    for offset, field in (
        (0, name), (100, b"0000644"), (108, b"0000000"), (116, b"0000000"), (124, b"%011o" % size), (136, b"%011o" % 0),
        (148, b" " * 8), (156, kind), (257, b"ustar\x0000"), (329, b"0000000"), (337, b"0000000"), (345, prefix),
    ):  # fmt: skip
        block[offset : offset + len(field)] = field
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """Return the zeros that fill the last block of a file of ``size`` bytes."""
    return bytes(-size % BLOCK)


END: Final = bytes(2 * BLOCK)


class Member:
    """One file of the stream; its bytes can be taken once, in order."""

    def __init__(self, path: str, size: int, source: BinaryIO) -> None:
        self.path = path
        self.size = size
        self._source = source
        self._left = size

    def read(self, limit: int) -> bytes:
        """Return up to ``limit`` bytes, nothing at the end.

        Raises:
            StageFailed: the stream ended before the file did.
        """
        data = self._source.read(min(limit, self._left, _CHUNK))
        if not data and self._left:
            raise not_ours("is cut off", found=f"the end, in the middle of {self.path}", expected="the whole file")
        self._left -= len(data)
        return data

    def drain(self) -> None:
        """Pass over what was not taken, and the padding.

        Raises:
            StageFailed: the stream ended, or the padding is not zeros.
        """
        while self._left:
            self.read(_CHUNK)
        fill = _exactly(self._source, -self.size % BLOCK)
        if fill.strip(b"\0"):
            raise not_ours("holds bytes between its files", found=f"after {self.path}", expected="zeros")


def _exactly(source: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.read(size - len(data))
        if not more:
            raise not_ours("is cut off", found=f"{len(data)} bytes", expected=f"{size}")
        data += more
    return data


def _octal(field: bytes) -> int:
    text = field.rstrip(b" \0")
    if not text or text.strip(b"01234567"):
        raise not_ours("is damaged or no tar", found=f"the number {field!r}", expected="octal digits")
    return int(text, 8)


def _text(field: bytes) -> str:
    raw, _, rest = field.partition(b"\0")
    try:
        if rest.strip(b"\0"):
            raise ValueError
        return raw.decode("utf-8")
    except ValueError:
        raise not_ours("is damaged or no tar", found=f"the name {field[:40]!r}") from None


def members(source: BinaryIO) -> Iterator[Member]:
    """Yield the files of a tar, in order; what the caller does not read of one is passed over.

    Raises:
        StageFailed: cut off, damaged, or anything but what :func:`header` writes.
    """
    while True:
        block = _exactly(source, BLOCK)
        if not block.strip(b"\0"):
            if _exactly(source, BLOCK).strip(b"\0"):
                raise not_ours("goes on after its end", expected="two blocks of zeros")
            return
        member = _parse(block, source)
        yield member
        member.drain()


def _parse(block: bytes, source: BinaryIO) -> Member:
    summed = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
    if block[257:265] != b"ustar\x0000" or _octal(block[148:156]) != summed:
        raise not_ours("is damaged or no tar of `moat pack`", expected="a ustar header with its sum")
    size = _octal(block[124:136])
    if block[156:157] == b"x" and size <= _MAX_RECORD:
        record = _exactly(source, size + len(padding(size)))[:size]
        last = _exactly(source, BLOCK)
        size = _octal(last[124:136])
        path = _text(record.partition(b"=")[2].removesuffix(b"\n"))
        block = _block(b"", _EXTENDED, len(record), b"x") + record + padding(len(record)) + last
    else:
        prefix, name = _text(block[345:500]), _text(block[:100])
        path = f"{prefix}/{name}" if prefix else name
    # The writer's form is the only one: whatever it would not have written is refused as a whole.
    if size > MAX_SIZE or block != header(path, size):
        kind = {b"1": "a hard link", b"2": "a symbolic link", b"5": "a folder"}.get(block[156:157], "another header")
        raise not_ours(
            "holds more than ordinary files", found=f"{kind} at {path[:200]}", expected="what `moat pack` writes"
        )
    return Member(path, size, source)


def copy(member: Member, sink: Callable[[bytes], object]) -> None:
    """Hand the rest of ``member`` to ``sink``, block by block.

    Raises:
        StageFailed: as :meth:`Member.read`.
    """
    while data := member.read(_CHUNK):
        sink(data)
