# SPDX-License-Identifier: Apache-2.0
"""``moat inspect``: what is on a medium, by kind and component, with sizes, images and licences.

It reads the manifest alone, after its signature. Where no trusted key is at hand it still shows
what the manifest claims, since one wants to look before the key arrives, and says so on top.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moat.console import Console, human_bytes
from moat.errors import UnknownKey
from moat.manifest import FileEntry, Manifest, parse_manifest
from moat.minisign import PublicKey
from moat.site import scan
from moat.site.keyring import add_key_arguments
from moat.site.verify import keys_of, open_signed, read_signed_bytes

NAME = "inspect"
HELP = "show what a bundle holds: files by kind, images, licences"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="the bundle's folder on the medium")
    add_key_arguments(parser)


def read_manifest(path: Path, keys: Sequence[PublicKey]) -> tuple[Manifest, PublicKey | None]:
    """Return the manifest, and the trusted key that signed it or ``None`` where no trusted one did.

    Raises:
        BadSignature: a trusted key is said to have signed, and did not. That is never shown.
        BadManifest, UnsafePath, Unreadable: there is nothing to show.
    """
    try:
        signed = open_signed(path, keys)
    except UnknownKey:
        with scan.open_root(path) as root:
            return parse_manifest(read_signed_bytes(root)[0]), None
    return signed.manifest, signed.key


def run(args: argparse.Namespace, console: Console) -> int:
    """Show the manifest."""
    manifest, key = read_manifest(args.path, keys_of(args, args.path, console))
    if key is None:
        console.warn(
            "the signature was NOT checked: no trusted key made it. What follows is only what the medium claims"
        )
    console.result(_object(manifest, key), _text(manifest, key))
    return 0


def _object(manifest: Manifest, key: PublicKey | None) -> dict[str, Any]:
    b = manifest.bundle
    return {
        "ok": True,
        "verified": key is not None,
        "key": key.to_string() if key else None,
        "bundle": {"version": b.version, "profile": b.profile, "target": b.target, "created": b.created},
        "files": len(manifest.files),
        "bytes": sum(f.size for f in manifest.files),
        "kinds": [
            {"kind": kind, "files": len(files), "bytes": sum(f.size for f in files)}
            for kind, files in _by_kind(manifest.files)
        ],
        "components": [
            {"kind": kind, "component": name, "version": version, "license": licence, "bytes": size}
            for (kind, name, version, licence), size in sorted(_components(manifest.files).items())
        ],
        "images": [
            {"name": i.name, "reference": i.reference, "id": i.id, "unpacked": i.unpacked} for i in manifest.images
        ],
        "licenses": dict(sorted(Counter(f.license for f in manifest.files).items())),
    }


def _by_kind(files: Iterable[FileEntry]) -> list[tuple[str, list[FileEntry]]]:
    kinds: dict[str, list[FileEntry]] = {}
    for f in files:
        kinds.setdefault(f.kind, []).append(f)
    return sorted(kinds.items(), key=lambda item: -sum(f.size for f in item[1]))


def _components(files: Iterable[FileEntry]) -> Counter[tuple[str, str, str, str]]:
    sizes: Counter[tuple[str, str, str, str]] = Counter()
    for f in files:
        sizes[f.kind, f.component, f.version, f.license] += f.size
    return sizes


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Return ``rows`` (the first is the heading) in columns; those in ``right`` are flush right."""
    flush = set(right)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in flush else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _short(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _text(manifest: Manifest, key: PublicKey | None) -> str:
    total = sum(f.size for f in manifest.files)
    kinds = [("kind", "files", "size")]
    kinds += [(kind, str(len(fs)), human_bytes(sum(f.size for f in fs))) for kind, fs in _by_kind(manifest.files)]
    kinds.append(("all", str(len(manifest.files)), human_bytes(total)))
    images = [("image", "reference", "unpacked", "id")]
    images += [(i.name, i.reference, human_bytes(i.unpacked), i.id[7:19]) for i in manifest.images]
    largest = [("component", "version", "licence", "size")]
    components = _components(manifest.files).most_common()
    largest += [
        (_short(name), _short(version), _short(licence), human_bytes(size))
        for (_, name, version, licence), size in components[:20]
    ]
    more = f"\n... and {len(components) - 20} smaller ones (--json shows all)" if len(components) > 20 else ""
    licences = [("licence", "files")]
    licences += [(_short(name, 90), str(n)) for name, n in Counter(f.license for f in manifest.files).most_common()]
    who = f"signature: valid, key {key.to_string()}" if key else "signature: NOT CHECKED (no trusted key made it)"
    parts = [
        f"{manifest.bundle.name}\n{who}\nfiles: not read; `moat verify` reads them all",
        table(kinds, (1, 2)),
        table(images, (2,)) if manifest.images else "no images",
        table(largest, (3,)) + more,
        table(licences, (1,)),
    ]
    return "\n\n".join(parts)
