# SPDX-License-Identifier: Apache-2.0
"""A revision of the configuration: numbered, signed, one archive of one spelling.

The archive is an uncompressed ustar file: ``revision.json`` (what is in it), ``revision.json.minisig`` (the signature
of exactly those bytes), then the files. It is never "extracted": the only free bytes are those of the manifest, which
are signed, and of the files, whose hashes the manifest holds. Every header and every pad is compared with the one that
:func:`build` would write, so that nothing else fits in: no link, no device, no second header, no trailing byte.

Order of trust: the size, the first two headers (compared, not interpreted), the signature; only then is the manifest
parsed, and only then does anything of the rest count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from moat_gateway import sitekey, ustar
from moat_gateway.errors import BadRevision, BadSignature
from moat_gateway.sitekey import PublicKey, SigningKey

FORMAT = 1
MANIFEST, SIGNATURE = "revision.json", "revision.json.minisig"
PREPARED = "prepared.json"  # beside the files in the folder of a kept revision; not part of it
MAX_MANIFEST = 1 << 20  # bytes
MAX_FILES = 2000
MAX_NUMBER = 2**53 - 1  # the largest that every JSON reader keeps
MAX_AUTHOR, MAX_MESSAGE = 200, 4000  # characters
MAX_PATH = 100  # bytes: a longer one would need a second header

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOMENT = "%Y-%m-%dT%H:%M:%SZ"
_FIELDS = frozenset(
    {"format", "revision", "previous", "created_at", "author", "message", "content_of", "content", "files"}
)


@dataclass(frozen=True)
class Revision:
    """A revision whose signature and hashes hold.

    Attributes:
        number: from 1, only ever growing.
        previous: the one that it follows; 0 for none.
        created_at: ``2027-01-31T12:00:00Z``, by the clock of who made it; for people only.
        author: who says to have made it.
        message: why.
        content_of: the revision whose content it brings back, or ``None``.
        content: sha256 over the sorted lines ``sha256  path``.
        files: the content by path.
        manifest: the bytes of ``revision.json``.
        signature: the bytes of ``revision.json.minisig``.
        key_id: the trusted key that signed.
    """

    number: int
    previous: int
    created_at: str
    author: str
    message: str
    content_of: int | None
    content: str
    files: Mapping[str, bytes] = field(repr=False)
    manifest: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    key_id: str

    @property
    def sha256(self) -> str:
        """Hex sha256 of the manifest: the name of this revision's content and number together."""
        return sha256(self.manifest)


def sha256(data: bytes) -> str:
    """Return the hex sha256 of a file."""
    return hashlib.sha256(data).hexdigest()


def content_sha256(files: Mapping[str, bytes]) -> str:
    """Return the sha256 that two revisions with the same files share."""
    return _content({path: sha256(data) for path, data in files.items()})


def build(
    files: Mapping[str, bytes],
    *,
    number: int,
    previous: int,
    author: str,
    message: str,
    created_at: str,
    content_of: int | None,
    key: SigningKey,
) -> bytes:
    """Return the signed archive of a revision; the same arguments give the same bytes.

    Args:
        files: the content by path.
        number: of the new revision.
        previous: the one that it follows; 0 for none.
        author: one line.
        message: text; lines end with a line feed.
        created_at: ``2027-01-31T12:00:00Z``.
        content_of: the revision whose content it brings back, or ``None``.
        key: the site key.

    Raises:
        BadRevision: a value or a path that no reader would take.
    """
    entries = [{"path": path, "size": len(files[path]), "sha256": sha256(files[path])} for path in sorted(files)]
    fields = {
        "format": FORMAT,
        "revision": number,
        "previous": previous,
        "created_at": created_at,
        "author": author,
        "message": message,
        "content_of": content_of,
        "content": content_sha256(files),
        "files": entries,
    }
    _check_manifest(fields)
    manifest = _canonical(fields)
    if len(manifest) > MAX_MANIFEST:
        raise _bad("the list of files is too long", f"{len(manifest)} bytes", f"at most {MAX_MANIFEST}")
    signature = key.sign(manifest, _trusted_comment(number))
    return ustar.build([(MANIFEST, manifest), (SIGNATURE, signature), *((path, files[path]) for path in sorted(files))])


