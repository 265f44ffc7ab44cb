# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway store``: the buckets of a store, their accounts, and their copy at another site."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from moat_gateway import settings, store, storeaccounts, storereplicas
from moat_gateway.cliout import print_json
from moat_gateway.errors import UnreadableSecret
from moat_gateway.settings import Settings

_ACTIONS = {
    "init": "make the buckets, the one of revisions with versions",
    "check": "see that the bucket of revisions is right",
    "accounts": "make buckets and accounts of a MinIO store",
    "replicate": "copy the revisions to another site's MinIO store; without --to show how that is",
    "promote": "make the copy of another site's revisions a store of its own",
}


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Add the actions to ``moat-gateway store``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "actions:\n" + "\n".join(f"  {name:<10} {text}" for name, text in _ACTIONS.items())
    parser.add_argument("action", choices=_ACTIONS)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--endpoint", dest="setting_store_endpoint", metavar="HOST:PORT", help="short for --store-endpoint"
    )
    parser.add_argument("--bucket", action="append", metavar="NAME", help="a bucket; with `accounts` repeat for more")
    secrets = parser.add_mutually_exclusive_group()
    secrets.add_argument(
        "--secrets",
        type=Path,
        metavar="DIR",
        help="accounts, replicate, promote: folder with store_root_user, store_writer_secret_key, ...",
    )
    secrets.add_argument("--secrets-stdin", action="store_true", help="the same as one JSON object on standard input")
    parser.add_argument("--prune", action="store_true", help="accounts: remove those of earlier keys")
    parser.add_argument(
        "--replica-of", metavar="SITE", help="accounts: this store only receives the revisions of that site"
    )
    parser.add_argument("--to", metavar="HOST:PORT", help="replicate: the other site's store")
    parser.add_argument("--to-bucket", metavar="NAME", help="replicate: the bucket there; default: the same name")
    parser.add_argument("--remove", action="store_true", help="replicate: end it")
    settings.add_options(parser, *(s.name for s in settings.SETTINGS if s.name.startswith("store_")))


def run(args: argparse.Namespace) -> int:
    """Carry out one action and return its exit code."""
    if args.action in ("accounts", "promote"):
        return _accounts(args)
    if args.bucket:
        args.setting_store_bucket = args.bucket[-1]
    values = _load(args)
    if args.action == "replicate":
        return _replicate(args, values)
    state = store.init(values) if args.action == "init" else store.check(values)
    reports_made = store.init_status(values) if args.action == "init" else False
    if args.json:
        return print_json({"ok": True, **asdict(state), "status_bucket": values.store_status_bucket})
    made = "made" if state.created else "was there"
    kept = "turned on" if state.versioning_enabled else "on"
    print(f"bucket {state.bucket} at {state.endpoint}: {made}, versioning {kept}")
    if args.action == "init":
        print(f"bucket {values.store_status_bucket}: {'made' if reports_made else 'was there'}")
    return 0


def _accounts(args: argparse.Namespace) -> int:
    values = _load(args)
    buckets = args.bucket or [values.store_bucket]
    if args.action == "promote":
        done = storeaccounts.promote(values, _secrets(args, values), buckets)
    else:
        folder = args.secrets or values.secrets_dir
        made = bool(args.replica_of) and not args.secrets_stdin and storeaccounts.make_replicator_keys(folder)
        secrets = _secrets(args, values)
        if args.replica_of and any(name not in secrets for name in storeaccounts.REPLICATOR_KEYS):
            raise UnreadableSecret(
                "the keys of the replication's account are not there",
                expected=" and ".join(storeaccounts.REPLICATOR_KEYS),
                hint="a receiving site needs them; with --secrets DIR they are made",
            )
        done = storeaccounts.apply(values, secrets, buckets, prune=args.prune, replica_of=args.replica_of)
        if made and not args.json:
            print(f"{folder}: {', '.join(storeaccounts.REPLICATOR_KEYS)} made; the main site needs them too")
    if args.json:
        return print_json({"ok": True, "exit": 0, "changed": bool(done.changes), **asdict(done), "problems": []})
    print(f"store {done.endpoint}: {'; '.join(done.changes) or 'buckets and accounts were right'}")
    return 0


def _replicate(args: argparse.Namespace, values: Settings) -> int:
    secrets = _secrets(args, values)
    if args.remove:
        done = storereplicas.remove(values, secrets)
    elif args.to:
        missing = [name for name in storeaccounts.REPLICATOR_KEYS if name not in secrets]
        if missing:
            raise UnreadableSecret(
                "the keys of the other site's replication account are not there",
                found="without " + ", ".join(missing),
                hint="make them there with `moat-gateway store accounts --replica-of SITE`, and bring both files here",
            )
        done = storereplicas.replicate(
            values, secrets, storereplicas.Target(args.to, args.to_bucket or values.store_bucket)
        )
    else:
        done = storereplicas.state(values, secrets)
    if args.json:
        return print_json({"ok": True, "exit": 0, "changed": bool(done.changes), **asdict(done), "problems": []})
    for change in done.changes:
        print(change)
    here = f"bucket {done.bucket} at {done.endpoint}"
    if not done.target:
        print(f"{here} is not copied anywhere")
        return 0
    print(f"{here} is copied to bucket {done.target_bucket} at {done.target}, {'online' if done.online else 'OFFLINE'}")
    if done.revision is not None:
        states = f"archive {done.archive.lower() or 'waits'}, pointer {done.pointer.lower() or 'waits'}"
        print(f"  revision {done.revision}: {states}")
    return 0


def _secrets(args: argparse.Namespace, values: Settings) -> dict[str, str]:
    if args.secrets_stdin:
        return storeaccounts.read_json(sys.stdin.read(1 << 16))
    return storeaccounts.read_folder(args.secrets or values.secrets_dir)


def _load(args: argparse.Namespace) -> Settings:
    return settings.load(os.environ, settings.overrides(args))[0]
