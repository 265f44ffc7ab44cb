# SPDX-License-Identifier: Apache-2.0
"""Where revisions of the configuration lie: the names, the pointer, and what a source and a store must do.

A bucket (or a folder) holds ``revisions/<n>``, never overwritten, and ``current``, the pointer: the one object that is
replaced, and only by who has seen the one before (``If-Match``). A push that dies anywhere leaves the old pointer, at
worst beside a revision that nobody points to; its number is passed over by the next push. Nothing is ever removed from
there: an archive is as large as the configuration, and any of them can be brought back.

What each node serves lies apart (``nodes/<node>.json``), because the nodes may write there and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moat_gateway.errors import BadRevision, PushConflict
from moat_gateway.settings import Settings

FORMAT = 1
POINTER = "current"
PREFIX = "revisions/"
NODES = "nodes/"
#: Present in a bucket that another site's store writes to; see :mod:`moat_gateway.storereplicas`.
REPLICA = "replica"
MAX_POINTER = 4096  # bytes; a real one is below 400
MAX_REPORT = 1 << 20  # bytes of one node's report
UNREADABLE = b""  # what stands for a report that is too large or no file, so that its node is named
MAX_NUMBER = 2**53 - 1  # the largest that every JSON reader keeps

_FIELDS = frozenset({"format", "revision", "object", "sha256", "size", "pushed_at", "author"})
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,15}")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class NoRevision(BadRevision):
    """Nothing has been pushed to this source yet."""


class BadPointer(BadRevision):
    """What lies where the pointer should be is none; ``etag`` is its own, so that a push can replace it."""

    etag = ""


class Taken(PushConflict):
    """The number of the revision is taken."""


@dataclass(frozen=True)
class Pointer:
    """The object ``current``: which revision is to be served.

    Attributes:
        revision: its number.
        object: the name of its archive.
        sha256: of the archive, hex.
        size: of the archive, bytes.
        pushed_at: by the clock of who pushed; for people only.
        author: who pushed.
        etag: what the source gave for these bytes; opaque.
    """

    revision: int
    object: str
    sha256: str
    size: int
    pushed_at: str
    author: str
    etag: str = ""

    def to_bytes(self) -> bytes:
        """Return the bytes of the pointer object."""
        fields = {name: getattr(self, name) for name in _FIELDS if name != "format"}
        return (json.dumps({"format": FORMAT, **fields}, sort_keys=True, separators=(",", ":")) + "\n").encode()


@dataclass(frozen=True)
class Stored:
    """One archive in the store: its number, its size in bytes, and when the store got it (seconds since 1970)."""

    number: int
    size: int
    modified: float


@dataclass(frozen=True)
class NodeReport:
    """What a node wrote, and how long ago (seconds) by the clock of the store itself; ``None`` if nobody knows."""

    raw: bytes = field(repr=False)
    age: float | None


class Source(Protocol):
    """What a node needs."""

    @property
    def kind(self) -> str:
        """``s3`` or ``directory``."""

    def describe(self) -> str:
        """Say in a few words where this is."""

    def pointer(self, etag: str | None = None) -> Pointer | None:
        """Return the pointer, or ``None`` if it is still the one with this etag.

        Raises:
            NoRevision: nothing has been pushed yet.
            StoreFailed: the source does not answer, or refuses.
            BadPointer: what lies there is no pointer (a :class:`BadRevision`).
        """

    def fetch(self, pointer: Pointer, limit_bytes: int) -> bytes:
        """Return the archive that a pointer names.

        Raises:
            StoreFailed: the source does not answer, or refuses.
            BadRevision: the archive is missing, larger than allowed, or not the one that the pointer means.
        """


class Store(Source, Protocol):
    """What an administrator needs, and the place of the nodes' reports."""

    def upload(self, number: int, raw: bytes) -> None:
        """Put a new archive.

        Raises:
            Taken: there is one of this number.
            StoreFailed: not done, or not known to be done.
        """

    def move(self, pointer: Pointer, etag: str | None) -> Pointer:
        """Make a pointer the current one, if the one with ``etag`` still is (``None``: if there is none).

        Raises:
            PushConflict: somebody else moved it.
            StoreFailed: not done, or not known to be done.
        """

    def probe(self) -> None:
        """See that the store holds to conditions, without which two administrators would overwrite each other.

        Raises:
            StoreFailed: it does not.
        """

    def list(self) -> list[Stored]:
        """Return the archives by number."""

    def get(self, number: int) -> bytes:
        """Return one archive; the errors are those of :meth:`Source.fetch`."""

    def report(self, node: str, raw: bytes) -> None:
        """Write what a node serves."""

    def reports(self) -> Mapping[str, NodeReport]:
        """Return what the nodes wrote."""

    def forget(self, node: str) -> bool:
        """Remove what a node wrote; say whether there was anything."""

    def replica_of(self) -> str | None:
        """Return the name of the site whose revisions this store only receives, or ``None`` if it has its own."""


def open_source(settings: Settings) -> Source:
    """Return the source that the settings name: a folder if ``source_dir`` is set, else the object store."""
    return open_store(settings)


