# SPDX-License-Identifier: Apache-2.0
"""``moat lock``: resolve every input of a bundle into ``bundles/locks/``, under ``bundles/policy.yaml``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import httpx
from packaging.requirements import Requirement

from moat.build import debian, deblicenses, gomodules, hub, wheels
from moat.build.cache import Cache
from moat.build.definitions import Components, read_components
from moat.build.downloads import Download, Downloader, names
from moat.build.lockdiff import changes, render
from moat.build.locks import (
    IMAGE_TARGET,
    TARGETS,
    LockedFile,
    Target,
    debs_lock_name,
    locks_dir,
    read_lock,
    write_index,
    write_lock,
)
from moat.build.mirrors import apt_proxy, debian_mirrors, http_client, python_index
from moat.build.policy import Policy, read_policy
from moat.console import Console
from moat.errors import LockFailed, LockStale

NAME = "lock"
HELP = "Resolve every input of a bundle into bundles/locks/ (needs the network)."
KINDS = ("wheels", "debs", "go", "files")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--only", choices=KINDS, help="resolve this kind of input alone")
    parser.add_argument(
        "--upgrade", action="store_true", help="wheels: take the newest that the rules allow (default: keep what fits)"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 32 if the committed locks would change"
    )


@dataclass(frozen=True)
class Context:
    """What every kind of resolution needs.

    Attributes:
        components: the definitions.
        policy: the rules.
        cache: where downloads go.
        console: for the person who watches.
        client: HTTP.
        now: the moment of the lock.
        upgrade: do not prefer the wheels that are locked now.
    """

    components: Components
    policy: Policy
    cache: Cache
    console: Console
    client: httpx.Client
    now: datetime
    upgrade: bool = False

    def download(self, downloads: list[Download], label: str, client: httpx.Client | None = None) -> None:
        """Have files in the cache.

        Raises:
            LockFailed: the index names a file that no place has.
        """
        gone = Downloader(self.cache, client or self.client, self.console).all(downloads, label)
        if gone:
            raise LockFailed(
                "the index names files that are not there", found=names(gone), hint="run `moat lock` again later"
            )


def lock_wheels(context: Context) -> list[LockedFile]:
    """Resolve, download and judge the wheels.

    Raises:
        LockFailed: something cannot be resolved.
        PolicyRefused: a rule refuses one.
    """
    url = python_index()
    index = wheels.Index(url, context.client)
    chosen: list[wheels.Choice] = []
    path = locks_dir() / "wheels.jsonl"
    old = read_lock(path) if path.is_file() and not context.upgrade else []
    for s in context.components.wheels:
        # Where the index tells upload times the resolver takes the newest releases that are old enough; the rule is
        # checked again on what it took.
        told = any(f.uploaded for f in index.files(Requirement(s.requirements[0]).name))
        before = context.policy.newest_allowed(context.now) if told else {}
        # What another set has locked is taken too where it fits: one file on the medium instead of two.
        own = [e for e in old if set(s.uses) & set(e.uses)]
        kept = own + [e for e in old if e.name not in {o.name for o in own}]
        pinned = wheels.compile_requirements(
            s, url, context.cache.root / "uv", context.console, before=before, prefer=kept
        )
        choices = wheels.choose(pinned, s.uses, index, context.policy)
        context.console.info(f"{s.name}: {len(pinned)} packages, {len(choices)} wheels")
        chosen += choices
    chosen = wheels.merged(chosen)
    untold = [c.file.filename for c in chosen if c.file.uploaded is None]
    if untold:
        context.console.warn(f"the index tells no upload time, so the minimum age is not checked: {', '.join(untold)}")
    for c in chosen:  # before anything is downloaded
        context.policy.check_age(c.pinned.name, c.pinned.version, c.file.filename, c.file.uploaded, context.now)
    wanted = [Download(c.file.filename, c.file.sha256, c.file.size, (c.file.url,)) for c in chosen]
    context.download(wanted, "wheels")
    entries = [wheels.locked(c, context.cache.path(c.file.sha256), context.policy, context.now) for c in chosen]
    context.policy.check_licenses(entries)
    return sorted(entries)


def lock_debs(context: Context, target: Target, images: list[LockedFile] | None = None) -> list[LockedFile]:
    """Resolve, download and judge a target's Debian packages.

    Args:
        context: what every resolution needs.
        target: whose packages.
        images: the lock of the images' release, which another target's ``newer`` are taken from; ``None`` is the
            one in the folder of the locks.

    Raises:
        LockFailed: something cannot be resolved, or a signature does not hold.
        PolicyRefused: a rule refuses one.
    """
    mirrors = debian_mirrors()
    apt = debian.AptRoot(context.cache.root / "apt", target, mirrors, context.console)
    apt.update()
    entries = debian.resolve(apt, context.components.debian, target, context.console)
    wanted = [Download(e.filename, e.sha256, e.size, debian.urls(e, mirrors)) for e in entries]
    with http_client(proxy=apt_proxy("http")) as client:
        context.download(wanted, "Debian packages", client)
    entries += _newer(context, apt, target, images)
    for e in entries:
        context.policy.check_denied(e.kind, e.name, e.version, e.filename)
    entries = deblicenses.fill_in(entries, context.cache, context.policy)
    context.policy.check_licenses(entries)
    return sorted(entries)


def _newer(context: Context, apt: debian.AptRoot, target: Target, images: list[LockedFile] | None) -> list[LockedFile]:
    """Return the packages that a target takes from the images' release, each tried on the target's base."""
    wanted = {name: s.use for s in context.components.debian if s.target == target.name for name in s.newer}
    if not wanted:
        return []
    lock = images if images is not None else read_lock(locks_dir() / debs_lock_name(IMAGE_TARGET))
    found = [e for e in lock if e.name in wanted]
    if missing := sorted(set(wanted) - {e.name for e in found}):
        raise LockFailed(
            f"{', '.join(missing)}: not among the packages of {IMAGE_TARGET.name}",
            hint=f"name it for {IMAGE_TARGET.name} too, or not under `newer` (bundles/components.yaml)",
        )
    mirrors = debian_mirrors()
    places = [Download(e.filename, e.sha256, e.size, debian.urls(e, mirrors)) for e in found]
    with http_client(proxy=apt_proxy("http")) as client:
        context.download(places, f"packages of {IMAGE_TARGET.suite}", client)
    for e in found:
        apt.check_installs(e.filename, context.cache.require(e), base=apt.base())
        context.console.info(f"{wanted[e.name]}: {e.name} {e.version} of {IMAGE_TARGET.suite}")
    return [replace(e, uses=(wanted[e.name],)) for e in found]


def lock_go(context: Context) -> list[LockedFile]:
    """Resolve, download and judge the modules of every Go program.

    Raises:
        LockFailed: something cannot be resolved, or a sum does not hold.
        PolicyRefused: a rule refuses one.
    """
    entries: list[LockedFile] = []
    for program in context.components.go:
        toolchain = [
            e
            for e in read_lock(locks_dir() / debs_lock_name(IMAGE_TARGET))
            if "builder" in e.uses and e.name.startswith(program.toolchain.removesuffix("-go"))
        ]
        mirrors = debian_mirrors()
        with http_client(proxy=apt_proxy("http")) as client:
            places = [Download(e.filename, e.sha256, e.size, debian.urls(e, mirrors)) for e in toolchain]
            context.download(places, "Go toolchain", client)
        found = gomodules.resolve(program, toolchain, context.cache, context.console)
        for e in found:
            context.policy.check_denied(e.kind, e.name, e.version, e.filename)
        entries += gomodules.judged(found, program, context.policy)
    return sorted(entries)


def lock_files(context: Context) -> list[LockedFile]:
    """Resolve, download and judge the files of hubs.

    Raises:
        LockFailed: a file is not there.
        PolicyRefused: a rule refuses one.
    """
    entries = [hub.resolve(f, context.cache) for f in context.components.hub]
    for e in entries:
        context.policy.check_denied(e.kind, e.name, e.version, e.filename)
    context.policy.check_licenses(entries)
    return sorted(entries)


def plan(context: Context) -> dict[str, tuple[str, Callable[[], list[LockedFile]]]]:
    """Return ``lock file -> (kind, how to make it)`` in the order that they must be made (Go needs its toolchain)."""
    steps: dict[str, tuple[str, Callable[[], list[LockedFile]]]] = {
        "wheels.jsonl": ("wheels", lambda: lock_wheels(context))
    }
    made: dict[str, list[LockedFile]] = {}

    def debs(target: Target) -> list[LockedFile]:
        made[target.name] = lock_debs(context, target, made.get(IMAGE_TARGET.name))
        return made[target.name]

    named = {s.target for s in context.components.debian}
    for target in TARGETS.values():  # the images' first: others may take packages from it
        if target.name in named:
            steps[debs_lock_name(target)] = ("debs", partial(debs, target))
    steps["go-minio.jsonl"] = ("go", lambda: lock_go(context))
    steps["files.jsonl"] = ("files", lambda: lock_files(context))
    return steps


def run(args: argparse.Namespace, console: Console) -> int:
    """Make or check the locks."""
    now = int(time.time())
    changed: dict[str, str] = {}
    counts: dict[str, int] = {}
    with http_client() as client:
        context = Context(read_components(), read_policy(), Cache(), console, client, datetime.fromtimestamp(now, UTC))
        for filename, (kind, make) in plan(context).items():
            path = locks_dir() / filename
            if args.only not in (None, kind):
                continue
            with console.step(f"resolve {filename}"):
                new = make()
            counts[filename] = len(new)
            old = read_lock(path) if path.is_file() else []
            if new == old and path.is_file():
                continue
            changed[filename] = render(changes(old, new))
            if not args.check:
                write_lock(path, new)
    if changed and not args.check:
        write_index(locks_dir(), now)
    text = "\n\n".join(f"{name}:\n{diff}" for name, diff in changed.items()) or "the locks are up to date"
    if changed and args.check:
        raise LockStale(
            f"{', '.join(changed)} would change",
            found=text.replace("\n", "\n            "),
            hint="run `moat lock`, review the diff and commit it",
        )
    total = ", ".join(f"{name} {count}" for name, count in counts.items())
    console.result({"ok": True, "changed": sorted(changed), "entries": counts}, f"{text}\n\nentries: {total}")
    return 0
