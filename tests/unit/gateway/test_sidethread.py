# SPDX-License-Identifier: Apache-2.0
"""Proves that a gateway reports and reads its keys while LiteLLM's callbacks hold every thread of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from moat_gateway import keyfile
from moat_gateway.allowlist import AllowList
from moat_gateway.egress import EgressGuard
from moat_gateway.keys import Identity
from moat_gateway.keystore import KeyStore
from moat_gateway.live import Live, Situation
from moat_gateway.logs import Log
from moat_gateway.reloader import Reloader
from moat_gateway.served import Served
from moat_gateway.settings import Settings
from moat_gateway.sidethread import SideThread
from moat_gateway.status import State
from moat_gateway.sync.reports import read_report


def while_every_thread_is_busy(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        free = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, free.wait)
        try:
            await asyncio.wait_for(test(), 30)
        finally:
            free.set()
            await busy

    asyncio.run(run())


@pytest.fixture
def state(tmp_path: Path) -> State:
    settings = replace(Settings(), sync_dir=str(tmp_path / "sync"), reports_dir=str(tmp_path), keys=tmp_path / "keys")
    keyfile.new_key(settings.keys, "one", "t", create_team=True)
    keys = KeyStore(settings.keys, "", Log(lambda _line: None))
    keys.load_first()
    served = Served(0, None, "0" * 64, {}, (), (), {}, {})
    return State(settings, Situation(served, ""), keys, EgressGuard(AllowList.parse([]), lambda *_: None))


def test_the_report_is_written_and_removed(state: State, tmp_path: Path) -> None:
    log = Log(lambda _line: None)
    live = Live(state.settings, state.situation, None, state.keys, state.counters, log)  # type: ignore[arg-type]
    reloader = Reloader(state, live, log, lambda: None)
    path = tmp_path / f"{state.settings.instance}.json"

    async def test() -> None:
        running = asyncio.create_task(reloader.run())
        while read_report(path) is None:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await reloader.last_report(comes_back=False)
        assert not path.exists()

    while_every_thread_is_busy(test)


def test_a_new_key_counts(state: State) -> None:
    secret = keyfile.new_key(state.settings.keys, "two", "t")

    async def test() -> None:
        assert await state.keys.recheck()
        assert isinstance(state.keys.identify(secret), Identity)

    while_every_thread_is_busy(test)


def test_works_are_done_in_order_and_their_exceptions_come_back() -> None:
    thread = SideThread("test")
    done: list[int] = []

    async def run() -> None:
        await asyncio.gather(*(thread.run(lambda i=i: done.append(i)) for i in range(5)))  # type: ignore[misc]
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 // 0)

    asyncio.run(run())
    assert done == [0, 1, 2, 3, 4]
    thread.close()
