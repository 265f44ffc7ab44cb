# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway config``: init, validate, push, status, diff, rollback, history, forget.

With ``--json`` there is one object on stdout; a table that is kept up to date goes to stderr then.
"""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moat_gateway import (
    checks,
    configdir,
    configviews,
    fleetview,
    publish,
    revision,
    revstore,
    settings,
    sitekey,
    starter,
)
from moat_gateway.cliout import count, plain, print_json, say
from moat_gateway.configviews import load, look
from moat_gateway.errors import GatewayError, NotConverged, StoreFailed
from moat_gateway.fleet import Lag
from moat_gateway.prepared import Prepared
from moat_gateway.publish import Base, Published, Wanted
from moat_gateway.revstore import Store
from moat_gateway.settings import Settings
from moat_gateway.sync.files import object_bytes, replace

_WAIT, _WAIT_MAX = 30.0, 86400  # seconds
_STORE = (
    *(s.name for s in settings.SETTINGS if s.name.startswith("store_")),
    "source_dir",
    "site_keys_dir",
    "revision_max",
)
_CHECKS = ("secrets_dir", "egress_allow", "dry_run_timeout", "dry_run_memory")
_HERE = ("sync_dir", "reports_dir", "node")


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Add the actions to ``moat-gateway config``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, run_: Callable[[argparse.Namespace], int], text: str, *names: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(config_run=run_)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        settings.add_options(sub, *names)
        return sub

    init = action("init", _init, "Make a folder to start from; with --key-out a site key too.", "egress_allow")
    init.add_argument("folder", metavar="DIR", type=Path)
    init.add_argument("--key-out", type=Path, metavar="FILE", help="new secret site key; its public half is FILE.pub")

    validate = action("validate", _validate, "Check a folder as `push` does, without publishing it.", *_CHECKS)
    validate.add_argument("folder", metavar="DIR", type=Path)

    push = action("push", _push, "Check a folder, sign it, and make it the revision in force.",
                  *_STORE, *_CHECKS, "site_key_file")  # fmt: skip
    push.add_argument("folder", metavar="DIR", type=Path, nargs="?")
    push.add_argument(
        "--signed-from", type=Path, metavar="DIR", help="take over a signed revision from a folder of revisions instead"
    )
    push.add_argument("--revision", type=int, metavar="N", help="its number, if the store is older than its nodes")
    push.add_argument("--force", action="store_true", help="a new revision even if the content is in force already")
    push.add_argument("--record", type=Path, metavar="FILE", help="note its number and content there as JSON")
    push.set_defaults(usage_error=push.error)
    _publishing(push)

    rollback = action("rollback", _rollback, "Make the content of an earlier revision a new one.",
                      *_STORE, *_CHECKS, "site_key_file")  # fmt: skip
    rollback.add_argument("number", metavar="N", type=int)
    _publishing(rollback)

    status = action(
        "status", configviews.status, "Show what the store holds and what each gateway serves.", *_STORE, *_HERE
    )
    status.add_argument("--watch", action="store_true", help="keep showing it until Ctrl-C")

    diff = action("diff", configviews.diff, "Show what the last push changed, or a push would change.",
                  *_STORE)  # fmt: skip
    diff.add_argument("old", metavar="A", nargs="?", help="a number, or a folder; default: the one before")
    diff.add_argument("new", metavar="B", nargs="?", help="a number, or a folder; default: the one in force")

    history = action("history", configviews.history, "List the revisions in the store, newest first.", *_STORE)
    history.add_argument("--limit", type=int, default=20, metavar="N", help="how many (default 20; 0 for all)")

    forget = action("forget", configviews.forget, "Forget a node that is gone for good.", *_STORE)
    forget.add_argument("node_name", metavar="NODE")


def _publishing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--message", "-m", default="", help="why; shown by `history`")
    parser.add_argument("--author", help="who; default: user@host")
    parser.add_argument(
        "--wait",
        nargs="?",
        type=_seconds,
        const=_WAIT,
        metavar="S",
        help=f"wait until every gateway serves it, at most so many seconds (default {_WAIT:g})",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _WAIT_MAX:  # false for NaN as well
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to {_WAIT_MAX} (DIR goes in front)")
    return value


def run(args: argparse.Namespace) -> int:
    """Carry out one action and return its exit code."""
    code: int = args.config_run(args)
    return code


# --- init, validate ---


def _init(args: argparse.Namespace) -> int:
    values = load(args)
    key = None
    if args.key_out is not None:
        key = sitekey.SigningKey.generate()
        public = args.key_out.with_name(args.key_out.name + sitekey.PUBLIC_SUFFIX)
        key.write(args.key_out, public)
    names = starter.write(args.folder, values)
    if args.json:
        made = {"secret": str(args.key_out), "public": str(public), "id": key.public.key_id} if key else None
        return print_json({"ok": True, "exit": 0, "folder": str(args.folder), "files": list(names), "site_key": made})
    print(f"{args.folder}: {', '.join(names)}")
    if key is not None:
        print(
            f"{args.key_out}: secret site key {key.public.key_id}; keep it where revisions are signed, and a copy safe"
        )
        print(f"{public}: its public half; copy it into the folder of site keys here and on every node")
    print(f"next: edit the files, then `moat-gateway config validate {args.folder}`")
    return 0


def _validate(args: argparse.Namespace) -> int:
    values = load(args)
    files = configdir.load(args.folder)
    ready, problems = _check(files, values)
    if ready is None:
        return _refuse(args, problems, args.folder)
    summary = _summary(ready, files)
    if args.json:
        return print_json({"ok": True, "exit": 0, **summary, "problems": []})
    print(f"{args.folder} is right: {_in_words(summary)}")
    return 0


def _check(files: Mapping[str, bytes], values: Settings) -> tuple[Prepared | None, list[GatewayError]]:
    from moat_gateway.dryrun import DryRun

    dry_run = DryRun(values, cold=True)
    try:
        return checks.check(files, values, dry_run=dry_run)
    finally:
        dry_run.close()


def _summary(ready: Prepared, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "models": list(ready.models),
        "deployments": len(ready.deployments),
        "secrets": sorted(ready.references),
        "keys": len(ready.keys["keys"]),
        "teams": len(ready.keys["teams"]),
        "files": {path: len(data) for path, data in sorted(files.items())},
        "content": revision.content_sha256(files),
    }


def _in_words(summary: Mapping[str, Any]) -> str:
    return (
        f"{count(len(summary['models']), 'model')}, {count(summary['deployments'], 'deployment')}, "
        f"{count(len(summary['secrets']), 'secret')}, {count(summary['keys'], 'key')} of "
        f"{count(summary['teams'], 'team')}, {count(len(summary['files']), 'file')}"
    )


def _refuse(args: argparse.Namespace, problems: Sequence[GatewayError], folder: Path | str) -> int:
    code = problems[0].exit_code
    if args.json:
        print_json({"ok": False, "exit": code, "problems": [checks.problem(p) for p in problems]})
    for p in problems:
        say(f"moat-gateway: refused ({p.kind}): {p.one_line()}")
    say(f"{count(len(problems), 'problem')} in {folder}; nothing was changed")
    return code


# --- push, rollback ---


def _push(args: argparse.Namespace) -> int:
    if (args.folder is None) == (args.signed_from is None):
        args.usage_error("give a folder DIR, or --signed-from DIR, and not both")
    values = load(args)
    store = revstore.open_store(values)
    # Before the folder is read and checked, which takes seconds: who pushes meanwhile is not to be overwritten unseen.
    base = _base(store)
    if args.signed_from is not None:
        return _carry(args, values, store, base)
    files = configdir.load(args.folder)
    ready, problems = _check(files, values)
    if ready is None:
        return _refuse(args, problems, args.folder)
    wanted = Wanted(files, _author(args), args.message, args.revision, args.force, base=base)
    return _publish(args, values, wanted, ready, store)


def _note(path: Path, done: Published) -> None:
    try:
        replace(path, object_bytes({"revision": done.revision, "content": done.content}), durable=True)
    except OSError as e:
        # It is in force: this is no refusal.
        say(f"moat-gateway: {path}: what was published is not noted: {e.strerror}")


def _base(store: Store) -> Base | None:
    try:
        return publish.base(store)
    except StoreFailed:
        return None  # what is wrong with the folder is said all the same; the store is asked again then


def _carry(args: argparse.Namespace, values: Settings, store: Store, base: Base | None) -> int:
    from moat_gateway.dirstore import DirectoryStore

    trusted, limit = sitekey.read_trusted(values.site_keys_dir), values.revision_max << 20
    source = DirectoryStore(args.signed_from, limit=limit)
    if args.revision is not None:
        archive = source.get(args.revision)
    else:
        pointer = source.pointer()
        assert pointer is not None  # noqa: S101 - asked without an etag
        archive = source.fetch(pointer, limit)
    brought = revision.open_archive(archive, trusted, limit=limit)
    ready, problems = _check(brought.files, values)
    if ready is None:
        return _refuse(args, problems, f"revision {brought.number} of {args.signed_from}")
    done = publish.carry(store, archive, trusted=trusted, limit=limit, author=_author(args), base=base)
    return _published(args, values, store, done, _summary(ready, brought.files))


def _rollback(args: argparse.Namespace) -> int:
    values = load(args)
    store = revstore.open_store(values)
    base = publish.base(store)
    trusted, limit = sitekey.read_trusted(values.site_keys_dir), values.revision_max << 20
    old = publish.stored(store, args.number, trusted, limit)
    ready, problems = _check(old.files, values)
    if ready is None:
        return _refuse(args, problems, f"revision {args.number}")
    message = args.message or f"back to the content of revision {args.number}"
    wanted = Wanted(old.files, _author(args), message, content_of=args.number, base=base)
    return _publish(args, values, wanted, ready, store)


def _publish(args: argparse.Namespace, values: Settings, wanted: Wanted, ready: Prepared, store: Store) -> int:
    trusted, limit = sitekey.read_trusted(values.site_keys_dir), values.revision_max << 20
    key = sitekey.SigningKey.read(values.site_key_file)
    done = publish.push(store, wanted, key=key, trusted=trusted, limit=limit)
    return _published(args, values, store, done, _summary(ready, wanted.files))


def _published(
    args: argparse.Namespace, values: Settings, store: Store, done: Published, summary: Mapping[str, Any]
) -> int:
    if not args.json:
        if done.changed:
            before = f" (before: revision {done.previous})" if done.previous else ""
            print(
                f"revision {done.revision} is in force in {store.describe()}{before}: {_in_words(summary)}", flush=True
            )
        else:
            print(
                f"revision {done.revision} has this content already; nothing was changed (--force makes a new one)",
                flush=True,
            )
    for note in done.notes:
        say(f"moat-gateway: {note}")
    if getattr(args, "record", None) is not None:
        _note(args.record, done)
    value = {"ok": True, "exit": 0, **asdict(done), **summary, "where": store.describe(), "problems": []}
    if args.wait is None:
        return print_json(value) if args.json else 0
    out = sys.stderr if args.json else sys.stdout
    state, lags, took = fleetview.wait(lambda: look(store), done.revision, done.sha256, args.wait, out)
    value |= {
        "converged": not lags and bool(state.gateways),
        "seconds": round(took, 3),
        "gateways": plain(state.gateways),
    }
    value["lagging"] = [{**asdict(x), "name": x.name} for x in lags]
    if value["converged"]:
        if args.json:
            return print_json(value)
        print(f"all {count(len(state.gateways), 'gateway')} serve revision {done.revision} after {took:.1f} s")
        return 0
    error = _not_converged(done.revision, lags, args.wait)
    if args.json:
        print_json({**value, "ok": False, "exit": error.exit_code, "problems": [error.to_dict()]})
    say(f"moat-gateway: refused ({error.kind}): {error.one_line()}")
    return error.exit_code


def _not_converged(number: int, lags: Sequence[Lag], seconds: float) -> NotConverged:
    if not lags:
        return NotConverged(
            f"revision {number} is in force, and no gateway reports what it serves",
            found="no report of a node",
            hint="see that `moat-gateway sync` runs on the nodes and that they reach the store",
        )
    return NotConverged(
        f"revision {number} is in force, and not every gateway serves it after {seconds:g} s",
        found="; ".join(f"{x.name}: {x.why}" for x in lags),
        hint="follow it with `moat-gateway config status --watch`; a node that is gone for good: "
        "`moat-gateway config forget NODE`",
    )


def _author(args: argparse.Namespace) -> str:
    if args.author:
        return str(args.author)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
