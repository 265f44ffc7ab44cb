# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway config``: init, validate, push, status, diff, rollback, history."""

from __future__ import annotations

import argparse

from moat_gateway import settings


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Add the actions to ``moat-gateway config``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    init = actions.add_parser("init", help="make a folder to start from, and a site key if there is none")
    init.add_argument("folder", metavar="DIR")
    settings.add_options(init)


def run(args: argparse.Namespace) -> int:
    """Carry out one action and return its exit code."""
    raise NotImplementedError(args.action)
