# SPDX-License-Identifier: Apache-2.0
"""``<sync_dir>``: what config-sync keeps on this node, as the gateways read it.

``current.json`` is the one commit point: a revision is in force when it names it, and its folder was complete on the
disk before. ``sync.json`` is how config-sync is. Readers never write here.

A folder of ``revisions/`` may vanish between two looks (only the last ``sync_keep`` are kept, and never the current
one): whoever finds it gone reads ``current.json`` again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moat_gateway.errors import BadRevision
from moat_gateway.sync.files import (
    Unusable,
    boot_id,
    boottime,
    object_bytes,
    read_bytes,
    read_object,
    seconds,
    stamp,
    whole,
)

CURRENT = "current.json"
SYNC = "sync.json"
SILENT = 10.0  # seconds without a new `sync.json`, which is promised every 2, after which config-sync is not there
REVISIONS = "revisions"
PREPARED = "prepared.json"
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Current:
    """The revision in force on this node.

    Attributes:
        revision: its number.
        sha256: of its ``revision.json``, hex.
        accepted_at: when config-sync took it, for people.
    """

    revision: int
    sha256: str
    accepted_at: str

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return object_bytes(
            {"format": 1, "revision": self.revision, "sha256": self.sha256, "accepted_at": self.accepted_at}
        )


def read_current(sync_dir: Path) -> Current | None:
    """Return the revision in force, or ``None`` if none was ever accepted.

    Raises:
        BadRevision: ``current.json`` is there and cannot be used (kept revisions may still be good).
    """
    path = sync_dir / CURRENT
    try:
        value = read_object(path)
        number, digest, at = value.get("revision"), value.get("sha256"), value.get("accepted_at")
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise Unusable(f"has no number of a revision ({str(number)[:40]})")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise Unusable("has no sha256")
    except FileNotFoundError:
        return None
    except Unusable as e:
        raise BadRevision(
            "the note of the current revision cannot be used",
            found=str(e),
            expected="a JSON object with revision and sha256",
            hint="restart config-sync; it finds the newest good revision and writes the note anew",
            path=str(path),
        ) from e
    return Current(number, digest, at if isinstance(at, str) else "")


class CurrentWatch:
    """Notices, for the price of one ``stat``, that ``current.json`` was replaced.

    Args:
        sync_dir: the folder.
    """

    def __init__(self, sync_dir: Path) -> None:
        self._path = sync_dir / CURRENT
        self._seen = stamp(self._path)

    def changed(self) -> bool:
        """Return whether the file is another one than at the last call (or when this object was made)."""
        now = stamp(self._path)
        if now == self._seen:
            return False
        self._seen = now
        return True


def kept(sync_dir: Path) -> tuple[int, ...]:
    """Return the numbers of the kept revisions, newest first; whether each is good is seen when it is read."""
    try:
        names = [p.name for p in (sync_dir / REVISIONS).iterdir()]
    except OSError:
        return ()
    return tuple(sorted((int(n) for n in names if _NUMBER.fullmatch(n)), reverse=True))


def usable_order(sync_dir: Path) -> tuple[int, ...]:
    """Return the kept revisions in the order in which a starting gateway tries them: the current one, then older ones.

    A number above the current one was never in force and is left out; without a usable ``current.json`` all are tried.
    """
    try:
        current = read_current(sync_dir)
    except BadRevision:
        current = None
    numbers = kept(sync_dir)
    return numbers if current is None else tuple(n for n in numbers if n <= current.revision)


def revision_folder(sync_dir: Path, number: int) -> Path:
    """Return the folder of a kept revision, to be given to ``revision.read_folder``."""
    return sync_dir / REVISIONS / str(number)


def read_prepared(sync_dir: Path, number: int) -> bytes:
    """Return the content of a kept revision's ``prepared.json``.

    Raises:
        BadRevision: it is missing or cannot be read.
    """
    path = revision_folder(sync_dir, number) / PREPARED
    try:
        return read_bytes(path, 256 << 20)
    except (FileNotFoundError, Unusable) as e:
        raise BadRevision(
            f"the prepared form of revision {number} cannot be used",
            found="no such file" if isinstance(e, FileNotFoundError) else str(e),
            hint="restart config-sync; it makes it again",
            path=str(path),
        ) from e


# --- sync.json ---


@dataclass(frozen=True)
class SourceState:
    """The source of revisions as config-sync sees it.

    Attributes:
        kind: ``s3`` or ``directory``.
        where: which one, for people.
        reachable: the last question was answered; ``None`` before the first.
        why: why not, one line, or ``None``.
    """

    kind: str
    where: str
    reachable: bool | None = None
    why: str | None = None


@dataclass(frozen=True)
class LastRefused:
    """The newest refusal; there is none once a later revision was accepted.

    Attributes:
        revision: the number that was refused, or ``None`` if not even that could be read.
        kind: of the refusal (``docs/reference/gateway-exit-codes.md``).
        reason: one line.
        at: when, for people.
    """

    revision: int | None
    kind: str
    reason: str
    at: str


@dataclass(frozen=True)
class Turn:
    """Whose turn it is to restart.

    Attributes:
        instance: name of the gateway.
        revision: what it is to come back with, or something newer.
        started_at: ``started_at`` of its report; a process that was started at another time is not meant.
    """

    instance: str
    revision: int
    started_at: str


@dataclass(frozen=True)
class Trial:
    """A revision that is fetched, checked and tried just now; the source is not asked meanwhile.

    Attributes:
        revision: its number.
        since_boottime: when that began (s, :func:`~moat_gateway.sync.files.boottime`).
    """

    revision: int
    since_boottime: float


@dataclass(frozen=True)
class SyncState:
    """``sync.json``: how config-sync is.

    Attributes:
        node: name of this node.
        pid: of config-sync.
        boot_id: in which ``checked_boottime`` counts.
        checked_boottime: when the source last answered (s, :func:`~moat_gateway.sync.files.boottime`), or ``None``.
        checked_at: the same moment, for people.
        source: the source of revisions.
        interval: the setting ``reload_interval`` (s).
        pointer: the newest revision that the source named, or ``None``.
        revision: the revision in force here, or ``None``.
        last_refused: the refusal that is not healed, or ``None``.
        refused_total: refusals since config-sync was started.
        turn: whose turn it is to restart, or ``None``.
        degraded: what a person should know, one line each.
        trial: what is tried just now, or ``None``.
        told_boottime: when this was written; ``None`` before.
    """

    node: str
    pid: int
    boot_id: str
    checked_boottime: float | None
    checked_at: str | None
    source: SourceState
    interval: float
    pointer: int | None = None
    revision: int | None = None
    last_refused: LastRefused | None = None
    refused_total: int = 0
    turn: Turn | None = None
    degraded: tuple[str, ...] = ()
    trial: Trial | None = None
    told_boottime: float | None = None

    def trying(self, now: float | None = None, boot: str | None = None) -> tuple[int, float] | None:
        """Return which revision is tried and since how many seconds, or ``None``.

        A config-sync that has not told anything for a while tries nothing any more. The arguments are for tests.
        """
        now = boottime() if now is None else now
        if self.trial is None or self.told_boottime is None or self.boot_id != (boot_id() if boot is None else boot):
            return None
        if now - self.told_boottime > SILENT:
            return None
        return self.trial.revision, max(0.0, now - self.trial.since_boottime)

    def staleness(self, now: float | None = None, boot: str | None = None) -> float:
        """Return the seconds since the source last answered.

        After a restart of the machine nobody knows; then it is the time since that restart, which is the least that
        it can be. The arguments are for tests.
        """
        now = boottime() if now is None else now
        if self.checked_boottime is None or self.boot_id != (boot_id() if boot is None else boot):
            return now
        return max(0.0, now - self.checked_boottime)

    def to_dict(self) -> dict[str, Any]:
        """Return the file's object."""
        refused, turn = self.last_refused, self.turn
        return {
            "format": 1,
            "node": self.node,
            "pid": self.pid,
            "boot_id": self.boot_id,
            "checked_boottime": self.checked_boottime,
            "checked_at": self.checked_at,
            "source": dict(vars(self.source)),
            "interval": self.interval,
            "pointer": self.pointer,
            "revision": self.revision,
            "last_refused": dict(vars(refused)) if refused else None,
            "refused_total": self.refused_total,
            "turn": dict(vars(turn)) if turn else None,
            "degraded": list(self.degraded),
            "trial": dict(vars(self.trial)) if self.trial else None,
            "told_boottime": self.told_boottime,
        }


