# SPDX-License-Identifier: Apache-2.0
"""Runs the real ``moat build``, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TARGET = "debian13-amd64"


def moat_build(
    output: Path,
    *,
    checkout: Path = ROOT,
    env: dict[str, str] | None = None,
    profile: str = "demo",
    target: str = TARGET,
) -> Path:
    """Run ``moat build`` and return the bundle's folder."""
    argv = [
        sys.executable,
        "-m",
        "moat",
        "build",
        "--profile",
        profile,
        "--target",
        target,
        "-o",
        str(output),
        "--json",
    ]
    full = {**os.environ, "PYTHONPATH": str(checkout / "scripts"), **(env or {})}
    done = subprocess.run(argv, env=full, capture_output=True, text=True, cwd=output.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["network"]["interfaces"] in ([], ["lo"])
    return Path(result["bundle"])
