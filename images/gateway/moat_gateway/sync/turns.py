# SPDX-License-Identifier: Apache-2.0
"""Rolling restarts: one gateway at a time, the next only when the one before is back and ready.

A gateway that cannot take a revision live says so in its report and serves the old one on. It gets the turn while all
others serve; it drains, ends, is started again and comes back with the revision. If it does not come back, nobody else
is restarted: the others go on with the old revision, and status says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moat_gateway.sync.nodefolder import Turn
from moat_gateway.sync.reports import ALIVE, Report

RETURN = 120.0  # seconds within which a gateway must be back and ready once its process is gone


@dataclass(frozen=True)
class _Stopped:
    turn: Turn
    why: str


class Turns:
    """Decides whose turn it is.

    Args:
        rolling: restarts are made; else gateways only report that they need one.
        drain: how long a gateway may take to end (s).
        say: called with the instance, the revision and a word (``given``, ``done``, ``failed``) and why.
        resume: the turn that was given before config-sync was restarted, or ``None``.
        back: seconds within which a gateway must be back; another value for tests.
    """

    def __init__(
        self,
        *,
        rolling: bool,
        drain: float,
        say: Callable[[str, int, str, str | None], None],
        resume: Turn | None = None,
        back: float = RETURN,
    ) -> None:
        self._rolling = rolling
        self._drain = drain
        self._say = say
        self._back = back
        self.turn: Turn | None = resume
        self._given: float | None = None  # when; None: at the next step
        self._gone: float | None = None  # since when the old process is not there
        self._stopped: _Stopped | None = None
        self._waits: str | None = None

    @property
    def degraded(self) -> tuple[str, ...]:
        """What a person should know, one line each."""
        lines = []
        if self._stopped is not None:
            turn = self._stopped.turn
            lines.append(
                f"the rolling restart to revision {turn.revision} stopped at {turn.instance}: {self._stopped.why}"
            )
        if self._waits is not None:
            lines.append(self._waits)
        return tuple(lines)

    def step(
        self,
        reports: Mapping[str, Report],
        revision: int | None,
        now: float,
        boot: str,
        objection: Callable[[], str | None] = lambda: None,
    ) -> Turn | None:
        """Look at the reports and return whose turn it is.

        Args:
            reports: by name of the instance.
            revision: the one in force on this node.
            now: in seconds of the machine's running time.
            boot: which run of the machine that is.
            objection: asked before a turn is given: why not (``None``: nothing against it; empty: not known yet).
        """
        ages = {name: r.age(now, boot) for name, r in reports.items()}
        alive = {name: r for name, r in reports.items() if (age := ages[name]) is not None and age <= ALIVE}
        # Who has been silent for long was removed or stopped by a person, and is not waited for.
        known = {name for name in reports if (age := ages[name]) is not None and age <= self._back}
        self._waits = None
        if self.turn is not None:
            self._follow(self.turn, alive.get(self.turn.instance), revision, now)
        if self._stopped is not None:
            self._look_again(self._stopped, alive, revision)
        if self._rolling and self.turn is None and self._stopped is None and revision is not None:
            self._give(alive, known, revision, now, objection)
        return self.turn

    def _follow(self, turn: Turn, report: Report | None, revision: int | None, now: float) -> None:
        if self._given is None:
            self._given = now
        if report is not None and report.started_at == turn.started_at:
            self._gone = None
            if not report.needs_restart and not report.draining:
                # A newer revision took back what could not be taken live.
                self._end(turn, "done", "no restart is needed any more")
            elif now - self._given > self._drain + self._back:
                self._end(turn, "failed", f"it did not end within {self._drain + self._back:g} s")
            return
        if self._gone is None:
            self._gone = now
        if report is not None and report.ready and not report.draining:
            if report.needs_restart and revision == turn.revision:
                self._end(turn, "failed", "it came back and still needs a restart: " + ", ".join(report.needs_restart))
                return
            if report.revision >= turn.revision or report.needs_restart:
                self._end(turn, "done", None)
                return
        if now - self._gone > self._back:
            self._end(turn, "failed", f"it was not back and ready within {self._back:g} s")

    def _end(self, turn: Turn, word: str, why: str | None) -> None:
        self.turn, self._given, self._gone = None, None, None
        if word == "failed":
            self._stopped = _Stopped(turn, why or "")
        self._say(turn.instance, turn.revision, word, why)

    def _look_again(self, stopped: _Stopped, alive: Mapping[str, Report], revision: int | None) -> None:
        """Go on when a newer revision is in force, or when the gateway did come back after all."""
        report = alive.get(stopped.turn.instance)
        back = (
            report is not None
            and report.ready
            and not report.draining
            and not report.needs_restart
            and report.revision >= stopped.turn.revision
        )
        if back or revision != stopped.turn.revision:
            self._stopped = None

    def _give(
        self,
        alive: Mapping[str, Report],
        known: set[str],
        revision: int,
        now: float,
        objection: Callable[[], str | None],
    ) -> None:
        waiting = [r for _, r in sorted(alive.items()) if r.needs_restart and not r.draining]
        if not waiting:
            return
        # One that does not serve costs nothing to restart, and may be helped by it.
        report = next((r for r in waiting if not r.ready), waiting[0])
        down = sorted(n for n in known - {report.name} if n not in alive or alive[n].draining or not alive[n].ready)
        if down:
            self._waits = f"the restart of {report.name} waits until {', '.join(down)} is ready"
            return
        against = objection()
        if against is not None:
            self._waits = f"the restart of {report.name} waits: {against}" if against else None
            return
        self.turn = Turn(report.name, revision, report.started_at)
        self._given, self._gone = now, None
        self._say(report.name, revision, "given", ", ".join(report.needs_restart))
