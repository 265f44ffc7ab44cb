#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures a demo bundle: its size by kind, against the sum of its inputs, and how long a build takes.

JSON lines. Times are of the whole command, from a copy of the checkout and with the downloads in the cache: *warm*
(every layer in the cache), *code* (one line of the gateway changed), and with ``--cold`` also from an empty cache of
built things (minutes: it compiles MinIO). Inputs are the locked files; those of the toolchain are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from moat.build.cache import Cache  # noqa: E402
from moat.build.locks import active_locks  # noqa: E402
from moat.manifest import Manifest, parse_manifest  # noqa: E402

TARGET = "debian13-amd64"
PARTS = ("scripts", "images", "bundles", "compose", "docs")


def copy_checkout(target: Path) -> None:
    """Copy what a build reads, so that a line can be changed without touching the checkout."""
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in PARTS:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    shutil.copy(ROOT / "LICENSE", target / "LICENSE")


def build(checkout: Path, output: Path, cache: Path) -> tuple[float, Path]:
    """Build and return the wall seconds and the bundle's folder."""
    argv = [sys.executable, "-m", "moat", "build", "--profile", "demo", "--target", TARGET, "-o", str(output), "--json"]
    env = {**os.environ, "PYTHONPATH": str(checkout / "scripts"), "MOAT_CACHE": str(cache)}
    started = time.monotonic()
    done = subprocess.run(argv, env=env, capture_output=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr.decode("utf-8", "replace")[-3000:])
    return time.monotonic() - started, Path(json.loads(done.stdout)["bundle"])


def blobs(manifest: Manifest, bundle: Path) -> dict[str, int]:
    """Return the size of every layer and configuration in the image archives, by digest."""
    found = {}
    for image in manifest.images:
        with tarfile.open(bundle / image.archive) as tar:
            found.update({m.name: m.size for m in tar if m.name.startswith("blobs/") and m.isfile()})
    return found


def say(**fields: object) -> None:
    """Print one JSON line."""
    print(json.dumps(fields), flush=True)


def sizes(manifest: Manifest, cache: Cache) -> None:
    """Print the bundle's size by kind and against its inputs, in bytes."""
    by_kind: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for f in manifest.files:
        by_kind[f.kind] += f.size
        count[f.kind] += 1
    for kind, size in by_kind.most_common():
        say(measure="size", kind=kind, files=count[kind], bytes=size)
    for image in manifest.images:
        size = next(f.size for f in manifest.files if f.path == image.archive)
        say(measure="image", name=image.name, bytes=size, unpacked=image.unpacked)
    locks = active_locks("demo", TARGET, cache_root=cache.root)
    shipped = {e.sha256: e.size for e in locks.everything if set(e.uses) - {"builder", "profile:demo"}}
    toolchain = {e.sha256: e.size for e in locks.everything if e.sha256 not in shipped}
    total = sum(by_kind.values())
    say(
        measure="total",
        bytes=total,
        inputs_shipped=sum(shipped.values()),
        inputs_toolchain_and_go_modules=sum(toolchain.values()),
        ratio_to_shipped=round(total / sum(shipped.values()), 3),
        ratio_to_all=round(total / (sum(shipped.values()) + sum(toolchain.values())), 3),
    )


def main() -> int:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cold", action="store_true", help="also from an empty cache of built things (minutes)")
    args = parser.parse_args()
    cache = Cache()
    with tempfile.TemporaryDirectory(prefix="moat-bench-") as name:
        work = Path(name)
        checkout, output = work / "checkout", work / "out"
        copy_checkout(checkout)
        output.mkdir()
        if args.cold:
            empty = work / "cache"
            empty.mkdir()
            (empty / "files").symlink_to(cache.root / "files")
            seconds, _ = build(checkout, output, empty)
            say(measure="build", state="cold", seconds=round(seconds, 1))
        build(checkout, output, cache.root)
        seconds, bundle = build(checkout, output, cache.root)
        say(measure="build", state="warm", seconds=round(seconds, 1))
        manifest = parse_manifest((bundle / "manifest.json").read_bytes())
        before = blobs(manifest, bundle)
        sizes(manifest, cache)
        source = checkout / "images/gateway/moat_gateway/__init__.py"
        source.write_text(source.read_text("utf-8") + "\n#: A changed line.\nBENCHMARK = 1\n", "utf-8")
        seconds, bundle = build(checkout, output, cache.root)
        manifest = parse_manifest((bundle / "manifest.json").read_bytes())
        changed = {d: s for d, s in blobs(manifest, bundle).items() if d not in before}
        say(
            measure="build",
            state="code",
            seconds=round(seconds, 1),
            goal=30,
            changed_blobs=len(changed),
            changed_bytes=sum(changed.values()),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
