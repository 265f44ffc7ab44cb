# SPDX-License-Identifier: Apache-2.0
"""Proves what the modules share: files are written whole or not at all, and Ansible packs it beside each of them."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.ansible.modules import LIBRARY, module

CONFIG = LIBRARY.parent / "ansible.cfg"
MODULES = sorted(p.stem for p in LIBRARY.glob("*.py"))
write = module("moat_files").write


def test_a_file_is_replaced_with_the_mode_and_owner_that_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    path.chmod(0o644)
    write(path, b"after", 0o640, (os.getuid(), os.getgid()))
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write(path, b"again", 0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_run_left_is_taken_away_and_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / ".file.tmp").symlink_to(theirs)
    write(tmp_path / "file", b"ours", 0o600)
    assert theirs.read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours"
    assert not os.path.lexists(tmp_path / ".file.tmp")


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError, match="directory"):
        write(folder, b"ours", 0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert folder.is_dir()


def test_each_module_runs_with_nothing_but_the_configuration_that_the_bundle_ships(tmp_path: Path) -> None:
    """Each is packed, sent and started as on a host; it then refuses what it is asked."""
    tasks = [{"name": m, m: {"no_such_option": 1}, "ignore_errors": True} for m in MODULES]
    (tmp_path / "play.yml").write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    argv = [sys.executable, "-I", "-m", "ansible", "playbook", "-i", "localhost,", "-c", "local"]
    done = subprocess.run(
        [*argv, str(tmp_path / "play.yml")],
        env={
            "PATH": os.environ["PATH"], "ANSIBLE_CONFIG": str(CONFIG), "ANSIBLE_HOME": str(tmp_path / "home"),
            "LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in MODULES:
        answer = done.stdout.split(f"TASK [{name}] ")[1].split("...ignoring")[0]
        assert re.search(r"msg: .*(missing|Unsupported parameters)", answer), answer
