# SPDX-License-Identifier: Apache-2.0
"""Proves what `moat gateway` brings into the container, and what it brings back: real folders, the engine left out.

The container itself is part of the acceptance tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moat.errors import GatewayFiles
from moat.site import gateway
from moat.site.gateway import Brought

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A folder of the operator's, closed to everybody else, as /root is."""
    folder = tmp_path / "host"
    (folder / "routers").mkdir(parents=True)
    (folder / "config.yaml").write_text("model_list: []\n")
    (folder / "config.yaml").chmod(0o600)
    (folder / "routers/index.yaml").write_text("models: []\n")
    folder.chmod(0o700)
    return folder


@pytest.fixture
def owners() -> dict[Path, int]:
    return {}


@pytest.fixture
def brought(tmp_path: Path, owners: dict[Path, int]) -> Brought:
    work = tmp_path / "work"
    work.mkdir()

    def chown(path: Path, uid: int, gid: int) -> None:
        assert uid == gid
        owners[path] = uid

    return Brought(work, tmp_path / "moat/config", chown)


def mounts(brought: Brought) -> dict[str, Path]:
    """Return the copies by their path in the container."""
    return {target: Path(source) for source, _, target in (m.partition(":") for m in brought.mounts())}


def test_a_named_folder_is_copied_to_the_same_path_for_the_containers_user(
    host: Path, brought: Brought, owners: dict[Path, int]
) -> None:
    assert brought.words([str(host)]) == [str(host)]
    copy = mounts(brought)[str(host)]
    assert (copy / "config.yaml").read_text() == "model_list: []\n"
    assert (copy / "routers/index.yaml").exists()
    assert {p for p, uid in owners.items() if uid == 10102} == {copy, *copy.rglob("*")}
    assert brought.back() == []
    assert (host / "config.yaml").stat().st_mode & 0o777 == 0o600


def test_words_that_are_no_paths_stay_and_the_configuration_folder_is_there_anyway(
    brought: Brought, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Path
) -> None:
    config = tmp_path / "moat/config"
    config.mkdir(parents=True)
    for word in ("config", "push", "--json", "config.yaml", "--message=a/b", str(config), f"{config}/keys.yaml", "1.5"):
        assert brought.words([word]) == [word]
    monkeypatch.chdir(config)
    assert brought.words(["."]) == [str(config)]
    assert brought.mounts() == []
    monkeypatch.chdir(host)
    words = brought.words(["../host/routers", "--config=./config.yaml", "x"])
    assert words == [str(host / "routers"), f"--config={host}/config.yaml", "x"]
    assert set(mounts(brought)) == {str(host / "routers"), str(host)}
    assert [p.name for p in mounts(brought)[str(host)].iterdir()] == ["config.yaml"]


