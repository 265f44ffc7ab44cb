# SPDX-License-Identifier: Apache-2.0
"""Proves the parts of `moat-gateway config` that need no store: pointer, differences, the folder to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway import checks, configdiff, configdir, revstore, starter
from moat_gateway.cli import main
from moat_gateway.errors import BadConfig
from moat_gateway.revstore import BadPointer, Pointer
from moat_gateway.settings import Settings

POINTER = Pointer(7, "revisions/7", "a" * 64, 1000, "2027-01-31T12:00:00Z", "alice", "etag")


# --- the pointer ---


def test_a_pointer_is_read_as_it_was_written() -> None:
    assert revstore.parse_pointer(POINTER.to_bytes(), "etag", "here") == POINTER


@pytest.mark.parametrize(
    "change",
    [
        {"revision": 0}, {"revision": -1}, {"revision": True}, {"revision": 1.0}, {"revision": "7"}, {"format": 2},
        {"format": True}, {"revision": 2**60}, {"object": "revisions/8"}, {"object": "../revisions/7"},
        {"sha256": "0" * 63}, {"sha256": "A" * 64}, {"sha256": None}, {"size": 0}, {"size": "1"}, {"size": True},
        {"author": "a\x1b[31m"}, {"author": 7}, {"pushed_at": "a\nb"}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_pointer_with_a_wrong_field_is_refused_and_can_be_replaced(change: dict[str, Any]) -> None:
    fields = json.loads(POINTER.to_bytes())
    with pytest.raises(BadPointer) as refused:
        revstore.parse_pointer(json.dumps(fields | change).encode(), "its-etag", "here")
    assert refused.value.etag == "its-etag"


@pytest.mark.parametrize("name", sorted(json.loads(POINTER.to_bytes())))
def test_a_pointer_without_a_field_is_refused(name: str) -> None:
    fields = json.loads(POINTER.to_bytes())
    del fields[name]
    with pytest.raises(BadPointer):
        revstore.parse_pointer(json.dumps(fields).encode(), "", "here")


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_in_no_other_way(raw: bytes) -> None:
    with pytest.raises(BadPointer):
        revstore.parse_pointer(raw, "", "here")


@pytest.mark.parametrize("name", ["0", "01", "-1", "x", "", "1.5", "1/2", "9007199254740992", "٣", " 1"])
def test_a_name_that_is_no_number_of_a_revision(name: str) -> None:
    assert revstore.number_of(name) is None


def test_names_of_nodes_and_numbers() -> None:
    assert revstore.number_of("9007199254740991") == revstore.MAX_NUMBER
    assert revstore.node_of("pc-1.site.json") == "pc-1.site"
    assert [revstore.node_of(n) for n in ("pc1", ".json", "../x.json", "a/b.json", ".tmp-1.json")] == [None] * 5


# --- differences ---

OLD = {"config.yaml": b"a: 1\nb: 2\n", "keys.yaml": f"keys:\n  - sha256: {'0' * 64}\n".encode()}


def test_a_difference_is_a_unified_diff() -> None:
    new = {**OLD, "config.yaml": b"a: 1\nb: 3\n"}
    (change,) = configdiff.compare(OLD, new, "revision-1", "revision-2")
    assert (change.path, change.change) == ("config.yaml", "changed")
    assert change.diff.splitlines()[:2] == ["--- revision-1/config.yaml", "+++ revision-2/config.yaml"]
    assert change.diff.splitlines()[-2:] == ["-b: 2", "+b: 3"]
    assert configdiff.compare(OLD, OLD, "a", "b") == ()


def test_a_hash_of_a_key_is_shown_shortened() -> None:
    new = {**OLD, "keys.yaml": f"keys:\n  - sha256: {'1' * 64}\n".encode()}
    (change,) = configdiff.compare(OLD, new, "a", "b")
    assert "+  - sha256: 1111111111...\n" in change.diff
    assert "1" * 11 not in change.diff
    hidden = {**OLD, "keys.yaml": f"keys:\n  - sha256: {'0' * 63}1\n".encode()}
    (change,) = configdiff.compare(OLD, hidden, "a", "b")
    assert change.diff == "keys.yaml: only a shortened hash differs\n"


def test_added_removed_and_binary_files() -> None:
    new = {"config.yaml": OLD["config.yaml"], "routers/m.onnx": b"\0\xff"}
    removed, added = configdiff.compare(OLD, new, "a", "b")
    assert (removed.path, removed.change, added.path, added.change) == (
        "keys.yaml",
        "removed",
        "routers/m.onnx",
        "added",
    )
    assert "+++ (none)" in removed.diff
    assert added.diff.startswith("routers/m.onnx: nothing -> 2 bytes, sha256 ")


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_nothing_in_a_difference_steers_a_terminal(a: bytes, b: bytes) -> None:
    changes = configdiff.compare({"config.yaml": a}, {"config.yaml": b}, "a", "b")
    assert bool(changes) == (a != b)
    for change in changes:
        assert all(c.isprintable() or c in "\n\t" for c in change.diff)
        assert change.diff.endswith("\n")


# --- the folder to start from ---


@pytest.mark.parametrize(
    ("allowed", "server"),
    [
        ((), "model:8081"),
        (("10.0.0.0/8", "*.x", "gpu.site:9000", "b:1"), "gpu.site:9000"),
        (("[fd00::1]:80",), "[fd00::1]:80"),
    ],
)
def test_the_folder_to_start_from_is_right_as_it_is(tmp_path: Path, allowed: tuple[str, ...], server: str) -> None:
    folder = tmp_path / "a/b"
    egress = tuple(a for a in allowed if "*" not in a) or ("model:8081",)
    assert starter.write(folder, Settings(egress_allow=allowed)) == ("config.yaml", "keys.yaml")
    files = configdir.load(folder)
    assert f"http://{server}/v1".encode() in files["config.yaml"]
    settings = Settings(egress_allow=egress, secrets_dir=tmp_path)
    ready, problems = checks.check(files, settings, dry_run=None)
    assert [p.one_line() for p in problems] == []
    assert ready is not None
    assert ready.models == ("chat-small",)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("mine")
    with pytest.raises(BadConfig):
        starter.write(tmp_path, Settings())
    assert [p.name for p in tmp_path.iterdir()] == ["keys.yaml"]
    assert (tmp_path / "keys.yaml").read_text() == "mine"


def test_init_makes_a_site_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, folder = tmp_path / "site_key", tmp_path / "conf"
    assert main(["config", "init", str(folder), "--key-out", str(key), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["site_key"]
    assert (made["secret"], made["public"]) == (str(key), f"{key}.pub")
    assert key.stat().st_mode & 0o777 == 0o600
    secret = key.read_bytes()
    assert main(["config", "init", str(tmp_path / "other"), "--key-out", str(key)]) == 25
    assert key.read_bytes() == secret
    # Nothing of the second call is left half done.
    assert not (tmp_path / "other").exists()


def test_push_wants_one_thing_to_push(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [[], ["a", "--signed-from", "b"], ["--wait", "a"], *(["a", f"--wait={w}"] for w in ("-1", "nan", "inf"))]
    for argv in (["config", "push", *w] for w in wrong):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 2
    assert "--signed-from" in capsys.readouterr().err
