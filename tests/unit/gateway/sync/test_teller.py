# SPDX-License-Identifier: Apache-2.0
"""Proves what one tick of config-sync reads and tells, on real folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moat_gateway.logs import Log
from moat_gateway.revstore import NodeReport
from moat_gateway.sync import reports
from moat_gateway.sync.board import Board
from moat_gateway.sync.files import boot_id, boottime
from moat_gateway.sync.keeper import Keeper
from moat_gateway.sync.neighbours import Neighbours
from moat_gateway.sync.reports import Report, Reports
from moat_gateway.sync.teller import Teller, Uploader
from moat_gateway.sync.turns import Turns


class Sent:
    """Where the node's report goes."""

    kind = "directory"

    def report(self, node: str, raw: bytes) -> None:
        raise AssertionError("nobody started the thread")

    def reports(self) -> Mapping[str, NodeReport]:
        return {}


class Kept(Uploader):
    """Keeps what it would send."""

    def offer(self, raw: bytes) -> None:
        self.last: dict[str, Any] = json.loads(raw)


def report(name: str, *, silent: float = 0.0, boot: str | None = None) -> Report:
    at = max(0.0, boottime() - silent)
    return Report(name, 7, boot or boot_id(), at, 1, None, None, True, False, "first")


def test_a_tick_tells_of_the_gateways_and_forgets_those_of_another_boot(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    log, neighbours = Log(lambda _line: None), Neighbours("n1")
    uploader = Kept("n1", Sent, neighbours, log)
    keeper = Keeper(tmp_path / "sync")
    teller = Teller(
        Board("n1", "directory", "here", 1.0),
        keeper,
        Reports(folder),
        Turns(rolling=False, drain=1, say=lambda *_: None),
        neighbours,
        False,
        uploader,
        log,
    )
    reports.write_report(folder, report("g1"))
    reports.write_report(folder, report("g2", boot="another"))
    (folder / "g3.json").write_text('{"format": 1, "name": "g3", "pid": Infinity}')
    assert teller.tick() is False
    assert [g["name"] for g in uploader.last["gateways"]] == ["g1"]
    assert sorted(p.name for p in folder.iterdir()) == ["g1.json", "g3.json"]
    keeper.close()
