# SPDX-License-Identifier: Apache-2.0
"""``moat stage``: bring a bundle into the release store, verified, whole or not at all.

Every byte is compared with the signed manifest while it is copied; the copy gets its name when all
of it is on the disk. A copy that is there already is read again: where it is as the manifest says
nothing is written, where it is not it is staged anew. Interrupted at any point, the same command
clears away what it left and starts from what is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moat.console import Console, human_bytes
from moat.errors import ChangedFile, MissingFile, MoatError, StageFailed
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry
from moat.site import scan
from moat.site.load import checked_blocks
from moat.site.source import FolderSource, Signed, Source, open_source
from moat.site.state import INSTALLED_NAME, read_installed, write_installed
from moat.site.store import (
    BUNDLE,
    DEFAULT_PARTS,
    DEFAULT_STORE,
    OWN_NAMES,
    Store,
    check_room,
    fsync_folder,
    fsync_tree,
    is_wanted,
    mode_of,
    parse_parts,
    refused,
    release_id,
    remove,
    wanted_files,
)
from moat.site.trust import EntryType
from moat.site.verify import add_trust_arguments, installed_of, keys_of

NAME = "stage"
HELP = "copy a verified bundle into the release store of this host"


@dataclass(frozen=True)
class Existing:
    """The copy that the store has: listed files that are right, and why it cannot stay as it is."""

    valid: frozenset[str]
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What staging did, or would do."""

    release: str
    path: Path
    changed: bool
    why: tuple[str, ...]
    files: int
    size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="the bundle's folder, a tar of `moat pack`, or - for one on stdin"
    )
    parser.add_argument(
        "--store", type=Path, default=DEFAULT_STORE, metavar="DIR", help="the release store; default %(default)s"
    )
    parser.add_argument(
        "--parts", default=",".join(DEFAULT_PARTS), metavar="PART,...", help="what to bring; default %(default)s"
    )
    parser.add_argument("--prune", type=int, metavar="N", help="afterwards keep the newest N releases and those in use")
    parser.add_argument("--check", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--record",
        action="store_true",
        help="the release is the one of this host now: link `current` to it, and refuse older ones from now on",
    )
    add_trust_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Stage, prune, record."""
    parts = parse_parts(args.parts)
    if args.prune is not None and args.prune < 1:
        raise StageFailed("--prune needs a number of at least 1", found=str(args.prune), hint="--prune 3 keeps three")
    store = Store(args.store)
    keys = keys_of(args, args.source, console)
    pruned: list[str] = []
    recorded = False
    with contextlib.ExitStack() as stack:
        if args.check:
            store.check_folders()
        else:
            stack.enter_context(store.locked())
        source = stack.enter_context(open_source(args.source, keys, target=args.target, installed=installed_of(args)))
        outcome = stage(source, args.source, store, parts, console, check=args.check)
        if args.prune is not None:
            pruned = store.prunable(args.prune, outcome.release)
            if not args.check:
                store.prune(pruned)
        if args.record:
            recorded = store.point(outcome.release, check=args.check)
            recorded |= record(args.state_dir, source.signed, check=args.check)
    changed = outcome.changed or bool(pruned) or recorded
    would = "would be " if args.check else ""
    lines = [f"{outcome.release}: {would}staged ({why})" for why in outcome.why[:5]] if outcome.changed else []
    lines += [f"{outcome.release}: as the manifest says, nothing to do"] if not outcome.changed else []
    lines += [f"{name}: {would}removed" for name in pruned]
    lines += [f"{outcome.release}: {would}recorded as installed"] if recorded else []
    console.result(
        {
            "ok": True,
            "exit": 0,
            "release": outcome.release,
            "path": str(outcome.path),
            "changed": changed,
            "staged": outcome.changed,
            "why": list(outcome.why),
            "files": outcome.files,
            "bytes": outcome.size,
            "pruned": pruned,
            "recorded": recorded,
            "problems": [],
        },
        "\n".join([*lines, f"{outcome.path}: {outcome.files} files, {human_bytes(outcome.size)}"]),
    )
    return 0


def record(state_dir: Path, signed: Signed, *, check: bool = False) -> bool:
    """Record what is installed, and tell whether the record was another one before.

    Raises:
        StageFailed: the folder cannot be written.
        Unreadable: the record that is there is damaged.
    """
    if read_installed(state_dir) == signed.as_installed:
        return False
    if not check:
        try:
            write_installed(state_dir, signed.as_installed, signed.manifest_bytes)
        except OSError as e:
            raise refused(f"{INSTALLED_NAME} cannot be written", e, state_dir) from e
    return True


def stage(
    source: Source, given: Path, store: Store, parts: Sequence[str], console: Console, *, check: bool = False
) -> Outcome:
    """Bring the files of ``parts`` into the store; the caller holds the lock unless it only checks.

    Args:
        source: a source whose signature holds.
        given: its path, to tell when it is the store's own copy.
        store: where to.
        parts: of :data:`moat.site.store.PARTS`; files of further parts that the store has stay.
        console: for the steps.
        check: write nothing.

    Raises:
        MoatError: the source is not as its manifest says, or the store cannot take it.
    """
    if not check:
        try:
            for path in store.clean():
                console.info(f"removed {path}, which an interrupted run had left")
        except OSError as e:
            raise refused("what an interrupted run left cannot be removed", e, store.releases) from e
    name = release_id(source.signed.manifest, source.signed.manifest_sha256)
    folder = store.bundle(name)
    own = given.resolve() == folder.resolve()
    wanted = {f.path: f for f in wanted_files(source.signed.manifest, parts)}
    if isinstance(source, FolderSource) and not own:
        _refuse(source.problems(lambda f: f.path in wanted), console)
    there = examine(folder, source.signed)
    lacking = [f for p, f in wanted.items() if p not in there.valid]
    if own:
        _refuse(_own_problems(folder, there, lacking), console)
    known = {f.path: f for f in source.signed.manifest.files}
    keep = [known[p] for p in sorted(there.valid)]
    final = {f.path: f for f in [*keep, *wanted.values()]}
    size = sum(f.size for f in final.values())
    why = _why(folder, there, lacking)
    if not why:
        return Outcome(name, folder, False, (), len(final), size)
    check_room(store.root, size)
    if check:
        for _, blocks in source.files(lambda f: f.path in wanted and f.path not in there.valid):
            for _ in blocks:
                pass
        return Outcome(name, folder, True, why, len(final), size)
    with console.step(f"stage {name} ({human_bytes(size)})"):
        _write(source, store, name, keep, {f.path for f in lacking})
    return Outcome(name, folder, True, why, len(final), size)


def _why(folder: Path, there: Existing, lacking: Sequence[FileEntry]) -> tuple[str, ...]:
    if not os.path.lexists(folder):
        return ("not in the store yet",)
    damaged = {d.partition(" ")[0] for d in there.damage}
    fresh = sum(1 for f in lacking if f.path not in damaged)
    return (*there.damage, *([f"{fresh} files are not there yet"] if fresh else []))


def _refuse(problems: Sequence[MoatError], console: Console) -> None:
    """Raise the first problem by exit code, report the rest."""
    ordered = sorted(problems, key=lambda p: (p.exit_code, p.path or ""))
    for problem in ordered[1:40]:
        console.problem(problem)
    if ordered:
        raise ordered[0]


def _own_problems(folder: Path, there: Existing, lacking: Sequence[FileEntry]) -> list[MoatError]:
    again = "bring the medium and run its install.sh: the release is staged anew from there"
    problems: list[MoatError] = [
        ChangedFile(f"the copy in the store is damaged: {why}", hint=again, path=str(folder)) for why in there.damage
    ]
    if not problems and lacking:
        problems = [
            MissingFile(f"{f.path} is not in the store's copy", hint=again, path=f"{folder}/{f.path}") for f in lacking
        ]
    return problems


def examine(folder: Path, signed: Signed) -> Existing:
    """Read the copy in the store, and compare it with its manifest: content, kind, owner and mode."""
    if not folder.is_dir() or folder.is_symlink():
        return Existing(frozenset(), ("it is no folder",) if os.path.lexists(folder) else ())
    known = {f.path: f for f in signed.manifest.files}
    damage: list[str] = []
    readable: list[FileEntry] = []
    # Whoever may write the folder above could put another copy in this one's place.
    above = _wrong_status(folder.parent, EntryType.FOLDER, "..")
    if above:
        damage.append(f"the release's folder {above}")
    with scan.open_root(folder) as root:
        for path, expected in ((MANIFEST_NAME, signed.manifest_bytes), (SIGNATURE_NAME, signed.signature)):
            try:
                found = scan.read_small(root, path, len(expected))
            except (FileNotFoundError, MoatError):
                found = b""
            if found != expected:
                damage.append(f"{path} is another")
        for entry in [None, *scan.walk(root)]:
            path = entry.path if entry else "."
            kind = entry.type if entry else EntryType.FOLDER
            wrong = _wrong_status(folder / path, kind, path)
            if wrong:
                damage.append(f"{path} {wrong}")
            elif entry is not None and kind is EntryType.FILE and path not in OWN_NAMES:
                if path not in known:
                    damage.append(f"{path} is not part of the bundle")
                elif entry.size != known[path].size:
                    damage.append(f"{path} has another size")
                else:
                    readable.append(known[path])
        digests = scan.hash_files(root, readable)
    valid = {f.path for f in readable if digests[f.path].sha256 == f.sha256}
    damage += [f"{f.path} has other content" for f in readable if f.path not in valid]
    return Existing(frozenset(valid), tuple(damage))


def _wrong_status(path: Path, kind: EntryType, relative: str) -> str:
    """Return what is wrong with an entry's kind, owner or mode, or nothing."""
    if kind not in (EntryType.FILE, EntryType.FOLDER):
        return f"is a {kind.value}"
    status = path.lstat()
    mode = 0o755 if kind is EntryType.FOLDER else mode_of(relative)
    if stat.S_IMODE(status.st_mode) != mode:
        return f"has mode {stat.S_IMODE(status.st_mode):04o} instead of {mode:04o}"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}"
    return ""


