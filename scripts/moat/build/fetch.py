# SPDX-License-Identifier: Apache-2.0
"""``moat fetch``: have every locked input in the cache, so that the build needs no network.

Debian's mirrors drop superseded versions. A locked package that the mirror has no longer is looked for in the
snapshot archive (at the moment of the lock); what is nowhere is named with its successor, and the fetch stops, because
only a reviewer may change a lock. A demonstration need not wait for one: with ``--relock-vanished`` the Debian packages
alone are resolved again, the difference is shown, and the result is kept in the cache as this machine's own lock, which
a ``site`` build never reads.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from urllib.parse import quote

import httpx

from moat.build import debian, gomodules, hub, wheels
from moat.build.cache import Cache
from moat.build.definitions import read_components
from moat.build.downloads import Download, Downloader, Gone
from moat.build.lock import Context, lock_debs
from moat.build.lockdiff import Change, changes, render
from moat.build.locks import (
    PROFILES,
    TARGETS,
    LockedFile,
    Locks,
    active_locks,
    debs_lock_name,
    local_debs_dir,
    locks_dir,
    locks_of,
    write_index,
    write_lock,
)
from moat.build.mirrors import DebianMirrors, apt_proxy, debian_mirrors, go_proxies, http_client, python_index
from moat.build.policy import read_policy
from moat.console import Console, human_bytes
from moat.errors import FetchFailed, LockStale

NAME = "fetch"
HELP = "Download every locked input into the cache (needs the network)."

#: The snapshot archive takes the mirror's state a few times a day: a package locked in between is in the next state.
_SNAPSHOT_OFFSETS = (0, 24 * 3600)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--profile", choices=PROFILES, default="demo", help="what the bundle will be (default: demo)")
    parser.add_argument("--target", default=next(iter(TARGETS)), help="what the bundle is for (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=8, help="downloads at the same time (default: %(default)s)")
    parser.add_argument(
        "--relock-vanished",
        action="store_true",
        help="profile demo: where Debian has dropped locked packages, take their successors (shown, never committed)",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Fetch everything, or say what is missing and why."""
    cache = Cache()
    locks = active_locks(args.profile, args.target, cache_root=cache.root)
    if locks.local_debs:
        console.info("Debian packages: this machine's own lock (made by --relock-vanished), not the committed one")
    relocked: list[Change] = []
    try:
        fetch(locks, cache, console, jobs=args.jobs)
    except LockStale:
        if not args.relock_vanished or args.profile != "demo":
            raise
        with console.step("lock the Debian packages again, on this machine alone"):
            relocked = relock_debs(locks, cache, console)
        locks = active_locks(args.profile, args.target, cache_root=cache.root)
        fetch(locks, cache, console, jobs=args.jobs)
    total = sum(e.size for e in locks.everything)
    console.result(
        {
            "ok": True,
            "files": len(locks.everything),
            "bytes": total,
            "local_debs": locks.local_debs,
            "relocked": [{"name": c.name, "old": c.old, "new": c.new} for c in relocked],
        },
        f"{len(locks.everything)} files, {human_bytes(total)}, in {cache.root}"
        + (f"\nDebian packages taken anew (not committed):\n{render(relocked)}" if relocked else ""),
    )
    return 0


def fetch(locks: Locks, cache: Cache, console: Console, *, jobs: int = 8) -> None:
    """Have every file of ``locks`` in the cache.

    Raises:
        FetchFailed: a file could not be downloaded.
        HashMismatch: a place serves other bytes than the lock names.
        LockStale: Debian has dropped locked packages; the message names them and their successors.
    """
    stale: list[LockedFile] = []
    with http_client() as client:
        downloader = Downloader(cache, client, console, jobs=jobs)
        if missing := _missing(locks.debs, cache):
            with console.step(f"Debian packages: {len(missing)} to fetch"):
                stale = _fetch_debs(locks, missing, cache, console, jobs)
        if stale:
            raise _stale_error(locks, stale, cache, console)
        if missing := _missing(locks.wheels, cache):
            with console.step(f"wheels: {len(missing)} to fetch"):
                _fetch_wheels(missing, downloader, client)
        if missing := _missing(locks.go, cache):
            with console.step(f"Go module files: {len(missing)} to fetch"):
                _fetch_go(locks, missing, cache, downloader, console)
        if missing := _missing(locks.files, cache):
            with console.step(f"hub files: {len(missing)} to fetch"):
                for entry in missing:
                    hub.fetch(entry, cache)
    still = _missing(locks.everything, cache)
    if still:  # the cache holds a file of another size under that name: only a broken disk does that
        raise FetchFailed(
            f"{len(still)} files are not in the cache after the fetch",
            found=", ".join(e.filename for e in still[:10]),
            hint="delete the cache's files/ folder and fetch again",
        )


def _missing(entries: Iterable[LockedFile], cache: Cache) -> list[LockedFile]:
    return [e for e in entries if not cache.has_entry(e)]


def _downloads(entries: Sequence[LockedFile], urls: Iterable[tuple[str, ...]]) -> list[Download]:
    return [Download(e.filename, e.sha256, e.size, u) for e, u in zip(entries, urls, strict=True)]


def _vanished(gone: Sequence[Gone], what: str) -> FetchFailed:
    return FetchFailed(
        f"{len(gone)} locked {what} are not served any more",
        found=", ".join(sorted(g.download.filename for g in gone)),
        expected="files that the index keeps",
        hint="use an index or proxy that has them, or lock again (`moat lock`) and have the diff reviewed",
        path=gone[0].download.filename,
    )


