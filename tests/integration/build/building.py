# SPDX-License-Identifier: Apache-2.0
"""Runs the real ``moat build``, as a user does."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[3]
TARGET = "debian13-amd64"
#: What a bundle is built of.
PARTS = ("scripts", "images", "bundles", "ansible", "compose", "docs", "LICENSE", "pyproject.toml")


@dataclass(frozen=True)
class Built:
    """A demo bundle and the checkout that it was built of, both to be read only."""

    checkout: Path
    bundle: Path


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


def copy_checkout(source: Path, target: Path) -> Path:
    """Copy what a bundle is built of; somebody may be changing the checkout itself."""
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in PARTS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=ignore)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
    return target


def build_demo(folder: Path) -> None:
    """Copy the checkout to ``checkout`` and build a demo bundle of it in ``bundles``."""
    copy_checkout(ROOT, folder / "checkout")
    (folder / "bundles").mkdir()
    moat_build(folder / "bundles", checkout=folder / "checkout")


@contextmanager
def shared(place: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make a folder once for all processes of a test run; the last one that uses it removes it.

    pytest would keep those of three runs, 750 MB each.
    """
    with place.with_name(place.name + ".users").open("a+") as users:
        with _counted(users, +1) as number:
            if number == 1:
                shutil.rmtree(place, ignore_errors=True)  # what a failed attempt has left
                place.mkdir()
                make(place)
        try:
            yield place
        finally:
            with _counted(users, -1) as number:
                if number == 0:
                    shutil.rmtree(place)


@contextmanager
def _counted(users: TextIO, change: int) -> Iterator[int]:
    """Change the number of users, alone with the folder; not if the block fails."""
    fcntl.flock(users, fcntl.LOCK_EX)
    try:
        users.seek(0)
        number = int(users.read() or 0) + change
        yield number
        users.truncate(0)
        users.write(str(number))
        users.flush()
    finally:
        fcntl.flock(users, fcntl.LOCK_UN)
