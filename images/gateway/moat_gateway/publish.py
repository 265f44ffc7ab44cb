# SPDX-License-Identifier: Apache-2.0
"""Publishing a revision: read the pointer, take a number, sign, upload, move the pointer from what was seen.

The order is the safety: until the last step nobody is led to anything new, and the last step is one conditional write.
What dies before it leaves at worst an archive that nobody points to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256

from moat_gateway import fleet, revision, revstore
from moat_gateway.errors import BadRevision, BadSignature, BadSiteKey, OlderRevision, PushConflict, StoreFailed
from moat_gateway.revision import Revision
from moat_gateway.revstore import BadPointer, NoRevision, Pointer, Store, Taken
from moat_gateway.sitekey import PublicKey, SigningKey

_ATTEMPTS = 20  # numbers tried after one that was taken meanwhile
_LEAP = 1_000_000  # an archive whose number is further above is nobody's push


@dataclass(frozen=True)
class Base:
    """What was in force when somebody began: the pointer's etag, or ``None`` for no pointer."""

    etag: str | None


@dataclass(frozen=True)
class Wanted:
    """What is to be published.

    Attributes:
        files: the content by path, already checked.
        author: one line.
        message: why.
        number: the number that it must get, or ``None`` for the next free one.
        force: also if the content is the one in force.
        content_of: the earlier revision whose content this is, or ``None``.
        base: what it was made from; if something else is in force by now, nothing is published. ``None`` for what is
            in force when the publishing begins.
    """

    files: Mapping[str, bytes]
    author: str
    message: str
    number: int | None = None
    force: bool = False
    content_of: int | None = None
    base: Base | None = None


@dataclass(frozen=True)
class Published:
    """What is in force now.

    Attributes:
        revision: its number.
        previous: the number before; 0 for none.
        changed: a revision was made; else the content was in force already.
        sha256: of its manifest.
        content: sha256 of its content.
        size: of the archive, bytes.
        author: who pushed it.
        message: why.
        pushed_at: when, by the clock of who pushed.
        notes: what a person should know, one line each.
    """

    revision: int
    previous: int
    changed: bool
    sha256: str
    content: str
    size: int
    author: str
    message: str
    pushed_at: str
    notes: tuple[str, ...] = ()


def base(store: Store) -> Base:
    """Return what is in force now, to be given to :class:`Wanted` after the check, which takes seconds.

    Raises:
        StoreFailed: the store does not answer.
    """
    try:
        pointer = store.pointer()
    except NoRevision:
        return Base(None)
    except BadPointer as e:
        return Base(e.etag)
    return Base(pointer.etag if pointer else None)


def current(store: Store, trusted: Sequence[PublicKey], limit: int) -> tuple[Pointer, Revision]:
    """Return the pointer and the revision that it means.

    Raises:
        NoRevision: nothing was pushed yet.
        StoreFailed: the store does not answer.
        BadRevision: pointer or archive cannot be used.
        BadSignature: it is not signed by a trusted key.
    """
    pointer = store.pointer()
    assert pointer is not None  # noqa: S101 - asked without an etag
    return pointer, revision.open_archive(store.fetch(pointer, limit), trusted, limit=limit)


def stored(store: Store, number: int, trusted: Sequence[PublicKey], limit: int) -> Revision:
    """Return a revision by its number, whether it is in force or not; for the errors see :func:`current`."""
    opened = revision.open_archive(store.get(number), trusted, limit=limit)
    if opened.number != number:
        raise BadRevision(
            f"the archive {revstore.object_name(number)} holds another revision",
            found=f"revision {opened.number}",
            expected=f"revision {number}",
            hint="see who else writes to the store",
            path=store.describe(),
        )
    return opened


def push(
    store: Store,
    wanted: Wanted,
    *,
    key: SigningKey,
    trusted: Sequence[PublicKey],
    limit: int,
    now: datetime | None = None,
) -> Published:
    """Publish a revision, or find that its content is in force.

    Args:
        store: where.
        wanted: what.
        key: signs it.
        trusted: the keys that the nodes trust.
        limit: of the archive, bytes.
        now: for tests.

    Raises:
        PushConflict: somebody else pushed meanwhile.
        BadSiteKey: no node would trust the key.
        OlderRevision: the number is not above those in use.
        StoreFailed: the store does not answer, or is another site's copy; or whether it is done is not known.
        BadRevision: the archive is too large.
    """
    if key.public not in trusted:
        raise BadSiteKey(
            "the signing key is not among the public site keys: no node would take the revision",
            found=f"key {key.public.key_id}",
            expected=" or ".join(k.key_id for k in trusted),
            hint="give the site's key, or put its .pub file into the folder of site keys, here and on the nodes",
        )
    _writable(store)
    before = _before(store, trusted, limit)
    if before.made is not None and before.pointer is not None and not wanted.force and wanted.number is None:  # noqa: SIM102
        if before.made.content == revision.content_sha256(wanted.files):
            return _published(before.made, before.pointer, changed=False)
    _unmoved(store, before, wanted.base)
    number, notes = _number(store, before, wanted.number)
    at = (now or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    for _ in range(_ATTEMPTS):
        raw = revision.build(
            wanted.files,
            number=number,
            previous=before.number if before.number < number else 0,
            author=wanted.author,
            message=wanted.message,
            created_at=at,
            content_of=wanted.content_of,
            key=key,
        )
        made = revision.open_archive(raw, trusted, limit=limit)
        try:
            store.upload(number, raw)
        except Taken:
            # A push that died left it, or somebody else is pushing right now: the pointer tells which.
            if wanted.number is not None:
                raise
            number += 1
            continue
        return replace(_move(store, made, raw, before, at, wanted.author), notes=notes)
    raise PushConflict(
        f"no free number was found in {_ATTEMPTS} attempts",
        found=f"archives up to revision {number - 1}",
        hint="others push all the time; try again",
        path=store.describe(),
    )


def carry(
    store: Store,
    archive: bytes,
    *,
    trusted: Sequence[PublicKey],
    limit: int,
    author: str,
    base: Base | None = None,
) -> Published:
    """Publish a revision that was signed elsewhere, with the number that it has.

    Raises:
        OlderRevision: its number is not above those in use.
        And see :func:`push`.
    """
    brought = revision.open_archive(archive, trusted, limit=limit)
    _writable(store)
    before = _before(store, trusted, limit)
    if before.pointer is not None and before.made is not None and before.made.manifest == brought.manifest:
        return _published(before.made, before.pointer, changed=False)
    _unmoved(store, before, base)
    number, _ = _number(store, before, brought.number)
    try:
        store.upload(number, archive)
    except Taken:
        # The same bytes are an earlier attempt of this very push.
        if store.get(number) != archive:
            raise
    return _move(store, brought, archive, before, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), author)


