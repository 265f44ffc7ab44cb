# SPDX-License-Identifier: Apache-2.0
"""``<reports_dir>``: each gateway tells what it serves; config-sync reads it, and may be asked here to look at once.

One file a gateway, ``<instance>.json``, replaced whole on every change and at least every :data:`BEAT` seconds. Ages
are differences of the machine's own running time, never of wall clocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moat_gateway.errors import BadSetting
from moat_gateway.sync.files import (
    Stamp,
    Unusable,
    boot_id,
    boottime,
    object_bytes,
    read_object,
    replace,
    seconds,
    stamp,
    whole,
    write_new,
)

BEAT = 2.0  # seconds between two reports without a change
ALIVE = 3 * BEAT  # seconds after which a gateway that says nothing counts as gone
FORGOTTEN = 3600.0  # seconds after which it is not spoken of any more: it was removed, and nobody waits for it
CHECK_NOW = "check-now"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class GatewayRefused:
    """What a gateway could not apply.

    Attributes:
        revision: its number.
        reason: one line.
    """

    revision: int
    reason: str


@dataclass(frozen=True)
class Report:
    """What one gateway says about itself.

    Attributes:
        name: its ``instance`` setting.
        pid: its process, in its own container's counting.
        boot_id: in which ``beat_boottime`` counts.
        beat_boottime: when it was written (s, :func:`~moat_gateway.sync.files.boottime`).
        revision: what it serves; 0 for its local files.
        sha256: of that revision's ``revision.json``, or ``None`` for local files.
        applied_at: since when, for people, or ``None``.
        ready: it takes requests.
        draining: it is ending.
        degraded: what a person should know, one line each.
        last_refused: what it could not apply, or ``None``.
        needs_restart: names of what only a restart can change; empty if nothing waits for one.
        started_at: when the process was started; tells a restarted gateway from the one before.
    """

    name: str
    pid: int
    boot_id: str
    beat_boottime: float
    revision: int
    sha256: str | None
    applied_at: str | None
    ready: bool
    draining: bool
    started_at: str
    degraded: tuple[str, ...] = ()
    last_refused: GatewayRefused | None = None
    needs_restart: tuple[str, ...] = ()

    def age(self, now: float | None = None, boot: str | None = None) -> float | None:
        """Return the seconds since it was written, or ``None`` if the machine was started since.

        The arguments are for tests.
        """
        if self.boot_id != (boot_id() if boot is None else boot):
            return None
        return max(0.0, (boottime() if now is None else now) - self.beat_boottime)

    def to_dict(self) -> dict[str, Any]:
        """Return the file's object."""
        refused = self.last_refused
        return {
            "format": 1,
            "name": self.name,
            "pid": self.pid,
            "boot_id": self.boot_id,
            "beat_boottime": self.beat_boottime,
            "revision": self.revision,
            "sha256": self.sha256,
            "applied_at": self.applied_at,
            "ready": self.ready,
            "draining": self.draining,
            "degraded": list(self.degraded),
            "last_refused": dict(vars(refused)) if refused else None,
            "needs_restart": list(self.needs_restart),
            "started_at": self.started_at,
        }


def report_path(reports_dir: Path, instance: str) -> Path:
    """Return a gateway's file.

    Raises:
        BadSetting: the name of the instance cannot be a file's name.
    """
    if not _NAME.fullmatch(instance):
        raise BadSetting(
            "the name of the instance cannot be used with reports_dir",
            found=repr(instance),
            expected="letters, digits, '.', '_' and '-', at most 64, no '.' in front",
            hint="set MOAT_INSTANCE",
        )
    return reports_dir / f"{instance}.json"


def write_report(reports_dir: Path, report: Report) -> None:
    """Replace a gateway's report.

    Raises:
        BadSetting: the name of the instance cannot be a file's name.
        OSError: it could not be written.
    """
    replace(report_path(reports_dir, report.name), object_bytes(report.to_dict()), durable=False)


def remove_report(reports_dir: Path, instance: str) -> None:
    """Take a gateway's report away, when it ends for good (not when it restarts in its turn)."""
    with suppress(OSError):
        report_path(reports_dir, instance).unlink()


def ask_for_check(reports_dir: Path) -> None:
    """Have config-sync look at the source at once.

    Raises:
        OSError: the folder cannot be written.
    """
    # Written anew each time: what changes is its stamp.
    write_new(reports_dir / CHECK_NOW, object_bytes({"format": 1, "asked": boottime()}), durable=False, over=True)


class Reports:
    """Reads the reports of all gateways of the node, each again only when its file changed.

    Args:
        reports_dir: the folder.
    """

    def __init__(self, reports_dir: Path) -> None:
        self._folder = reports_dir
        self._known: dict[str, tuple[Stamp, Report | None]] = {}
        self._asked = stamp(reports_dir / CHECK_NOW)

    def read(self) -> dict[str, Report]:
        """Return the reports by name of the instance; a file that cannot be used is left out."""
        found: dict[str, tuple[Stamp, Report | None]] = {}
        try:
            paths = [p for p in self._folder.iterdir() if p.suffix == ".json" and _NAME.fullmatch(p.stem)]
        except OSError:
            paths = []
        for path in paths:
            now = stamp(path)
            if now is None:
                continue
            known = self._known.get(path.stem)
            found[path.stem] = known if known is not None and known[0] == now else (now, read_report(path))
        self._known = found
        return {name: report for name, (_, report) in sorted(found.items()) if report is not None}

    def check_asked(self) -> bool:
        """Return whether a gateway asked for a check since the last call."""
        now = stamp(self._folder / CHECK_NOW)
        asked = now != self._asked and now is not None
        self._asked = now
        return asked

    def forget_gone(self, now: float | None = None) -> None:
        """Remove the reports of gateways that are silent for long, or since the machine was started.

        One that was only stopped writes its report again when it is back. The argument is for tests.
        """
        for name, report in self.read().items():
            age = report.age(now)
            if age is None or age > FORGOTTEN:
                remove_report(self._folder, name)


def read_report(path: Path) -> Report | None:
    """Return the report in a file, or ``None`` if it cannot be used."""
    try:
        return _report(read_object(path), path.stem)
    except (FileNotFoundError, Unusable, KeyError, TypeError, ValueError):
        return None


def _report(value: Mapping[str, Any], name: str) -> Report:
    if value["name"] != name:
        raise Unusable("names another gateway than its file")
    refused = value["last_refused"]
    return Report(
        name=name,
        pid=whole(value["pid"]),
        boot_id=str(value["boot_id"]),
        beat_boottime=seconds(value["beat_boottime"]),
        revision=whole(value["revision"]),
        sha256=None if value["sha256"] is None else str(value["sha256"]),
        applied_at=None if value["applied_at"] is None else str(value["applied_at"]),
        ready=value["ready"] is True,
        draining=value["draining"] is True,
        degraded=tuple(str(d) for d in value["degraded"]),
        last_refused=None if refused is None else GatewayRefused(whole(refused["revision"]), str(refused["reason"])),
        needs_restart=tuple(str(n) for n in value["needs_restart"]),
        started_at=str(value["started_at"]),
    )
