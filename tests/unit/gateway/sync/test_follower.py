# SPDX-License-Identifier: Apache-2.0
"""Proves the loop step by step: a real folder as source, real signatures and checks, a clock that the test turns.

The dry run is left out (its own tests have it); everything else is what the process uses.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.integration.hotreload.craft import archive
from tests.integration.sync.drive import Drive, config, content

from moat_gateway import revision as revisions
from moat_gateway import revstore, settings
from moat_gateway.errors import GatewayError, StoreFailed
from moat_gateway.logs import Log
from moat_gateway.revision import Revision
from moat_gateway.revstore import Pointer, Source
from moat_gateway.sitekey import SigningKey, read_trusted
from moat_gateway.sync import nodefolder
from moat_gateway.sync.board import Board
from moat_gateway.sync.follower import Follower
from moat_gateway.sync.keeper import Keeper
from moat_gateway.sync.vetting import NodeVet


class WithoutDryRun(NodeVet):
    """The node's checks, but for the child process."""

    def prepare(self, revision: Revision, *, dry_run: bool) -> bytes:
        return super().prepare(revision, dry_run=False)


@dataclass
class Switched:
    """A source that can be cut off, and that counts what is asked of it."""

    inner: Source
    cut: GatewayError | Exception | None = None
    fetched: int = 0

    @property
    def kind(self) -> str:
        return self.inner.kind

    def describe(self) -> str:
        return self.inner.describe()

    def pointer(self, etag: str | None = None) -> Pointer | None:
        if self.cut is not None:
            raise self.cut
        return self.inner.pointer(etag)

    def fetch(self, pointer: Pointer, limit_bytes: int) -> bytes:
        self.fetched += 1
        return self.inner.fetch(pointer, limit_bytes)


@dataclass
class Node:
    """A node without a process."""

    root: Path
    drive: Drive
    now: float = 100.0
    lines: list[dict[str, Any]] = field(default_factory=list)
    held: Keeper | None = None

    def __post_init__(self) -> None:
        (self.root / "secrets").mkdir(parents=True)
        (self.root / "secrets" / "up_key").write_text("a-secret-of-the-site")
        self.drive.trust(self.root / "site-keys")
        self.settings, _ = settings.load(
            {"MOAT_SETTINGS_FILE": str(self._empty())},
            {
                "sync_dir": str(self.root / "sync"),
                "source_dir": str(self.drive.folder),
                "site_keys_dir": str(self.root / "site-keys"),
                "secrets_dir": str(self.root / "secrets"),
                "revision_max": "1",
                "sync_keep": "3",
            },
        )
        self.start()

    def _empty(self) -> Path:
        path = self.root / "gateway.yaml"
        path.write_text("")
        return path

    def start(self) -> None:
        """Start (again, as after a kill: nothing but the folder is left)."""
        if self.held is not None:
            self.held.close()
        self.lines.clear()
        self.held = self.keeper = Keeper(self.root / "sync")
        self.source = Switched(revstore.open_source(self.settings))
        self.board = Board("node-1", self.source.kind, self.source.describe(), 1.0)
        self.follower = Follower(
            self.settings,
            self.keeper,
            self.source,
            WithoutDryRun(self.settings, None),  # type: ignore[arg-type]
            self.board,
            Log(lambda line: self.lines.append(json.loads(line))),
            clock=lambda: self.now,
            jitter=lambda: 0.5,
        )
        self.follower.recover()

    def step(self, seconds: float = 0.25, **how: bool) -> int | None:
        """Let time pass, take one step, return the revision in force as the folder says it."""
        self.now += seconds
        self.follower.step(**how)
        current = nodefolder.read_current(self.keeper.folder)
        if current is None:
            assert self.board.state.revision is None
            return None
        assert self.board.state.revision == current.revision
        kept = revisions.read_folder(
            nodefolder.revision_folder(self.keeper.folder, current.revision), read_trusted(self.settings.site_keys_dir)
        )
        assert kept.sha256 == current.sha256
        return current.revision

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in self.lines if e["event"] == name]

    def refused(self) -> tuple[int | None, str] | None:
        last = self.board.state.last_refused
        return (last.revision, last.kind) if last else None


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node", Drive(tmp_path / "drive"))


