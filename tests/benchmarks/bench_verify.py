#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures ``moat verify`` (moat.pyz on the host's Python) against ``sha256sum`` over the same files.

Runs are paired and alternate, warm (files in the page cache) and cold (dropped from it before each run). One JSON line
a pair, then one a mode with medians: seconds, ratio (how many times faster than sha256sum), peak memory in MB.
``openssl_s`` tells how much of the ratio is the hash's own code: Debian 12's sha256sum does not use the processor's
SHA instructions, OpenSSL (so Python, and Debian 13's sha256sum) does; the rest is the use of all cores.
The bundle is synthetic, with the sizes of a real one, unless ``--bundle`` and ``--key`` name one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from tests.unit.site.bundles import CREATED, HOST_PYTHON, Made, make_large_bundle  # noqa: E402

from moat.build.pyz import build_pyz  # noqa: E402


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages; as root also the whole page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    with contextlib.suppress(OSError):  # not root, or not ours to write: the advice above has to do
        Path("/proc/sys/vm/drop_caches").write_text("1\n", "ascii")


def timed(argv: list[str], stdin: bytes | None = None) -> tuple[float, float, float]:
    """Run a command; return its wall seconds, CPU seconds and peak resident memory in MB."""
    with tempfile.TemporaryFile() as given:
        given.write(stdin or b"")
        given.seek(0)
        started = time.perf_counter()
        child = subprocess.Popen(argv, stdin=given, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{argv[0]} ended with {child.returncode}: the measurement would be of a failure")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def measure(bundle: Path, key: Path, pyz: Path, pairs: int) -> None:
    """Print the JSON lines."""
    files = sorted(p for p in bundle.rglob("*") if p.is_file())
    size = sum(p.stat().st_size for p in files)
    ours = [HOST_PYTHON, "-I", str(pyz), "verify", str(bundle), "--key", str(key), "--allow-older"]
    stock = ["xargs", "-0", "sha256sum"]
    openssl = ["xargs", "-0", "openssl", "dgst", "-sha256"] if shutil.which("openssl") else None
    names = b"\0".join(os.fsencode(p) for p in files)
    for mode in ("warm", "cold"):
        ratios, ours_s, stock_s, openssl_s, memory = [], [], [], [], []
        if mode == "warm":
            timed(stock, names)
        for i in range(pairs):
            results = {}
            for name in ("ours", "stock") if i % 2 else ("stock", "ours"):
                if mode == "cold":
                    drop_from_cache(bundle)
                results[name] = timed(ours) if name == "ours" else timed(stock, names)
            if openssl:
                if mode == "cold":
                    drop_from_cache(bundle)
                openssl_s.append(timed(openssl, names)[0])
            ours_s.append(results["ours"][0])
            stock_s.append(results["stock"][0])
            memory.append(results["ours"][2])
            ratios.append(stock_s[-1] / ours_s[-1])
            line = {"mode": mode, "pair": i, "verify_s": round(ours_s[-1], 3), "sha256sum_s": round(stock_s[-1], 3)}
            print(json.dumps({**line, "verify_cpu_s": round(results["ours"][1], 3), "ratio": round(ratios[-1], 2)}))
        summary = {
            "benchmark": "verify",
            "mode": mode,
            "bytes": size,
            "files": len(files),
            "cores": len(os.sched_getaffinity(0)),
            "pairs": pairs,
            "verify_s": round(statistics.median(ours_s), 3),
            "sha256sum_s": round(statistics.median(stock_s), 3),
            "openssl_s": round(statistics.median(openssl_s), 3) if openssl_s else None,
            "verify_mb_per_s": round(size / 1e6 / statistics.median(ours_s)),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "peak_mb": round(max(memory), 1),
        }
        print(json.dumps(summary), flush=True)


def main() -> int:
    """Make the bundle if none is given, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--mib", type=int, default=1024, help="size of the synthetic bundle; default %(default)s")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moat-bench-") as scratch:
        folder = Path(scratch)
        if args.bundle is not None:
            made = Made(args.bundle.resolve(), args.key.resolve().parent)
        else:
            made = make_large_bundle(folder / "bundle", folder / "keys", args.mib * 1024 * 1024)
        build_pyz(folder / "moat.pyz", CREATED)
        measure(made.path, args.key or made.public, folder / "moat.pyz", args.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
