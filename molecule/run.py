#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs Molecule scenarios (all without names), each timed: what ``make molecule`` and the stage of ``make test`` call.

It brings the demo's bundle up to date with the checkout (``MOAT_TEST_MEDIUM`` and ``MOAT_TEST_PUBLIC_KEY`` name another
one), and passes on the rest: which base file Molecule reads, where its state goes. One scenario writes to the terminal;
several run two at a time, because an installation waits as much as it computes, and write to files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moat.console import Console
from moat.demo.places import BUNDLE, HOME, KEYS, PROFILE, ROOT, TARGET
from moat.demo.steps import CUT, Steps, moat
from moat.demo.up import build
from moat.errors import MoatError

#: In the order in which they are begun: the long ones first, and `default` before `upgrade`, which goes on from it.
SCENARIOS = ("default", "hostile", "multinode", "upgrade", "alternative", "debian12")
STATE = ROOT / ".moat" / "molecule"
#: The host that `default` has installed, as the image that `upgrade` starts from.
SNAPSHOT = "moat-testhost:installed"


@dataclass(frozen=True)
class Result:
    """How one scenario ended; ``seconds`` is wall time, ``log`` where it wrote, or ``None`` for the terminal."""

    name: str
    ok: bool
    seconds: float
    log: Path | None


