# SPDX-License-Identifier: Apache-2.0
"""Nodes and gateways as a table: once, or kept up to date in place on a terminal, or as lines where there is none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from moat_gateway import cliout, fleet
from moat_gateway.errors import GatewayError
from moat_gateway.fleet import Fleet, Gateway, Lag

_COLUMNS = ("NODE", "GATEWAY", "SERVES", "SINCE", "STATE")


def table(state: Fleet, revision: int | None, sha256: str | None = None) -> list[str]:
    """Return the lines of the table, one a gateway.

    Args:
        state: what is known.
        revision: that should be served, or ``None`` if nobody knows.
        sha256: of its manifest, or ``None``.
    """
    lags = {(x.node, x.gateway): x for x in fleet.lagging(state, revision or 0, sha256)}
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for g in state.gateways:
        rows.append((g.node, g.name, _served(g), _since(g), _state(g, lags.get((g.node, g.name)))))
    rows += [(n.name, "-", "-", "-", _empty(n, lags)) for n in state.nodes if not n.gateways]
    return cliout.table(rows)


def notes(state: Fleet) -> list[str]:
    """Return what is to be said of the nodes themselves."""
    out = []
    for n in state.nodes:
        if n.reachable is False:
            out.append(f"{n.name}: does not reach {n.where}: {n.why}")
        if n.last_refused is not None:
            kind, why = fleet.kind_of(n.last_refused), n.last_refused.get("reason")
            out.append(f"{n.name}: refused revision {n.last_refused.get('revision')}{kind}: {why}")
        out += [f"{n.name}: {d}" for d in n.degraded]
    unknown = [n.name for n in state.nodes if n.age is None]
    if unknown:
        out.append(f"how old these reports are is not known, as their folder cannot be written: {', '.join(unknown)}")
    return out


def wait(
    look: Callable[[], Fleet],
    revision: int,
    sha256: str | None,
    seconds: float,
    out: TextIO,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Fleet, tuple[Lag, ...], float]:
    """Follow a revision until every gateway serves it, or the time is over.

    Args:
        look: returns what is known now; a refusal counts as not yet.
        revision: the number.
        sha256: of its manifest.
        seconds: how long.
        out: where it is shown.
        clock: for tests.
        sleep: for tests.

    Returns:
        What is known, who lags, and how long it took (seconds).
    """
    begun = clock()
    show = Live(out) if out.isatty() else None
    told: dict[tuple[str, str | None], tuple[str, int]] = {}
    state = Fleet()
    while True:
        blind: tuple[Lag, ...] = ()
        try:
            state = look()
        except GatewayError as e:
            # It is in force: that the store does not answer now says nothing against that.
            blind = (Lag("the reports", None, "reports-not-read", f"cannot be read: {e.one_line()}"),)
        lags = (*fleet.lagging(state, revision, sha256), *blind)
        took = clock() - begun
        done = bool(state.gateways) and not lags
        if show is not None:
            ready = len(state.gateways) - sum(x.gateway is not None for x in lags)
            head = f"revision {revision}: {ready} of {len(state.gateways)} gateways, {took:.1f} s"
            show.update([*table(state, revision, sha256), *(f"{x.name}: {x.why}" for x in blind), head])
        else:
            _tell(state, lags, told, took, out)
        if done or took >= seconds:
            return state, lags, took
        sleep(min(0.25, max(0.01, seconds - took)))


class Live:
    """Lines that are replaced in place."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines = 0

    def update(self, lines: Sequence[str]) -> None:
        """Show these lines instead of the last ones."""
        size = shutil.get_terminal_size()
        # A line that wraps, or more lines than the screen has, could not be replaced.
        shown = [line[: size.columns - 1] for line in lines][-(size.lines - 1) :]
        up = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
        self._out.write(up + "".join(f"{line}\n" for line in shown))
        self._out.flush()
        self._lines = len(shown)


def _tell(
    state: Fleet, lags: Sequence[Lag], told: dict[tuple[str, str | None], tuple[str, int]], took: float, out: TextIO
) -> None:
    behind = {(x.node, x.gateway): x for x in lags}
    for g in state.gateways:
        lag = behind.get((g.node, g.name))
        # Not the text: how long somebody has been silent changes all the time.
        now = (lag.kind if lag else "", g.revision)
        if told.get((g.node, g.name)) != now:
            told[g.node, g.name] = now
            out.write(f"{took:6.1f} s  {g.node}/{g.name}: {lag.why if lag else f'serves revision {g.revision}'}\n")
            out.flush()
    blind = next((x for x in lags if x.kind == "reports-not-read"), None)
    here = (blind.kind if blind else "", 0)
    if told.get(("", None), ("", 0)) != here:
        told["", None] = here
        out.write(f"{took:6.1f} s  the reports: {blind.why if blind else 'are read again'}\n")
        out.flush()


def _served(gateway: Gateway) -> str:
    return f"revision {gateway.revision}" if gateway.revision else "local files"


def _since(gateway: Gateway) -> str:
    return gateway.applied_at or "-"


def _state(gateway: Gateway, lag: Lag | None) -> str:
    if lag is not None:
        return lag.why
    if gateway.draining:
        return "is ending"
    if not gateway.ready:
        return "not ready" + "".join(f"; {d}" for d in gateway.degraded)
    return "degraded: " + "; ".join(gateway.degraded) if gateway.degraded else "ok"


def _empty(node: fleet.Node, lags: dict[tuple[str, str | None], Lag]) -> str:
    lag = lags.get((node.name, None))
    return lag.why if lag is not None else "no gateway reports here"
