# SPDX-License-Identifier: Apache-2.0
"""What surrounds the changes of a running gateway: "look now", the report to config-sync, and the turn to restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moat_gateway.live import Live
from moat_gateway.logs import Log
from moat_gateway.sidethread import SideThread
from moat_gateway.status import State
from moat_gateway.sync import nodefolder
from moat_gateway.sync.files import boottime
from moat_gateway.sync.reports import BEAT, ask_for_check, remove_report, write_report

WAIT = 2.0  # seconds for which "look now" waits for config-sync


class Reloader:
    """Ties :class:`~moat_gateway.live.Live` to the admin socket and to config-sync.

    Args:
        state: of the gateway.
        live: applies changes.
        log: for a report that cannot be written.
        restart: is called when it is this gateway's turn to restart.
    """

    def __init__(self, state: State, live: Live, log: Log, restart: Callable[[], None]) -> None:
        self._state = state
        self._live = live
        self._log = log
        self._restart = restart
        settings = state.settings
        self._sync_dir = Path(settings.sync_dir) if settings.sync_dir else None
        self._reports_dir = Path(settings.reports_dir) if settings.sync_dir else None
        self._told = asyncio.Event()
        self._failed = False
        self._thread = SideThread("moat-report")

    def told(self) -> None:
        """The situation changed: report it at once."""
        self._told.set()

    # --- look now ---

    async def reload(self) -> dict[str, Any]:
        """Look at everything at once: the source (through config-sync), the revision, secrets, keys.

        Returns:
            The answer of ``POST /reload``; ``checked`` says whether config-sync had looked at the source in time.
        """
        checked = await self._ask_config_sync()
        keys_ok = await self._thread.run(lambda: self._state.keys.refresh(force=True))
        await self._live.look_at_everything()
        state = self._state
        problems = [e.to_dict() for e in (state.keys.problem, *state.situation.secret_problems.values()) if e]
        return {
            "ok": keys_ok and not problems and state.situation.refused() is None,
            "checked": checked,
            "keys": {"count": len(state.keys.current.keys), "sha256": state.keys.current.sha256},
            "config": state.config(),
            "problems": problems,
        }

    async def _ask_config_sync(self) -> bool | None:
        if self._sync_dir is None or self._reports_dir is None:
            return None
        sync_dir, reports_dir = self._sync_dir, self._reports_dir
        asked = boottime()
        try:
            await self._thread.run(lambda: ask_for_check(reports_dir))
        except OSError as e:
            self._say_unwritable(e)
            return False
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            sync = await self._thread.run(lambda: nodefolder.read_sync(sync_dir))
            if sync is not None and (sync.checked_boottime or 0.0) >= asked:
                return True
        return False

    # --- the report, and the turn ---

    async def run(self) -> None:
        """Report on every change and at least every two seconds, and take the turn to restart, for ever."""
        if self._reports_dir is None:
            return
        while True:
            # Cleared first: what is told while the report is being written makes another one.
            self._told.clear()
            await self._report()
            self._take_turn()
            try:
                await asyncio.wait_for(self._told.wait(), BEAT)
            except TimeoutError:
                continue

    async def _report(self) -> None:
        assert self._reports_dir is not None  # noqa: S101 - asked by run()
        folder, report = self._reports_dir, self._state.report()
        try:
            await self._thread.run(lambda: write_report(folder, report))
            self._failed = False
        except OSError as e:
            self._say_unwritable(e)

    def _take_turn(self) -> None:
        state, sync = self._state, self._state.situation.sync
        turn = sync.turn if sync is not None else None
        if (
            turn is not None
            and turn.instance == state.settings.instance
            and turn.started_at == state.started
            and state.situation.needs_restart
            and state.settings.restart_policy == "rolling"
            and not state.draining
        ):
            self._restart()

    async def last_report(self, *, comes_back: bool) -> None:
        """Say that the gateway ends; it is forgotten unless it comes back in its turn."""
        folder = self._reports_dir
        if folder is not None and comes_back:
            await self._report()
        elif folder is not None:
            await self._thread.run(lambda: remove_report(folder, self._state.settings.instance))

    def _say_unwritable(self, e: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._log.event(
                "config.report_failed",
                "error",
                message=e.strerror or str(e),
                path=str(self._state.settings.reports_dir),
            )
