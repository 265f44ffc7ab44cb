# SPDX-License-Identifier: Apache-2.0
"""``moat verify``: may this medium be used here?

Signature, manifest, target and age, then every file: :mod:`moat.site.trust` decides,
:mod:`moat.site.scan` reads. ``load``, ``plan``, ``inspect`` and ``prepare`` come through the
functions of this module and never read a bundle that did not pass them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moat.console import Console, human_bytes, human_seconds
from moat.errors import BadManifest, BadSignature, MoatError
from moat.manifest import MANIFEST_NAME, MAX_BYTES, SIGNATURE_NAME, Manifest
from moat.minisign import MAX_BYTES as MAX_SIGNATURE_BYTES
from moat.minisign import PublicKey
from moat.site import scan
from moat.site.keyring import add_key_arguments, trusted_keys
from moat.site.state import DEFAULT_STATE_DIR, read_installed
from moat.site.trust import COPY_AGAIN, Installed, TrustedBundle

NAME = "verify"
HELP = "check a bundle: signature, target, age, and every file"

#: Rows that a person reads before the rest is only counted; ``--json`` has them all.
_MAX_ROWS: Final = 40


@dataclass(frozen=True)
class SignedBundle:
    """A bundle whose signature, manifest, target and age were checked; its files were not."""

    path: Path
    manifest: Manifest
    manifest_bytes: bytes
    manifest_sha256: str
    key: PublicKey

    @property
    def as_installed(self) -> Installed:
        """What ``installed.json`` says once this bundle is loaded."""
        b = self.manifest.bundle
        return Installed(b.version, b.profile, b.target, self.manifest_sha256, b.created)


@dataclass(frozen=True)
class VerifiedBundle(SignedBundle):
    """A bundle of which every byte was checked. ``files`` and ``size`` (bytes) are what was read."""

    files: int
    size: int


@dataclass(frozen=True)
class Report:
    """The outcome of a verification: ``signed`` as far as it came, all problems, worst first."""

    signed: SignedBundle | None
    verified: VerifiedBundle | None
    problems: tuple[MoatError, ...]

    @property
    def exit_code(self) -> int:
        """0, or the code of the first problem in the order of exit codes."""
        return self.problems[0].exit_code if self.problems else 0


def _in_order(problems: Sequence[MoatError]) -> tuple[MoatError, ...]:
    return tuple(sorted(problems, key=lambda p: (p.exit_code, p.path or "")))


def read_signed_bytes(root: int) -> tuple[bytes, bytes]:
    """Return the bytes of the manifest and of its signature; neither is trusted yet.

    Raises:
        BadManifest: there is no manifest, or it is too large to be one.
        BadSignature: there is no signature, or it is too large to be one.
        UnsafePath, Unreadable: one of them is a link or cannot be read.
    """
    try:
        manifest = scan.read_small(root, MANIFEST_NAME, MAX_BYTES)
    except FileNotFoundError as e:
        raise BadManifest(
            f"there is no {MANIFEST_NAME}",
            found="a folder without one",
            expected="a bundle's folder",
            hint="give the path of the folder moat-<version>-<profile>-<target>",
            path=MANIFEST_NAME,
        ) from e
    try:
        signature = scan.read_small(root, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
    except FileNotFoundError as e:
        raise BadSignature(
            f"there is no {SIGNATURE_NAME}",
            found="an unsigned bundle",
            expected="a signature by the release key",
            hint=COPY_AGAIN,
            path=SIGNATURE_NAME,
        ) from e
    except BadManifest as e:
        raise BadSignature(e.message, found=e.found, expected=e.expected, hint=e.hint, path=e.path) from e
    return manifest, signature


def _read_and_parse(path: Path, root: int, trust: TrustedBundle) -> SignedBundle:
    manifest, signature = read_signed_bytes(root)
    trust.check_signature(manifest, signature)
    return SignedBundle(path, trust.parse(), manifest, trust.manifest_sha256, trust.key)


def open_signed(
    path: Path, keys: Sequence[PublicKey], *, target: str | None = None, installed: Installed | None = None
) -> SignedBundle:
    """Check a bundle as far as its manifest and read no other file.

    Raises:
        BadSignature, UnknownKey, BadManifest, UnsafePath, WrongTarget, OlderThanInstalled, Unreadable.
    """
    trust = TrustedBundle(keys)
    with scan.open_root(path) as root:
        signed = _read_and_parse(path, root, trust)
    trust.accept(target=target, installed=installed)
    return signed


def examine_bundle(
    path: Path,
    keys: Sequence[PublicKey],
    console: Console,
    *,
    target: str | None = None,
    installed: Installed | None = None,
) -> Report:
    """Check a bundle whole and return everything that is wrong with it; refusals are not raised."""
    signed: SignedBundle | None = None
    trust = TrustedBundle(keys)
    try:
        with scan.open_root(path) as root:
            signed = _read_and_parse(path, root, trust)
            trust.accept(target=target, installed=installed)
            problems, readable = trust.check_entries(scan.walk(root))
            size = sum(f.size for f in readable)
            with console.progress("verifying", size) as bar:
                digests = scan.hash_files(root, readable, count=bar.add)
            problems += trust.count(digests, readable)
    except MoatError as e:
        return Report(signed, None, (e,))
    verified = None
    if not problems:
        verified = VerifiedBundle(**vars(signed), files=len(readable), size=size)
    return Report(signed, verified, _in_order(problems))


def verify_bundle(
    path: Path,
    keys: Sequence[PublicKey],
    console: Console,
    *,
    target: str | None = None,
    installed: Installed | None = None,
) -> VerifiedBundle:
    """Check a bundle whole, for commands that must not touch one with any problem.

    Raises:
        MoatError: the worst problem; every other one is reported to ``console`` first.
    """
    report = examine_bundle(path, keys, console, target=target, installed=installed)
    if report.verified is None:
        for problem in report.problems[1 : _MAX_ROWS + 1]:
            console.problem(problem)
        raise report.problems[0]
    return report.verified


def add_trust_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides whether a bundle is accepted; shared by every command that reads one."""
    add_key_arguments(parser)
    parser.add_argument("--target", metavar="T", help="refuse a bundle for another target, e.g. debian13-amd64")
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=DEFAULT_STATE_DIR,
        metavar="DIR",
        help="where installed.json is kept; default %(default)s",
    )
    parser.add_argument(
        "--allow-older", action="store_true", help="accept a bundle that is older than the installed one"
    )


