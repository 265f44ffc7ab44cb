# SPDX-License-Identifier: Apache-2.0
"""Proves how `<sync_dir>` is written and read: whole, with its modes, by one process; and what damage does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integration.hotreload.craft import archive

from moat_gateway import revision as revisions
from moat_gateway.errors import BadRevision, SyncFolderFailed
from moat_gateway.revision import Revision
from moat_gateway.sitekey import SigningKey
from moat_gateway.sync import nodefolder
from moat_gateway.sync.files import Unusable, boot_id, boottime, read_bytes
from moat_gateway.sync.keeper import Keeper
from moat_gateway.sync.nodefolder import CurrentWatch, LastRefused, SourceState, SyncState, Trial, Turn

KEY = SigningKey.generate()
FILES = {
    "config.yaml": b"a: 1\n",
    "keys.yaml": b"teams: []\n",
    "routers/index.yaml": b"[]\n",
    "routers/a/b.json": b"{}",
}


def revision(number: int, text: bytes = b"a: 1\n") -> Revision:
    raw = archive({**FILES, "config.yaml": text}, number, KEY)
    return revisions.open_archive(raw, [KEY.public], limit=1 << 20)


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(tmp_path / "sync")


def put(keeper: Keeper, number: int) -> Revision:
    one = revision(number)
    keeper.keep(one, b"{}\n")
    keeper.commit(one)
    return one


def test_what_is_kept_verifies_and_is_in_force(keeper: Keeper) -> None:
    one = put(keeper, 3)
    folder = nodefolder.revision_folder(keeper.folder, 3)
    assert revisions.read_folder(folder, [KEY.public]) == one
    current = nodefolder.read_current(keeper.folder)
    assert current is not None
    assert (current.revision, current.sha256) == (3, one.sha256)
    assert nodefolder.read_prepared(keeper.folder, 3) == b"{}\n"
    assert {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()} == {0o640}
    assert {p.stat().st_mode & 0o777 for p in (folder, *folder.rglob("*")) if p.is_dir()} == {0o750}
    assert list((keeper.folder / "tmp").iterdir()) == []


def test_a_watch_sees_each_replacement_once(keeper: Keeper) -> None:
    watch = CurrentWatch(keeper.folder)
    assert not watch.changed()
    one = put(keeper, 1)
    assert watch.changed()
    assert not watch.changed()
    keeper.commit(one)
    assert watch.changed()


def test_a_kept_number_can_be_replaced(keeper: Keeper) -> None:
    put(keeper, 1)
    (nodefolder.revision_folder(keeper.folder, 1) / "config.yaml").write_text("damaged")
    keeper.keep(revision(1), b"[]\n")
    assert revisions.read_folder(nodefolder.revision_folder(keeper.folder, 1), [KEY.public]) == revision(1)
    assert nodefolder.read_prepared(keeper.folder, 1) == b"[]\n"


def test_only_the_newest_are_kept_and_always_the_current_one(keeper: Keeper) -> None:
    for number in (1, 2, 5, 9, 12):
        put(keeper, number)
    keeper.prune(3, 12)
    assert nodefolder.kept(keeper.folder) == (12, 9, 5)
    keeper.prune(2, 5)
    assert nodefolder.kept(keeper.folder) == (12, 5)


def test_a_start_tries_the_current_one_and_then_older_ones(keeper: Keeper) -> None:
    for number in (1, 2, 3):
        put(keeper, number)
    keeper.keep(revision(4), b"{}\n")
    assert nodefolder.usable_order(keeper.folder) == (3, 2, 1)
    (keeper.folder / "current.json").write_text("nonsense")
    assert nodefolder.usable_order(keeper.folder) == (4, 3, 2, 1)
    assert nodefolder.usable_order(keeper.folder / "nowhere") == ()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2}', '{"format": 1, "revision": "7", "sha256": ""}', '{"format": 1, "revision": true}',
     '{"format": 1, "revision": 0, "sha256": "%s"}' % ("a" * 64), '{"format": 1, "revision": 7, "sha256": "x"}',
     "[" * 200_000],
    ids=lambda t: t[:30],
)  # fmt: skip
def test_a_damaged_note_of_the_current_revision_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "current.json").write_text(text)
    with pytest.raises(BadRevision, match=r"current\.json|cannot be used"):
        nodefolder.read_current(tmp_path)


def test_no_note_is_no_damage(tmp_path: Path) -> None:
    assert nodefolder.read_current(tmp_path) is None
    assert nodefolder.read_sync(tmp_path) is None


def test_a_reader_takes_plain_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "large").write_bytes(b"12345")
    for name in ("pipe", "link", "large", "."):
        with pytest.raises(Unusable):
            read_bytes(tmp_path / name, 4)


STATE = SyncState(
    "node-1", 1, boot_id(), 100.0, "2027-01-31T12:00:00.000Z", SourceState("s3", "bucket", False, "why"), 1.0, 9, 8,
    LastRefused(9, "bad-config", "why", "2027-01-31T12:00:00.000Z"), 4, Turn("g1", 8, "x"), ("a", "b"),
    Trial(10, 90.0), 101.0,
)  # fmt: skip


def test_the_state_is_read_as_it_was_told(keeper: Keeper) -> None:
    keeper.tell(STATE)
    assert nodefolder.read_sync(keeper.folder) == STATE
    least = SyncState("n", 1, "b", None, None, SourceState("s3", "x"), 0.2)
    keeper.tell(least)
    assert nodefolder.read_sync(keeper.folder) == least


@pytest.mark.parametrize(
    "change",
    [{"node": None, "pid": None}, {"source": 3}, {"format": 0}, {"turn": {}}, {"pid": float("inf")},
     {"checked_boottime": float("nan")}, {"revision": float("inf")}],
    ids=str,
)  # fmt: skip
def test_a_state_that_is_none_is_not_read(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "sync.json").write_text(json.dumps({**STATE.to_dict(), **change}))
    assert nodefolder.read_sync(tmp_path) is None


def test_staleness_is_of_the_machines_running_time() -> None:
    assert STATE.staleness(130.0) == pytest.approx(30)
    assert STATE.staleness(90.0) == 0
    assert STATE.staleness(55.0, "another boot") == 55, "the least that it can be: the time since the machine started"
    assert 0 < STATE.staleness() <= boottime()


def test_a_second_one_is_refused_and_told_who_holds_the_folder(keeper: Keeper) -> None:
    with pytest.raises(SyncFolderFailed, match="another config-sync") as caught:
        Keeper(keeper.folder)
    assert caught.value.found == f"process {os.getpid()}"
    keeper.close()
    Keeper(keeper.folder).close()


def test_a_start_removes_what_was_not_finished(keeper: Keeper) -> None:
    put(keeper, 1)
    keeper.close()
    (keeper.folder / "tmp" / "new-2" / "routers").mkdir(parents=True)
    (keeper.folder / "tmp" / "new-2" / "routers" / "x").write_text("half")
    (keeper.folder / ".current.json.tmp").write_text("half")
    again = Keeper(keeper.folder)
    assert list((again.folder / "tmp").iterdir()) == []
    assert not (again.folder / ".current.json.tmp").exists()
    assert nodefolder.kept(again.folder) == (1,)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SyncFolderFailed) as caught:
        Keeper(tmp_path / "file")
    assert caught.value.path == str(tmp_path / "file")


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.unit.gateway.sync.test_nodefolder import Keeper, nodefolder, put, revision
keeper = Keeper(Path(sys.argv[1]))
put(keeper, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    keeper.keep(revision(2, b"# " + b"x" * 4000), b"{}")
except Exception as e:
    print(type(e).__name__, e.one_line())
print(nodefolder.kept(keeper.folder), list((keeper.folder / "tmp").iterdir()))
"""


def test_a_full_disk_leaves_the_old_one_and_no_waste(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "sync")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("SyncFolderFailed")
    assert "make room" in first
    assert second == "(1,) []"
