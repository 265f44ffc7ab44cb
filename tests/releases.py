# SPDX-License-Identifier: Apache-2.0
"""Builds another release from this checkout, without touching it: what upgrade tests go to and come from.

    .venv/bin/python -m tests.releases --version 0.1.1 --profile demo --out DIR

The tracked files are copied to a temporary folder as they are now (``--committed``: as the last commit has them), the
versions there are set, and that copy's own ``moat build`` makes the bundle, from the same cache and with the demo's
signing key, so that a site that trusts the one release trusts the other. The path of the bundle is printed last.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Where the version is written, each as a line of this form.
VERSIONED = {
    "scripts/moat/__init__.py": r'^__version__ = "([^"]+)"$',
    "images/gateway/moat_gateway/__init__.py": r'^__version__ = "([^"]+)"$',
    "images/gateway/pyproject.toml": r'^version = "([^"]+)"$',
}


def copy_tracked(to: Path, *, committed: bool) -> None:
    """Copy the checkout's tracked files, as they are in the folder or as the last commit has them."""
    if committed:
        archive = subprocess.run(
            ["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", str(to)], input=archive.stdout, check=True)
        return
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    for name in listed.decode("utf-8").split("\0"):
        source = ROOT / name
        if name and source.is_file():  # not one that was deleted since the last commit
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)


def set_version(checkout: Path, version: str) -> None:
    """Write the version wherever the checkout names it.

    Raises:
        ValueError: a place does not name exactly one, or they differ.
    """
    found = set()
    for name, pattern in VERSIONED.items():
        path = checkout / name
        text = path.read_text("utf-8")
        matches = list(re.finditer(pattern, text, re.M))
        if len(matches) != 1:
            raise ValueError(f"{name} names {len(matches)} versions, expected one line like {pattern}")
        start, end = matches[0].span(1)
        found.add(matches[0][1])
        path.write_text(text[:start] + version + text[end:], "utf-8")
    if len(found) != 1:
        raise ValueError(f"the checkout's versions differ: {sorted(found)}")


def break_gateway(checkout: Path) -> None:
    """Make the copy's gateway one that passes every check of a configuration and then does not start."""
    with (checkout / "images/gateway/moat_gateway/serve.py").open("a", encoding="utf-8") as f:
        f.write('\nraise SystemExit("planted by tests/releases.py: this release does not start")\n')


def build(
    version: str,
    out: Path,
    *,
    profile: str,
    target: str,
    key: Path | None,
    committed: bool = False,
    broken: bool = False,
) -> Path:
    """Build one release into ``out`` and return the bundle's folder; ``broken``: one whose gateway does not start.

    Raises:
        subprocess.CalledProcessError: the build failed; what it said is on stderr.
        ValueError: the version cannot be set.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moat-release-") as scratch:
        checkout = Path(scratch)
        copy_tracked(checkout, committed=committed)
        set_version(checkout, version)
        if broken:
            break_gateway(checkout)
        argv = [sys.executable, "-m", "moat", "build", "--profile", profile, "--target", target]
        argv += ["-o", str(out.resolve()), *(["--key", str(key)] if key else [])]
        env = {**os.environ, "PYTHONPATH": str(checkout / "scripts"), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(argv, cwd=checkout, env=env, stdout=sys.stderr, check=True)
    return out.resolve() / f"moat-{version}-{profile}-{target}"


def main() -> int:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.releases", description="Build another release.")
    parser.add_argument("--version", required=True, help="of moat and moat-gateway, e.g. 0.1.1")
    parser.add_argument("--profile", choices=("demo", "site"), default="demo", help="default: %(default)s")
    parser.add_argument("--target", default="debian13-amd64", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle's folder is made in DIR")
    parser.add_argument("--key", type=Path, default=ROOT / ".moat" / "keys" / "moat.key", help="default: the demo's")
    parser.add_argument("--unsigned", action="store_true", help="sign with no key")
    parser.add_argument("--committed", action="store_true", help="take the last commit, not the folder as it is now")
    parser.add_argument("--broken", action="store_true", help="plant a gateway that does not start")
    args = parser.parse_args()
    key = None if args.unsigned else args.key.resolve()
    try:
        bundle = build(
            args.version,
            args.out,
            profile=args.profile,
            target=args.target,
            key=key,
            committed=args.committed,
            broken=args.broken,
        )
    except subprocess.CalledProcessError as e:
        return e.returncode
    print(bundle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
