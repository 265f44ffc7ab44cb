# SPDX-License-Identifier: Apache-2.0
"""Proves that reports are read as written, that what is no report is left out, and that ages use no wall clock."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moat_gateway.errors import BadSetting
from moat_gateway.sync import reports
from moat_gateway.sync.files import boot_id, boottime
from moat_gateway.sync.reports import GatewayRefused, Report, Reports

WHOLE = Report(
    name="gateway-1",
    pid=4711,
    boot_id=boot_id(),
    beat_boottime=boottime(),
    revision=7,
    sha256="a" * 64,
    applied_at="2027-01-31T12:00:00.000Z",
    ready=True,
    draining=False,
    started_at="2027-01-31T11:00:00.000Z",
    degraded=("one", "two"),
    last_refused=GatewayRefused(8, "why"),
    needs_restart=("callbacks",),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    least = replace(WHOLE, name="g2", sha256=None, applied_at=None, degraded=(), last_refused=None, needs_restart=())
    reports.write_report(tmp_path, WHOLE)
    reports.write_report(tmp_path, least)
    assert Reports(tmp_path).read() == {"g2": least, "gateway-1": WHOLE}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g2.json", "gateway-1.json"]
    assert (tmp_path / "g2.json").stat().st_mode & 0o777 == 0o640


def test_a_change_is_seen_and_an_end_too(tmp_path: Path) -> None:
    reader = Reports(tmp_path)
    reports.write_report(tmp_path, WHOLE)
    assert reader.read()["gateway-1"].revision == 7
    reports.write_report(tmp_path, replace(WHOLE, revision=8))
    assert reader.read()["gateway-1"].revision == 8
    reports.remove_report(tmp_path, "gateway-1")
    assert reader.read() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"}, {"format": 2}, {"revision": "x"}, {"degraded": None}, {"last_refused": 3},
        # Python's JSON reads `Infinity` and `NaN`, and none of them may end config-sync.
        {"pid": float("inf")}, {"revision": float("inf")}, {"revision": -1}, {"beat_boottime": float("inf")},
        {"beat_boottime": float("nan")}, {"last_refused": {"revision": float("inf"), "reason": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_report_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "gateway-1.json").write_text(json.dumps({**WHOLE.to_dict(), **change}))
    assert Reports(tmp_path).read() == {}


def test_files_that_are_none_are_left_out(tmp_path: Path) -> None:
    for name in ("half.json", ".hidden.json", "check-now", "x.json.tmp"):
        (tmp_path / name).write_text('{"format": 1')
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/etc/passwd")
    (tmp_path / "folder.json").mkdir()
    assert Reports(tmp_path).read() == {}


def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    for name in ("../evil", ".x", "a/b", "", "x" * 65):
        with pytest.raises(BadSetting):
            reports.write_report(tmp_path, replace(WHOLE, name=name))


def test_ages_are_of_the_same_boot_only() -> None:
    assert WHOLE.age(WHOLE.beat_boottime + 3) == pytest.approx(3)
    assert WHOLE.age(WHOLE.beat_boottime - 3) == 0
    assert replace(WHOLE, boot_id="another").age() is None


def test_a_check_is_asked_for_once_each_time(tmp_path: Path) -> None:
    reports.ask_for_check(tmp_path)
    reader = Reports(tmp_path)
    assert not reader.check_asked(), "what was asked before the start is answered by the start"
    for _ in range(2):
        reports.ask_for_check(tmp_path)
        assert reader.check_asked()
        assert not reader.check_asked()
    (tmp_path / reports.CHECK_NOW).unlink()
    assert not reader.check_asked()


def test_reports_of_an_earlier_boot_are_removed(tmp_path: Path) -> None:
    reports.write_report(tmp_path, WHOLE)
    reports.write_report(tmp_path, replace(WHOLE, name="old", boot_id="another"))
    Reports(tmp_path).forget_gone()
    assert [p.name for p in tmp_path.iterdir()] == ["gateway-1.json"]


def test_reports_of_gateways_that_are_gone_for_good_are_removed(tmp_path: Path) -> None:
    now = boottime()
    reports.write_report(tmp_path, replace(WHOLE, beat_boottime=now))
    reports.write_report(tmp_path, replace(WHOLE, name="removed", beat_boottime=now - 1))
    reader = Reports(tmp_path)
    reader.forget_gone(now + reports.FORGOTTEN - 1.5)
    assert sorted(reader.read()) == ["gateway-1", "removed"]
    reader.forget_gone(now + reports.FORGOTTEN - 0.5)
    assert sorted(reader.read()) == ["gateway-1"]
    assert not (tmp_path / "removed.json").exists()
