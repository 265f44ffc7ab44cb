# SPDX-License-Identifier: Apache-2.0
"""Proves that every command in a bundle's README.txt is one that moat.pyz understands."""

from __future__ import annotations

import re
import shlex

import pytest

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
    assert [c.split()[0] for c in COMMANDS][:4] == ["verify", "doctor", "plan", "load"]


def test_it_fits_a_terminal_and_names_the_bundle() -> None:
    assert TEXT.startswith("moat-0.1.0-site-debian13-amd64\n====")
    assert max(len(line) for line in TEXT.splitlines()) <= 120
