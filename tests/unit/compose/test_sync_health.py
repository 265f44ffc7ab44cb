# SPDX-License-Identifier: Apache-2.0
"""Proves that config-sync's health check tells when the source last answered, and why it is not healthy, in one line.

The real program is run, with the interpreter's options of compose.yaml, on files such as config-sync writes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "compose/health/sync.py"
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def state(age: float, **changed: Any) -> dict[str, Any]:
    source = {"kind": "s3", "where": "minio:9000", "reachable": True, "why": None}
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return {"boot_id": BOOT, "checked_boottime": now - age, "source": source, "revision": 7, **changed}


def ask(folder: Path, content: str | None) -> tuple[int, str]:
    file = folder / "sync.json"
    if content is not None:
        file.write_text(content, "utf-8")
    done = subprocess.run([sys.executable, "-IS", PROGRAM, file], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    return done.returncode, done.stdout


def test_an_answer_of_just_now_is_healthy(tmp_path: Path) -> None:
    code, line = ask(tmp_path, json.dumps(state(0.3)))
    assert (code, line.partition(";")[2].strip()) == (0, "revision 7")
    assert line.startswith("healthy: minio:9000 answered ")
    assert ask(tmp_path, json.dumps(state(0.3, revision=0)))[1].endswith("; no revision yet\n")


def test_a_long_interval_is_allowed_for(tmp_path: Path) -> None:
    assert ask(tmp_path, json.dumps(state(100)))[0] == 1
    assert ask(tmp_path, json.dumps(state(100, interval=60)))[0] == 0
    assert ask(tmp_path, json.dumps(state(200, interval=60)))[0] == 1


def test_a_long_trial_is_no_lost_source(tmp_path: Path) -> None:
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    trial = {"trial": {"revision": 8, "since_boottime": now - 90}}
    code, line = ask(tmp_path, json.dumps(state(90, **trial, told_boottime=now - 1)))
    assert (code, line) == (0, "healthy: trying revision 8 for 90 s; revision 7\n")
    # Nobody tries anything where nobody writes the file.
    assert "no answer of minio:9000 for" in unhealthy(tmp_path, json.dumps(state(90, **trial, told_boottime=now - 30)))
    assert "cannot be read" in unhealthy(tmp_path, json.dumps(state(90, trial=7, told_boottime=now)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not there: config-sync has not begun"),
        ("", "cannot be read"), ("[]", "cannot be read"), ("{}", "KeyError"), ("{", "JSONDecodeError"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_its_state_is_unhealthy(tmp_path: Path, content: str | None, words: str) -> None:
    assert words in unhealthy(tmp_path, content)


# The state is made in the test: its times are of the moment of asking, not of the collection a minute before.
@pytest.mark.parametrize(
    ("age", "changed", "words"),
    [
        (60, {}, "no answer of minio:9000 for "),
        (-600, {}, "no answer of minio:9000"),
        (1, {"boot_id": "of an earlier start of the host"}, "since the start"),
        (1, {"checked_boottime": None}, "since the start"),
        (60, {"source": {"where": "minio:9000", "why": "refused\nby all"}}, "(refused by all)"),
    ],
)
def test_a_source_that_does_not_answer_is_unhealthy(
    tmp_path: Path, age: float, changed: dict[str, Any], words: str
) -> None:
    assert words in unhealthy(tmp_path, json.dumps(state(age, **changed)))


def unhealthy(folder: Path, content: str | None) -> str:
    code, line = ask(folder, content)
    assert (code, line.startswith("unhealthy: ")) == (1, True)
    return line
