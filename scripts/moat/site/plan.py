# SPDX-License-Identifier: Apache-2.0
"""``moat plan``: what installing a bundle would add, change and remove. It changes nothing.

The bundle's signature must hold; its files are not read (``moat load`` reads them all first).
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from moat.console import Console, human_bytes
from moat.errors import HostNotReady
from moat.manifest import FileEntry, Manifest
from moat.site.doctor import DEFAULT_DEPLOY_DIR
from moat.site.engine import PROJECT, Container, Engine, EngineError
from moat.site.inspect import table
from moat.site.load import to_load
from moat.site.state import read_installed_manifest
from moat.site.verify import add_trust_arguments, installed_of, keys_of, open_signed

NAME = "plan"
HELP = "show what installing a bundle would add, change and remove"

_COMPOSE: Final = "compose/"
#: Filled in, or the operator's own once they are there (moat.site.layout).
_NOT_COPIED: Final = ("config/", "nginx/upstream.conf", "nginx/site.conf", "moat-firewall.service")
#: Lines of the table that a person reads.
_MAX_ROWS: Final = 60


@dataclass(frozen=True)
class Change:
    """One component that differs. ``before`` or ``after`` is empty where it is not part; ``size`` in bytes."""

    action: str
    kind: str
    component: str
    before: str
    after: str
    size: int


@dataclass(frozen=True)
class Plan:
    """What would happen. ``restart`` names running services, ``start`` services that do not run yet."""

    load: tuple[str, ...]
    present: tuple[str, ...]
    unused: tuple[str, ...]
    load_bytes: int
    changes: tuple[Change, ...]
    deployment: tuple[tuple[str, str], ...]
    restart: tuple[str, ...]
    keep: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the bundle's folder on the medium")
    add_trust_arguments(parser)
    parser.add_argument(
        "--dir", type=Path, default=DEFAULT_DEPLOY_DIR, metavar="DIR", help="deployment folder; default %(default)s"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Compare and show."""
    signed = open_signed(args.path, keys_of(args, args.path, console), target=args.target, installed=installed_of(args))
    before = read_installed_manifest(args.state_dir)
    engine = Engine()
    try:
        ids, containers = engine.image_ids(), engine.containers()
    except EngineError as e:
        raise HostNotReady(
            "the container engine does not answer", found=str(e), hint="start it; `moat doctor` checks it"
        ) from e
    plan = make_plan(signed.manifest, before, ids, containers, deployment_changes(signed.manifest, args.dir))
    b = signed.manifest.bundle
    console.result(
        {
            "ok": True,
            "bundle": {"version": b.version, "profile": b.profile, "target": b.target},
            "installed": {k: getattr(before.bundle, k) for k in ("version", "profile", "target")} if before else None,
            **asdict(plan),
            "deployment": [{"action": action, "path": path} for action, path in plan.deployment],
        },
        _text(signed.manifest, before, plan),
    )
    return 0


def make_plan(
    after: Manifest,
    before: Manifest | None,
    ids: Mapping[str, str],
    containers: Iterable[Container],
    deployment: Iterable[tuple[str, str]],
) -> Plan:
    """Compare a bundle with what is installed and what runs.

    Args:
        after: the bundle's manifest.
        before: the installed one, if any.
        ids: the engine's image ids by reference.
        containers: those that run.
        deployment: (action, path) of the deployment folder's files.

    Raises:
        LoadFailed: a reference of the bundle is taken by another image.
    """
    lacking, there = to_load(after.images, dict(ids))
    sizes = {f.path: f.size for f in after.files}
    references = {i.reference for i in after.images}
    old = [i.reference for i in before.images] if before else []
    ours = [c for c in containers if c.project == PROJECT]
    return Plan(
        load=tuple(i.reference for i in lacking),
        present=tuple(i.reference for i in there),
        unused=tuple(sorted(r for r in set(old) - references if r in ids)),
        load_bytes=sum(sizes[i.archive] for i in lacking),
        changes=tuple(_changes(after, before)),
        deployment=tuple(deployment),
        restart=tuple(sorted(c.service for c in ours if c.image not in references)),
        keep=tuple(sorted(c.service for c in ours if c.image in references)),
    )


