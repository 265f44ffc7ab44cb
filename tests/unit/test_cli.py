# SPDX-License-Identifier: Apache-2.0
"""Proves that a checkout without its tools' environment offers the site's commands and says where the others are.

The real program runs with no third-party package in reach (``-S``: no site-packages).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from moat.cli import SITE_COMMANDS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def bare(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    return subprocess.run(
        [sys.executable, "-S", "-m", "moat", *words], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def test_the_sites_commands_need_no_tools() -> None:
    shown = bare("--help")
    assert shown.returncode == 0, shown.stderr
    for name in SITE_COMMANDS:
        assert f"\n    {name}" in shown.stdout
    assert "run `make setup`" in shown.stdout
    assert bare("verify", "/nowhere").returncode not in (0, 1, 2)


def test_a_missing_build_command_is_wrong_usage_not_a_traceback() -> None:
    answer = bare("fetch")
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