def open_store(settings: Settings) -> Store:
    """Return the store that the settings name."""
    if settings.source_dir:
        from moat_gateway.dirstore import DirectoryStore

        return DirectoryStore(Path(settings.source_dir), limit=settings.revision_max << 20)
    from moat_gateway.s3store import S3Store

    return S3Store(settings)


def object_name(number: int) -> str:
    """Return the name of a revision's archive."""
    return f"{PREFIX}{number}"


def number_of(name: str) -> int | None:
    """Return the number in the last part of an archive's name; ``None`` if it is none."""
    return int(name) if _NUMBER.fullmatch(name) and int(name) <= MAX_NUMBER else None


def is_node_name(name: str) -> bool:
    """Say whether a node can have this name."""
    return bool(_NODE.fullmatch(name))


def node_of(name: str) -> str | None:
    """Return the node of a report's name (``pc1.json``); ``None`` if it is none."""
    node = name.removesuffix(".json")
    return node if node != name and is_node_name(node) else None


def parse_pointer(raw: bytes, etag: str, where: str) -> Pointer:
    """Read the bytes of a pointer.

    Raises:
        BadPointer: they are none.
    """
    try:
        value: Any = json.loads(raw) if len(raw) <= MAX_POINTER else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or set(value) != _FIELDS or type(value["format"]) is not int or value["format"] != 1:
        raise _bad_pointer(where, etag, f"{min(len(raw), MAX_POINTER + 1)} bytes that are none")
    number, size = value["revision"], value["size"]
    if type(number) is not int or not 0 < number <= MAX_NUMBER or value["object"] != object_name(number):
        raise _bad_pointer(where, etag, "a number or a name that cannot be one")
    if type(size) is not int or not 0 < size <= MAX_NUMBER:
        raise _bad_pointer(where, etag, "a size that cannot be one")
    if not isinstance(value["sha256"], str) or not _SHA256.fullmatch(value["sha256"]):
        raise _bad_pointer(where, etag, "a sha256 that cannot be one")
    for name in ("pushed_at", "author"):
        if not isinstance(value[name], str) or not value[name].isprintable():
            raise _bad_pointer(where, etag, f"a text in {name} that cannot be one")
    return Pointer(number, value["object"], value["sha256"], size, value["pushed_at"], value["author"], etag)


def no_revision(where: str) -> NoRevision:
    """Return the refusal of a source without a pointer."""
    return NoRevision(
        "there is no revision yet", found="nothing", hint="make one with `moat-gateway config push DIR`", path=where
    )


#: For what the pointer names and the store does not have, or not as it was.
PUSH_AGAIN = "push again: `moat-gateway config push DIR --force`"


def missing(where: str, name: str, hint: str = "look for its number with `moat-gateway config history`") -> BadRevision:
    """Return the refusal of an archive that is not there."""
    return BadRevision(
        f"the archive {name} is missing",
        found="no such object",
        expected="the archive of this revision",
        hint=hint,
        path=where,
    )


def too_large(where: str, name: str, found: int, limit: int) -> BadRevision:
    """Return the refusal of an archive that is larger than it may be."""
    return BadRevision(
        f"the archive {name} is too large",
        found=f"at least {found} bytes",
        expected=f"at most {limit} bytes",
        hint="push it again, smaller; or raise MOAT_REVISION_MAX",
        path=where,
    )


def taken(where: str, number: int) -> Taken:
    """Return the refusal of a number that is in use."""
    return Taken(
        f"there is an archive of revision {number} already",
        found=object_name(number),
        expected="a free number",
        hint="give a higher one with --revision",
        path=where,
    )


def check(raw: bytes, pointer: Pointer, where: str) -> None:
    """Refuse an archive that is not the one that the pointer means.

    Raises:
        BadRevision: another size or another sha256.
    """
    digest = hashlib.sha256(raw).hexdigest()
    if len(raw) != pointer.size or digest != pointer.sha256:
        raise BadRevision(
            f"the archive {pointer.object} is not the one that the pointer means",
            found=f"{len(raw)} bytes, sha256 {digest[:16]}...",
            expected=f"{pointer.size} bytes, sha256 {pointer.sha256[:16]}...",
            hint=PUSH_AGAIN,
            path=where,
        )


def conflict(where: str, winner: Pointer | None) -> PushConflict:
    """Return what the loser of two simultaneous pushes is told."""
    return PushConflict(
        "somebody else pushed at the same time; your revision is not in force",
        found=f"revision {winner.revision} by {winner.author}, {winner.pushed_at}" if winner else "no pointer any more",
        expected="the revision that was in force when you began",
        hint="look at it with `moat-gateway config diff DIR`, and push again",
        path=where,
    )


def _bad_pointer(where: str, etag: str, found: str) -> BadPointer:
    refusal = BadPointer(
        f"the object {POINTER} is not a pointer to a revision",
        found=found,
        expected="what `moat-gateway config push` writes",
        hint="push again; see who else writes to the store",
        path=where,
    )
    refusal.etag = etag
    return refusal