def environment(*, short: bool) -> dict[str, str]:
    """Return the environment of Molecule: its tools first, all state below .moat/; ``short`` leaves out long tests."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOAT_TEST_MEDIUM": os.environ.get("MOAT_TEST_MEDIUM") or str(BUNDLE),
        "MOAT_TEST_PUBLIC_KEY": os.environ.get("MOAT_TEST_PUBLIC_KEY") or str(KEYS / "moat.pub"),
        "MOAT_TEST_SNAPSHOT": "",
        "NO_COLOR": "1",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOME": str(STATE / "ansible"),
        "MOLECULE_PROJECT_DIRECTORY": str(ROOT),
        # Tests of the hosts are no part of the tree's own pytest settings.
        "PYTEST_ADDOPTS": f"-q -ra --import-mode=importlib --rootdir={ROOT / 'molecule'} -c /dev/null"
        + (" -m 'not long'" if short else ""),
    }


def releases(log: Path | None) -> dict[str, str]:
    """Build what the scenario ``upgrade`` goes to (the next release, and one whose gateway does not start).

    Returns:
        The variables that name them; one is missing where a build failed.
    """
    found = {}
    # Without a network, as every build.
    argv = ["unshare", "--net", "--", sys.executable, "-m", "tests.releases", "--out", str(STATE / "releases")]
    for name, version, more in (("NEXT", "0.9.1", []), ("BROKEN", "0.9.2", ["--broken"])):
        done = subprocess.run(
            [*argv, "--version", version, *more], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            found[f"MOAT_TEST_{name}"] = done.stdout.strip().splitlines()[-1]
        elif log is not None:
            log.write_text(f"release {version} could not be built:\n{done.stderr}", "utf-8")
        else:
            print(done.stderr[-4000:], file=sys.stderr)
    return found


def debian12(log: Path | None) -> dict[str, str]:
    """Fetch and build the bundle of the second target.

    Returns:
        The variable that names it; empty where a step failed.
    """
    target, out = "debian12-amd64", STATE / "debian12-bundle"
    fetch = moat("fetch", "--profile", PROFILE, "--target", target, "--relock-vanished")
    build_it = moat("build", "--profile", PROFILE, "--target", target, "-o", str(out), "--key", str(KEYS / "moat.key"))
    for argv in (fetch, [*CUT, *build_it]):
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = f"{' '.join(argv)} failed:\n{done.stderr}"
            if log is not None:
                log.write_text(said, "utf-8")
            else:
                print(said[-4000:], file=sys.stderr)
            return {}
    return {"MOAT_TEST_MEDIUM": str(out / BUNDLE.name.replace(TARGET, target))}


def scenario(name: str, *, env: dict[str, str], keep: bool, log: Path | None, after: Future[Result] | None) -> Result:
    """Run one scenario; ``after`` is waited for first."""
    if after is not None:
        after.result()
    started = time.monotonic()
    env = dict(env)
    if name == "upgrade":
        there = subprocess.run(["docker", "image", "inspect", SNAPSHOT], capture_output=True, check=False)
        if there.returncode != 0:
            env["MOAT_TEST_SNAPSHOT"] = ""  # `default` did not run, or did not come that far
        env |= releases(log)
        if "MOAT_TEST_NEXT" not in env or "MOAT_TEST_BROKEN" not in env:
            return Result(name, False, time.monotonic() - started, log)
    if name == "debian12":
        other = debian12(log)
        if not other:
            return Result(name, False, time.monotonic() - started, log)
        env |= other
    base = ["molecule", "--base-config", str(ROOT / "molecule" / "base.yml")]
    commands = [[*base, "test", "--scenario-name", name, "--no-command-borders", "--destroy", "always"]]
    if keep:  # "never" leaves out the destroy at the start too
        commands[0][-1] = "never"
        commands.insert(0, [*base, "destroy", "--scenario-name", name])
    code = 0
    for command in commands:
        if log is None:
            code = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, check=False).returncode
        else:
            with log.open("ab") as out:
                done = subprocess.run(
                    command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False
                )
            code = done.returncode
    return Result(name, code == 0, time.monotonic() - started, log)


def prepare(env: dict[str, str]) -> None:
    """Make once what several scenarios would otherwise make at the same time.

    Raises:
        MoatError: the bundle could not be built.
        subprocess.CalledProcessError: the image of the hosts or the model could not be made.
    """
    if not os.environ.get("MOAT_TEST_MEDIUM"):
        HOME.mkdir(mode=0o755, exist_ok=True)
        build(Steps(Console()))
    for argv in (["build.py", "debian13"], ["model.py", env["MOAT_TEST_MEDIUM"]]):
        program = ROOT / "molecule" / "testhost" / argv[0]
        subprocess.run([sys.executable, str(program), *argv[1:]], check=True, stdout=subprocess.DEVNULL)


def run(names: Sequence[str], *, keep: bool, jobs: int, short: bool) -> list[Result]:
    """Run the scenarios, ``jobs`` at a time, and return how they ended."""
    env = environment(short=short)
    prepare(env)
    if {"default", "upgrade"} <= set(names):
        env["MOAT_TEST_SNAPSHOT"] = SNAPSHOT
    begun: dict[str, Future[Result]] = {}
    _forget_snapshot()  # of a run that was killed: `upgrade` must not go on from another day's host
    try:
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            for name in names:
                log = STATE / f"{name}.log" if jobs > 1 else None
                if log is not None:
                    log.unlink(missing_ok=True)
                    print(f"=== molecule {name} (writes to {log.relative_to(ROOT)})", flush=True)
                else:
                    print(f"\n=== molecule {name} ===", flush=True)
                after = begun.get("default") if name == "upgrade" else None
                begun[name] = pool.submit(scenario, name, env=env, keep=keep, log=log, after=after)
                if jobs == 1:
                    begun[name].result()
            return [f.result() for f in begun.values()]
    finally:
        _forget_snapshot()


def _forget_snapshot() -> None:
    subprocess.run(["docker", "rmi", "--force", SNAPSHOT], capture_output=True, check=False)


def main(argv: list[str]) -> int:
    """Run the scenarios and print their times; return 0 only if each passed."""
    parser = argparse.ArgumentParser(description="Run Molecule scenarios with networking disabled.")
    parser.add_argument("scenario", nargs="*", choices=[*SCENARIOS, []], help="all without names")
    parser.add_argument("--keep", action="store_true", help="leave the hosts after the tests")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default 2; one scenario: 1)")
    parser.add_argument("--short", action="store_true", help="without the tests that are marked long")
    args = parser.parse_args(argv)
    names = args.scenario or [n for n in SCENARIOS if (ROOT / "molecule" / n / "molecule.yml").is_file()]
    STATE.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        results = run(names, keep=args.keep, jobs=min(args.jobs, len(names)), short=args.short)
    except MoatError as e:
        Console().problem(e)
        return e.exit_code
    except subprocess.CalledProcessError as e:
        return e.returncode
    for r in results:
        if not r.ok and r.log is not None and r.log.is_file():
            tail = r.log.read_text("utf-8", "replace").splitlines()[-80:]
            print(f"\n--- the last lines of {r.name} ---\n" + "\n".join(tail))
    print("\nscenario      result    seconds")
    for r in results:
        print(f"{r.name:<13} {'passed' if r.ok else 'FAILED':<8} {r.seconds:8.0f}")
        if not r.ok:
            print(f"  journal and logs: .moat/molecule/{r.name}/; the same alone: make molecule SCENARIO={r.name}")
    print(f"{'in all':<13} {'':<8} {time.monotonic() - started:8.0f}")
    return 0 if all(r.ok for r in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
