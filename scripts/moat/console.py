# SPDX-License-Identifier: Apache-2.0
"""What a person reads: nested timed steps, progress with rate and ETA, results.

Everything but the result goes to stderr, so that ``--json`` leaves exactly one object on
stdout. On a terminal progress redraws one line; off it (a log, CI) it prints a plain line
every few seconds.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TextIO

from moat.errors import MoatError


def human_bytes(n: float) -> str:
    """Return ``n`` bytes with a binary unit, e.g. ``98.1 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def human_seconds(s: float) -> str:
    """Return a duration in seconds as ``0.4 s``, ``12 s``, ``3 min 05 s``."""
    if s < 10:
        return f"{s:.1f} s"
    if s < 60:
        return f"{s:.0f} s"
    return f"{int(s // 60)} min {int(s % 60):02d} s"


def printable(text: str) -> str:
    """Return ``text`` with everything but printable characters and line ends written as an escape.

    File names on a hostile medium and the output of other programs reach the terminal; an escape
    sequence or a right-to-left override in them must not be able to redraw what the operator reads.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


class Progress:
    """A thread-safe byte counter that draws itself; made by :meth:`Console.progress`."""

    _LINE_EVERY: ClassVar = {True: 0.2, False: 5.0}  # seconds between redraws, on and off a terminal

    def __init__(self, console: Console, label: str, total: int, clock: Callable[[], float]) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._done = 0
        self._clock = clock
        self._started = self._drawn = clock()
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        """Count ``n`` more bytes as done."""
        with self._lock:
            self._done += n
            now = self._clock()
            if now - self._drawn >= self._LINE_EVERY[self._console.is_terminal]:
                self._drawn = now
                self._console._draw(self._text(now))

    def _text(self, now: float) -> str:
        elapsed = max(now - self._started, 1e-6)
        rate = self._done / elapsed
        share = 100 * self._done / self._total if self._total else 100
        eta = human_seconds((self._total - self._done) / rate) if rate else "?"
        return (
            f"{self._label}: {human_bytes(self._done)} of {human_bytes(self._total)} "
            f"({share:.0f} %), {human_bytes(rate)}/s, {eta} left"
        )


class Console:
    """Output for one command.

    Args:
        json_mode: results are one JSON object on stdout; nothing else is written there.
        quiet: no steps and no progress, only problems and the result.
        err: stream for steps, progress and messages.
        out: stream for the result.
        clock: monotonic seconds (a parameter so that tests need no patching).
    """

    def __init__(
        self,
        *,
        json_mode: bool = False,
        quiet: bool = False,
        err: TextIO | None = None,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self._err = err if err is not None else sys.stderr
        self._out = out if out is not None else sys.stdout
        self._clock = clock
        self._depth = 0
        self._dirty = False  # a progress line without a newline stands on the terminal
        self.is_terminal = self._err.isatty()

    def info(self, text: str) -> None:
        """Print one message for the person who watches."""
        if not self.quiet:
            self._line("  " * self._depth + text)

    def warn(self, text: str) -> None:
        """Print a warning; it is shown even when quiet."""
        self._line("  " * self._depth + "warning: " + text)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print ``title``, run the body one level deeper, print how long it took."""
        self.info(f"==> {title}" if self._depth == 0 else f"- {title}")
        started = self._clock()
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            self.info(f"    failed after {human_seconds(self._clock() - started)}: {title}")
            raise
        self._depth -= 1
        self.info(f"    done in {human_seconds(self._clock() - started)}")

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """Yield a byte counter for work of ``total`` bytes."""
        bar = Progress(self, label, total, self._clock)
        try:
            yield bar
        finally:
            self._clear()

    def result(self, obj: Mapping[str, Any], text: str) -> None:
        """Print the command's result: ``obj`` with ``--json``, else ``text``."""
        self._clear()
        self._out.write(
            json.dumps(obj, sort_keys=True) + "\n" if self.json_mode else printable(text).rstrip("\n") + "\n"
        )
        self._out.flush()

    def problem(self, error: MoatError) -> None:
        """Print a refusal: what happened, found against expected, what to do."""
        # A file name may hold line ends: one must not begin a line that looks like ours.
        self._line("error: " + error.message.replace("\n", "\\n"))
        for name, value in (("found", error.found), ("expected", error.expected), ("do", error.hint)):
            if value:
                lines = [line.strip() for line in value.split("\n")]
                self._line(f"  {name + ':':<10}" + ("\n" + " " * 12).join(lines))

    def run(
        self,
        argv: Sequence[str],
        *,
        error: type[MoatError],
        what: str,
        hint: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes | None = None,
        show: bool = True,
        own_session: bool = False,
    ) -> str:
        """Run a program from a list, printed before it runs, and return its stdout.

        ``own_session``: a Ctrl-C at the terminal is ours alone and does not reach it.

        Raises:
            MoatError: of class ``error`` when it cannot be started or exits non-zero; the
                message carries the last lines of its output. ``show=False`` keeps an argv
                with nothing of interest out of the output; secrets never go into an argv.
        """
        if show:
            self.info("+ " + shlex.join(argv))
        try:
            done = subprocess.run(
                list(argv),
                env=dict(env) if env is not None else None,
                cwd=cwd,
                input=stdin,
                capture_output=True,
                check=False,
                start_new_session=own_session,
            )
        except OSError as e:
            raise error(f"{what}: cannot start {argv[0]}", found=str(e), hint=hint) from e
        if done.returncode != 0:
            tail = (done.stderr + done.stdout).decode("utf-8", "replace").strip().splitlines()[-15:]
            raise error(
                f"{what}: {argv[0]} ended with code {done.returncode}",
                found="\n            ".join(tail) or "no output",
                hint=hint,
            )
        return done.stdout.decode("utf-8", "replace")

    def _line(self, text: str) -> None:
        self._clear()
        self._err.write(printable(text) + "\n")
        self._err.flush()

    def _draw(self, text: str) -> None:
        if self.quiet:
            return
        if self.is_terminal:
            self._err.write("\r\x1b[2K" + "  " * self._depth + text)
            self._err.flush()
            self._dirty = True
        else:
            self._line("  " * self._depth + text)

    def _clear(self) -> None:
        if self._dirty:
            self._err.write("\r\x1b[2K")
            self._dirty = False
