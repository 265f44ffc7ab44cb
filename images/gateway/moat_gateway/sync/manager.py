# SPDX-License-Identifier: Apache-2.0
"""``ConfigSyncManager``: watches the pointer, verifies, checks, keeps, and tells the node's gateways.

Three threads: the first takes signals, reads the gateways' reports and tells the state; one follows the source; one
sends the node's report. Settings are read at the start only; site keys and secrets at each check of a revision.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from moat_gateway import __version__, dryrun, revstore, s3store
from moat_gateway.deadline import Step
from moat_gateway.dryrun import DryRun
from moat_gateway.errors import BadSetting, GatewayError, SyncStuck
from moat_gateway.logs import Log, adopt_loggers, capture_everything, where_of
from moat_gateway.notify import Notifier
from moat_gateway.settings import Settings
from moat_gateway.sync.board import Board
from moat_gateway.sync.files import boot_id
from moat_gateway.sync.follower import Follower
from moat_gateway.sync.keeper import Keeper
from moat_gateway.sync.neighbours import Neighbours
from moat_gateway.sync.nodefolder import SyncState, read_sync
from moat_gateway.sync.reports import Reports
from moat_gateway.sync.teller import TICK, Teller, Uploader
from moat_gateway.sync.turns import Turns
from moat_gateway.sync.vetting import NodeVet

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_END = 3.0  # seconds for a step that is writing to come to its end after SIGTERM
_STEP_MARGIN = 120.0  # seconds of a step for what has no limit of its own: the folder, and a busy machine


def run(settings: Settings, unknown: tuple[str, ...]) -> int:
    """Run until SIGTERM or SIGINT; return the exit code."""
    # Revisions and secrets of this process and of the dry run never reach a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stderr = os.fdopen(os.dup(2), "w", buffering=1)
    log = capture_everything(settings.log_level)
    try:
        if unknown:
            log.event("settings.unknown", "warning", names=list(unknown))
        ConfigSyncManager(settings, log, Notifier(os.environ)).run()
    except GatewayError as e:
        log.event("start.refused", "error", kind=e.kind, exit=e.exit_code, message=e.one_line())
        print(f"moat-gateway: refused ({e.kind}): {e.one_line()}", file=stderr)
        return e.exit_code
    except Exception as e:
        log.event("defect", "error", error=type(e).__name__, where=where_of(e))
        sys.stderr = stderr
        raise
    return 0


class ConfigSyncManager:
    """The sidecar of one node.

    Args:
        settings: in force.
        log: for events.
        notifier: tells the service manager.

    Raises:
        BadSetting: a setting that it needs is missing or cannot be used.
        SyncFolderFailed: the folder cannot be written, or another config-sync holds it.
    """

    def __init__(self, settings: Settings, log: Log, notifier: Notifier) -> None:
        self._settings = settings
        self._log = log
        self._notifier = notifier
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._asked = threading.Event()
        self._signal = ""
        self._step = Step(step_limit(settings))
        self._node = node_name(settings)
        for name, value in (("sync_dir", settings.sync_dir), ("reports_dir", settings.reports_dir)):
            if not value:
                raise BadSetting(
                    f"MOAT_{name.upper()} is not set",
                    expected="a folder of this node that config-sync may write",
                    hint=f"set MOAT_{name.upper()}",
                )
        if not Path(settings.reports_dir).is_dir():
            raise BadSetting(
                "the folder of the gateways' reports is not there",
                expected="a folder that the gateways may write",
                hint="make it, or correct MOAT_REPORTS_DIR",
                path=settings.reports_dir,
            )

    def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        settings, log = self._settings, self._log
        begun = time.monotonic()
        self._take_signals()
        folder = Path(settings.sync_dir)
        before = read_sync(folder)
        keeper = Keeper(folder)
        store = revstore.open_store(settings)
        log.event("sync.begin", version=__version__, node=self._node, pid=os.getpid(), source=store.describe())
        # First of all, for it takes seconds to import LiteLLM; nothing here waits for it before a revision comes.
        dry_run = DryRun(settings)
        dry_run.start()
        try:
            board = Board(self._node, store.kind, store.describe(), settings.reload_interval)
            follower = Follower(settings, keeper, store, NodeVet(settings, dry_run), board, log)
            follower.recover()
            adopt_loggers(log)
            reports = Reports(Path(settings.reports_dir))
            neighbours = Neighbours(self._node)
            uploader = Uploader(self._node, lambda: revstore.open_store(settings), neighbours, log)
            rolling = settings.restart_policy == "rolling"
            teller = Teller(board, keeper, reports, self._turns(before), neighbours, rolling, uploader, log)
            uploader.start()
            following = threading.Thread(target=self._follow, args=(follower,), name="follow", daemon=True)
            following.start()
            self._notifier.ready(_status(board.state))
            self._tell(teller, board, following)
        finally:
            self._stop.set()
            self._wake.set()
            # The dry run's end also ends a step that waits for it.
            dry_run.close()
        # The folder is let go by the end of the process, not before a step that may still write.
        following.join(_END)
        log.event("sync.end", signal=self._signal, seconds=round(time.monotonic() - begun, 1))

    def _tell(self, teller: Teller, board: Board, following: threading.Thread) -> None:
        said = ""
        while self._wait():
            self._watch(following)
            if teller.tick():
                self._check_now()
            status = _status(board.state)
            if status != said:
                self._notifier.status(status)
                said = status
        self._notifier.stopping("ending")

    def _follow(self, follower: Follower) -> None:
        while not self._stop.is_set():
            asked = self._asked.is_set()
            self._asked.clear()
            with self._step:
                follower.step(asked=asked)
            self._wake.wait(follower.pause())
            self._wake.clear()

    def _watch(self, following: threading.Thread) -> None:
        """See that the source is followed; nothing else would notice, and a thread cannot be ended from outside."""
        if not following.is_alive():
            raise RuntimeError("the thread that follows the source has ended")
        seconds = self._step.stuck()
        if seconds is not None:
            raise SyncStuck(
                "a step of config-sync does not come to its end",
                found=f"{seconds:.0f} s",
                expected=f"at most {step_limit(self._settings):g} s with all that it may wait for",
                hint="nothing now: whoever runs config-sync starts it again. If it comes back, see the source, the "
                "network's name service and the disk",
            )

    def _check_now(self) -> None:
        self._asked.set()
        self._wake.set()

    def _take_signals(self) -> None:
        """Have signals arrive as bytes in a pipe: a handler that took a lock could wait for its own thread."""
        self._signals, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)

    def _wait(self) -> bool:
        """Wait for the next tick or a signal; return whether to go on."""
        with suppress(InterruptedError):
            select.select([self._signals], [], [], TICK)
        with suppress(BlockingIOError):
            for number in os.read(self._signals, 100):
                if number == signal.SIGHUP:
                    self._check_now()
                elif number in (signal.SIGTERM, signal.SIGINT):
                    self._signal = signal.Signals(number).name
                    return False
        return True

    def _turns(self, before: SyncState | None) -> Turns:
        settings, log = self._settings, self._log

        def say(instance: str, revision: int, word: str, why: str | None) -> None:
            log.event(
                "sync.turn",
                "error" if word == "failed" else "info",
                instance=instance,
                revision=revision,
                turn=word,
                why=why,
            )

        return Turns(
            rolling=settings.restart_policy == "rolling",
            drain=settings.shutdown_delay + settings.shutdown_timeout,
            say=say,
            resume=before.turn if before is not None and before.boot_id == boot_id() else None,
        )


def step_limit(settings: Settings) -> float:
    """Return the seconds in which a step of the follower ends for certain if it ends at all."""
    # An archive may be asked for twice (a refusal, then by the store's clock), and so may the dry run.
    waits = s3store.ARCHIVE_DEADLINE + dryrun.START_TIMEOUT + settings.dry_run_timeout
    return 2 * waits + _STEP_MARGIN


def node_name(settings: Settings) -> str:
    """Return the name of this node.

    Raises:
        BadSetting: it cannot be the name of an object.
    """
    name = settings.node or socket.gethostname()
    if not _NODE.fullmatch(name):
        raise BadSetting(
            "the name of the node cannot be used",
            found=repr(name),
            expected="letters, digits, '.', '_' and '-', at most 100",
            hint="set MOAT_NODE",
        )
    return name


def _status(state: SyncState) -> str:
    parts = [f"revision {state.revision}" if state.revision is not None else "no revision yet"]
    if state.last_refused is not None:
        parts.append(f"revision {state.last_refused.revision or '?'} refused ({state.last_refused.kind})")
    if state.trial is not None:
        parts.append(f"trying revision {state.trial.revision}")
    if state.source.reachable is False:
        parts.append("source lost")
    return ", ".join(parts)
