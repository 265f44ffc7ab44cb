# SPDX-License-Identifier: Apache-2.0
"""Proves that every command in a bundle's README.txt is one that moat.pyz understands."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from moat.build.definitions import read_components
from moat.build.locks import ROOT
from moat.build.readme import readme_text
from moat.cli import SITE_COMMANDS, _parser
from moat.manifest import BundleInfo

TEXT = readme_text(BundleInfo("0.1.0", "site", "debian13-amd64", 1))
COMMANDS = re.findall(r"^ +python3 -I moat\.pyz (.+)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_is_understood(command: str) -> None:
    args = _parser().parse_args(shlex.split(command))
    assert args.command in SITE_COMMANDS


def test_the_order_is_the_order_of_trust() -> None:
    assert [c.split()[0] for c in COMMANDS] == [
        *("verify", "doctor", "plan", "load", "prepare", "firewall", "doctor", "egress")
    ]
    # The installation by one command comes before the one in containers, and its trial before the real one.
    order = ["moat.pyz verify", "install.sh --key KEY --check\n", "install.sh --key KEY\n", "docker compose"]
    assert sorted(order, key=TEXT.index) == order


def test_the_installer_is_started_so_that_no_mount_option_stops_it() -> None:
    commands = re.findall(r"^ +(\S+) install\.sh", TEXT, re.MULTILINE)
    assert commands == ["sh", "sh"], "the executable bit is lost on FAT, and noexec forbids it elsewhere"


def test_every_option_of_the_installer_is_one_that_it_knows() -> None:
    script = ROOT / "ansible" / "install.sh"
    told = subprocess.run(["sh", str(script), "--help"], capture_output=True, text=True, check=True).stdout
    (install,) = re.findall(r"^2\. Install.*?^3\. ", TEXT, re.MULTILINE | re.DOTALL)
    options = set(re.findall(r"(?<= )--(?:key|check|inventory)\b", install))
    assert options == {"--key", "--check", "--inventory"}
    assert options <= set(re.findall(r"^  (--[a-z]+)", told, re.MULTILINE))


@pytest.mark.parametrize(("target", "client"), [("debian13-amd64", True), ("debian12-amd64", False)])
def test_docker_is_installed_by_the_names_of_the_targets_own_packages(target: str, client: bool) -> None:
    text = readme_text(BundleInfo("0.1.0", "site", target, 1))
    (names,) = re.findall(r"apt-get install --no-install-recommends (.+)$", text, re.MULTILINE)
    hosts = next(s for s in read_components().debian if s.use == "host" and s.target == target)
    assert set(names.split()) <= {*hosts.packages, *hosts.newer}
    assert ("docker-cli" in names.split()) == client


def test_it_fits_a_terminal_and_names_the_bundle() -> None:
    assert TEXT.startswith("moat-0.1.0-site-debian13-amd64\n====")
    assert max(len(line) for line in TEXT.splitlines()) <= 120