def _write(source: Source, store: Store, name: str, keep: Sequence[FileEntry], lacking: set[str]) -> None:
    """Write a whole copy beside the old one, and put it in its place."""
    release, folder = store.release(name), store.bundle(name)
    old_mask = os.umask(0o022)
    try:
        release.mkdir(exist_ok=True)
        release.chmod(0o755)
        temporary = Path(tempfile.mkdtemp(prefix=f".{BUNDLE}.new.", dir=release))
        temporary.chmod(0o755)
        _write_file(temporary, MANIFEST_NAME, iter([source.signed.manifest_bytes]))
        _write_file(temporary, SIGNATURE_NAME, iter([source.signed.signature]))
        for entry, blocks in source.files(lambda f: f.path in lacking):
            _write_file(temporary, entry.path, blocks)
            lacking.discard(entry.path)
        if lacking:
            first = min(lacking)
            raise MissingFile(
                f"{first} is not in the source" + (f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""),
                expected="every file of the parts that were asked for",
                hint="pack those parts too (moat pack --parts ...), or ask for fewer with --parts",
                path=first,
            )
        if keep:
            with scan.open_root(folder) as root:
                for entry in keep:
                    _write_file(temporary, entry.path, checked_blocks(root, entry, lambda n: None))
        fsync_tree(temporary)
        _swap(temporary, folder)
        fsync_folder(store.releases)
    except OSError as e:
        raise refused("the release cannot be written", e, release) from e
    finally:
        os.umask(old_mask)
        _tidy(store, name)


def _tidy(store: Store, name: str) -> None:
    """Clear away what a refusal left; what cannot be cleared now is cleared by the next run."""
    with contextlib.suppress(OSError):
        for path in store.leftovers():
            if path.parent == store.release(name) and path.name.startswith(f".{BUNDLE}.new."):
                remove(path)
        if not any(store.release(name).iterdir()):
            store.release(name).rmdir()


def _write_file(root: Path, path: str, blocks: Iterator[bytes | memoryview]) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode_of(path))
    with os.fdopen(fd, "wb") as f:
        for block in blocks:
            f.write(block)
        os.fchmod(f.fileno(), mode_of(path))


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; a run that dies in between is mended by :meth:`Store.clean`."""
    old = folder.with_name(f".{BUNDLE}.old.{os.getpid()}")
    if os.path.lexists(folder):
        folder.rename(old)
    new.rename(folder)
    fsync_folder(folder.parent)
    if os.path.lexists(old):
        remove(old)


__all__ = ["Existing", "Outcome", "add_arguments", "examine", "is_wanted", "record", "run", "stage"]
