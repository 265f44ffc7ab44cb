# SPDX-License-Identifier: Apache-2.0
"""Synthetic bundles for tests and measurements: real files, a real manifest, a real signature; no container images."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moat.build.keys import new_keys
from moat.build.pyz import build_pyz
from moat.build.sign import make_signature, sign_manifest
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME, BundleInfo, FileEntry, ImageEntry, Manifest
from moat.minisign import SecretKey, parse_secret_key
from moat.site.trust import trusted_comment

ROOT = Path(__file__).resolve().parents[3]
CREATED = 1_760_000_000
#: The distribution's own Python, as at a site; the tests' one where there is none.
HOST_PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable

SMALL: dict[str, bytes] = {
    "README.txt": b"Read me first.\n",
    "images/gateway.tar": b"gateway" * 3000,
    "images/nginx.tar": b"nginx" * 4000,
    "wheels/a-1.0-py3-none-any.whl": b"wheel a" * 100,
    "wheels/b-1.0-py3-none-any.whl": b"wheel b" * 100,
    "compose/nginx/nginx.conf": b"events {}\n",
    "empty.txt": b"",
}


@dataclass(frozen=True)
class Made:
    """A signed bundle and the keys it was signed with."""

    path: Path
    keys: Path

    @property
    def public(self) -> Path:
        return self.keys / "moat.pub"

    @property
    def secret(self) -> SecretKey:
        return parse_secret_key((self.keys / "moat.key").read_bytes(), None)

    def verify_argv(self, *more: str, key: Path | str | None = None) -> list[str]:
        """Return the command of a site: the host's Python, isolated, runs moat.pyz; nothing of this host counts."""
        pyz = self.keys / "moat.pyz"
        if not pyz.exists():
            build_pyz(pyz, CREATED)
        trusted = str(self.public if key is None else key)
        state = [] if "--state-dir" in more else ["--state-dir", str(self.keys / "no-state")]
        return [HOST_PYTHON, "-I", str(pyz), "verify", str(self.path), "--key", trusted, *state, *more]

    def verify(self, *more: str, key: Path | str | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``moat verify`` on the bundle in a process of its own; a hang fails the test."""
        argv = self.verify_argv(*more, key=key)
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def run_moat(*argv: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run ``python -m moat`` from this checkout."""
    return subprocess.run(
        [python, "-m", "moat", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def entry(path: str, content: bytes) -> FileEntry:
    """Return the manifest's line for one file."""
    top = path.split("/")[0]
    kind = top if top in ("images", "wheels", "compose") else "tool"
    digest = hashlib.sha256(content).hexdigest()
    return FileEntry(path, len(content), digest, kind, "component-" + digest[:8], "1.0", "MIT", "test:component")


def image(name: str, archive: str) -> ImageEntry:
    """Return the manifest's line for one image with a made-up id."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return ImageEntry(name, f"moat/{name}:0.1.0-{digest[:12]}", "sha256:" + digest, archive, 4096)


def manifest_of(
    files: Mapping[str, bytes],
    *,
    version: str = "0.1.0",
    profile: str = "demo",
    target: str = "debian13-amd64",
    created: int = CREATED,
    images: Sequence[ImageEntry] | None = None,
) -> Manifest:
    """Return the manifest of ``files``; every ``images/NAME.tar`` becomes an image."""
    if images is None:
        images = [image(Path(p).stem, p) for p in sorted(files) if p.startswith("images/")]
    entries = tuple(entry(p, files[p]) for p in sorted(files))
    return Manifest(BundleInfo(version, profile, target, created), entries, tuple(images))


def write_signed(folder: Path, manifest: Manifest, secret: SecretKey) -> None:
    """Write manifest and signature without any check, as somebody who holds the key could."""
    data = manifest.to_bytes()
    (folder / MANIFEST_NAME).write_bytes(data)
    signature = make_signature(secret, data, trusted_comment(manifest.bundle))
    (folder / SIGNATURE_NAME).write_bytes(signature.to_bytes())


def make_bundle(
    folder: Path,
    keys: Path,
    files: Mapping[str, bytes] = SMALL,
    *,
    version: str = "0.1.0",
    profile: str = "demo",
    target: str = "debian13-amd64",
    created: int = CREATED,
) -> Made:
    """Write a signed bundle with ``files`` and ``moat.pyz``; makes the keys where there are none."""
    if not (keys / "moat.key").exists():
        new_keys(keys, None)
    folder.mkdir(parents=True)
    build_pyz(folder / "moat.pyz", created)
    contents = {**files, "moat.pyz": (folder / "moat.pyz").read_bytes()}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    manifest = manifest_of(contents, version=version, profile=profile, target=target, created=created)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    sign_manifest(folder, keys / "moat.key", None)
    return Made(folder, keys)


def make_large_bundle(folder: Path, keys: Path, total: int) -> Made:
    """Write a signed bundle of about ``total`` bytes, with the sizes of a real one: few large files, many small."""
    if not (keys / "moat.key").exists():
        new_keys(keys, None)
    shares = {
        "images/gateway.tar": 0.30,
        "images/minio.tar": 0.12,
        "images/model.tar": 0.15,
        "images/nginx.tar": 0.05,
        "images/valkey.tar": 0.05,
        "models/model.gguf": 0.15,
    }
    small = 180
    shares |= {f"wheels/w{i:03}-1.0-py3-none-any.whl": (1 - sum(shares.values())) / small for i in range(small)}
    block = os.urandom(1024 * 1024)
    folder.mkdir(parents=True)
    entries = []
    for path in sorted(shares):
        size = int(total * shares[path])
        digest = hashlib.sha256()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / path).open("wb") as f:
            for start in range(0, size, len(block)):
                part = block[: size - start]
                f.write(part)
                digest.update(part)
        kind = path.split("/")[0]
        entries.append(FileEntry(path, size, digest.hexdigest(), kind, Path(path).name, "1.0", "MIT", "test:" + path))
    images = tuple(image(Path(p).stem, p) for p in sorted(shares) if p.startswith("images/"))
    manifest = Manifest(BundleInfo("0.1.0", "demo", "debian13-amd64", CREATED), tuple(entries), images)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    sign_manifest(folder, keys / "moat.key", None)
    return Made(folder, keys)
