# SPDX-License-Identifier: Apache-2.0
"""Proves that docs/verify.md shows what really happens: each of its console blocks is run, and its output compared.

A block names its scenario in a comment above it. Keys, ids, times and sizes differ from run to run and are masked.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.site.attacker import WITHOUT_KEY, flip
from tests.unit.site.bundles import CREATED, HOST_PYTHON, ROOT, Made, make_bundle

from moat.build.keys import new_keys
from moat.build.pyz import build_pyz
from moat.errors import all_kinds

PAGE = (ROOT / "docs" / "verify.md").read_text("utf-8")
BLOCKS = re.findall(r"<!-- test: ([a-z-]+) -->\n```console\n(.*?)```", PAGE, re.DOTALL)


def _files(made: Made) -> None:
    (made.path / "README.txt").write_bytes((made.path / "README.txt").read_bytes() + b"x\n")
    (made.path / "wheels/a-1.0-py3-none-any.whl").unlink()
    (made.path / "setup.sh").write_bytes(b"e\n")


def _older(made: Made) -> None:
    record = {"version": "0.2.0", "profile": "demo", "target": "debian13-amd64", "manifest_sha256": "0" * 64}
    (made.keys / "state").mkdir()
    (made.keys / "state/installed.json").write_text(json.dumps({**record, "created": CREATED}))


def _symlink(made: Made) -> None:
    next(a for a in WITHOUT_KEY if a.name == "a symlink to the same bytes").do(made, random.Random(0))


#: What is done to the bundle before the block is run.
SCENARIOS: dict[str, Callable[[Made], None]] = {
    "clean": lambda made: None,
    "minisign": lambda made: None,
    "bad-signature": lambda made: flip(made.path / "manifest.json", 50, 1),
    "unknown-key": lambda made: None,
    "files": _files,
    "unsafe-path": _symlink,
    "bad-manifest": lambda made: None,
    "wrong-target": lambda made: None,
    "older": _older,
    "unreadable": lambda made: None,
}


def masked(text: str) -> str:
    text = re.sub(r"RW[A-Za-z0-9+/]{54}", "RW...", text)
    text = re.sub(r"\b[0-9A-F]{16}\b", "KEYID", text)
    return re.sub(r"[0-9.]+ KiB, key RW... in [0-9.]+ s", "SIZE, key RW... in TIME", text)


@pytest.mark.parametrize(("scenario", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_page_shows_what_happens(scenario: str, block: str, tmp_path: Path) -> None:
    if scenario == "minisign" and shutil.which("minisign") is None:
        pytest.skip("minisign is not installed")
    work = tmp_path / "work"
    usb = tmp_path / "usb"
    usb.mkdir()
    made = make_bundle(usb / "moat-0.1.0-demo-debian13-amd64", work)
    new_keys(tmp_path / "other", None)
    shutil.copy(tmp_path / "other/moat.pub", work / "other.pub")
    build_pyz(work / "moat.pyz", CREATED)
    (work / "python3").symlink_to(HOST_PYTHON)
    SCENARIOS[scenario](made)
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    expected = [line for line in block.splitlines() if not line.startswith("$ ")]
    if scenario == "older":
        assert "--state-dir" in commands[0]
    else:
        commands = [c + " --state-dir none" if " verify " in c else c for c in commands]
    script = "\n".join(commands).replace("/tmp/", f"{work}/").replace("/media/usb", str(usb))
    env = {**os.environ, "KEY": made.public.read_text().splitlines()[1], "PATH": f"{work}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert masked(done.stdout.replace(str(usb), "/media/usb")).splitlines() == masked("\n".join(expected)).splitlines()
    code = {k.kind: k.exit_code for k in all_kinds()} | {"clean": 0, "minisign": 0, "files": 5}
    assert done.returncode == code[scenario]


def test_every_scenario_is_on_the_page() -> None:
    assert {name for name, _ in BLOCKS} == set(SCENARIOS)


def test_every_kind_of_a_medium_has_its_section() -> None:
    kinds = {k.kind: k.exit_code for k in all_kinds() if k.exit_code < 20}
    headings = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
    shown = {word: int(code) for line in headings for code, word in re.findall(r"(\d+) ([a-z-]+)", line)}
    assert shown == kinds


def test_the_commands_alone_find_what_they_claim_to_find(tmp_path: Path) -> None:
    """The last command must name an extra file, a link and a hard link: a check that cannot fail is none."""
    (block,) = (b for name, b in BLOCKS if name == "minisign")
    made = make_bundle(tmp_path / "b", tmp_path / "keys")
    (made.path / "evil").write_bytes(b"x")
    (made.path / "link").symlink_to("evil")
    os.link(made.path / "README.txt", tmp_path / "second")
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")][2:]
    script = "\n".join(commands).replace("/tmp/", f"{tmp_path}/")
    done = subprocess.run(["bash", "-c", script], cwd=made.path, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()[1:]) == ["./README.txt", "./link", "evil", "link"]


def test_the_doctors_page_names_every_check(tmp_path: Path) -> None:
    """The table of checks, and the sample output, hold the names that doctor really yields."""
    from moat.site.doctor import examine
    from moat.site.engine import Engine

    ports = {"--https-port": 8443, "--http-port": 8080}
    yielded = {c.name.split(" /")[0] for c in examine(None, Engine(("/nonexistent/docker",)), tmp_path, ports)}
    page = (ROOT / "docs" / "doctor-plan-load.md").read_text("utf-8")
    sample = {re.split(r" {2,}| /", line)[1] for line in page.splitlines() if re.match(r"(ok|NOT OK)  ", line)}
    assert sample == yielded
    section = page.partition("## Doctor")[2].partition("## Plan")[0]
    table = {m for m in re.findall(r"^\| ([a-z ]+) \| [a-zA-Z0-9`].* \| .* \|$", section, re.MULTILINE) if m != "check"}
    assert table == {name if not name.startswith("port ") else "port" for name in yielded}
