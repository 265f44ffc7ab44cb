# SPDX-License-Identifier: Apache-2.0
"""The order of trust, as a state machine without input or output.

``untrusted -> signed -> parsed -> accepted -> listed -> counted``: each step takes bytes or facts
that somebody else read, and either moves on or refuses. Nothing that an earlier step has not
vouched for is looked at by a later one: the manifest is not parsed before its signature holds, no
file is judged before the manifest says which there should be. The reading is in
:mod:`moat.site.scan`, the command in :mod:`moat.site.verify`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from moat import minisign
from moat.errors import (
    BadSignature,
    ChangedFile,
    ExtraFile,
    MissingFile,
    MoatError,
    OlderThanInstalled,
    UnknownKey,
    Unreadable,
    UnsafePath,
    WrongTarget,
)
from moat.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    BundleInfo,
    FileEntry,
    Manifest,
    parse_manifest,
    version_key,
)
from moat.minisign import PublicKey
from moat.paths import fold

COPY_AGAIN = "copy the bundle again from the build host; if it happens twice, replace the medium"
KEEP = "do not install; keep the medium for whoever handles security, and get a fresh copy"


class Stage(IntEnum):
    """How far a bundle has come."""

    UNTRUSTED = 0
    SIGNED = 1
    PARSED = 2
    ACCEPTED = 3
    LISTED = 4
    COUNTED = 5


class EntryType(Enum):
    """What stands at a path of the medium; the value is the word for the operator."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "symbolic link"
    SPECIAL = "device, pipe or socket"
    UNREADABLE = "entry that cannot be read"
    BAD_NAME = "name that is not UTF-8"
    TOO_DEEP = "path longer than any in a bundle"
    TOO_MANY = "limit of entries"


@dataclass(frozen=True)
class Entry:
    """One directory entry, as found (nothing is followed, nothing is opened).

    ``size`` in bytes; ``links`` is the count of names that the file has (file systems without hard
    links say 1); ``why`` is the system's message for an unreadable entry.
    """

    path: str
    type: EntryType
    size: int = 0
    links: int = 1
    why: str = ""


@dataclass(frozen=True)
class Digest:
    """What reading a listed file gave: its sha256, or the refusal that reading ended with."""

    sha256: str = ""
    error: MoatError | None = None


@dataclass(frozen=True)
class Installed:
    """What is installed on this host (``installed.json``)."""

    version: str
    profile: str
    target: str
    manifest_sha256: str
    created: int


def trusted_comment(bundle: BundleInfo) -> str:
    """Return the comment that a bundle's signature must carry."""
    return f"moat version={bundle.version} profile={bundle.profile} target={bundle.target}"