def keys_of(args: argparse.Namespace, bundle: Path, console: Console) -> tuple[PublicKey, ...]:
    """Return the keys that count, by the arguments of :func:`add_trust_arguments`."""
    return trusted_keys(args.key, args.trusted_keys, bundle, console)


def installed_of(args: argparse.Namespace) -> Installed | None:
    """Return what a bundle must not be older than, by the arguments of :func:`add_trust_arguments`."""
    return None if args.allow_older else read_installed(args.state_dir)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the bundle's folder on the medium")
    add_trust_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Verify, and report one row for each bad file."""
    started = time.monotonic()
    try:
        keys = keys_of(args, args.path, console)
        report = examine_bundle(args.path, keys, console, target=args.target, installed=installed_of(args))
    except MoatError as e:  # a key or the state folder; the same object for machines
        report = Report(None, None, (e,))
    seconds = time.monotonic() - started
    for problem in report.problems[:_MAX_ROWS]:
        console.problem(problem)
    if len(report.problems) > _MAX_ROWS:
        console.warn(f"{len(report.problems) - _MAX_ROWS} more problems; --json shows all")
    bundle = report.signed.manifest.bundle if report.signed else None
    console.result(
        {
            "ok": not report.problems,
            "exit": report.exit_code,
            "bundle": {"version": bundle.version, "profile": bundle.profile, "target": bundle.target}
            if bundle
            else None,
            "problems": [p.to_dict() for p in report.problems],
            "files": report.verified.files if report.verified else None,
            "bytes": report.verified.size if report.verified else None,
            "key": report.signed.key.to_string() if report.signed else None,
            "manifest_sha256": report.signed.manifest_sha256 if report.signed else None,
            "seconds": round(seconds, 3),
        },
        _summary(report, seconds),
    )
    return report.exit_code


def _summary(report: Report, seconds: float) -> str:
    if report.verified is not None:
        v = report.verified
        return (
            f"verified: {v.manifest.bundle.name}, {v.files} files, {human_bytes(v.size)}, "
            f"key {v.key.to_string()} in {human_seconds(seconds)}"
        )
    kinds = Counter(p.kind for p in report.problems)
    count = len(report.problems)
    words = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return f"NOT verified: {count} problem{'s' if count > 1 else ''} ({words}); do not install from this medium"
