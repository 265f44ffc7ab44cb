# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway store``: the buckets of a store and their accounts."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from moat_gateway import settings, store, storeaccounts
from moat_gateway.cliout import print_json
from moat_gateway.settings import Settings


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Add the actions to ``moat-gateway store``."""
    parser.add_argument("action", choices=("init", "check", "accounts"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--endpoint", dest="setting_store_endpoint", help="short for --store-endpoint")
    parser.add_argument("--bucket", action="append", metavar="NAME", help="a bucket; with `accounts` repeat for more")
    secrets = parser.add_mutually_exclusive_group()
    secrets.add_argument(
        "--secrets",
        type=Path,
        metavar="DIR",
        help="accounts: folder with store_root_user, store_writer_secret_key, ...",
    )
    secrets.add_argument(
        "--secrets-stdin", action="store_true", help="accounts: the same as one JSON object on standard input"
    )
    parser.add_argument("--prune", action="store_true", help="accounts: remove those of earlier keys")
    settings.add_options(parser, *(s.name for s in settings.SETTINGS if s.name.startswith("store_")))


def run(args: argparse.Namespace) -> int:
    """Carry out one action and return its exit code."""
    if args.action == "accounts":
        return _accounts(args)
    if args.bucket:
        args.setting_store_bucket = args.bucket[-1]
    values = _load(args)
    state = store.init(values) if args.action == "init" else store.check(values)
    reports_made = store.init_status(values) if args.action == "init" else False
    if args.json:
        print_json({"ok": True, **asdict(state), "status_bucket": values.store_status_bucket})
    else:
        made = "made" if state.created else "was there"
        kept = "turned on" if state.versioning_enabled else "on"
        print(f"bucket {state.bucket} at {state.endpoint}: {made}, versioning {kept}")
        if args.action == "init":
            print(f"bucket {values.store_status_bucket}: {'made' if reports_made else 'was there'}")
    return 0


def _accounts(args: argparse.Namespace) -> int:
    values = _load(args)
    if args.secrets_stdin:
        secrets = storeaccounts.read_json(sys.stdin.read(1 << 16))
    else:
        secrets = storeaccounts.read_folder(args.secrets or values.secrets_dir)
    done = storeaccounts.apply(values, secrets, args.bucket or [values.store_bucket], prune=args.prune)
    if args.json:
        print_json({"ok": True, "exit": 0, "changed": bool(done.changes), **asdict(done), "problems": []})
    else:
        print(f"store {done.endpoint}: {'; '.join(done.changes) or 'buckets and accounts were right'}")
    return 0


def _load(args: argparse.Namespace) -> Settings:
    return settings.load(os.environ, settings.overrides(args))[0]
