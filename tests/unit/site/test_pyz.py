# SPDX-License-Identifier: Apache-2.0
"""Proves that moat.pyz is the same bytes each time, and that it needs nothing but a bare Python of the distribution."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from tests.unit.site.bundles import HOST_PYTHON, make_bundle

from moat.build.pyz import build_pyz
from moat.cli import SITE_COMMANDS

#: Runs the zipapp's verify and doctor's parser inside one interpreter, then tells where every module came from.
PROBE = """
import json, runpy, sys, sysconfig
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    code = e.code
homes = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
files = {name: m.__file__ for name, m in sys.modules.items() if getattr(m, "__file__", None)}
print(json.dumps({"code": code, "homes": homes, "files": files, "path": sys.path}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pyz") / "moat.pyz"
    build_pyz(out, 1_760_000_000)
    return out


def test_two_builds_are_byte_identical(pyz: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)  # neither the caller's umask nor the time of day may show
    try:
        build_pyz(tmp_path / "again.pyz", 1_760_000_000)
    finally:
        os.umask(before)
    assert (tmp_path / "again.pyz").stat().st_mode == pyz.stat().st_mode
    assert (tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()
    build_pyz(tmp_path / "later.pyz", 1_760_086_400)
    assert (tmp_path / "later.pyz").read_bytes() != pyz.read_bytes(), "the date is that of the locks"


def test_it_holds_the_sites_half_only(pyz: Path) -> None:
    names = zipfile.ZipFile(pyz).namelist()
    assert "moat/site/verify.py" in names
    assert not [n for n in names if n.startswith(("moat/build", "moat/demo"))]
    assert [n for n in names if not n.endswith(".py")] == []
    assert names == sorted(names)


def test_it_is_executable_by_itself(pyz: Path) -> None:
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.access(pyz, os.X_OK)


def test_every_command_of_the_site_is_in_it(pyz: Path) -> None:
    done = subprocess.run([HOST_PYTHON, "-I", str(pyz), "--help"], capture_output=True, text=True, check=True)
    for name in SITE_COMMANDS:
        assert f"\n    {name} " in done.stdout, f"moat {name} is missing"
    assert "\n    lock " not in done.stdout


def test_a_bare_python_is_enough(pyz: Path, tmp_path: Path) -> None:
    """Isolated (-I), without site-packages (-S): every module comes from the standard library or the zipapp itself."""
    made = make_bundle(tmp_path / "bundle", tmp_path / "keys")
    argv = ["verify", str(made.path), "--key", str(made.public), "--state-dir", str(tmp_path / "none")]
    done = subprocess.run(
        [HOST_PYTHON, "-I", "-S", "-c", PROBE, str(pyz), *argv], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr, done.stdout
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["code"] == 0, done.stdout + done.stderr
    homes = tuple(f"{Path(h)}/" for h in told["homes"])
    foreign = {
        name: file
        for name, file in told["files"].items()
        if not file.startswith((f"{pyz}/", *homes)) or "-packages/" in file
    }
    assert foreign == {}
    assert any(file.startswith(f"{pyz}/") for file in told["files"].values()), "the probe saw the zipapp's modules"


def test_an_old_python_gets_a_sentence(pyz: Path) -> None:
    """The entry file is kept to old syntax; what an old Python reads of it is simulated by its version alone."""
    main = zipfile.ZipFile(pyz).read("__main__.py").decode()
    script = f"import sys\nsys.version_info = (3, 9, 2)\n{main}"
    done = subprocess.run([HOST_PYTHON, "-I", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs Python 3.11" in done.stderr
    assert "Traceback" not in done.stderr
