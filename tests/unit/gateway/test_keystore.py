# SPDX-License-Identifier: Apache-2.0
"""Proves that a changed keys file takes effect, and that a bad or vanished one never does."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from moat_gateway import keyfile
from moat_gateway.errors import BadKeys
from moat_gateway.keys import Identity, Verdict, hash_secret
from moat_gateway.keystore import KeyStore
from moat_gateway.logs import Log

MASTER = "sk-master-of-this-test-only-0123456789"


class Store:
    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "keys.yaml"
        self.first = keyfile.new_key(self.path, "one", "t", create_team=True)
        self.lines: list[bytes] = []
        self.store = KeyStore(self.path, hash_secret(MASTER), Log(self.lines.append))
        self.store.load_first()

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.lines]


@pytest.fixture
def s(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_the_master_key_is_the_administrator(s: Store) -> None:
    who = s.store.identify(MASTER)
    assert isinstance(who, Identity)
    assert who.admin
    assert s.store.identify(MASTER + "x") is Verdict.UNKNOWN


def test_a_change_is_seen(s: Store) -> None:
    second = keyfile.new_key(s.path, "two", "t")
    assert s.store.identify(second) is Verdict.UNKNOWN
    assert s.store.refresh()
    assert isinstance(s.store.identify(second), Identity)
    keyfile.revoke(s.path, "one")
    assert s.store.refresh()
    assert s.store.identify(s.first) is Verdict.UNKNOWN


@pytest.mark.parametrize("bad", ["", "teams: [", "teams: []\nkeys: [{id: x}]\n"])
def test_a_bad_file_leaves_the_old_one_in_force_until_it_is_mended(s: Store, bad: str) -> None:
    good = s.path.read_text()
    s.path.write_text(bad)
    assert not s.store.refresh()
    assert s.store.problem is not None
    assert isinstance(s.store.identify(s.first), Identity)
    assert s.events()[-1] == "keys.refused"
    assert not s.store.refresh()  # said once, still bad
    assert s.events().count("keys.refused") == 1
    s.path.write_text(good + "# mended\n")
    assert s.store.refresh()
    assert s.store.problem is None


def test_a_vanished_file_leaves_the_old_one_in_force(s: Store) -> None:
    s.path.unlink()
    assert not s.store.refresh()
    assert isinstance(s.store.identify(s.first), Identity)
    assert "cannot be read" in (s.store.problem.one_line() if s.store.problem else "")


def test_the_same_size_and_time_in_another_file_is_seen(s: Store) -> None:
    before = s.path.stat()
    other = s.path.with_suffix(".new")
    other.write_text(s.path.read_text().replace("id: one", "id: eno"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(s.path)
    assert s.store.refresh()
    assert s.store.current.keys[0].id == "eno"


def test_the_poll_sees_a_change_by_itself(s: Store) -> None:
    async def run() -> bool:
        poll = asyncio.create_task(s.store.poll(0.02))
        second = keyfile.new_key(s.path, "two", "t")
        for _ in range(100):
            await asyncio.sleep(0.02)
            if isinstance(s.store.identify(second), Identity):
                break
        poll.cancel()
        return isinstance(s.store.identify(second), Identity)

    assert asyncio.run(run())


def test_an_unknown_key_has_a_changed_file_read_at_once(s: Store) -> None:
    assert asyncio.run(s.store.recheck()) is False  # nothing changed: nothing is read
    s.path.write_text(s.path.read_text() + "# changed\n")
    assert asyncio.run(s.store.recheck()) is True
    assert asyncio.run(s.store.recheck()) is False


def test_without_a_good_file_there_is_no_beginning(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "none.yaml", "0" * 64, Log(lambda _line: None))
    with pytest.raises(BadKeys, match="cannot be read"):
        store.load_first()
