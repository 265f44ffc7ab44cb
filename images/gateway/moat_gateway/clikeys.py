# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway keys``: make, list, rotate and revoke client keys; a secret is shown once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from moat_gateway import keyfile, keys, settings
from moat_gateway.cliout import print_json, say
from moat_gateway.errors import BadKeys


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Add the actions to ``moat-gateway keys``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--keys", "--file", dest="setting_keys", metavar="FILE", help="the keys file (MOAT_KEYS)")
    new = actions.add_parser("new", parents=[shared], help="make a key; its secret is shown once")
    new.add_argument("id_positional", nargs="?", metavar="ID", help="id of the key in logs")
    new.add_argument("--id", dest="id_option", help="the same as an option")
    new.add_argument("--team", required=True, help="id of its team")
    new.add_argument(
        "--create-team", action="store_true", help="make the team if it is not there (with --models, or all)"
    )
    new.add_argument("--models", help="model names it may use, with commas; default: the team's")
    new.add_argument("--not-after", metavar="DATE", help="last day (2027-06-30), or a time with its zone")
    new.add_argument("--out", type=Path, metavar="FILE", help="write the secret there (mode 0600) instead of stdout")
    rotate = actions.add_parser(
        "rotate", parents=[shared], help="give a key a new secret; the old one counts for a while"
    )
    rotate.add_argument("id", metavar="ID")
    rotate.add_argument(
        "--overlap", default="24h", metavar="TIME", help="how long the old secret counts: 24h, 30m, 7d, 0 (default 24h)"
    )
    rotate.add_argument("--not-after", metavar="DATE", help="end of the new secret; default: the one that the key had")
    rotate.add_argument("--out", type=Path, metavar="FILE", help="write the secret there (mode 0600) instead of stdout")
    listing = actions.add_parser("list", parents=[shared], help="list teams and keys")
    listing.add_argument("--json", action="store_true", help="one JSON object on stdout")
    revoke = actions.add_parser(
        "revoke", parents=[shared], help="remove a key, and the old secrets that `keys rotate` left of it"
    )
    revoke.add_argument("id", metavar="ID")


def run(args: argparse.Namespace) -> int:
    """Carry out one action and return its exit code."""
    path = settings.load(os.environ, settings.overrides(args))[0].keys
    if args.action == "new":
        return _new(args, path)
    if args.action == "rotate":
        return _rotate(args, path)
    if args.action == "revoke":
        old = keyfile.revoke(path, args.id)
        too = f", together with {', '.join(old)}" if old else ""
        say(f"{args.id} is revoked in {path}{too}: with the next push, or within a second where this file is read")
        return 0
    now = keys.read(path)
    if args.json:
        print_json(
            {
                "ok": True,
                "teams": [asdict(t) for t in now.teams.values()],
                "keys": [{"id": k.id, "team": k.team, "models": k.models, "not_after": _moment(k)} for k in now.keys],
            }
        )
        return 0
    for t in now.teams.values():
        print(f"team {t.id}: models {', '.join(t.models)}")
    for k in now.keys:
        models = ", ".join(k.models or ("of the team",))
        print(f"key  {k.id}: team {k.team}, models {models}, ends {_moment(k) or 'never'}")
    return 0


def _new(args: argparse.Namespace, path: Path) -> int:
    key_id = args.id_option or args.id_positional
    if not key_id or (args.id_option and args.id_positional):
        raise BadKeys("the key needs one id", expected="moat-gateway keys new ID --team TEAM")
    names = [m.strip() for m in args.models.split(",") if m.strip()] if args.models else None

    def make(secret: str) -> None:
        keyfile.new_key(
            path, key_id, args.team, models=names, not_after=args.not_after, create_team=args.create_team, secret=secret
        )

    _hand_over(args.out, make)
    say(f"{key_id} is in {path}; this is the only time that its secret is shown")
    return 0


def _rotate(args: argparse.Namespace, path: Path) -> int:
    done: list[keyfile.Rotated] = []
    overlap = keyfile.parse_overlap(args.overlap)
    _hand_over(
        args.out,
        lambda secret: done.append(keyfile.rotate(path, args.id, overlap, not_after=args.not_after, secret=secret)),
    )
    say(f"{args.id} has a new secret in {path}; this is the only time that it is shown")
    say(f"the old one counts until {done[0].old_ends:%Y-%m-%dT%H:%M:%SZ}, as {done[0].old_id}")
    return 0


def _hand_over(place: Path | None, make: Callable[[str], None]) -> None:
    """Make a secret and show it once: on stdout, or in a new file, which must be writable before anything is made."""
    secret = keys.new_secret()
    out = _open_new(place) if place else None
    try:
        make(secret)
    except BaseException:
        if out is not None and place is not None:
            os.close(out)
            place.unlink(missing_ok=True)
        raise
    if out is None:
        print(secret)
    else:
        with os.fdopen(out, "w", encoding="ascii") as f:
            f.write(secret + "\n")


def _open_new(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as e:
        raise BadKeys("the secret cannot be written", found=e.strerror or str(e), path=str(path)) from e


def _moment(key: keys.Key) -> str | None:
    return key.not_after.isoformat().replace("+00:00", "Z") if key.not_after is not None else None
