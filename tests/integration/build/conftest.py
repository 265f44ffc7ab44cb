# SPDX-License-Identifier: Apache-2.0
"""A built demo bundle, and the ways to look into it that share no code with the builder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moat.build.cache import Cache
from moat.build.locks import Locks, active_locks

ROOT = Path(__file__).resolve().parents[3]
TARGET = "debian13-amd64"


def moat_build(output: Path, *, checkout: Path = ROOT, env: dict[str, str] | None = None) -> Path:
    """Run ``moat build`` and return the bundle's folder."""
    argv = [sys.executable, "-m", "moat", "build", "--profile", "demo", "--target", TARGET, "-o", str(output), "--json"]
    full = {**os.environ, "PYTHONPATH": str(checkout / "scripts"), **(env or {})}
    done = subprocess.run(argv, env=full, capture_output=True, text=True, cwd=output.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["network"]["interfaces"] in ([], ["lo"])
    return Path(result["bundle"])


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in ``$MOAT_TEST_BUNDLE``, or a demo bundle built from the cache (seconds when it is warm)."""
    given = os.environ.get("MOAT_TEST_BUNDLE")
    return Path(given) if given else moat_build(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def cache() -> Cache:
    return Cache()


@pytest.fixture(scope="session")
def locks(cache: Cache) -> Locks:
    return active_locks("demo", TARGET, cache_root=cache.root)
