# SPDX-License-Identifier: Apache-2.0
"""Which relative paths a bundle may hold.

A bundle is written on one system and read on another: from ext4 over a FAT32 or exFAT medium,
perhaps through Windows. A path is safe only if it names one and the same file on all of them and
cannot leave the bundle's folder. The rules are on text alone; nothing here looks at a disk.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from moat.errors import UnsafePath

#: FAT32 and exFAT count 255 UTF-16 units, ext4 255 bytes: the smaller of both, since bytes >= units.
MAX_SEGMENT_BYTES: Final = 255
MAX_PATH_BYTES: Final = 1024

_WINDOWS_FORBIDDEN: Final = frozenset('<>:"|?*')
_WINDOWS_DEVICES: Final = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE)


def _why_unsafe(path: str) -> str | None:
    """Return what is wrong with ``path``, or ``None``."""
    try:
        size = len(path.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not Unicode text"
    if not path:
        return "is empty"
    if size > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    if path.startswith("/"):
        return "is absolute"
    if "\\" in path:
        return "holds a backslash"
    if not path.isprintable():
        return "holds control or invisible characters"
    if unicodedata.normalize("NFC", path) != path:
        return "is not in Unicode normal form C"
    for segment in path.split("/"):
        if segment in ("", ".", ".."):
            return f"has a segment {segment!r}"
        if len(segment.encode("utf-8")) > MAX_SEGMENT_BYTES:
            return f"has a segment longer than {MAX_SEGMENT_BYTES} bytes"
        if segment[-1] in ". " or segment[0] == " ":
            return "has a segment that begins with a space or ends with a dot or space"
        if not _WINDOWS_FORBIDDEN.isdisjoint(segment):
            return "holds a character that FAT32 or Windows refuses"
        if _WINDOWS_DEVICES.fullmatch(segment):
            return "has a segment that Windows takes for a device"
    return None


def check_path(path: str) -> None:
    """Check one path of a manifest.

    Raises:
        UnsafePath: absolute, leaving the folder (``..``), ambiguous (empty or ``.`` segments,
            backslash, control characters, another Unicode form), not storable on FAT32, or too long.
    """
    why = _why_unsafe(path)
    if why is not None:
        raise UnsafePath(
            f"the path {path[:200]!r} {why}",
            found=path[:200],
            expected="a relative path with plain names",
            hint="do not use this medium; no release of moat holds such a path",
            path=path[:1000],
        )


def fold(path: str) -> str:
    """Return what twins have in common: two paths that some file system takes for one.

    Case-insensitive (FAT, exFAT, NTFS) and normalising (HFS+) file systems differ in detail;
    compatibility composition of the case fold is coarser than each of them.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


def check_paths(paths: Iterable[str], *, reserved: Iterable[str] = ()) -> None:
    """Check all paths of a manifest, each by itself and against one another.

    Args:
        paths: of the files.
        reserved: names at the top that no listed file may have or resemble.

    Raises:
        UnsafePath: an unsafe path, two paths that are one file or folder on a case-insensitive or
            normalising file system, or a file that is also a folder.
    """
    files: dict[str, str] = {fold(r): r for r in reserved}
    folders: dict[str, str] = {}
    for path in paths:
        check_path(path)
        folded = fold(path)
        if folded in files:
            raise _twin(path, files[folded])
        files[folded] = path
        parts = path.split("/")
        for i in range(1, len(parts)):
            folder = "/".join(parts[:i])
            if folders.setdefault(fold(folder), folder) != folder:
                raise _twin(path, folders[fold(folder)] + "/")
    for folded, path in files.items():
        if folded in folders:
            raise _twin(path, folders[folded] + "/")


def _twin(path: str, other: str) -> UnsafePath:
    return UnsafePath(
        f"the paths {path[:200]!r} and {other[:200]!r} are one on some file systems",
        found=path[:200],
        expected="paths that differ by more than case or Unicode form",
        hint="do not use this medium; no release of moat holds such a pair",
        path=path[:1000],
    )