def test_a_plain_name_of_a_folder_is_a_path_where_config_takes_one(
    host: Path, brought: Brought, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(host.parent)
    (host.parent / "7").mkdir()
    name = host.name
    assert brought.words(["config", "push", "--json", name]) == ["config", "push", "--json", str(host)]
    for words in (["config", "push", "-m", name], ["config", "diff", "7"], ["config", "rollback", name], ["ask", name]):
        assert brought.words(words) == words


def test_a_folder_that_is_not_there_is_named_as_it_was_typed(host: Path, brought: Brought) -> None:
    for action in ("validate", "push", "diff"):
        with pytest.raises(GatewayFiles, match=f"{host}/typo is not there"):
            brought.words(["config", action, "--json", f"{host}/typo"])
    for words in (["config", "init", f"{host}/new"], ["config", "push", "-m", f"{host}/said", str(host)]):
        assert brought.words(words) == words


def test_what_the_command_changed_or_made_is_brought_back_and_nothing_else(host: Path, brought: Brought) -> None:
    brought.words([str(host)])
    copy = mounts(brought)[str(host)]
    (copy / "keys.yaml").write_text("keys: []\n")
    (copy / "keys.yaml").chmod(0o640)
    (copy / "config.yaml").write_text("model_list: [1]\n")
    (copy / ".keys.yaml.lock").touch()
    before = (host / "routers/index.yaml").stat().st_mtime_ns
    assert sorted(brought.back()) == [host / "config.yaml", host / "keys.yaml"]
    assert (host / "keys.yaml").read_text() == "keys: []\n"
    assert (host / "keys.yaml").stat().st_uid == host.stat().st_uid
    assert (host / "config.yaml").read_text() == "model_list: [1]\n"
    assert sorted(p.name for p in host.iterdir()) == ["config.yaml", "keys.yaml", "routers"]
    assert (host / "routers/index.yaml").stat().st_mtime_ns == before


def test_a_single_file_can_be_replaced_too(host: Path, brought: Brought) -> None:
    """By a file beside it that is renamed, as the command does; the folder holds nothing else."""
    brought.words(["--keys=" + str(host / "config.yaml")])
    copy = mounts(brought)[str(host)]
    (copy / ".config.yaml.tmp").write_text("changed\n")
    (copy / ".config.yaml.tmp").replace(copy / "config.yaml")
    assert brought.back() == [host / "config.yaml"]
    assert (host / "config.yaml").read_text() == "changed\n"
    assert (host / "routers/index.yaml").exists()


def test_a_file_or_folder_that_is_to_be_made_comes_to_its_place(host: Path, brought: Brought) -> None:
    words = [str(host / "new.key"), str(host / "next")]
    assert brought.words(words) == words
    place = mounts(brought)[str(host)]
    (place / "new.key").write_text("secret\n")
    (place / "new.key").chmod(0o600)
    (place / "next").mkdir()
    (place / "next/config.yaml").write_text("x\n")
    assert brought.back() == [host / "new.key", host / "next/config.yaml"]
    assert (host / "new.key").stat().st_mode & 0o777 == 0o600


def test_a_file_of_a_folder_that_the_container_has_itself_is_seen_elsewhere(brought: Brought) -> None:
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        (word,) = brought.words([file.name])
        assert word == f"/host/0/{Path(file.name).name}"
        copy = mounts(brought)["/host/0"]
        assert [p.name for p in copy.iterdir()] == [Path(file.name).name]
        (copy / Path(file.name).name).write_text("changed")
        assert brought.back() == [Path(file.name)]


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_inside_of_a_folder_that_is_named_too_is_the_folders(host: Path, brought: Brought, order: int) -> None:
    words = [str(host), str(host / "config.yaml"), str(host / "routers"), str(host / "new.key")][::order]
    assert brought.words(words) == words
    assert set(mounts(brought)) == {str(host)}
    assert (mounts(brought)[str(host)] / "routers/index.yaml").exists()


def test_links_inside_a_folder_are_shown_to_the_command_not_followed(
    host: Path, brought: Brought, tmp_path: Path
) -> None:
    (tmp_path / "shadow").write_text("precious")
    (host / "keys.yaml").symlink_to(tmp_path / "shadow")
    brought.words([str(host)])
    copy = mounts(brought)[str(host)] / "keys.yaml"
    assert copy.is_symlink()
    copy.unlink()
    copy.symlink_to(tmp_path / "else")  # one that the command makes leads nowhere on this host either
    assert brought.back() == []
    assert (tmp_path / "shadow").read_text() == "precious"


def test_what_would_cover_the_container_or_is_none_of_its_business_is_refused(
    host: Path, brought: Brought, tmp_path: Path
) -> None:
    link, fifo = tmp_path / "link", host / "pipe"
    link.symlink_to(host)
    os.mkfifo(fifo)
    for path, words in (
        ("/", "would cover"), ("/etc", "would cover"), ("/tmp", "would cover"), ("/opt/..", "would cover"),
        ("/proc/self", "would cover|symbolic link"), (str(link), "symbolic link"), (str(host), "neither a file"),
    ):  # fmt: skip
        with pytest.raises(GatewayFiles) as refused:
            brought.words([path])
        assert re.search(words, f"{refused.value} {refused.value.found}"), path


def test_too_much_is_refused(host: Path, brought: Brought, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_MOST_FILES", 1)
    with pytest.raises(GatewayFiles, match="too much"):
        brought.words([str(host)])


@pytest.mark.parametrize(("options", "words"), [([], "is no deployment folder"), (["--instance", "a/b"], "--instance")])
def test_the_program_refuses_in_its_own_words(tmp_path: Path, options: list[str], words: str) -> None:
    if options:
        (tmp_path / "compose.yaml").touch()
    argv = [sys.executable, "-m", "moat", "gateway", "--dir", str(tmp_path), *options, "status", "--json"]
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, capture_output=True, text=True)
    assert done.returncode == 29, done.stderr
    assert words in done.stderr


def test_a_revision_names_the_person_unless_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def author(*words: str) -> list[str]:
        argv = gateway._argv(Path("/opt/moat"), "gateway-1", [], words)
        assert argv[argv.index("admin") + 1 :][:1] == [words[0]]
        return [w for w in argv if "author" in w or "@" in w]

    monkeypatch.setenv("SUDO_USER", "anna")
    assert author("config", "push", "/x")[0].startswith("--author=anna@")
    assert author("config", "push", "/x", "--author", "bert@x") == ["--author", "bert@x"]
    assert author("config", "status") == author("keys", "new", "push") == []