class TrustedBundle:
    """One bundle on its way from untrusted bytes to a counted set of files.

    Args:
        keys: the keys that this site trusts, from anywhere but the medium.
    """

    def __init__(self, keys: Sequence[PublicKey]) -> None:
        self._keys = tuple(keys)
        self._stage = Stage.UNTRUSTED
        self._bytes = b""
        self._signature: minisign.Signature | None = None
        self._manifest: Manifest | None = None
        self._key: PublicKey | None = None
        self._expected: dict[str, FileEntry] = {}

    @property
    def stage(self) -> Stage:
        """How far it has come."""
        return self._stage

    @property
    def manifest(self) -> Manifest:
        """The manifest, from stage PARSED on."""
        if self._manifest is None:
            raise AssertionError("the manifest is not to be looked at before its signature holds")
        return self._manifest

    @property
    def manifest_sha256(self) -> str:
        """The hash of the signed bytes, from stage SIGNED on."""
        return hashlib.sha256(self._bytes).hexdigest()

    @property
    def key(self) -> PublicKey:
        """The trusted key that signed, from stage SIGNED on."""
        if self._key is None:
            raise AssertionError("no signature was checked")
        return self._key

    def _step(self, before: Stage, after: Stage) -> None:
        if self._stage is not before:
            raise AssertionError(f"step to {after.name} out of order: the stage is {self._stage.name}")
        self._stage = after

    def check_signature(self, manifest: bytes, signature: bytes) -> None:
        """Check the bytes of ``manifest.json`` against ``manifest.json.minisig``.

        Raises:
            BadSignature: malformed, not matching, or not in the one form that ``moat sign`` writes.
            UnknownKey: made by a key that is not among the trusted ones.
        """
        parsed = minisign.parse_signature(signature)
        # No signature covers the first line nor the spelling of the file. Both are fixed, so that
        # there is no byte on the medium that anybody could change unseen.
        if parsed.untrusted_comment != minisign.SIGNATURE_COMMENT or parsed.to_bytes() != signature:
            raise BadSignature(
                f"{SIGNATURE_NAME} is not written the way moat and minisign write it",
                found="another first line, line end or spelling",
                expected=f"`untrusted comment: {minisign.SIGNATURE_COMMENT}` and four plain lines",
                hint=COPY_AGAIN,
                path=SIGNATURE_NAME,
            )
        if not parsed.prehashed:
            raise BadSignature(
                f"{SIGNATURE_NAME} is in minisign's old form",
                found="Ed",
                expected="ED (prehashed)",
                hint="sign the bundle with `moat sign`, or `minisign -S` of version 0.10 or newer",
                path=SIGNATURE_NAME,
            )
        candidates = [k for k in self._keys if k.key_id == parsed.key_id]
        if not candidates:
            raise UnknownKey(
                "the bundle is signed by a key that is not trusted here",
                found=f"key {parsed.id_text}",
                expected=", ".join(f"key {k.id_text}" for k in self._keys) or "a trusted key, but none is known here",
                hint="compare the release key with the printed copy, then give it with --key RW... "
                "or put it into /etc/moat/trusted-keys/; a key that lies on the medium never counts",
                path=SIGNATURE_NAME,
            )
        refusal: BadSignature | None = None
        for key in candidates:  # ids are 8 free bytes: two trusted keys may share one
            try:
                minisign.verify(key, manifest, parsed)
            except BadSignature as e:
                refusal = e
            else:
                self._key = key
                break
        if self._key is None and refusal is not None:
            refusal.path = MANIFEST_NAME
            raise refusal
        self._step(Stage.UNTRUSTED, Stage.SIGNED)
        self._bytes, self._signature = manifest, parsed

    def parse(self) -> Manifest:
        """Parse the signed manifest and compare it with the signature's trusted comment.

        Raises:
            BadManifest: malformed.
            UnsafePath: a path in it is not safe.
            BadSignature: the signature was made for another bundle.
        """
        if self._stage is not Stage.SIGNED or self._signature is None:
            raise AssertionError("only a signed manifest is parsed")
        manifest = parse_manifest(self._bytes)
        expected = trusted_comment(manifest.bundle)
        if self._signature.trusted_comment != expected:
            raise BadSignature(
                "the signature was made for another bundle",
                found=self._signature.trusted_comment[:200],
                expected=expected,
                hint="sign the bundle again with `moat sign`",
                path=SIGNATURE_NAME,
            )
        self._step(Stage.SIGNED, Stage.PARSED)
        self._manifest = manifest
        self._expected = {f.path: f for f in manifest.files}
        return manifest

    def accept(self, *, target: str | None, installed: Installed | None) -> None:
        """Check that the bundle is meant for this host and not older than what is installed.

        Args:
            target: what the host is, e.g. ``debian13-amd64``; ``None`` accepts every target.
            installed: what is installed; ``None`` accepts every version.

        Raises:
            WrongTarget: made for another distribution or architecture.
            OlderThanInstalled: a lower version, or the same version made from older locks.
        """
        bundle = self.manifest.bundle
        if target is not None and target != bundle.target:
            raise WrongTarget(
                "the bundle is made for another kind of host",
                found=bundle.target,
                expected=target,
                hint=f"bring the bundle that was built with --target {target}",
                path=MANIFEST_NAME,
            )
        if installed is not None:
            new, old = version_key(bundle.version), version_key(installed.version)
            if new < old or (new == old and bundle.created < installed.created):
                raise OlderThanInstalled(
                    "the bundle is older than the release that is installed",
                    found=f"{bundle.version}, made from inputs of {bundle.created}",
                    expected=f"{installed.version}, made from inputs of {installed.created}, or newer",
                    hint="bring the current bundle; to go back on purpose use --allow-older",
                    path=MANIFEST_NAME,
                )
        self._step(Stage.PARSED, Stage.ACCEPTED)

    def check_entries(self, entries: Iterable[Entry]) -> tuple[list[MoatError], list[FileEntry]]:
        """Compare what lies on the medium with what should, before anything is read.

        Returns:
            The refusals so far, and the files whose content is worth reading: right place, right
            size, ordinary file with one name.
        """
        self._step(Stage.ACCEPTED, Stage.LISTED)
        problems: list[MoatError] = []
        readable: list[FileEntry] = []
        explained: set[str] = set()  # listed paths that need no "missing" row of their own
        covers: list[str] = []  # links and unreadable folders, which hide what should be below
        folders = {p[:i] for p in self._expected for i, c in enumerate(p) if c == "/"}
        folded = {fold(p): p for p in [*self._expected, *folders, MANIFEST_NAME, SIGNATURE_NAME]}
        entries = list(entries)
        filled = {e.path[:i] for e in entries for i, c in enumerate(e.path) if c == "/"}
        for entry in entries:
            problem: MoatError | None
            if entry.type is EntryType.FILE:
                problem = self._judge_file(entry, folded)
                if problem is None and entry.path in self._expected:
                    readable.append(self._expected[entry.path])
            elif entry.type is EntryType.FOLDER:
                known = entry.path in folders or entry.path in self._expected or entry.path in filled
                problem = None if known else _extra(entry.path + "/", "an empty folder")
            else:
                problem = _refuse_entry(entry)
                if entry.path in folders:
                    covers.append(entry.path + "/")
            if entry.type is not EntryType.FOLDER:
                explained.add(entry.path)
            if problem is not None:
                problems.append(problem)
        found_folders = {e.path for e in entries if e.type is EntryType.FOLDER}
        cut_short = any(
            e.type is EntryType.TOO_MANY or (e.type is EntryType.UNREADABLE and e.path == ".") for e in entries
        )
        for path, expected in self._expected.items():
            if path in explained or cut_short or any(path.startswith(c) for c in covers):
                continue
            found = "a folder" if path in found_folders else "nothing"
            problems.append(
                MissingFile(
                    f"{path} is missing",
                    found=found,
                    expected=f"a file of {expected.size} bytes",
                    hint=COPY_AGAIN,
                    path=path,
                )
            )
        return problems, readable

    def _judge_file(self, entry: Entry, folded: Mapping[str, str]) -> MoatError | None:
        expected = self._expected.get(entry.path)
        ours = entry.path in (MANIFEST_NAME, SIGNATURE_NAME)
        if (expected is not None or ours) and entry.links > 1:
            return hard_linked(entry.path, entry.links)
        if ours:
            return None
        if expected is None:
            twin = folded.get(fold(entry.path))
            if twin is not None and twin != entry.path:
                return UnsafePath(
                    f"{entry.path} is a twin of {twin}",
                    found=entry.path,
                    expected=f"only {twin}",
                    hint=KEEP,
                    path=entry.path,
                )
            if entry.links > 1:
                return hard_linked(entry.path, entry.links)
            return _extra(entry.path, f"a file of {entry.size} bytes")
        if entry.size != expected.size:
            return ChangedFile(
                f"{entry.path} has another size",
                found=f"{entry.size} bytes",
                expected=f"{expected.size} bytes",
                hint=COPY_AGAIN,
                path=entry.path,
            )
        return None

    def count(self, digests: Mapping[str, Digest], wanted: Iterable[FileEntry]) -> list[MoatError]:
        """Compare what the files contain with what they should.

        Args:
            digests: what reading gave, for every file of ``wanted``.
            wanted: the files that :meth:`check_entries` returned.
        """
        self._step(Stage.LISTED, Stage.COUNTED)
        problems: list[MoatError] = []
        for expected in wanted:
            digest = digests[expected.path]  # a file that was not read must not pass: KeyError is right
            if digest.error is not None:
                problems.append(digest.error)
            elif digest.sha256 != expected.sha256:
                problems.append(
                    ChangedFile(
                        f"{expected.path} has other content",
                        found=f"sha256 {digest.sha256}",
                        expected=f"sha256 {expected.sha256}",
                        hint=COPY_AGAIN,
                        path=expected.path,
                    )
                )
        return problems