def open_archive(raw: bytes, trusted: Iterable[PublicKey], *, limit: int) -> Revision:
    """Verify an archive and return what it holds.

    Args:
        raw: from an untrusted place.
        trusted: the keys that may sign.
        limit: of the archive, bytes.

    Raises:
        BadRevision: too large, or not exactly an archive of the signed manifest.
        BadSignature: not signed by a trusted key.
    """
    if len(raw) > limit:
        raise BadRevision(
            "the archive is too large",
            found=f"{len(raw)} bytes",
            expected=f"at most {limit}",
            hint="make the configuration smaller, or raise MOAT_REVISION_MAX",
        )
    reader = ustar.Reader(raw)
    manifest = reader.first(MANIFEST, MAX_MANIFEST)
    signature = reader.first(SIGNATURE, sitekey.MAX_BYTES)
    fields, key_id = _verified(manifest, signature, trusted)
    files: dict[str, bytes] = {}
    for entry in fields["files"]:
        data = reader.member(entry["path"], entry["size"])
        files[entry["path"]] = _matching(entry, data)
    reader.end()
    return _revision(fields, files, manifest, signature, key_id)


def read_folder(folder: Path, trusted: Iterable[PublicKey] | None) -> Revision:
    """Verify a kept revision again: its manifest, signature and files as they lie in a folder.

    ``prepared.json`` may lie beside them; any other file, and any link, is refused.

    Args:
        folder: of the kept revision.
        trusted: the keys that may sign; ``None`` leaves the signature out (it was verified before it was kept).

    Raises:
        BadRevision: a file is missing, changed, a link, or does not belong.
        BadSignature: not signed by a trusted key.
    """
    manifest = _read_file(folder, MANIFEST, MAX_MANIFEST)
    signature = _read_file(folder, SIGNATURE, sitekey.MAX_BYTES)
    fields, key_id = (_parse_manifest(manifest), "") if trusted is None else _verified(manifest, signature, trusted)
    listed = {e["path"] for e in fields["files"]} | {MANIFEST, SIGNATURE, PREPARED}
    for path in _walk(folder):
        if path not in listed:
            raise _bad(f"the kept revision holds {_shown(path)}, which is not listed", None, "the listed files only")
    files = {e["path"]: _matching(e, _read_file(folder, e["path"], e["size"])) for e in fields["files"]}
    return _revision(fields, files, manifest, signature, key_id)


# --- the manifest ---


def _verified(manifest: bytes, signature: bytes, trusted: Iterable[PublicKey]) -> tuple[dict[str, Any], str]:
    by = sitekey.verify(manifest, signature, trusted)
    fields = _parse_manifest(manifest)
    expected = _trusted_comment(fields["revision"])
    if by.trusted_comment != expected:
        raise BadSignature(
            "the signature is not of this revision",
            found=by.trusted_comment[:100],
            expected=expected,
            hint="sign revisions with `moat-gateway config push`",
        )
    return fields, by.key_id


def _parse_manifest(raw: bytes) -> dict[str, Any]:
    def refuse(text: str) -> Any:
        raise ValueError(f"the number {text[:20]}")

    try:
        fields = json.loads(raw, parse_float=refuse, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise _bad(
            f"{MANIFEST} is not JSON as it must be", str(e)[:100] or "nested too deeply", "whole numbers, text, lists"
        ) from None
    _check_manifest(fields)
    if _canonical(fields) != raw:
        raise _bad(
            f"{MANIFEST} is not in its one spelling",
            "other blanks, escapes, order, or a key twice",
            "sorted keys, no blanks, ASCII, one line feed at the end",
        )
    return dict(fields)


def _check_manifest(fields: Any) -> None:
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        names = _shown(sorted(map(str, fields))) if isinstance(fields, dict) else type(fields).__name__
        raise _bad(f"{MANIFEST} does not hold the fields of a revision", names, ", ".join(sorted(_FIELDS)))
    if not _is_count(fields["format"]) or fields["format"] != FORMAT:
        raise _bad("the revision is of an unknown format", _shown(fields["format"]), str(FORMAT))
    number = fields["revision"]
    if not _is_count(number) or not 0 < number <= MAX_NUMBER:
        raise _bad("the revision's number cannot be used", _shown(number), f"a whole number from 1 to {MAX_NUMBER}")
    if not _is_count(fields["previous"]) or not 0 <= fields["previous"] < number:
        raise _bad("the previous revision's number cannot be used", _shown(fields["previous"]), f"0 to {number - 1}")
    origin = fields["content_of"]
    if origin is not None and (not _is_count(origin) or not 0 < origin < number):
        raise _bad("content_of names no earlier revision", _shown(origin), f"null, or 1 to {number - 1}")
    _check_text(fields["author"], "author", MAX_AUTHOR, "")
    _check_text(fields["message"], "message", MAX_MESSAGE, "\n")
    try:
        if datetime.strptime(fields["created_at"], _MOMENT).strftime(_MOMENT) != fields["created_at"]:
            raise ValueError
    except (TypeError, ValueError):
        raise _bad("created_at is not a moment", _shown(fields["created_at"]), "2027-01-31T12:00:00Z") from None
    _check_files(fields["files"])
    if fields["content"] != _content({e["path"]: e["sha256"] for e in fields["files"]}):
        raise _bad("content is not the hash of the list of files", _shown(fields["content"]), "their sha256")


def _check_files(entries: Any) -> None:
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_FILES:
        raise _bad("files is not a list of files", None, f"1 to {MAX_FILES} files")
    paths: list[str] = []
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"path", "size", "sha256"}:
            raise _bad("an entry of files is malformed", _shown(entry), "path, size and sha256")
        if not _is_count(entry["size"]) or not 0 <= entry["size"] <= MAX_NUMBER:
            raise _bad("an entry of files has no usable size", _shown(entry["size"]), "a whole number from 0")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise _bad("an entry of files has no sha256", _shown(entry["sha256"]), "64 lower-case hex digits")
        check_path(entry["path"])
        paths.append(entry["path"])
    if paths != sorted(set(paths)):
        raise _bad("the list of files is not sorted, or names a file twice", None, "each path once, in order")
    folders = {path[:i] for path in paths for i, c in enumerate(path) if c == "/"}
    both = sorted(folders.intersection(paths))
    if both:
        raise _bad(f"{both[0]} is a file and a folder at once", None, "one of the two")


