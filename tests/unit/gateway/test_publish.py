# SPDX-License-Identifier: Apache-2.0
"""Proves, on a real folder, what reports and archives that others wrote can do to a push: be named, never stop it."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moat_gateway import fleet, publish, revstore
from moat_gateway.cli import main
from moat_gateway.dirstore import DirectoryStore
from moat_gateway.errors import OlderRevision, PushConflict
from moat_gateway.publish import Published, Wanted
from moat_gateway.revstore import Pointer
from moat_gateway.sitekey import SigningKey

FILES = {"config.yaml": b"a: 1\n", "keys.yaml": b"keys: []\n"}


@dataclass
class Site:
    """A folder as store, and the key that signs."""

    folder: Path
    key: SigningKey = field(default_factory=SigningKey.generate)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.store = DirectoryStore(self.folder, limit=1 << 20)

    def push(self, text: str = "a", **how: Any) -> Published:
        wanted = Wanted({**FILES, "config.yaml": text.encode()}, "tester", "why", **how)
        return publish.push(self.store, wanted, key=self.key, trusted=[self.key.public], limit=1 << 20)

    def report(self, node: str, accepted: Any, **gateway: Any) -> None:
        """Write a node's report as that node pleases."""
        source = {"kind": "directory", "where": "w", "reachable": True, "why": None}
        sync = {"revision": accepted, "pointer": 1, "source": source, "last_refused": None, "degraded": []}
        one = {
            "name": "g1", "pid": 1, "revision": 1, "sha256": None, "applied_at": None, "ready": True, "draining": False,
            "degraded": [], "last_refused": None, "needs_restart": [], "started_at": "x", "age": 1.0, **gateway,
        }  # fmt: skip
        self.store.report(node, json.dumps({"format": 1, "sync": sync, "gateways": [one] if gateway else []}).encode())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "store")


@pytest.mark.parametrize("number", [revstore.MAX_NUMBER - 1, 5_000_000])
def test_one_report_with_a_number_that_cannot_be_is_named_and_uses_up_no_numbers(site: Site, number: int) -> None:
    site.push("one")
    site.report("broken", number)
    site.report("pc2", 1, revision=number)
    done = site.push("two")
    assert done.revision == 2
    assert [n.split(" was left out")[0] for n in done.notes] == ["the report of broken", "the report of pc2/g1"]
    assert not any(str(number) in n for n in done.notes), "nobody is led to that number"
    # A store that is older than its nodes is still noticed, by the reports that can be.
    site.report("pc3", 9)
    with pytest.raises(OlderRevision, match="newer revisions") as refused:
        site.push("three")
    assert "--revision 10" in refused.value.one_line()


def test_archives_far_ahead_use_up_no_numbers_either(site: Site) -> None:
    site.push("one")
    (site.folder / "revisions" / str(revstore.MAX_NUMBER)).write_bytes(b"x")
    site.report("broken", revstore.MAX_NUMBER)
    assert site.push("two").revision == 2


@pytest.mark.parametrize(
    "gateway", [{"pid": float("inf")}, {"age": float("inf")}, {"age": float("nan")}, {"revision": -1}, {"pid": 1.5}],
    ids=str,
)  # fmt: skip
def test_a_report_with_numbers_that_are_none_stops_nobody(site: Site, gateway: dict[str, Any]) -> None:
    site.push("one")
    site.report("broken", 1, **gateway)
    site.report("pc2", 1, revision=1)
    assert site.push("two").revision == 2
    found = fleet.from_reports(site.store.reports())
    assert [(n.name, n.degraded) for n in found.nodes] == [
        ("broken", ("its report cannot be read",)),
        ("pc2", ()),
    ]


def test_what_is_no_report_in_a_folder_is_named_and_stops_nobody(site: Site, tmp_path: Path) -> None:
    site.push("one")
    site.report("pc2", 1)
    nodes = site.folder / "nodes"
    (nodes / "large.json").write_bytes(b" " * (revstore.MAX_REPORT + 1))
    (nodes / "link.json").symlink_to(tmp_path / "elsewhere")
    (nodes / "folder.json").mkdir()
    os.mkfifo(nodes / "pipe.json")
    assert site.push("two").revision == 2
    found = fleet.from_reports(site.store.reports())
    bad = [n.name for n in found.nodes if n.degraded == ("its report cannot be read",)]
    assert bad == ["folder", "large", "link", "pipe"]
    assert site.store.forget("link")
    assert site.store.forget("pipe")


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_ages_are_by_the_folder_s_own_clock(site: Site, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    # A share: the files are dated by its server, whose clock is not ours.
    site.report("pc1", 1)
    site.report("pc2", 1)
    path = site.folder / "nodes" / "pc1.json"
    os.utime(path, times=(0, path.stat().st_mtime - 100))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    ages = {name: report.age for name, report in site.store.reports().items()}
    assert ages["pc1"] is not None
    assert ages["pc2"] is not None
    assert 100 <= ages["pc1"] < 130
    assert 0 <= ages["pc2"] < 30
    assert sorted(p.name for p in (site.folder / "nodes").iterdir()) == ["pc1.json", "pc2.json"], "nothing is left"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_ages_in_a_folder_that_cannot_be_written_are_not_known(site: Site) -> None:
    site.report("pc1", 1)
    (site.folder / "nodes").chmod(0o500)
    try:
        assert site.store.reports()["pc1"].age is None
    finally:
        (site.folder / "nodes").chmod(0o700)


def test_ages_on_a_full_disk_are_not_known(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.report("pc1", 1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert site.store.reports()["pc1"].age is None
    monkeypatch.undo()
    assert [p.name for p in (site.folder / "nodes").iterdir()] == ["pc1.json"]


class Overtaken(DirectoryStore):
    """A store where somebody else pushes just before the last step."""

    site: Site

    def move(self, pointer: Pointer, etag: str | None) -> Pointer:
        self.site.push("theirs", number=9)
        return super().move(pointer, etag)


def test_who_lost_is_told_what_stays_and_the_history_marks_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.push("one")
    overtaken = Overtaken(site.folder, limit=1 << 20)
    overtaken.site = site
    loser = Site.__new__(Site)
    loser.folder, loser.key, loser.store = site.folder, site.key, overtaken
    with pytest.raises(PushConflict) as lost:
        loser.push("mine")
    assert "revision 9 by tester" in lost.value.one_line()
    assert "your archive revisions/2 stays in the store and is not in force" in lost.value.one_line()
    keys = tmp_path / "site-keys"
    keys.mkdir()
    (keys / "site.pub").write_bytes(site.key.public.to_bytes())
    (tmp_path / "gateway.yaml").touch()
    for name, value in (("SETTINGS_FILE", "gateway.yaml"), ("SITE_KEYS_DIR", "site-keys"), ("SOURCE_DIR", "store")):
        monkeypatch.setenv(f"MOAT_{name}", str(tmp_path / value))
    assert main(["config", "history"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [(r.lstrip("* ").split()[0], "[never in force]" in r) for r in rows] == [
        ("9", False), ("2", True), ("1", False),
    ]  # fmt: skip
