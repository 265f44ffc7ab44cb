# SPDX-License-Identifier: Apache-2.0
"""Proves that changed secret files are seen, and that a bad or vanished one leaves the value before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moat_gateway import secretfiles
from moat_gateway.errors import BadMasterKey, UnreadableSecret
from moat_gateway.secretfiles import Watch


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "up_key"
    path.write_text("one\n")
    return path


def test_a_changed_file_gives_its_new_value_and_an_unchanged_one_is_not_read(file: Path) -> None:
    read: list[Path] = []

    def reader(path: Path) -> str:
        read.append(path)
        return secretfiles.read_value(path)

    watch = Watch(reader)
    assert watch.look({"A": file, "B": file}).values == {"A": "one", "B": "one"}
    assert watch.look({"A": file}).values == {"A": "one"}
    assert read == [file]
    beside = file.with_name("new")
    beside.write_text("two")
    beside.replace(file)
    assert watch.look({"A": file}).values == {"A": "two"}
    file.write_text("three")
    assert watch.look({"A": file}).values == {"A": "three"}


def test_a_file_behind_a_link_that_is_swapped(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other"
    other.write_text("two")
    link = tmp_path / "link"
    link.symlink_to(file)
    watch = Watch()
    assert watch.look({"A": link}).values == {"A": "one"}
    link.unlink()
    link.symlink_to(other)
    assert watch.look({"A": link}).values == {"A": "two"}


@pytest.mark.parametrize("bad", [b"", b"\xff\xfe", b"a\0b", None])
def test_a_bad_file_leaves_the_value_before_and_is_news_once(file: Path, bad: bytes | None) -> None:
    watch = Watch()
    watch.look({"A": file})
    if bad is None:
        file.unlink()
    else:
        file.write_bytes(bad)
    look = watch.look({"A": file})
    assert look.values == {"A": "one"}
    assert look.news == ("A",)
    assert isinstance(look.problems["A"], UnreadableSecret)
    again = watch.look({"A": file})
    assert (again.news, tuple(again.problems)) == ((), ("A",))
    file.write_text("two")
    healed = watch.look({"A": file})
    assert (healed.values, healed.problems) == ({"A": "two"}, {})


def test_a_name_that_never_had_a_value_has_none(tmp_path: Path) -> None:
    look = Watch().look({"A": tmp_path / "missing"})
    assert look.values == {}
    assert look.news == ("A",)


def test_a_file_that_is_written_while_it_is_read_waits_for_the_next_look(file: Path) -> None:
    busy = True

    def reader(path: Path) -> str:
        value = secretfiles.read_value(path)
        if busy:
            path.write_text(value + "x")
        return value

    watch = Watch(secretfiles.read_value)
    watch.look({"A": file})
    watch._read = reader
    file.write_text("half")
    assert watch.look({"A": file}).values == {"A": "one"}
    busy = False
    assert watch.look({"A": file}).values["A"].startswith("half")


def test_values_are_not_in_what_is_printed(file: Path) -> None:
    look = Watch().look({"A": file})
    assert "one" not in repr(look)


def test_a_weak_master_key_is_refused_by_the_same_watch(tmp_path: Path) -> None:
    path = tmp_path / "master_key"
    path.write_text("0123456789abcdef" * 4)
    watch = Watch(secretfiles.read_master_key)
    watch.look({"M": path})
    path.write_text("changeme")
    look = watch.look({"M": path})
    assert look.values == {"M": "0123456789abcdef" * 4}
    assert isinstance(look.problems["M"], BadMasterKey)
