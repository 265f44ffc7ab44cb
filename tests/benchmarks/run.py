#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs every ``bench_*.py`` of this folder in turn (``make bench``), or those that are named.

A benchmark prints JSON lines: figures and ratios against a stock tool of the same run. Nothing is asserted, since
absolute times depend on the machine and its neighbours.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run the benchmarks; return 0 if each of them ran to its end."""
    failed = []
    for script in sorted(HERE.rglob("bench_*.py")):
        if names and not any(n in script.name for n in names):
            continue
        print(f"\n=== {script.stem} ===", flush=True)
        if subprocess.run([sys.executable, str(script)], cwd=HERE.parents[1], check=False).returncode != 0:
            failed.append(script.name)
    print("\nall ran to their end" if not failed else f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
