# SPDX-License-Identifier: Apache-2.0
"""Proves what install.sh and moat-site do before they touch a host: usage, refusals, and that shellcheck likes them.

Installations by them, on fresh hosts, interrupted, from damaged media, are the Molecule scenarios' matter.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INSTALL, SITE = ROOT / "ansible/install.sh", ROOT / "ansible/moat-site"
PAGE = ROOT / "docs/install.md"


def run(script: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(script), *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", [INSTALL, SITE], ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [INSTALL, SITE], ids=lambda p: p.name)
def test_it_is_plain_posix_shell(script: Path) -> None:
    dash = shutil.which("dash")
    if dash is None:
        pytest.skip("needs dash, Debian's sh")
    assert script.read_text("utf-8").startswith("#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n")
    assert subprocess.run([dash, "-n", str(script)], capture_output=True).returncode == 0


def test_both_give_a_variable_its_type_in_the_same_way() -> None:
    """Each stands alone: the medium is gone when moat-site runs. integration/ansible/test_extra_vars.py runs both."""
    found = [
        re.findall(r"^# typed ARGUMENT:.*?^}$", s.read_text("utf-8"), re.MULTILINE | re.DOTALL) for s in (INSTALL, SITE)
    ]
    assert len(found[0]) == 1
    assert found[0] == found[1]


@pytest.mark.parametrize("script", [INSTALL, SITE], ids=lambda p: p.name)
def test_a_file_of_variables_with_comments_alone_is_not_given_to_ansible(script: Path, tmp_path: Path) -> None:
    """Which refuses it. The one that install.sh writes is such a file."""
    function = re.findall(r"^holds_vars\(\) .*$", script.read_text("utf-8"), re.MULTILINE)
    assert len(function) == 1
    for text, holds in {
        "": False, "# a\n\n": False, "---\n  # a\n": False, "--- # a\n": False,
        "a: 1\n": True, "# a\n{}\n": True, "--- {a: 1}\n": True, "# a\n  a: 1": True,
    }.items():  # fmt: skip
        (tmp_path / "vars.yml").write_text(text)
        done = subprocess.run(["sh", "-c", f'{function[0]}\nholds_vars "$1"', "sh", str(tmp_path / "vars.yml")])
        assert (done.returncode == 0) is holds, text


def test_help_names_every_option_that_is_parsed_and_documented() -> None:
    shown = run(INSTALL, "--help")
    assert shown.returncode == 0
    assert shown.stderr == ""
    parsed = set(re.findall(r"(--[a-z-]+)", INSTALL.read_text("utf-8").split("while [ $# -gt 0 ]")[1].split("done")[0]))
    for option in parsed - {"--extra-vars"}:
        assert f"  {option}" in shown.stdout, option
    for option in parsed - {"--extra-vars", "--help"}:
        assert f"`{option}" in PAGE.read_text("utf-8"), option


@pytest.mark.parametrize(
    "argv",
    [["--frobnicate"], ["--key"], ["--key", ""], ["-e", "a=1\nb=2"], ["--vars", "a\nb"], ["site"]],
    ids=lambda a: " ".join(a).replace("\n", "|"),
)
def test_wrong_usage_is_refused_with_code_2_before_anything_is_looked_at(argv: list[str]) -> None:
    done = run(INSTALL, *argv)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "do:       sh install.sh --help" in done.stderr
    assert "Phase 1" not in done.stdout


def test_outside_of_a_bundle_it_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "with blank" / "install.sh"
    copy.parent.mkdir()
    shutil.copy(INSTALL, copy)
    done = run(copy, "--check")
    assert done.returncode == 9
    assert str(copy.parent) in done.stderr
    assert [p.name for p in copy.parent.iterdir()] == ["install.sh"]


def test_every_code_that_it_ends_with_is_on_the_page() -> None:
    codes = {int(c) for s in (INSTALL, SITE) for c in re.findall(r"\brefuse (\d+) ", s.read_text("utf-8"))}
    table = PAGE.read_text("utf-8").split("| code |")[1].split("\n\n")[0]
    assert codes == {2, 9, 20, 28, 130}
    for code in codes - {9}:  # in a row of several codes
        assert re.search(rf"^\| {code} \|", table, re.MULTILINE), code


def test_moat_site_without_a_release_says_what_to_do() -> None:
    if Path("/opt/moat/current").exists():
        pytest.skip("a release is installed on this host")
    done = run(SITE)
    assert done.returncode == 28
    assert "install.sh" in done.stderr