def check_path(path: Any) -> None:
    """Refuse a path that is not plainly below the revision's folder.

    Raises:
        BadRevision: absolute, ``..``, unusual characters, too long, or a name of the revision's own files.
    """
    if (
        not isinstance(path, str)
        or len(path) > MAX_PATH
        or any(s in (".", "..") or not _SEGMENT.fullmatch(s) for s in path.split("/"))
        or path in (MANIFEST, SIGNATURE, PREPARED)
    ):
        raise _bad(
            "a path in the revision cannot be used",
            _shown(path),
            f"at most {MAX_PATH} characters: letters, digits, '.', '_', '-', and '/' between names; no '..'",
            "rename the file",
        )


def _check_text(value: Any, name: str, most: int, also: str) -> None:
    if not isinstance(value, str) or len(value) > most or not all(c.isprintable() or c in also for c in value):
        raise _bad(
            f"the {name} cannot be used",
            f"{len(value)} characters" if isinstance(value, str) else type(value).__name__,
            f"at most {most} characters, none of them a control character",
            f"give another {name}",
        )


def _content(hashes: Mapping[str, str]) -> str:
    text = "".join(sorted(f"{digest}  {path}\n" for path, digest in hashes.items()))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True) + "\n").encode("ascii")


def _trusted_comment(number: int) -> str:
    return f"moat-config revision={number}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _matching(entry: Mapping[str, Any], data: bytes) -> bytes:
    digest = sha256(data)
    if len(data) != entry["size"] or digest != entry["sha256"]:
        raise _bad(f"{entry['path']} is not the file that was signed", f"sha256 {digest}", f"sha256 {entry['sha256']}")
    return data


def _revision(
    fields: Mapping[str, Any], files: Mapping[str, bytes], manifest: bytes, signature: bytes, key_id: str
) -> Revision:
    return Revision(
        number=fields["revision"],
        previous=fields["previous"],
        created_at=fields["created_at"],
        author=fields["author"],
        message=fields["message"],
        content_of=fields["content_of"],
        content=fields["content"],
        files=files,
        manifest=manifest,
        signature=signature,
        key_id=key_id,
    )


# --- a kept revision ---


def _walk(folder: Path) -> Iterable[str]:
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise _bad(f"the kept revision holds {_shown(str(path))}, a link or special file", None, "plain files")
        yield from (Path(place, name).relative_to(folder).as_posix() for name in names)


def _read_file(folder: Path, path: str, most: int) -> bytes:
    try:
        fd = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as f:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _bad(f"{path} is not a plain file", None, "a plain file")
            data = f.read(most + 1)
    except OSError as e:
        raise BadRevision(
            f"{path} of the kept revision cannot be read",
            found=e.strerror or str(e),
            expected="the file that was signed",
            hint="let config-sync fetch the revision again",
            path=str(folder),
        ) from e
    if len(data) > most:
        raise _bad(f"{path} is larger than it may be", f"over {most} bytes", f"at most {most}")
    return data


def _shown(value: Any) -> str:
    # As repr: what an attacker chose must not reach a terminal as control characters.
    return ascii(value)[:120]


def _bad(message: str, found: str | None, expected: str | None, hint: str = ustar.AGAIN) -> BadRevision:
    return BadRevision(message, found=found, expected=expected, hint=hint)