def _fetch_wheels(entries: Sequence[LockedFile], downloader: Downloader, client: httpx.Client) -> None:
    """Find each wheel on the index by its hash, and download it."""
    index = wheels.Index(python_index(), client)
    places = wheels.places(entries, index)
    gone = downloader.all(_downloads(entries, (places.get(e.sha256, ()) for e in entries)), "wheels")
    if gone:
        raise _vanished(gone, "wheels")


def _fetch_go(
    locks: Locks, entries: Sequence[LockedFile], cache: Cache, downloader: Downloader, console: Console
) -> None:
    """Download module files from the Go proxy, whose default address is in the locked toolchain."""
    toolchain = [e for e in locks.debs if "builder" in e.uses and e.name.startswith("golang-")]
    proxies = go_proxies(gomodules.toolchain(toolchain, cache, console))
    gone = downloader.all(_downloads(entries, (gomodules.urls(e, proxies) for e in entries)), "Go module files")
    if gone:
        raise _vanished(gone, "Go module files")


def snapshot_urls(entry: LockedFile, mirrors: DebianMirrors, locked_at: int) -> tuple[str, ...]:
    """Return the places of a locked Debian package in the snapshot archive, or nothing where none is configured.

    The archive answers ``ARCHIVE/TIMESTAMP/POOL-PATH`` with the state at or before that moment. Its other address, by
    file hash, wants SHA-1, which no lock of ours holds; the sha256 is checked after the download as always.
    """
    if not mirrors.snapshot:
        return ()
    security, pool = debian.pool_path(entry)
    archive = "debian-security" if security else "debian"
    moments = [datetime.fromtimestamp(locked_at + offset, UTC) for offset in _SNAPSHOT_OFFSETS]
    return tuple(f"{mirrors.snapshot}/{archive}/{m:%Y%m%dT%H%M%SZ}/{quote(pool)}" for m in moments)


def _fetch_debs(
    locks: Locks, entries: Sequence[LockedFile], cache: Cache, console: Console, jobs: int
) -> list[LockedFile]:
    """Download Debian packages; return those that neither the mirror nor the snapshot archive has."""
    mirrors = debian_mirrors()
    by_hash = {e.sha256: e for e in entries}
    with http_client(proxy=apt_proxy("http")) as client:
        downloader = Downloader(cache, client, console, jobs=jobs)
        gone = downloader.all(_downloads(entries, (debian.urls(e, mirrors) for e in entries)), "Debian packages")
        lost = [by_hash[g.download.sha256] for g in gone]
        if not lost or not mirrors.snapshot:
            return lost
        console.info(f"{len(lost)} packages are gone from the mirror; asking the snapshot archive")
        try:
            places = (snapshot_urls(e, mirrors, locks.locked_at) for e in lost)
            gone = downloader.all(_downloads(lost, places), "snapshot archive")
        except FetchFailed as e:
            console.warn(f"the snapshot archive cannot be reached: {e.found}")
            return [e for e in lost if not cache.has_entry(e)]
    return [by_hash[g.download.sha256] for g in gone]


def _stale_error(locks: Locks, stale: Sequence[LockedFile], cache: Cache, console: Console) -> LockStale:
    """Return the refusal that names each vanished package and the version that took its place."""
    rows, files = [], []
    for target in locks_of(locks.target):
        # By the suite that it came from: a target may take a package from the images' release.
        of = [e for e in sorted(stale) if debian.suite_of(e) == target.suite]
        if not of:
            continue
        files.append(debs_lock_name(target))
        apt = debian.AptRoot(cache.root / "apt", target, debian_mirrors(), console)
        apt.update()
        available = apt.available()
        for e in of:
            successor = available[e.name]["version"] if e.name in available else "no package of that name any more"
            rows.append(Change(e.name, e.version, successor, ""))
    return LockStale(
        f"Debian's mirror has dropped {len(stale)} of the locked packages",
        found=render(rows).strip().replace("\n  ", "\n            "),
        expected="the versions of the committed lock",
        hint=(
            "have a new lock reviewed: `moat lock --only debs`, read the diff, commit it"
            + (" (a demonstration goes on with `moat fetch --relock-vanished`)" if locks.profile == "demo" else "")
            + ("" if debian_mirrors().snapshot else "; or set MOAT_DEBIAN_SNAPSHOT to a snapshot archive")
        ),
        path=", ".join(files),
    )


def relock_debs(locks: Locks, cache: Cache, console: Console) -> list[Change]:
    """Resolve the Debian packages again and keep the result as this machine's own lock; return what differs.

    Raises:
        LockFailed: something cannot be resolved, or a signature does not hold.
        PolicyRefused: a rule refuses a package.
    """
    now = int(time.time())
    images: list[LockedFile] | None = None
    for target in locks_of(locks.target):
        with http_client() as client:
            moment = datetime.fromtimestamp(now, UTC)
            context = Context(read_components(), read_policy(), cache, console, client, moment)
            new = lock_debs(context, target, images)
        images = images or new  # the images' release comes first
        name = debs_lock_name(target)
        reviewed = hashlib.sha256((locks_dir() / name).read_bytes()).hexdigest()
        folder = local_debs_dir(cache.root, target)
        write_lock(folder / name, new)
        # Written last: without the index, or with another `replaces`, the overlay does not count.
        write_index(folder, now, replaces=reviewed)
    difference = changes(locks.debs, active_locks(locks.profile, locks.target.name, cache_root=cache.root).debs)
    for line in render(difference).splitlines():
        console.info(line)
    return difference
