# SPDX-License-Identifier: Apache-2.0
"""Proves that the helper of the upgrade tests gives a copy of the checkout another version, everywhere, or stops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.releases import VERSIONED, copy_tracked, set_version

from moat import __version__
from moat.build.locks import ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("the checkout is not a git repository")
    folder = tmp_path_factory.mktemp("checkout")
    copy_tracked(folder, committed=False)
    return folder


def test_a_copy_gets_another_version_and_the_checkout_keeps_its_own(checkout: Path) -> None:
    set_version(checkout, "7.8.9")
    env = {**os.environ, "PYTHONPATH": str(checkout / "scripts")}
    said = subprocess.run([sys.executable, "-m", "moat", "--version"], env=env, capture_output=True, text=True, cwd="/")
    assert said.stdout == "moat 7.8.9\n", said.stderr
    assert 'version = "7.8.9"' in (checkout / "images/gateway/pyproject.toml").read_text("utf-8")
    for name in VERSIONED:
        assert __version__ in (ROOT / name).read_text("utf-8")
        assert f'"{__version__}"' not in (checkout / name).read_text("utf-8")
    assert not (checkout / ".git").exists()
    assert not (checkout / ".moat").exists(), "what is not tracked stays behind, keys above all"


def test_versions_that_differ_are_not_papered_over(checkout: Path) -> None:
    path = checkout / "images/gateway/pyproject.toml"
    path.write_text(path.read_text("utf-8").replace('version = "', 'version = "1'), "utf-8")
    with pytest.raises(ValueError, match="versions differ"):
        set_version(checkout, "7.8.9")
