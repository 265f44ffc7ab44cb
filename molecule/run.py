#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs Molecule scenarios (all without names), each timed: what ``make molecule`` and the stage of ``make test`` call.

It brings the demo's bundle up to date with the checkout (``MOAT_TEST_MEDIUM`` and ``MOAT_TEST_PUBLIC_KEY`` name another
one), and passes on the rest: which base file Molecule reads, where its state goes. With ``--keep`` the hosts of a
scenario stay, to look around in.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from moat.console import Console
from moat.demo.places import BUNDLE, HOME, KEYS, ROOT
from moat.demo.steps import Steps
from moat.demo.up import build
from moat.errors import MoatError

SCENARIOS = ("default", "upgrade", "hostile", "multinode", "alternative")
#: The host that `default` has installed, as the image that `upgrade` starts from.
SNAPSHOT = "moat-testhost:installed"


def environment() -> dict[str, str]:
    """Return the environment of Molecule: its tools first, all state below .moat/."""
    state = ROOT / ".moat" / "molecule"
    state.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOAT_TEST_MEDIUM": os.environ.get("MOAT_TEST_MEDIUM") or str(BUNDLE),
        "MOAT_TEST_PUBLIC_KEY": os.environ.get("MOAT_TEST_PUBLIC_KEY") or str(KEYS / "moat.pub"),
        "NO_COLOR": "1",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": str(state / "ansible"),
        "MOLECULE_PROJECT_DIRECTORY": str(ROOT),
        # Tests of the hosts are no part of the tree's own pytest settings.
        "PYTEST_ADDOPTS": f"-q -ra --import-mode=importlib --rootdir={ROOT / 'molecule'} -c /dev/null",
    }


def releases(env: dict[str, str]) -> None:
    """Build what the scenario ``upgrade`` goes to: the next release, and one whose gateway does not start.

    Raises:
        subprocess.CalledProcessError: a build failed; what it said is on stderr.
    """
    out = ROOT / ".moat" / "molecule" / "releases"
    argv = [sys.executable, "-m", "tests.releases", "--out", str(out)]
    # Without a network, as every build.
    cut = ["unshare", "--net", "--"]
    for name, version, more in (("NEXT", "0.9.1", []), ("BROKEN", "0.9.2", ["--broken"])):
        print(f"+ build release {version} {' '.join(more)}", flush=True)
        command = [*cut, *argv, "--version", version, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stderr[-3000:], file=sys.stderr)
            done.check_returncode()
        env[f"MOAT_TEST_{name}"] = done.stdout.strip().splitlines()[-1]


def main(argv: list[str]) -> int:
    """Run the scenarios and print their times; return 0 only if each passed."""
    parser = argparse.ArgumentParser(description="Run Molecule scenarios with networking disabled.")
    parser.add_argument("scenario", nargs="*", choices=[*SCENARIOS, []], help="all without names")
    parser.add_argument("--keep", action="store_true", help="leave the hosts after the tests")
    args = parser.parse_args(argv)
    if not os.environ.get("MOAT_TEST_MEDIUM"):
        try:
            HOME.mkdir(mode=0o755, exist_ok=True)
            build(Steps(Console()))
        except MoatError as e:
            Console().problem(e)
            return e.exit_code
    env = environment()
    scenarios = args.scenario or SCENARIOS
    env["MOAT_TEST_SNAPSHOT"] = SNAPSHOT if {"default", "upgrade"} <= set(scenarios) else ""
    results: list[tuple[str, bool, float]] = []
    for name in scenarios:
        base = ["molecule", "--base-config", str(ROOT / "molecule" / "base.yml")]
        command = [*base, "test", "--scenario-name", name, "--no-command-borders"]
        command += ["--destroy", "never" if args.keep else "always"]
        print(f"\n=== molecule {name} ===", flush=True)
        started = time.monotonic()
        if name == "upgrade":
            there = subprocess.run(["docker", "image", "inspect", SNAPSHOT], capture_output=True, check=False)
            if there.returncode != 0:
                env["MOAT_TEST_SNAPSHOT"] = ""  # `default` did not come that far
            try:
                releases(env)
            except subprocess.CalledProcessError:
                results.append((name, False, time.monotonic() - started))
                continue
        if args.keep:  # "never" leaves out the destroy at the start too
            destroy = [*base, "destroy", "--scenario-name", name]
            subprocess.run(destroy, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, check=False)
        results.append((name, done.returncode == 0, time.monotonic() - started))
    subprocess.run(["docker", "rmi", "--force", SNAPSHOT], capture_output=True, check=False)
    print("\nscenario      result    seconds")
    for name, ok, seconds in results:
        print(f"{name:<13} {'passed' if ok else 'FAILED':<8} {seconds:8.0f}")
        if not ok:
            print(f"  journal and logs: .moat/molecule/{name}/; the same alone: make molecule SCENARIO={name}")
    return 0 if all(ok for _, ok, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