def _components(manifest: Manifest | None) -> dict[tuple[str, str], list[FileEntry]]:
    groups: dict[tuple[str, str], list[FileEntry]] = {}
    for f in manifest.files if manifest else ():
        groups.setdefault((f.kind, f.component), []).append(f)
    return groups


def _versions(files: Iterable[FileEntry]) -> str:
    return ", ".join(sorted({f.version for f in files}))


def _changes(after: Manifest, before: Manifest | None) -> Iterable[Change]:
    """Yield the components whose files differ; files that only moved do not count."""
    old, new = _components(before), _components(after)
    known = {f.sha256 for f in before.files} if before else set()
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, []), new.get(key, [])
        if sorted(f.sha256 for f in was) == sorted(f.sha256 for f in now):
            continue
        action = "add" if not was else "remove" if not now else "change"
        size = sum(f.size for f in now if f.sha256 not in known)
        yield Change(action, *key, _versions(was), _versions(now), size)


def deployment_changes(manifest: Manifest, folder: Path) -> list[tuple[str, str]]:
    """Return (``add`` or ``change``, path) for the Compose files that the deployment folder lacks or has otherwise.

    Only files that `moat prepare` copies as they are; those that it fills in (ports, certificate names) and the
    operator's own (configuration, keys, secrets, the nginx upstreams) are not ours to foretell.
    """
    found = []
    for f in manifest.files:
        name = f.path.removeprefix(_COMPOSE)
        if name == f.path or name.startswith(_NOT_COPIED):
            continue
        place = folder / name
        try:
            same = hashlib.sha256(place.read_bytes()).hexdigest() == f.sha256
        except OSError:
            found.append(("add", str(place)))
            continue
        if not same:
            found.append(("change", str(place)))
    return found


def _text(after: Manifest, before: Manifest | None, plan: Plan) -> str:
    lines = [
        f"bundle:    {after.bundle.name} (signature valid; files not read yet)",
        f"installed: {before.bundle.name if before else 'nothing'}",
        "",
        f"images to load: {len(plan.load)} ({human_bytes(plan.load_bytes)}); there already: {len(plan.present)}",
        *(f"  + {r}" for r in plan.load),
        *(f"  = {r}" for r in plan.present),
    ]
    if plan.unused:
        lines += ["images no longer used (kept until you remove them):", *(f"  - {r}" for r in plan.unused)]
    lines += ["", *_changes_text(plan.changes, first=before is None)] if plan.changes else []
    if plan.deployment:
        lines += ["", "deployment folder:", *(f"  {action} {path}" for action, path in plan.deployment)]
    lines += ["", f"services to restart: {', '.join(plan.restart) or 'none'}"]
    if plan.keep:
        lines.append(f"services that go on: {', '.join(plan.keep)}")
    elif not plan.restart:
        lines.append("no service runs: the installation starts all of them")
    return "\n".join(lines)


def _changes_text(changes: Sequence[Change], *, first: bool) -> list[str]:
    """Return the table of changes; of a first installation, where all is new, one line a kind."""
    if first:
        kinds: Counter[str] = Counter()
        for c in changes:
            kinds[c.kind] += c.size
        counts = Counter(c.kind for c in changes)
        rows = [("", "kind", "components", "size")]
        rows += [("add", kind, str(counts[kind]), human_bytes(size)) for kind, size in kinds.most_common()]
        return [table(rows, (2, 3))]
    rows6 = [("", "kind", "component", "installed", "bundle", "new bytes")]
    rows6 += [(c.action, c.kind, c.component, c.before, c.after, human_bytes(c.size)) for c in changes[:_MAX_ROWS]]
    more = [f"... and {len(changes) - _MAX_ROWS} more (--json shows all)"] if len(changes) > _MAX_ROWS else []
    return [table(rows6, (5,)), *more]