def _writable(store: Store) -> None:
    origin = store.replica_of()
    if origin is not None:
        raise StoreFailed(
            f"this store only receives the revisions of {origin}",
            found=f"the object {revstore.REPLICA} in {store.describe()}",
            expected="the store that the revisions come from",
            hint=f"push at {origin}; if that site is lost, make this store the main one (`moat-gateway store promote`)",
        )
    store.probe()


@dataclass(frozen=True)
class _Before:
    """What is in force: the pointer's etag, the pointer, the revision; each is ``None`` if it is missing or bad."""

    etag: str | None = None
    pointer: Pointer | None = None
    made: Revision | None = None

    @property
    def number(self) -> int:
        return self.pointer.revision if self.pointer else 0


def _before(store: Store, trusted: Sequence[PublicKey], limit: int) -> _Before:
    """Return what is in force; what cannot be used is what a push heals."""
    try:
        pointer = store.pointer()
    except NoRevision:
        return _Before()
    except BadPointer as e:
        return _Before(e.etag)
    assert pointer is not None  # noqa: S101 - asked without an etag
    try:
        made = revision.open_archive(store.fetch(pointer, limit), trusted, limit=limit)
    except (BadRevision, BadSignature):
        made = None
    return _Before(pointer.etag, pointer, made)


def _unmoved(store: Store, before: _Before, base: Base | None) -> None:
    if base is not None and base.etag != before.etag:
        raise revstore.conflict(store.describe(), before.pointer)


def _number(store: Store, before: _Before, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    """Return the number of the new revision, never one that a node would take for an older one; and notes."""
    # A pointer that leads to nothing may say any number; it must not use them all up.
    there = before.number if before.made is not None else 0
    if wanted is not None:
        if wanted <= there:
            raise OlderRevision(
                f"revision {wanted} is not newer than the one in force",
                found=f"revision {there} in {store.describe()}",
                expected=f"{there + 1} or more",
                hint="numbers never go back: to return to an old content use `moat-gateway config rollback`",
            )
        return wanted, ()
    try:
        found = fleet.from_reports(store.reports())
    except (StoreFailed, BadRevision):
        found = fleet.Fleet()  # no place of reports: nothing is known
    # Numbers above these do not count: one node, or one archive, must not use up all that are left.
    number = max(there, *(n for n in (0, before.number, *(s.number for s in store.list())) if n <= there + _LEAP)) + 1
    served, strange = fleet.highest(found, number + _LEAP)
    if served >= number:
        raise OlderRevision(
            "the nodes have newer revisions than the store: they would refuse the next one",
            found=f"revision {there} in {store.describe()}; {served} on a node",
            expected="a store that is not older than its nodes (was it restored from a backup?)",
            hint=f"look at what is in force with `moat-gateway config status`, then push with --revision {served + 1}",
        )
    notes = tuple(
        f"the report of {who} was left out: it names a revision more than {_LEAP} above those in {store.describe()}; "
        "look at that node"
        for who in strange
    )
    return number, notes


def _move(store: Store, made: Revision, raw: bytes, before: _Before, at: str, author: str) -> Published:
    pointer = Pointer(made.number, revstore.object_name(made.number), sha256(raw).hexdigest(), len(raw), at, author)
    try:
        moved = store.move(pointer, before.etag)
    except PushConflict as e:
        # It is signed and numbered above the winner's: whoever looks for it shall know what it is.
        e.hint = f"{e.hint}; your archive {pointer.object} stays in the store and is not in force"
        raise
    # What was in force may have been another number than the one that a carried revision followed at home.
    return replace(_published(made, moved, changed=True), previous=before.number)


def _published(made: Revision, pointer: Pointer, *, changed: bool) -> Published:
    return Published(
        revision=made.number,
        previous=made.previous,
        changed=changed,
        sha256=made.sha256,
        content=made.content,
        size=pointer.size,
        author=pointer.author,
        message=made.message,
        pushed_at=pointer.pushed_at,
    )
