# SPDX-License-Identifier: Apache-2.0
"""The page on locks names every rule, variable and option that the code has."""

from __future__ import annotations

import argparse
import re

from moat.build import fetch, lock
from moat.build.locks import ROOT

PAGE = (ROOT / "docs" / "locks-and-policy.md").read_text("utf-8")
CODE = {p.name: p.read_text("utf-8") for p in (ROOT / "scripts" / "moat" / "build").glob("*.py")}


def test_every_rule_that_can_refuse_is_explained() -> None:
    rules = set(re.findall(r'f?"rule ([a-z-]+):', CODE["policy.py"]))
    assert len(rules) == 5
    for rule in rules:
        assert f"| `{rule}` |" in PAGE, rule


def test_every_variable_is_named() -> None:
    for module in ("mirrors.py", "cache.py", "locks.py"):
        for name in re.findall(r'"((?:MOAT|UV|PIP)_[A-Z_]+)"', CODE[module]):
            if name not in ("PIP_CERT", "PIP_CONFIG_FILE"):
                assert name in PAGE, name


def test_every_option_of_lock_is_named() -> None:
    for module in (lock, fetch):
        parser = argparse.ArgumentParser(add_help=False)
        module.add_arguments(parser)
        for action in parser._actions:
            if action.option_strings[0] not in ("--jobs", "--target"):
                assert action.option_strings[0] in PAGE, action.option_strings
