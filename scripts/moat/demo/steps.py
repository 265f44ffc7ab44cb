# SPDX-License-Identifier: Apache-2.0
"""The demo's steps: each with a title, a time, and a word on which network it had."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from moat.console import Console, human_seconds
from moat.demo.places import ROOT
from moat.errors import DemoFailed, MoatError, all_kinds

#: A network namespace of its own with nothing in it but a loopback that is down: a socket call to anywhere fails.
#: Unix sockets are not part of it, so docker can still be asked.
CUT: Final = ("unshare", "--net", "--")
_BY_CODE: Final = {kind.exit_code: kind for kind in all_kinds()}


@dataclass(frozen=True)
class Step:
    """One finished step; ``network`` is ``open``, ``cut``, or why it was neither."""

    title: str
    network: str
    seconds: float


class Steps:
    """Runs commands and keeps the table.

    Args:
        console: for the person who watches.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.done: list[Step] = []

    @contextmanager
    def step(self, title: str, network: str) -> Iterator[None]:
        """Time one step."""
        started = time.monotonic()
        with self.console.step(f"{title}  [network: {network}]"):
            yield
        self.done.append(Step(title, network, time.monotonic() - started))

    def watch(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, what: str) -> None:
        """Run a command whose output the person wants to see as it comes.

        Raises:
            MoatError: it failed; of the refusal's own class where the exit code is one of ours.
        """
        self.console.info("+ " + shlex.join(argv))
        tail: deque[str] = deque(maxlen=12)
        try:
            with subprocess.Popen(
                list(argv),
                cwd=ROOT,
                env=dict(env) if env is not None else None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as child:
                for line in child.stdout or ():
                    tail.append(line.rstrip("\n"))
                    self.console.info("  " + line.rstrip("\n"))
        except OSError as e:
            raise DemoFailed(f"{what}: cannot start {argv[0]}", found=str(e)) from e
        if child.returncode != 0:
            kind: type[MoatError] = _BY_CODE.get(child.returncode, DemoFailed)
            raise kind(
                f"{what} failed with code {child.returncode}",
                found="\n            ".join(tail) or "no output",
                hint="mend what the lines above say, then `make demo` again: what is done is kept",
            )

    def ask(self, argv: Sequence[str], *, what: str, show: bool = True) -> str:
        """Run a short command and return its stdout."""
        return self.console.run(argv, error=DemoFailed, what=what, cwd=str(ROOT), show=show)

    def table(self) -> str:
        """Return the table of all steps."""
        width = max(len(s.title) for s in self.done)
        rows = [f"  {s.title:<{width}}  {human_seconds(s.seconds):>12}  {s.network}" for s in self.done]
        total = sum(s.seconds for s in self.done)
        return "\n".join([*rows, f"  {'in all':<{width}}  {human_seconds(total):>12}"])


def moat(*words: str) -> list[str]:
    """Return the argv of a command of the build host's ``moat``."""
    return [sys.executable, "-m", "moat", *words]