def test_the_first_revision_and_the_next(node: Node) -> None:
    assert node.step() is None
    assert node.step() is None
    assert len(node.events("sync.waiting")) == 1, "said once"
    assert node.board.state.source.reachable
    node.drive.push()
    assert node.step() == 1
    assert node.step() == 1
    node.drive.push(number=7)
    assert node.step() == 7
    assert [e["revision"] for e in node.events("sync.accepted")] == [1, 7]
    assert node.board.state.pointer == 7
    assert json.loads(nodefolder.read_prepared(node.keeper.folder, 7))["revision"] == 7


def test_the_last_ones_are_kept(node: Node) -> None:
    for _ in range(5):
        node.drive.push()
        node.step()
    assert nodefolder.kept(node.keeper.folder) == (5, 4, 3)


def other_key(drive: Drive) -> None:
    drive.push(key=SigningKey.generate())


def older(drive: Drive) -> None:
    drive.move((drive.folder / "first").read_bytes())


def same_number(drive: Drive) -> None:
    drive.push(content("another"), number=2)


def missing(drive: Drive) -> None:
    drive.push()
    (drive.folder / "revisions" / "3").unlink()


def cut_short(drive: Drive) -> None:
    drive.publish(3, archive(content(), 3, drive.key)[:-512])


def too_large(drive: Drive) -> None:
    drive.push(content(routers__x="x" * (2 << 20)))


def another_number(drive: Drive) -> None:
    drive.publish(4, archive(content(), 3, drive.key))


def no_pointer(drive: Drive) -> None:
    drive.move(b"{}")


