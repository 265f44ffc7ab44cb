# SPDX-License-Identifier: Apache-2.0
"""Proves what `moat build` answers when it cannot start: nothing is left behind, and the next step is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.integration.build.building import ROOT

from moat.errors import BuildFailed, FetchFailed, LockFailed


def run(output: Path, *options: str, **env: str) -> tuple[int, dict[str, object]]:
    argv = [sys.executable, "-m", "moat", "build", "--profile", "demo", "-o", str(output), "--json", *options]
    full = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), **env}
    done = subprocess.run(argv, env=full, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout)


def test_an_empty_cache_names_the_command_that_fills_it(tmp_path: Path) -> None:
    code, said = run(tmp_path / "out", MOAT_CACHE=str(tmp_path / "cache"))
    assert code == FetchFailed.exit_code
    problem = said["problems"][0]  # type: ignore[index]
    assert "moat fetch --profile demo --target debian13-amd64" in problem["hint"]
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    code, said = run(tmp_path / "out", "--target", "debian12-arm64")
    assert code == LockFailed.exit_code
    problem = said["problems"][0]  # type: ignore[index]
    assert problem["expected"] == "debian13-amd64 or debian12-amd64"
    assert not (tmp_path / "out").exists()


def test_something_else_in_the_place_of_the_bundle_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "moat-0.1.0-demo-debian13-amd64"
    place.mkdir()
    (place / "notes.txt").write_text("mine", "utf-8")
    code, said = run(tmp_path)
    assert code == BuildFailed.exit_code
    assert "in the way" in said["problems"][0]["message"]  # type: ignore[index]
    assert (place / "notes.txt").read_text("utf-8") == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
