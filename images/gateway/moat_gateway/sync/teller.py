# SPDX-License-Identifier: Apache-2.0
"""Tells how this node is: ``sync.json`` for its gateways, and one object in the status bucket for the whole site.

It also reads the gateways' reports, hands out the turns of a rolling restart, and hears when a gateway asks for a
check. It runs apart from the loop that follows the source, which may wait for a store or for a dry run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from moat_gateway.errors import GatewayError, SyncFolderFailed
from moat_gateway.logs import Log, where_of
from moat_gateway.revstore import NodeReport
from moat_gateway.sync.board import Board
from moat_gateway.sync.files import boot_id, boottime, object_bytes
from moat_gateway.sync.keeper import Keeper
from moat_gateway.sync.neighbours import Neighbours
from moat_gateway.sync.nodefolder import SyncState
from moat_gateway.sync.reports import Report, Reports
from moat_gateway.sync.turns import Turns

TICK = 0.1  # seconds between two looks at the reports
_SYNC_JSON = 1.5  # seconds after which sync.json is written again without a change: two is promised
_ASKING = 1.0  # the same while the other nodes are asked
_NODE_REPORT = 10.0  # seconds after which the node's report is sent again without a change


class Sender(Protocol):
    """Where the nodes' reports are."""

    @property
    def kind(self) -> str:
        """``s3`` or ``directory``."""

    def report(self, node: str, raw: bytes) -> None:
        """Write what a node serves."""

    def reports(self) -> Mapping[str, NodeReport]:
        """Return what the nodes wrote."""


class Uploader:
    """Sends the newest report of the node from a thread of its own, so that a store that hangs holds up nothing.

    Args:
        node: its name.
        connect: returns where reports go; called in the thread, again after a defect.
        neighbours: given the other nodes' reports when it wants them.
        log: for events.
        clock: the one of ``neighbours``.
    """

    def __init__(
        self,
        node: str,
        connect: Callable[[], Sender],
        neighbours: Neighbours,
        log: Log,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._connect = connect
        self._neighbours = neighbours
        self._log = log
        self._clock = clock
        self._wake = threading.Condition()
        self._next: tuple[float, bytes] | None = None
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def offer(self, raw: bytes) -> None:
        """Send this as soon as the one before is sent; one that waits is replaced."""
        with self._wake:
            self._next = self._clock(), raw
            self._wake.notify()

    def _run(self) -> None:
        sender: Sender | None = None
        while True:
            with self._wake:
                while self._next is None:
                    self._wake.wait()
                (offered, raw), self._next = self._next, None
            try:
                if sender is None:
                    sender = self._connect()
                self._exchange(sender, offered, raw)
            except Exception as e:
                sender = None
                self._failed(f"a defect of config-sync: {type(e).__name__} at {where_of(e)}")

    def _exchange(self, sender: Sender, offered: float, raw: bytes) -> None:
        try:
            sender.report(self._node, raw)
        except GatewayError as e:
            self._failed(e.one_line())
            # A read-only folder is a drive that was carried here: there is nobody to agree with.
            if sender.kind != "directory":
                return
        else:
            self._failing = False
        if self._neighbours.wanted:
            self._neighbours.told(offered)
            try:
                self._neighbours.looked(sender.reports())
            except GatewayError as e:
                self._neighbours.failed(e.one_line())

    def _failed(self, message: str) -> None:
        self._neighbours.failed(message)
        # Once: a source on a read-only drive is no fault, and a lost store is said elsewhere.
        if not self._failing:
            self._log.event("sync.report_failed", "warning", message=message)
        self._failing = True


class Teller:
    """One tick: reports in, ``sync.json`` and the node's report out.

    Args:
        board: the state of config-sync.
        keeper: of the node's folder.
        reports: of the gateways.
        turns: of a rolling restart.
        neighbours: asked before a turn is given.
        rolling: whether this node restarts its gateways by itself.
        uploader: of the node's report.
        log: for events.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        board: Board,
        keeper: Keeper,
        reports: Reports,
        turns: Turns,
        neighbours: Neighbours,
        rolling: bool,
        uploader: Uploader,
        log: Log,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._keeper = keeper
        self._reports = reports
        self._turns = turns
        self._neighbours = neighbours
        self._rolling = rolling
        self._uploader = uploader
        self._log = log
        self._clock = clock
        self._told: SyncState | None = None
        self._told_at = 0.0
        self._sent: tuple[Any, ...] = ()
        self._sent_at = 0.0
        self._unwritable = False

    def tick(self) -> bool:
        """Do everything once; return whether a gateway asked for a check."""
        asked = self._reports.check_asked()
        self._reports.forget_gone()
        reports = self._reports.read()
        revision = self._board.state.revision
        turn = self._turns.step(reports, revision, boottime(), boot_id(), self._neighbours.objection)
        self._board.turn(turn)
        self._board.note("turns", *self._turns.degraded)
        state = self._board.state
        now = self._clock()
        self._tell(state, now)
        self._send(state, reports, now)
        return asked

    def _tell(self, state: SyncState, now: float) -> None:
        told = self._told
        if told is not None and now - self._told_at < _SYNC_JSON and _lasting(told) == _lasting(state):
            return
        self._told_at = now
        try:
            self._keeper.tell(replace(state, told_boottime=boottime()))
        except SyncFolderFailed as e:
            self._told = None
            if not self._unwritable:
                self._log.event("sync.damaged", "error", revision=None, message=e.one_line())
            self._unwritable = True
        else:
            self._told = state
            self._unwritable = False

    def _send(self, state: SyncState, reports: Mapping[str, Report], now: float) -> None:
        alive = {name: (age := r.age()) is not None and age <= 6 for name, r in reports.items()}
        what = (
            _lasting(state),
            tuple(sorted(alive.items())),
            tuple(replace(r, beat_boottime=0.0) for r in reports.values()),
        )
        pause = _ASKING if self._neighbours.wanted else _NODE_REPORT
        if what == self._sent and now - self._sent_at < pause:
            return
        self._sent, self._sent_at = what, now
        self._uploader.offer(node_report(state, reports, rolling=self._rolling))


def node_report(state: SyncState, reports: Mapping[str, Report], *, rolling: bool) -> bytes:
    """Return the object that tells the site how this node is."""
    gateways = []
    for report in reports.values():
        age = report.age()
        gateways.append({**report.to_dict(), "age": None if age is None else round(age, 3)})
    return object_bytes(
        {"format": 1, "node": state.node, "rolling": rolling, "sync": state.to_dict(), "gateways": gateways}
    )


def _lasting(state: SyncState) -> SyncState:
    """Return the state without what every answer of the source changes."""
    return replace(state, checked_boottime=None, checked_at=None)