WRONG: dict[str, tuple[Callable[[Drive], Any], str, int | None]] = {
    "signed by another": (other_key, "bad-signature", 3),
    "an older one": (older, "older-revision", 1),
    "the same number with other content": (same_number, "bad-revision", 2),
    "a missing archive": (missing, "bad-revision", 3),
    "an archive cut short": (cut_short, "bad-revision", 3),
    "an archive that is too large": (too_large, "bad-revision", 3),
    "an archive of another number": (another_number, "bad-revision", 4),
    "a pointer that is none": (no_pointer, "bad-revision", None),
    "broken YAML": (lambda d: d.push({**content(), "config.yaml": b"a: ["}), "bad-config", 3),
    "an unset secret": (
        lambda d: d.push({**content(), "config.yaml": config(reference="NO").encode()}),
        "unset-secret",
        3,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_revision_is_named_once_and_the_next_good_one_heals_it(node: Node, name: str) -> None:
    wrong, kind, number = WRONG[name]
    node.drive.push()
    shutil.copy(node.drive.folder / "current", node.drive.folder / "first")
    node.step()
    node.drive.push()
    assert node.step() == 2
    wrong(node.drive)
    for _ in range(8):
        assert node.step() == 2
    assert node.refused() == (number, kind)
    assert node.board.state.refused_total == 1
    [event] = node.events("sync.refused")
    assert (event["revision"], event["kind"]) == (number, kind)
    node.drive.push(number=9)
    assert node.step() == 9
    assert node.refused() is None
    assert node.board.state.refused_total == 1


def test_moving_the_pointer_back_to_what_is_in_force_heals(node: Node) -> None:
    node.drive.push()
    good = (node.drive.folder / "current").read_bytes()
    node.step()
    node.drive.push(key=SigningKey.generate())
    assert node.step() == 1
    assert node.refused() == (2, "bad-signature")
    node.drive.move(good)
    assert node.step() == 1
    assert node.refused() is None


def test_an_archive_that_comes_after_its_pointer_is_waited_for(node: Node) -> None:
    node.drive.push()
    raw = (node.drive.folder / "revisions" / "1").read_bytes()
    (node.drive.folder / "revisions" / "1").unlink()
    tried = []
    for _ in range(100):
        assert node.step() is None
        tried.append(node.source.fetched)
    # 25 seconds: at 0.25, 0.5, 1, 2, 4, then every 5.
    assert 7 <= tried[-1] <= 10
    assert len(node.events("sync.refused")) == 1
    node.drive.put(1, raw)
    assert node.step(5.1) == 1


def test_a_final_refusal_is_not_fetched_again(node: Node) -> None:
    node.drive.push({**content(), "config.yaml": b"a: ["})
    for _ in range(50):
        node.step(60)
    assert node.source.fetched == 1
    assert "next push" in node.events("sync.refused")[0]["tried_again"]


def test_a_secret_that_comes_later_heals(node: Node) -> None:
    node.drive.push({**content(), "config.yaml": config(reference="LATE").encode()})
    for _ in range(5):
        node.step(30)
    assert node.refused() == (1, "unset-secret")
    assert node.source.fetched == 1
    (node.root / "secrets" / "late").write_text("now-there-is-one")
    assert node.step() == 1


def test_a_site_key_that_is_trusted_later_heals(node: Node) -> None:
    other = SigningKey.generate()
    node.drive.push(key=other)
    node.step()
    assert node.refused() == (1, "bad-signature")
    (node.root / "site-keys" / "other.pub").write_bytes(other.public.to_bytes())
    assert node.step() == 1


def test_no_site_keys_at_all_is_a_refusal_and_heals(node: Node) -> None:
    (node.root / "site-keys" / "site.pub").rename(node.root / "away")
    node.drive.push()
    node.step()
    assert node.refused() == (1, "bad-site-key")
    (node.root / "away").rename(node.root / "site-keys" / "site.pub")
    assert node.step() == 1


def test_a_kept_revision_whose_site_key_is_missing_at_the_start_is_good_once_the_key_is_back(node: Node) -> None:
    node.drive.push()
    node.step()
    (node.root / "site-keys" / "site.pub").rename(node.root / "away")
    node.start()
    assert node.board.state.revision == 1
    assert "cannot be used" in node.board.state.degraded[0]
    (node.root / "away").rename(node.root / "site-keys" / "site.pub")
    assert node.step() == 1
    assert node.board.state.degraded == ()
    assert node.source.fetched == 0


def test_being_asked_tries_again_at_once(node: Node) -> None:
    node.drive.push()
    path = node.drive.folder / "revisions" / "1"
    path.rename(node.drive.folder / "away")
    for _ in range(20):
        node.step()
    (node.drive.folder / "away").rename(path)
    assert node.step(0.01) is None
    assert node.step(0.01, asked=True) == 1


def test_what_is_tried_is_on_the_board_meanwhile_and_not_after(node: Node) -> None:
    vet = WithoutDryRun(node.settings, None)  # type: ignore[arg-type]
    seen: list[int | None] = []

    def opening(raw: bytes) -> Revision:
        trial = node.board.state.trial
        seen.append(trial.revision if trial is not None else None)
        return WithoutDryRun.open(vet, raw)

    vet.open = opening  # type: ignore[method-assign]
    node.follower._vet = vet
    node.drive.push()
    assert node.step() == 1
    node.drive.push(key=SigningKey.generate())
    assert node.step() == 1
    assert seen == [1, 2]
    assert node.board.state.trial is None


def test_a_lost_source_is_said_once_and_asked_less_often(node: Node) -> None:
    node.drive.push()
    node.step()
    assert node.follower.pause() == pytest.approx(0.25)
    checked = node.board.state.checked_boottime
    node.source.cut = StoreFailed("gone")
    pauses = []
    for _ in range(8):
        assert node.step() == 1
        pauses.append(node.follower.pause())
    assert pauses == pytest.approx([0.5, 1, 2, 4, 5, 5, 5, 5])
    assert node.board.state.checked_boottime == checked
    assert node.board.state.source.reachable is False
    assert "gone" in str(node.board.state.source.why)
    assert len(node.events("sync.source_lost")) == 1
    node.source.cut = None
    node.drive.push()
    assert node.step() == 2
    assert len(node.events("sync.source_back")) == 1
    assert node.follower.pause() == pytest.approx(0.25)


def test_a_defect_of_the_source_is_survived(node: Node) -> None:
    node.source.cut = ZeroDivisionError()
    assert node.step() is None
    assert node.events("defect")
    node.source.cut = None
    node.drive.push()
    assert node.step() == 1


def test_an_emptied_source_changes_nothing_but_is_said(node: Node) -> None:
    node.drive.push()
    node.step()
    (node.drive.folder / "current").unlink()
    assert node.step() == 1
    assert "holds no revision any more" in node.board.state.degraded[0]
    node.drive.push()
    assert node.step() == 2
    assert node.board.state.degraded == ()


# --- starts ---


def test_a_restart_fetches_nothing_that_is_kept(node: Node) -> None:
    node.drive.push()
    node.step()
    node.start()
    assert node.board.state.revision == 1
    assert node.step() == 1
    assert node.source.fetched == 0
    assert node.events("sync.accepted") == []


def test_after_a_restart_the_same_number_with_other_content_is_refused(node: Node) -> None:
    node.drive.push()
    node.step()
    node.start()
    node.drive.push(content("another"), number=1)
    assert node.step() == 1
    assert node.refused() == (1, "bad-revision")


def test_after_a_restart_without_a_source_the_kept_one_stays(node: Node) -> None:
    node.drive.push()
    node.step()
    node.drive.folder.rename(node.drive.folder.with_name("away"))
    node.start()
    assert node.step() == 1
    assert node.board.state.source.reachable is False


def damage_config(folder: Path) -> None:
    (folder / "config.yaml").write_text(config("somebody-elses"))


def damage_signature(folder: Path) -> None:
    (folder / "revision.json.minisig").write_text("nonsense")


def lose_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def plant_a_link(folder: Path) -> None:
    (folder / "keys.yaml").unlink()
    (folder / "keys.yaml").symlink_to("/etc/passwd")


def plant_a_file(folder: Path) -> None:
    (folder / "more.yaml").write_text("a: 1")


@pytest.mark.parametrize("damage", [damage_config, damage_signature, lose_everything, plant_a_link, plant_a_file])
def test_a_damaged_kept_copy_is_said_and_fetched_again(node: Node, damage: Callable[[Path], None]) -> None:
    node.drive.push()
    node.step()
    damage(nodefolder.revision_folder(node.keeper.folder, 1))
    node.start()
    assert node.events("sync.damaged")
    assert "cannot be used" in node.board.state.degraded[0]
    watch = nodefolder.CurrentWatch(node.keeper.folder)
    assert node.step() == 1
    assert node.events("sync.accepted")[0]["repaired"] is True
    assert node.board.state.degraded == ()
    assert watch.changed(), "gateways look again"


def test_with_a_damaged_copy_nothing_older_is_taken(node: Node) -> None:
    node.drive.push()
    first = (node.drive.folder / "current").read_bytes()
    node.step()
    node.drive.push()
    node.step()
    lose_everything(nodefolder.revision_folder(node.keeper.folder, 2))
    node.drive.move(first)
    node.start()
    node.now += 1
    node.follower.step()
    assert node.refused() == (1, "older-revision")
    assert node.board.state.revision == 2


@pytest.mark.parametrize("text", ["", "nonsense", None], ids=["empty", "nonsense", "gone"])
def test_without_a_usable_note_the_newest_kept_one_counts(node: Node, text: str | None) -> None:
    for _ in range(2):
        node.drive.push()
        node.step()
    note = node.keeper.folder / "current.json"
    note.unlink()
    if text is not None:
        note.write_text(text)
    damage_config(nodefolder.revision_folder(node.keeper.folder, 2))
    node.start()
    current = nodefolder.read_current(node.keeper.folder)
    assert current is not None
    assert current.revision == 1
    assert node.step() == 2


def test_what_was_kept_and_never_in_force_is_removed_and_comes_again(node: Node) -> None:
    node.drive.push()
    node.step()
    node.drive.push()
    note = (node.keeper.folder / "current.json").read_bytes()
    assert node.step() == 2
    (node.keeper.folder / "current.json").write_bytes(note)  # as if killed before the last rename
    node.start()
    assert nodefolder.kept(node.keeper.folder) == (1,)
    assert node.step() == 2


def test_a_lost_prepared_form_is_made_again(node: Node) -> None:
    node.drive.push()
    node.step()
    path = nodefolder.revision_folder(node.keeper.folder, 1) / "prepared.json"
    before = path.read_bytes()
    for text in (None, b"{}", b""):
        path.unlink()
        if text is not None:
            path.write_bytes(text)
        watch = nodefolder.CurrentWatch(node.keeper.folder)
        node.start()
        assert path.read_bytes() == before
        assert watch.changed()
        assert node.step() == 1


def test_what_is_in_force_and_would_be_refused_now_stays_and_is_said(node: Node) -> None:
    node.drive.push()
    node.step()
    (node.root / "secrets" / "up_key").unlink()
    node.start()
    assert node.step() == 1
    assert "would be refused now" in node.board.state.degraded[0]
    (node.root / "secrets" / "up_key").write_text("it is back")
    assert node.step() == 1
    assert node.board.state.degraded == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the process test covers it with a full disk")
def test_a_folder_that_cannot_be_written_is_a_refusal_that_heals(node: Node) -> None:
    node.drive.push()
    (node.keeper.folder / "tmp").chmod(0o500)
    assert node.step() is None
    assert node.refused() == (1, "sync-folder-failed")
    (node.keeper.folder / "tmp").chmod(0o750)
    assert node.step(1.1) == 1
