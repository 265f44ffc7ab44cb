# SPDX-License-Identifier: Apache-2.0
"""Where a release comes from: a bundle's folder, or the tar of ``moat pack``; one file each behind a protocol.

Both give the signed manifest first, and then files one after the other. A file that does not have
the manifest's size and sha256 is refused by the reader itself, at its last block, so whoever
writes what it gets has written nothing that may stay.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from moat.errors import ChangedFile, ExtraFile, MissingFile, MoatError, Unreadable
from moat.manifest import MANIFEST_NAME, MAX_BYTES, SIGNATURE_NAME, FileEntry, Manifest
from moat.minisign import MAX_BYTES as MAX_SIGNATURE_BYTES
from moat.minisign import PublicKey
from moat.site import scan, ustar
from moat.site.load import checked_blocks
from moat.site.trust import COPY_AGAIN, Installed, TrustedBundle
from moat.site.verify import read_signed_bytes

#: Told the name of a file; says whether its bytes are wanted.
Wanted = Callable[[FileEntry], bool]


@dataclass(frozen=True)
class Signed:
    """The signed manifest of a source."""

    manifest: Manifest
    manifest_bytes: bytes
    signature: bytes
    manifest_sha256: str

    @property
    def as_installed(self) -> Installed:
        """What ``installed.json`` says once this release runs."""
        b = self.manifest.bundle
        return Installed(b.version, b.profile, b.target, self.manifest_sha256, b.created)


class Source(Protocol):
    """A bundle whose manifest's signature holds."""

    signed: Signed

    def files(self, wanted: Wanted) -> Iterator[tuple[FileEntry, Iterator[bytes | memoryview]]]:
        """Yield the wanted files; each one's blocks end with a refusal where they are not the manifest's."""
        ...


class FolderSource:
    """A bundle's folder on a medium, or in a store."""

    def __init__(self, root: int, trust: TrustedBundle, signed: Signed) -> None:
        self._root = root
        self._trust = trust
        self.signed = signed

    def problems(self, wanted: Wanted) -> list[MoatError]:
        """Return what is wrong with the folder before any file is read; unwanted files may be missing."""
        known = {f.path: f for f in self.signed.manifest.files}
        found, _ = self._trust.check_entries(scan.walk(self._root))
        return [p for p in found if not (isinstance(p, MissingFile) and p.path in known and not wanted(known[p.path]))]

    def files(self, wanted: Wanted) -> Iterator[tuple[FileEntry, Iterator[bytes | memoryview]]]:
        """Yield the wanted files."""
        for entry in self.signed.manifest.files:
            if wanted(entry):
                yield entry, checked_blocks(self._root, entry, lambda n: None)


class TarSource:
    """The tar of ``moat pack``, read once from its beginning."""

    def __init__(self, members: Iterator[ustar.Member], signed: Signed) -> None:
        self._members = members
        self.signed = signed

    def files(self, wanted: Wanted) -> Iterator[tuple[FileEntry, Iterator[bytes | memoryview]]]:
        """Yield the wanted files in the tar's order; others are passed over, unlisted ones refused."""
        listed = {f.path: f for f in self.signed.manifest.files}
        for member in self._members:
            entry = listed.pop(member.path, None)
            if entry is None:
                raise ExtraFile(
                    f"{member.path} is not part of the bundle, or twice in the tar",
                    found=f"a file of {member.size} bytes",
                    expected="every listed file once",
                    hint=ustar.PACK_AGAIN,
                    path=member.path,
                )
            if wanted(entry):
                yield entry, _checked(member, entry)


def _checked(member: ustar.Member, entry: FileEntry) -> Iterator[bytes]:
    digest = hashlib.sha256()
    if member.size != entry.size:
        raise _changed(entry, f"{member.size} bytes", f"{entry.size} bytes")
    while data := member.read(scan.CHUNK_BYTES):
        digest.update(data)
        yield data
    if digest.hexdigest() != entry.sha256:
        raise _changed(entry, f"sha256 {digest.hexdigest()}", f"sha256 {entry.sha256}")


def _changed(entry: FileEntry, found: str, expected: str) -> ChangedFile:
    return ChangedFile(
        f"{entry.path} has other content", found=found, expected=expected, hint=COPY_AGAIN, path=entry.path
    )


def _accept(
    manifest: bytes, signature: bytes, keys: Sequence[PublicKey], target: str | None, installed: Installed | None
) -> tuple[TrustedBundle, Signed]:
    trust = TrustedBundle(keys)
    trust.check_signature(manifest, signature)
    parsed = trust.parse()
    trust.accept(target=target, installed=installed)
    return trust, Signed(parsed, manifest, signature, trust.manifest_sha256)


@contextmanager
def open_source(
    path: Path, keys: Sequence[PublicKey], *, target: str | None = None, installed: Installed | None = None
) -> Iterator[FolderSource | TarSource]:
    """Yield a source whose signature, target and age were checked; ``-`` is a tar on standard input.

    Raises:
        BadSignature, UnknownKey, BadManifest, UnsafePath, WrongTarget, OlderThanInstalled, Unreadable,
        StageFailed: as their names say.
    """
    if str(path) != "-" and path.is_dir():
        with scan.open_root(path) as root:
            manifest, signature = read_signed_bytes(root)
            trust, signed = _accept(manifest, signature, keys, target, installed)
            yield FolderSource(root, trust, signed)
        return
    with _open_stream(path) as stream:
        members = ustar.members(stream)
        manifest = _first(members, MANIFEST_NAME, MAX_BYTES)
        signature = _first(members, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
        _, signed = _accept(manifest, signature, keys, target, installed)
        yield TarSource(members, signed)


@contextmanager
def _open_stream(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = path.open("rb")
    except OSError as e:
        raise Unreadable(
            f"{path} cannot be opened",
            found=e.strerror,
            expected="a bundle's folder, or the tar of `moat pack`",
            hint="mount the medium and give the path of the folder moat-<version>-<profile>-<target>",
            path=str(path),
        ) from e
    with stream:
        yield stream


def _first(members: Iterator[ustar.Member], name: str, limit: int) -> bytes:
    """Return the next member's bytes, which must be the file ``name`` of bounded size."""
    member = next(members, None)
    if member is None or member.path != name or member.size > limit:
        raise ustar.not_ours(f"does not begin with {name}", found=member.path[:200] if member else "an empty tar")
    data = bytearray()
    ustar.copy(member, data.extend)
    return bytes(data)
