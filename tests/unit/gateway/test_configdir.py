# SPDX-License-Identifier: Apache-2.0
"""Proves what may lie in a folder of configuration, that nothing else passes unseen, and what routers/ needs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from moat_gateway import configdir
from moat_gateway.errors import BadConfig, BadRevision, GatewayError

INDEX = "routers/index.yaml"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "site"
    (place / "routers/a").mkdir(parents=True)
    (place / "config.yaml").write_bytes(b"c")
    (place / "keys.yaml").write_bytes(b"k")
    (place / "routers/a/m.onnx").write_bytes(b"weights")
    (place / INDEX).write_text(f"models:\n  - {{file: a/m.onnx, sha256: {sha(b'weights')}}}\n")
    return place


def test_a_folder_is_loaded_whole(folder: Path) -> None:
    files = configdir.load(folder)
    assert sorted(files) == ["config.yaml", "keys.yaml", "routers/a/m.onnx", INDEX]
    assert files["routers/a/m.onnx"] == b"weights"
    assert configdir.check(files) == []


def test_this_machines_settings_are_no_part_of_it(folder: Path) -> None:
    (folder / "gateway.yaml").write_text("port: 1\n")
    assert "gateway.yaml" not in configdir.load(folder)


def test_without_routers(folder: Path) -> None:
    for path in (INDEX, "routers/a/m.onnx"):
        (folder / path).unlink()
    assert sorted(configdir.load(folder)) == ["config.yaml", "keys.yaml"]  # empty folders are nothing


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.yml", "rename it to config.yaml"),
        ("Config.yaml", "rename it to config.yaml"),
        ("key.yaml", "rename it to keys.yaml"),
        ("gateway.yml", "rename it to gateway.yaml"),
        ("README.md", "does not belong"),
        (".gitignore", "does not belong"),
        ("revision.json", "does not belong"),
        ("prepared.json", "does not belong"),
        ("config.yaml~", "backup"),
        (".config.yaml.swp", "backup"),
        (".#config.yaml", "backup"),
        ("#config.yaml#", "backup"),
        ("config.yaml.bak", "backup"),
        ("keys.yaml.orig", "backup"),
        ("4913", "backup"),
        ("routers/m.pkl", "can hold code"),
        ("routers/m.PKL", "can hold code"),
        ("routers/m.py", "can hold code"),
        ("routers/m.pt", "can hold code"),
        ("routers/m.joblib", "can hold code"),
        ("routers/m.so", "can hold code"),
        ("routers/m.npy", "can hold code"),
        ("routers/m.npz", "can hold code"),
        ("routers/m.exe", "no router reads"),
        ("routers/noname", "no router reads"),
        ("routers/.hidden.json", "hidden"),
        ("routers/a b.json", "a path"),
        ("routers/\x1b[2J.json", "a path"),
        ("routers/" + "x" * 100 + ".json", "a path"),
    ],
)
def test_what_does_not_belong_is_named(folder: Path, name: str, words: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(BadRevision) as caught:
        configdir.load(folder)
    text = caught.value.one_line()
    assert words in text
    assert "\x1b" not in text
    assert isinstance(configdir.check({"config.yaml": b"", "keys.yaml": b"", name: b"x"})[0], BadRevision)


@pytest.mark.parametrize("name", ["secrets", "router", "routers.d", ".git"])
def test_another_folder_is_named(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    with pytest.raises(BadRevision, match="does not belong"):
        configdir.load(folder)


@pytest.mark.parametrize("path", ["keys.yaml", "routers/a/m.onnx", "routers/a", "routers"])
def test_a_link_is_refused(folder: Path, path: str) -> None:
    place = folder / path
    place.rename(folder.parent / "elsewhere")
    place.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BadRevision, match="link"):
        configdir.load(folder)


def test_a_special_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "routers/x.json")
    with pytest.raises(BadRevision, match="neither a file nor a folder"):
        configdir.load(folder)


def test_a_file_with_a_folders_name_and_the_other_way_round(folder: Path) -> None:
    (folder / "keys.yaml").unlink()
    (folder / "keys.yaml").mkdir()
    with pytest.raises(GatewayError):
        configdir.load(folder)


@pytest.mark.parametrize("name", ["config.yaml", "keys.yaml"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BadConfig, match=f"{name} is missing"):
        configdir.load(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        configdir.load(tmp_path / "missing")


def test_the_size_of_all_files_together_is_limited(folder: Path) -> None:
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert configdir.load(folder, limit=size)
    with pytest.raises(BadRevision, match="too large"):
        configdir.load(folder, limit=size - 1)


# --- routers/index.yaml ---

GOOD = {"config.yaml": b"", "keys.yaml": b"", "routers/m.json": b"{}"}


@pytest.mark.parametrize(
    ("index", "kind", "line", "words"),
    [
        (f"models:\n  - {{file: m.json, sha256: {'ab' * 32}}}\n", BadRevision, 2, "not the file that the index means"),
        ("models: []\n", BadRevision, 1, "m.json is not listed"),
        ("", BadRevision, None, "m.json is not listed"),
        (
            f"models:\n  - {{file: m.json, sha256: {sha(b'{}')}}}\n  - {{file: n.json, sha256: {'ab' * 32}}}\n",
            BadRevision,
            3,
            "n.json is not there",
        ),
        (f"models:\n  - {{file: m.json, sha256: {sha(b'{}')}}}\nx: 1\n", BadConfig, 1, "not a list"),
        ("models: {}\n", BadConfig, 1, "not a list"),
        ("- m.json\n", BadConfig, 1, "not a list"),
        ("models:\n  - m.json\n", BadConfig, 2, "not an entry"),
        ("models:\n  - {file: m.json}\n", BadConfig, 2, "not an entry"),
        ("models:\n  - {file: m.json, sha256: " + "0" * 64 + "}\n", BadConfig, 2, "not an entry"),
        ("models:\n  - {file: m.json, sha256: x, load: evil.module}\n", BadConfig, 2, "not an entry"),
        ("models: !!python/object:os.system x\n", BadConfig, 1, "YAML tag"),
        ("models: [\n", BadConfig, 2, "not valid YAML"),
        ("models:\n  - {file: m.json, file: m.json}\n", BadConfig, 2, "twice"),
    ],
)
def test_a_wrong_index_is_named_with_its_line(
    index: str, kind: type[GatewayError], line: int | None, words: str
) -> None:
    problems = configdir.check({**GOOD, INDEX: index.encode()})
    assert problems
    assert problems[0].path == INDEX
    assert type(problems[0]) is kind
    assert words in problems[0].message
    assert problems[0].line == line


def test_a_file_that_is_listed_twice(folder: Path) -> None:
    line = f"  - {{file: m.json, sha256: {sha(b'{}')}}}\n"
    (problem,) = configdir.check({**GOOD, INDEX: f"models:\n{line}{line}".encode()})
    assert (problem.line, "twice" in problem.message) == (3, True)


def test_models_without_an_index() -> None:
    (problem,) = configdir.check(GOOD)
    assert "index.yaml is missing" in problem.message


def test_every_problem_is_reported() -> None:
    files = {"config.yaml": b"", "x": b"", "routers/a.pkl": b"", INDEX: b"models: [5]\n"}
    assert len(configdir.check(files)) >= 4
