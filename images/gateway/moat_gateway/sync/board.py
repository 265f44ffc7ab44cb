# SPDX-License-Identifier: Apache-2.0
"""What config-sync knows about itself, written by one thread and read by the others: the content of ``sync.json``."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any

from moat_gateway.sync.files import boot_id, boottime, timestamp
from moat_gateway.sync.nodefolder import LastRefused, SourceState, SyncState, Trial, Turn


class Board:
    """The state, whole at each moment.

    Args:
        node: name of this node.
        kind: ``s3`` or ``directory``.
        where: the source, for people.
        interval: the setting ``reload_interval`` (s).
    """

    def __init__(self, node: str, kind: str, where: str, interval: float) -> None:
        self._lock = threading.Lock()
        self._state = SyncState(node, os.getpid(), boot_id(), None, None, SourceState(kind, where), interval)
        self._notes: dict[str, str] = {}

    @property
    def state(self) -> SyncState:
        """The state now."""
        with self._lock:
            return self._state

    def answered(self) -> None:
        """Note that the source answered."""
        with self._lock:
            source = replace(self._state.source, reachable=True, why=None)
            self._state = replace(self._state, checked_boottime=boottime(), checked_at=timestamp(), source=source)

    def lost(self, why: str) -> None:
        """Note that the source did not answer."""
        self._change(source=replace(self._state.source, reachable=False, why=why))

    def pointer(self, revision: int | None) -> None:
        """Note the newest revision that the source names."""
        self._change(pointer=revision)

    def accepted(self, revision: int) -> None:
        """Note the revision in force; what was refused before is healed."""
        self._change(revision=revision, last_refused=None)

    def healed(self) -> None:
        """Note that nothing is refused any more."""
        self._change(last_refused=None)

    def refused(self, revision: int | None, kind: str, reason: str) -> bool:
        """Note a refusal; return whether it is another one than the last."""
        with self._lock:
            last = self._state.last_refused
            if last is not None and (last.revision, last.kind, last.reason) == (revision, kind, reason):
                return False
            self._state = replace(
                self._state,
                last_refused=LastRefused(revision, kind, reason, timestamp()),
                refused_total=self._state.refused_total + 1,
            )
            return True

    def trying(self, revision: int | None) -> None:
        """Note the revision that is fetched and tried from now on; ``None``: no more."""
        self._change(trial=None if revision is None else Trial(revision, boottime()))

    def turn(self, turn: Turn | None) -> None:
        """Note whose turn it is to restart."""
        self._change(turn=turn)

    def note(self, topic: str, *lines: str) -> None:
        """Set what a person should know about one topic; no line takes it away."""
        with self._lock:
            self._notes.pop(topic, None)
            if lines:
                self._notes[topic] = "\n".join(lines)
            degraded = tuple(line for text in self._notes.values() for line in text.split("\n"))
            if degraded != self._state.degraded:
                self._state = replace(self._state, degraded=degraded)

    def _change(self, **values: Any) -> None:
        with self._lock:
            self._state = replace(self._state, **values)
