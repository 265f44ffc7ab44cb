# SPDX-License-Identifier: Apache-2.0
"""The bundle's root document ``manifest.json``: what crosses from the build host to the site.

Canonical form: UTF-8 JSON, keys sorted, no white space, ``files`` sorted by path, one newline
at the end. The parser accepts nothing else, so that one meaning has one byte string and one
signature. It reads untrusted bytes: it is total (a value or :class:`BadManifest`), bounded in
size, and looks at nothing but its argument.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from moat.errors import BadManifest

FORMAT = "moat-bundle/1"
#: A site bundle has a few hundred files of about 300 bytes each; 16 MiB leaves room for 50,000.
MAX_BYTES = 16 * 1024 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class BundleInfo:
    """What the bundle is. ``created`` is seconds since 1970 (the locks' time, not the build's)."""

    version: str
    profile: str
    target: str
    created: int

    @property
    def name(self) -> str:
        """The folder's name, e.g. ``moat-0.1.0-site-debian13-amd64``."""
        return f"moat-{self.version}-{self.profile}-{self.target}"


@dataclass(frozen=True)
class FileEntry:
    """One file on the medium. ``size`` is in bytes; ``license`` an SPDX expression."""

    path: str
    size: int
    sha256: str
    kind: str
    component: str
    version: str
    license: str
    source: str


@dataclass(frozen=True)
class ImageEntry:
    """One container image: its archive on the medium and what the engine must show after loading.

    ``id`` is the config digest (``docker inspect .Id``); ``unpacked`` the sum of its layers in bytes.
    """

    name: str
    reference: str
    id: str
    archive: str
    unpacked: int


@dataclass(frozen=True)
class Manifest:
    """The whole document."""

    bundle: BundleInfo
    files: tuple[FileEntry, ...]
    images: tuple[ImageEntry, ...]

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        document = {
            "format": FORMAT,
            "bundle": asdict(self.bundle),
            "files": [asdict(f) for f in sorted(self.files, key=lambda f: f.path)],
            "images": [asdict(i) for i in sorted(self.images, key=lambda i: i.name)],
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8") + b"\n"
