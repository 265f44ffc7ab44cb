# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway config status|diff|history|forget``: what is in force, what changed, and who serves it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moat_gateway import configdiff, configdir, fleet, fleetview, publish, revision, revstore, settings, sitekey
from moat_gateway.cliout import plain, print_json, table
from moat_gateway.errors import BadRevision, BadSignature, GatewayError
from moat_gateway.fleet import Fleet
from moat_gateway.revstore import NoRevision, Pointer, Store
from moat_gateway.settings import Settings
from moat_gateway.sitekey import PublicKey

_NOTHING: tuple[str, Mapping[str, bytes]] = ("nothing", {})  # what the first revision follows
_OF_MANIFEST = ("created_at", "author", "message", "content_of", "content", "previous")


def load(args: argparse.Namespace) -> Settings:
    """Return the settings in force for a command."""
    return settings.load(os.environ, settings.overrides(args))[0]


def _opened(values: Settings) -> tuple[Store, tuple[PublicKey, ...], int]:
    """Return the store, the keys that may sign, and the limit of an archive in bytes."""
    return revstore.open_store(values), sitekey.read_trusted(values.site_keys_dir), values.revision_max << 20


def look(store: Store) -> Fleet:
    """Return what the nodes reported to the store."""
    return fleet.from_reports(store.reports())


# --- status ---


def status(args: argparse.Namespace) -> int:
    """Show what the store holds and what each gateway serves."""
    values = load(args)
    store = revstore.open_store(values)
    live = fleetview.Live(sys.stdout) if args.watch and sys.stdout.isatty() and not args.json else None
    while True:
        value, lines = _status_once(store, values)
        if args.json:
            print_json(value)
        elif live is not None:
            live.update(lines)
        else:
            print("\n".join(lines), flush=True)
        if not args.watch:
            return 0
        time.sleep(1.0)


def _status_once(store: Store, values: Settings) -> tuple[dict[str, Any], list[str]]:
    pointer: Pointer | None = None
    why: GatewayError | None = None
    reachable, state = True, Fleet()
    try:
        pointer = store.pointer()
    except NoRevision:
        pass
    except BadRevision as e:
        why = e
    except GatewayError as e:
        reachable, why = False, e
    if reachable:
        try:
            state = look(store)
        except GatewayError as e:
            why = why or e
    here = False
    if not state.nodes:
        state, here = fleet.from_here(values), True
        if not reachable and not state.nodes and why is not None:
            raise why
    number = pointer.revision if pointer else None
    lags = fleet.lagging(state, number) if number else ()
    held: dict[str, Any] = {"kind": store.kind, "where": store.describe(), "reachable": reachable}
    held |= {"why": why.one_line() if why else None, "revision": number}
    held |= {n: getattr(pointer, n) if pointer else None for n in ("pushed_at", "author", "size", "sha256")}
    value = {
        "ok": True,
        "exit": 0,
        "store": held,
        "this_node_only": here,
        "converged": bool(number) and bool(state.gateways) and not lags,
        "gateways": plain(state.gateways),
        "nodes": plain(state.nodes),
        "lagging": [{**asdict(x), "name": x.name} for x in lags],
    }
    return value, _status_lines(store, pointer, reachable, why, state, here)


def _status_lines(
    store: Store, pointer: Pointer | None, reachable: bool, why: GatewayError | None, state: Fleet, here: bool
) -> list[str]:
    if pointer is not None:
        lines = [f"{store.describe()}: revision {pointer.revision}, pushed {pointer.pushed_at} by {pointer.author}"]
    elif reachable and why is None:
        lines = [f"{store.describe()}: no revision yet"]
    else:
        lines = [f"{store.describe()}: " + ("answers" if reachable else "NOT REACHED")]
    if why is not None:
        lines.append(f"  {why.one_line()}")
    if here and state.nodes:
        lines.append("what this node alone knows:")
    if state.nodes:
        lines += ["", *fleetview.table(state, pointer.revision if pointer else None)]
        lines += ["", *notes] if (notes := fleetview.notes(state)) else []
    else:
        lines.append("no node has reported what it serves")
    return lines


# --- diff, history, forget ---


