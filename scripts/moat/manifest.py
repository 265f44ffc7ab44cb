# SPDX-License-Identifier: Apache-2.0
"""The bundle's root document ``manifest.json``: what crosses from the build host to the site.

Canonical form: UTF-8 JSON, keys sorted, no white space, ``files`` sorted by path, one newline
at the end. The parser accepts nothing else, so that one meaning has one byte string and one
signature. It reads untrusted bytes: it is total (a value, :class:`BadManifest` or
:class:`UnsafePath`), bounded in size, and looks at nothing but its argument. Which paths are
safe is in :mod:`moat.paths`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from moat.errors import BadManifest
from moat.paths import check_paths

FORMAT: Final = "moat-bundle/1"
MANIFEST_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = "manifest.json.minisig"
#: A site bundle has a few hundred files of about 300 bytes each; 16 MiB leaves room for 50,000.
MAX_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True)
class BundleInfo:
    """What the bundle is. ``created`` is seconds since 1970 (the locks' time, not the build's)."""

    version: str
    profile: str
    target: str
    created: int

    @property
    def name(self) -> str:
        """The folder's name, e.g. ``moat-0.1.0-site-debian13-amd64``."""
        return f"moat-{self.version}-{self.profile}-{self.target}"


@dataclass(frozen=True)
class FileEntry:
    """One file on the medium. ``size`` is in bytes; ``license`` an SPDX expression."""

    path: str
    size: int
    sha256: str
    kind: str
    component: str
    version: str
    license: str
    source: str


@dataclass(frozen=True)
class ImageEntry:
    """One container image: its archive on the medium and what the engine must show after loading.

    ``id`` is the config digest (``docker inspect .Id``); ``unpacked`` the sum of its layers in bytes.
    """

    name: str
    reference: str
    id: str
    archive: str
    unpacked: int


