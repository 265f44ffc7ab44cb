# SPDX-License-Identifier: Apache-2.0
"""Proves that log lines are JSON with fixed fields, and that secrets and (later) library messages are not in them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moat_gateway.context import RequestContext, current
from moat_gateway.keys import Identity
from moat_gateway.logs import LibraryHandler, Log

PACKAGE = Path(__file__).resolve().parents[3] / "images/gateway"


class Kept(Log):
    def __init__(self, **more: Any) -> None:
        self.raw: list[bytes] = []
        super().__init__(self.raw.append, **more)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.raw]


def test_the_fixed_fields_and_the_request() -> None:
    log = Kept()
    log.event("start.begin", pid=1)
    context = RequestContext("r1", "a" * 32, "b" * 16, Identity("physics", "k", "0" * 64, None, ("*",)))
    token = current.set(context)
    log.event("start.begin")
    current.reset(token)
    first, second = log.lines
    assert list(first)[:7] == ["ts", "level", "event", "trace_id", "span_id", "request_id", "team"]
    assert first["request_id"] is None
    assert first["ts"].endswith("Z")
    assert (second["request_id"], second["trace_id"], second["span_id"], second["team"]) == (
        "r1", "a" * 32, "b" * 16, "physics",
    )  # fmt: skip


def test_an_undocumented_event_is_a_defect() -> None:
    with pytest.raises(KeyError, match="not documented"):
        Kept().event("made.up")


def test_secrets_are_replaced_wherever_they_are() -> None:
    log = Kept()
    log.hide(["canary-secret", "short"])
    log.event("library.log", message='x canary-secret "y"', names=["canary-secret"], deep={"a": ["canary-secret"]})
    log.event("library.log", message="key sk-moat-ABCDEFGHIJKLMNOP and Authorization: Bearer abcdefgh.ijkl")
    text = b"".join(log.raw).decode()
    assert "canary-secret" not in text
    assert "ABCDEFGH" not in text
    assert "abcdefgh" not in text
    assert text.count("[redacted]") == 5


def test_levels() -> None:
    log = Kept(level="warning")
    log.event("start.begin", "info")
    log.event("start.begin", "error")
    assert [line["level"] for line in log.lines] == ["error"]


@pytest.mark.parametrize("serving", [False, True])
def test_a_library_is_quoted_before_requests_are_served_and_only_located_later(serving: bool) -> None:
    log = Kept()
    log.serving = serving
    logger = logging.Logger("lib")
    logger.addHandler(LibraryHandler(log))
    try:
        raise ValueError("prompt canary in an exception")
    except ValueError:
        logger.exception("prompt canary %s", "in a message")
    text = log.raw[0].decode()
    assert ("canary" in text) is not serving
    assert log.lines[0]["error"] == "ValueError"
    assert log.lines[0]["where"].startswith("test_logs:")


def test_stdout_is_taken_over_completely(tmp_path: Path) -> None:
    program = tmp_path / "p.py"
    program.write_text(
        "import os, sys, logging, warnings\n"
        "from moat_gateway.logs import capture_everything\n"
        "log = capture_everything('debug')\n"
        "print('plain print\\x1b[31m red\\x1b[0m'); print('partial', end=''); print(' line')\n"
        "sys.stderr.write('to stderr\\n')\n"
        "os.write(1, b'native write\\n')\n"
        "logging.getLogger('lib').warning('a warning')\n"
        "warnings.warn('python warning')\n"
        "print('\\u00e9\\udce9')\n"
        "log.serving = True\n"
        "print('prompt canary')\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], env={"PYTHONPATH": str(PACKAGE)}, capture_output=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    texts = [line.get("text") or line.get("message") for line in lines]
    assert texts[:4] == ["plain print red", "partial line", "to stderr", "a warning"]
    assert "python warning" in str(texts[4])
    assert lines[-1]["chars"] == len("prompt canary")
    assert b"canary" not in done.stdout
    assert b"native write" in done.stderr