def diff(args: argparse.Namespace) -> int:
    """Show what changes between two contents."""
    values = load(args)
    store, trusted, limit = _opened(values)

    def side(text: str) -> tuple[str, Mapping[str, bytes]]:
        if text.isdecimal():
            return f"revision-{text}", publish.stored(store, int(text), trusted, limit).files
        return text.rstrip("/"), configdir.load(Path(text))

    if args.old is not None and args.new is not None:
        (old_name, old), (new_name, new) = side(args.old), side(args.new)
    else:
        before, current = _in_force(store, trusted, limit, folder=args.old is not None and not args.old.isdecimal())
        if args.old is None:
            (old_name, old), (new_name, new) = side(str(before)) if before else _NOTHING, current
        elif args.old.isdecimal():
            (old_name, old), (new_name, new) = side(args.old), current
        else:
            (old_name, old), (new_name, new) = current, side(args.old)
    changes = configdiff.compare(old, new, old_name, new_name)
    if args.json:
        return print_json(
            {"ok": True, "exit": 0, "old": old_name, "new": new_name, "files": plain(changes), "same": not changes}
        )
    for change in changes:
        print(change.diff, end="")
    if not changes:
        print(f"{old_name} and {new_name} have the same content")
    return 0


def _in_force(
    store: Store, trusted: Sequence[PublicKey], limit: int, *, folder: bool
) -> tuple[int, tuple[str, Mapping[str, bytes]]]:
    """Return the number before the one in force, and that one with its name; a folder may be compared with nothing."""
    try:
        _pointer, now = publish.current(store, trusted, limit)
    except NoRevision:
        if not folder:
            raise
        return 0, _NOTHING
    return now.previous, (f"revision-{now.number}", now.files)


def history(args: argparse.Namespace) -> int:
    """List the revisions in the store, newest first."""
    values = load(args)
    store, trusted, limit = _opened(values)
    try:
        pointer = store.pointer()
    except (NoRevision, BadRevision):
        pointer = None
    stored = sorted(store.list(), key=lambda s: s.number, reverse=True)
    rows: list[dict[str, Any]] = []
    # The revisions that were in force follow each other; what lies between them is of pushes that died or lost.
    chain: int | None = pointer.revision if pointer else 0
    for entry in stored[: args.limit] if args.limit > 0 else stored:
        if chain is not None and entry.number < chain:
            chain = None  # that one is not here: a revision was brought from elsewhere
        row: dict[str, Any] = dict.fromkeys(_OF_MANIFEST)
        row |= {"revision": entry.number, "size": entry.size, "stored_at": _moment(entry.modified)}
        row |= {"signed_by": None, "problem": None, "current": pointer is not None and entry.number == pointer.revision}
        row["in_force"] = None if chain is None else entry.number == chain
        try:
            opened = revision.open_archive(store.get(entry.number), trusted, limit=limit)
        except (BadSignature, BadRevision) as e:
            row["problem"] = f"{e.message}: {e.found}" if e.found else e.message
            chain = None if row["in_force"] else chain
        else:
            row |= {name: getattr(opened, name) for name in _OF_MANIFEST}
            row["signed_by"] = opened.key_id
            chain = opened.previous if row["in_force"] else chain
        rows.append(row)
    if args.json:
        return print_json({"ok": True, "exit": 0, "where": store.describe(), "total": len(stored), "revisions": rows})
    if not rows:
        print(f"{store.describe()}: no revision yet")
        return 0
    print("\n".join(_history_lines(rows)))
    if len(rows) < len(stored):
        print(f"and {len(stored) - len(rows)} older ones (--limit 0 shows all)")
    return 0


def _history_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [("REVISION", "WHEN", "AUTHOR", "SIGNED", "WHY")]
    for r in rows:
        if r["problem"] is not None:
            signed, why = "NO", str(r["problem"])
        else:
            signed = str(r["signed_by"])
            why = " ".join(str(r["message"]).split())
            why += f" [content of {r['content_of']}]" if r["content_of"] is not None else ""
            why += " [never in force]" if r["in_force"] is False else ""
        mark = "*" if r["current"] else " "
        when, who = r["created_at"] or r["stored_at"], r["author"] or "?"
        cells.append((f"{mark} {r['revision']}", when, who, signed, why.strip()))
    return table(cells)


def forget(args: argparse.Namespace) -> int:
    """Remove what a node reported."""
    values = load(args)
    if not revstore.is_node_name(args.node_name):
        raise BadRevision(f"{args.node_name!r} cannot be the name of a node", expected="a name that `status` shows")
    there = revstore.open_store(values).forget(args.node_name)
    if args.json:
        return print_json({"ok": True, "exit": 0, "node": args.node_name, "forgotten": there})
    print(f"{args.node_name} is forgotten" if there else f"{args.node_name} had not reported anything")
    return 0


def _moment(seconds: float) -> str:
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return "?"