@dataclass(frozen=True)
class Manifest:
    """The whole document."""

    bundle: BundleInfo
    files: tuple[FileEntry, ...]
    images: tuple[ImageEntry, ...]

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        document = {
            "format": FORMAT,
            "bundle": asdict(self.bundle),
            "files": [asdict(f) for f in sorted(self.files, key=lambda f: f.path)],
            "images": [asdict(i) for i in sorted(self.images, key=lambda i: i.name)],
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8") + b"\n"


_VERSION_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
#: What every field must look like, by its type in the dataclass and its name. A bare ``\Z``-anchored
#: full match; lengths are in characters.
_PATTERNS: Final = {
    "version": re.compile(
        rf"{_VERSION_NUMBER}(?:\.{_VERSION_NUMBER}){{1,3}}(?:-[0-9a-z]{{1,16}}(?:\.[0-9a-z]{{1,16}}){{0,3}})?"
    ),
    "profile": re.compile(r"[a-z0-9][a-z0-9-]{0,31}"),
    "target": re.compile(r"[a-z0-9][a-z0-9-]{0,63}"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "kind": re.compile(r"[a-z0-9][a-z0-9-]{0,31}"),
    "name": re.compile(r"[a-z0-9][a-z0-9-]{0,62}"),
    "reference": re.compile(r"[a-z0-9][a-z0-9._/-]{0,199}:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"),
    "id": re.compile(r"sha256:[0-9a-f]{64}"),
}
_MAX_TEXT: Final = 1024
#: 2038 and beyond is fine; a time that ``datetime`` cannot show (after 9999) is not.
_MAX_NUMBER: Final = {"created": 253_402_300_799, "size": 2**50, "unpacked": 2**50}


def _bad(message: str, *, found: object = None, expected: str | None = None) -> BadManifest:
    return BadManifest(
        f"{MANIFEST_NAME}: {message}",
        found=None if found is None else str(found)[:200],
        expected=expected,
        hint="make the bundle again with `moat build`; a copy cannot be repaired",
        path=MANIFEST_NAME,
    )


def _field(where: str, name: str, value: object, pattern: re.Pattern[str] | None) -> None:
    """Check one value: text of one printable line, or a whole number in its range."""
    if name in _MAX_NUMBER:
        # bool is a subclass of int: {"size": true} must not pass for 1.
        if type(value) is not int or not 0 <= value <= _MAX_NUMBER[name]:
            raise _bad(f"{where}: {name} is not a whole number in range", found=repr(value)[:80])
        return
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _bad(f"{where}: {name} is not text of at most {_MAX_TEXT} characters", found=type(value).__name__)
    if pattern is not None and not pattern.fullmatch(value):
        raise _bad(f"{where}: {name} is malformed", found=value, expected=pattern.pattern)
    if not value.isprintable():
        raise _bad(f"{where}: {name} holds control characters", found=ascii(value))


def _record(where: str, raw: object, kind: type[Any], patterned: tuple[str, ...]) -> Any:
    """Make a ``kind`` from a JSON object that has exactly its fields."""
    names = {f.name for f in fields(kind)}
    if not isinstance(raw, dict) or set(raw) != names:
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise _bad(f"{where} has other fields than the format", found=found, expected=str(sorted(names)))
    for name in sorted(names):
        _field(where, name, raw[name], _PATTERNS[name] if name in patterned else None)
    return kind(**raw)


def _records(raw: object, name: str, make: Callable[[str, object], Any], key: str) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise _bad(f"{name} is not a list", found=type(raw).__name__)
    records = tuple(make(f"{name}[{i}]", one) for i, one in enumerate(raw))
    keys = [getattr(r, key) for r in records]
    for before, after in itertools.pairwise(keys):
        if before >= after:
            raise _bad(f"{name} is not sorted by {key}, or names one twice", found=f"{before!r} before {after!r}")
    return records


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{text[:40]} is not a whole number")


def _load(data: bytes) -> dict[str, Any]:
    """Decode strict JSON: whole numbers, no duplicate keys, no NaN, an object at the top."""
    try:
        raw = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except RecursionError:
        raise _bad("is nested too deeply", expected="three levels") from None
    except ValueError as e:  # includes UnicodeDecodeError and JSONDecodeError
        raise _bad("is not strict JSON", found=e) from e
    if not isinstance(raw, dict):
        raise _bad("is not an object", found=type(raw).__name__)
    return raw


def parse_manifest(data: bytes) -> Manifest:
    """Parse ``manifest.json``; the bytes need not be trusted.

    Raises:
        BadManifest: too large, not strict JSON, an unknown format, a field that is missing, unknown
            or malformed, or bytes that are not the canonical encoding of what they say.
        UnsafePath: a path that no file on a medium may have (:func:`moat.paths.check_paths`).
    """
    if len(data) > MAX_BYTES:
        raise _bad("is too large", found=f"more than {MAX_BYTES} bytes", expected=f"at most {MAX_BYTES}")
    raw = _load(data)
    if raw.get("format") != FORMAT:
        raise BadManifest(
            f"{MANIFEST_NAME}: the format is not one that this moat knows",
            found=ascii(raw.get("format"))[:80],
            expected=FORMAT,
            hint="use the moat.pyz of the release that made the bundle",
            path=MANIFEST_NAME,
        )
    if set(raw) != {"format", "bundle", "files", "images"}:
        raise _bad("has other parts than the format", found=sorted(raw), expected="bundle, files, format, images")
    # Paths first: a path that would escape is named as such, whatever else is wrong with its entry.
    listed = raw["files"] if isinstance(raw["files"], list) else []
    paths = {f["path"] for f in listed if isinstance(f, dict) and isinstance(f.get("path"), str)}
    check_paths(sorted(paths), reserved=(MANIFEST_NAME, SIGNATURE_NAME))
    bundle: BundleInfo = _record("bundle", raw["bundle"], BundleInfo, ("version", "profile", "target"))
    files: tuple[FileEntry, ...] = _records(
        raw["files"], "files", lambda where, one: _record(where, one, FileEntry, ("sha256", "kind")), "path"
    )
    images: tuple[ImageEntry, ...] = _records(
        raw["images"], "images", lambda where, one: _record(where, one, ImageEntry, ("name", "reference", "id")), "name"
    )
    for image in images:
        if image.archive not in paths:
            raise _bad(f"the archive of image {image.name} is not in files", found=image.archive)
    for unique in ("reference", "archive"):
        if len({getattr(i, unique) for i in images}) != len(images):
            raise _bad(f"two images have one {unique}")
    manifest = Manifest(bundle, files, images)
    try:
        canonical = manifest.to_bytes()
    except UnicodeEncodeError as e:
        raise _bad("holds text that is not Unicode", found="a lone surrogate") from e
    if canonical != data:
        raise _bad("is not in canonical form", expected="keys sorted, no white space, one newline at the end")
    return manifest


def version_key(version: str) -> tuple[tuple[int, ...], tuple[tuple[int, int, str], ...]]:
    """Return what orders release versions by number, not by text: 0.10.0 comes after 0.9.1.

    A pre-release (``1.0.0-rc.2``) comes before its release, as in semantic versioning.

    Raises:
        ValueError: not a version in the manifest's form.
    """
    if not _PATTERNS["version"].fullmatch(version):
        raise ValueError(f"{version[:40]!r} is not a version")
    numbers, _, pre = version.partition("-")
    release = tuple(int(n) for n in numbers.split("."))
    release += (0,) * (4 - len(release))
    if not pre:
        return release, ((2, 0, ""),)
    parts = tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pre.split("."))
    return release, parts
