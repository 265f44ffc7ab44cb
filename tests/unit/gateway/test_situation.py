# SPDX-License-Identifier: Apache-2.0
"""Proves that what nobody knows about config-sync does not look as if all were well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moat_gateway.live import Situation
from moat_gateway.served import Served
from moat_gateway.settings import Settings
from moat_gateway.sync import nodefolder
from moat_gateway.sync.files import boot_id, boottime

SERVED = Served(0, None, "0" * 64, {}, (), (), {}, {})


@pytest.mark.parametrize("note", [None, "", "{}", "[]"])
def test_without_a_note_of_config_sync_it_is_as_stale_as_the_machine_is_old(note: str | None, tmp_path: Path) -> None:
    if note is not None:
        (tmp_path / nodefolder.SYNC).write_text(note)
    situation = Situation(SERVED, "", follows=True, sync=nodefolder.read_sync(tmp_path))
    assert boottime() - 60 < situation.staleness() <= boottime()
    (line,) = situation.degraded(replace(Settings(), sync_dir=str(tmp_path)))
    assert "has never run on this node, or its note cannot be read" in line


def test_a_long_trial_of_a_revision_is_not_taken_for_a_lost_source() -> None:
    now, settings = boottime(), replace(Settings(), stale_after=0.5)
    source = nodefolder.SourceState("s3", "the store", True)
    state = nodefolder.SyncState("n1", 5, boot_id(), now - 60, "x", source, 1.0, pointer=8, revision=7)
    trying = replace(state, trial=nodefolder.Trial(8, now - 60), told_boottime=now)
    (line,) = Situation(SERVED, "", follows=True, sync=trying).degraded(settings)
    assert line.startswith("config-sync: has been trying revision 8 for 6")
    # It ended in the middle of it.
    for lost in (state, replace(trying, told_boottime=now - 60), replace(trying, boot_id="another")):
        (line,) = Situation(SERVED, "", follows=True, sync=lost).degraded(settings)
        assert line.startswith("config-sync: the source has not answered for ")


def test_without_config_sync_nothing_is_stale() -> None:
    situation = Situation(SERVED, "")
    assert situation.staleness() == 0
    assert situation.degraded(Settings()) == []