def read_sync(sync_dir: Path) -> SyncState | None:
    """Return how config-sync is, or ``None`` if it never ran here or its note cannot be used."""
    try:
        value = read_object(sync_dir / SYNC)
        return _sync_state(value)
    except (FileNotFoundError, Unusable, KeyError, TypeError, ValueError):
        return None


def _sync_state(value: Mapping[str, Any]) -> SyncState:
    source, refused, turn = value["source"], value["last_refused"], value["turn"]
    checked, told, trial = value["checked_boottime"], value.get("told_boottime"), value.get("trial")
    return SyncState(
        node=str(value["node"]),
        pid=whole(value["pid"]),
        boot_id=str(value["boot_id"]),
        checked_boottime=None if checked is None else seconds(checked),
        checked_at=_text(value["checked_at"]),
        source=SourceState(
            str(source["kind"]),
            str(source["where"]),
            None if source["reachable"] is None else bool(source["reachable"]),
            _text(source["why"]),
        ),
        interval=seconds(value["interval"]),
        pointer=_number(value["pointer"]),
        revision=_number(value["revision"]),
        last_refused=None
        if refused is None
        else LastRefused(
            _number(refused["revision"]), str(refused["kind"]), str(refused["reason"]), str(refused["at"])
        ),
        refused_total=whole(value["refused_total"]),
        turn=None if turn is None else Turn(str(turn["instance"]), whole(turn["revision"]), str(turn["started_at"])),
        degraded=tuple(str(d) for d in value.get("degraded", [])),
        trial=None if trial is None else Trial(whole(trial["revision"]), seconds(trial["since_boottime"])),
        told_boottime=None if told is None else seconds(told),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> int | None:
    return None if value is None else whole(value)
