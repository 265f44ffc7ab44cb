#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the stages of ``make test`` in order, each timed, and prints one table at the end.

A failing stage does not hide the later ones, except that the acceptance tests need the demo. Molecule runs beside the
acceptance tests, which keep one core busy; its hosts have no network, and the demo's containers are none of theirs.
The stack is left as it was found: where no demo was running before, it is taken down at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moat.demo.places import BUNDLE, KEYS

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
#: Set, the tests that are marked `long` run, too, and one more scenario (docs/developers.md).
LONG = "MOAT_LONG_TESTS" in os.environ
PYTEST = [PYTHON, "-m", "pytest", "--durations=5", "-q", *([] if LONG else ["-m", "not long"])]
#: The scenarios that every run has time for; `make molecule` runs all of them (docs/molecule.md).
MOLECULE = ("default", "hostile", "upgrade") if LONG else ("--short", "default", "hostile")
#: Most of these tests wait for programs that start: two at once, the tests of one file never side by side. In the order
#: of the files: sorted by their number of tests, the long builds would come last and alone.
SIDE_BY_SIDE = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def _run(argv: list[str], environment: dict[str, str] | None = None) -> bool:
    print("+ " + " ".join(a if len(a) < 60 else a[:57] + "..." for a in argv[:8]), flush=True)
    return subprocess.run(argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False).returncode == 0


def _tracked(*patterns: str) -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    return [name for name in done.stdout.decode().splitlines() if (ROOT / name).is_file()]


def _ansible_lint() -> bool:
    """Run ansible-lint without a network, with the configuration, modules and roles of ansible/."""
    bin_dir = Path(PYTHON).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "ANSIBLE_HOME": str(ROOT / ".moat" / "ansible-lint"),
        "ANSIBLE_LIBRARY": str(ROOT / "ansible" / "library"),
        "ANSIBLE_MODULE_UTILS": str(ROOT / "ansible" / "module_utils"),
        "ANSIBLE_FILTER_PLUGINS": str(ROOT / "ansible" / "filter_plugins"),
        "ANSIBLE_ROLES_PATH": str(ROOT / "ansible" / "roles"),
    }
    argv = [str(bin_dir / "ansible-lint"), "--offline", "-q", "-c", "ansible/.ansible-lint", "ansible", "molecule"]
    return _run(argv, environment)


def lint() -> bool:
    """Run every linter; all of them, so that one run shows all there is to mend."""
    bin_dir = Path(PYTHON).parent
    shell = [n for n in _tracked("*.sh", ".ci/run") if n]
    results = [
        _run([str(bin_dir / "ruff"), "check", "."]),
        _run([str(bin_dir / "ruff"), "format", "--check", "."]),
        _run([PYTHON, "-m", "mypy", "scripts/moat", "images/gateway/moat_gateway", "tests/run.py"]),
        # Its own run: these are scripts, not modules of one package.
        _run([PYTHON, "-m", "mypy", *_tracked("molecule/*.py", ":!molecule/*/tests/*", ":!molecule/conftest.py")]),
        _run([str(bin_dir / "yamllint"), "--strict", *_tracked("*.yaml", "*.yml", ".yamllint")]),
        _run(["shellcheck", *shell]),
        _ansible_lint(),
    ]
    return all(results)


def unit() -> bool:
    """Fast tests, no engine."""
    return _run([*PYTEST, *SIDE_BY_SIDE, "tests/unit"])


def demo() -> bool:
    """Bring the demo up; it also fills the cache that the integration tests read."""
    # What a killed run of tests/integration/compose/test_demo_beside_a_site.py leaves: no demo starts beside it.
    label = "label=com.docker.compose.project.working_dir=/opt/moat-of-somebody"
    left = subprocess.run(["docker", "ps", "-aq", "--filter", label], capture_output=True, text=True, check=False)
    if left.stdout:
        _run(["docker", "rm", *left.stdout.split()])
    return _run([PYTHON, "-m", "moat.demo", "up"])


def integration() -> bool:
    """Tests with real servers and programs."""
    return _run([*PYTEST, *SIDE_BY_SIDE, "tests/integration"])


def acceptance() -> bool:
    """Tests of the whole product through the running demo."""
    return _run([*PYTEST, "tests/acceptance"])


def molecule() -> bool:
    """The USB install on test hosts without a network; each scenario is timed in a table of its own."""
    return _run([PYTHON, "molecule/run.py", *MOLECULE])


class Beside:
    """Molecule while another stage runs: it installs the demo's bundle as it is, and writes to a file.

    A build of its own would put another folder in the bundle's place while the acceptance tests read it.
    """

    LOG = ROOT / ".moat" / "molecule" / "stage.log"

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.LOG.parent.mkdir(parents=True, exist_ok=True)
        environment = {"MOAT_TEST_MEDIUM": str(BUNDLE), "MOAT_TEST_PUBLIC_KEY": str(KEYS / "moat.pub"), **os.environ}
        print(f"=== molecule begins beside it (writes to {self.LOG.relative_to(ROOT)}) ===", flush=True)
        with self.LOG.open("wb") as log:
            self._process = subprocess.Popen(
                [PYTHON, "molecule/run.py", *MOLECULE],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def end(self) -> bool:
        """Wait for the end, print what it wrote, and return whether every scenario passed."""
        code = self._process.wait()
        print(self.LOG.read_text("utf-8", "replace"), flush=True)
        return code == 0


@dataclass(frozen=True)
class Result:
    """How one stage ended; ``seconds`` is wall time."""

    stage: str
    word: str
    seconds: float


STAGES: dict[str, Callable[[], bool]] = {
    "lint": lint,
    "unit": unit,
    "demo": demo,
    "integration": integration,
    "acceptance": acceptance,
    "molecule": molecule,
}


def main(names: list[str]) -> int:
    """Run the named stages (all without names); return 0 only if each passed."""
    unknown = [n for n in names if n not in STAGES]
    if unknown:
        print(f"unknown stage {unknown[0]}; there are: {' '.join(STAGES)}", file=sys.stderr)
        return 2
    wanted = names or list(STAGES)
    if "acceptance" in wanted and "demo" not in wanted:
        wanted.insert(wanted.index("acceptance"), "demo")
    was_running = (ROOT / ".moat" / "demo.json").exists()
    results: list[Result] = []
    failed: set[str] = set()
    beside: Beside | None = None
    for name in wanted:
        if name == "acceptance" and "demo" in failed:
            results.append(Result(name, "not run: the demo failed", 0))
            failed.add(name)
            continue
        print(f"\n=== {name} ===", flush=True)
        started = time.monotonic()
        if name == "acceptance" and "molecule" in wanted[wanted.index(name) :]:
            beside = Beside()
        if name == "molecule" and beside is not None:
            started = beside.started
            ok = beside.end()
        else:
            ok = STAGES[name]()
        results.append(Result(name, "passed" if ok else "FAILED", time.monotonic() - started))
        if not ok:
            failed.add(name)
    if "demo" in wanted and not was_running:
        print("\n=== the demo was not running before: taking it down ===", flush=True)
        _run([PYTHON, "-m", "moat.demo", "down"])
    print("\nstage        result      seconds")
    for r in results:
        print(f"{r.stage:<12} {r.word:<11} {r.seconds:7.0f}")
    if failed:
        print(f"\nNext: run the first failing stage alone: make {next(r.stage for r in results if r.stage in failed)}")
    else:
        print("\nNext: make demo (a running gateway to try by hand), make bench (the measurements)")
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