def hard_linked(path: str, links: int) -> UnsafePath:
    """Return the refusal of a file that has further names."""
    return UnsafePath(
        f"{path} is a hard link",
        found=f"a file with {links} names",
        expected="a file with one name",
        hint="a second name can change the file after it was checked; copy the bundle without links (cp -r)",
        path=path,
    )


def _extra(path: str, found: str) -> ExtraFile:
    return ExtraFile(
        f"{path} is not part of the bundle",
        found=found,
        expected="nothing",
        hint="find out who put it there; remove it only if you know, and verify again",
        path=path,
    )


def _refuse_entry(entry: Entry) -> MoatError:
    if entry.type is EntryType.UNREADABLE:
        return Unreadable(
            f"{entry.path} cannot be read",
            found=entry.why,
            expected="a readable file or folder",
            hint="check the medium (dmesg) and that you may read it, then copy the bundle to another one",
            path=entry.path,
        )
    if entry.type is EntryType.TOO_MANY:
        return ExtraFile(
            "the medium holds far more than a bundle",
            found=entry.why,
            expected="the files of the manifest",
            hint="give the bundle's own folder (it holds manifest.json), not one above it",
            path=entry.path,
        )
    return UnsafePath(
        f"{entry.path} is not an ordinary file",
        found=f"a {entry.type.value}",
        expected="ordinary files and folders only",
        hint=KEEP,
        path=entry.path,
    )
