# SPDX-License-Identifier: Apache-2.0
"""One verification from end to end, over the :class:`Site` and :class:`Layer` protocols.

Whatever happens - a refusal, a signal, a defect - every layer that was started is stopped and what it
set on the host is removed. What a run that was killed outright leaves behind is removed by the watcher
that it started, and once more by the next run (:mod:`moat.site.egresscheck.leftovers`).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import EgressUnproven, MoatError
from moat.site.egresscheck import leftovers, signals
from moat.site.egresscheck.attribute import attribute, name_servers
from moat.site.egresscheck.marks import CONTROL
from moat.site.egresscheck.model import (
    Attempt,
    Component,
    Endpoint,
    Layer,
    LayerResult,
    NotAvailable,
    Probe,
    Report,
    RequestResult,
    Site,
    Step,
)
from moat.site.egresscheck.subject import differences
from moat.site.egresscheck.when import stamp

#: Events are on their way for a moment (a queue in the kernel, a thread of ours); then a layer is asked.
_SETTLE_SECONDS: Final = 1.0
_PROGRESS_EVERY: Final = 10.0


@dataclass(frozen=True)
class Options:
    """What the operator decides. ``quiet_seconds``: how long to watch on; ``allow``: destinations that are no leak."""

    quiet_seconds: float = 30.0
    allow: tuple[str, ...] = ()
    settle_seconds: float = _SETTLE_SECONDS


class Capture:
    """The layers of one run: which are watching, what they saw, what went wrong."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: list[Layer] = []
        self._refused: dict[str, str] = {}
        self._controls: dict[str, str] = {}
        self._order: list[Layer] = []
        self._failed: dict[str, str] = {}
        self.seen: list[Attempt] = []
        self.problems: list[str] = []
        self.names: dict[str, str] = {}

    def start(self, layers: Sequence[Layer], components: Sequence[Component]) -> None:
        """Start every layer; one that the host does not offer is remembered with its reason."""
        for layer in layers:
            self._order.append(layer)
            # Entered before it starts: what a start that broke in the middle has set must be removed too.
            self._running.append(layer)
            try:
                layer.start(components)
            except NotAvailable as e:
                self._running.remove(layer)
                layer.stop()
                self._refused[layer.name] = str(e)
                self._console.warn(f"layer {layer.name} is not available here: {e}")
            else:
                self._console.info(f"layer {layer.name} is watching")

    def controls(self) -> None:
        """Let every running layer make its control."""
        for layer in self._running:
            try:
                self._controls[layer.name] = layer.control()
            except (OSError, RuntimeError, NotAvailable) as e:
                self._failed[layer.name] = f"the control could not be made: {e}"

    def stop(self) -> None:
        """Stop every running layer and take what it saw; runs to its end whatever one of them does."""
        first: BaseException | None = None
        while self._running:
            layer = self._running.pop()
            try:
                self.seen += layer.stop()
            except BaseException as e:
                first = first or e
                self.problems.append(f"layer {layer.name} did not end cleanly: {e}")
            self.problems += [f"{layer.name}: {text}" for text in getattr(layer, "problems", ())]
            self.names.update(getattr(layer, "answers", {}))
        if isinstance(first, (TypeError, AttributeError, NameError)) or not isinstance(first, Exception | None):
            raise first  # a defect of ours, or an interruption, is no finding about the site

    def results(self) -> list[LayerResult]:
        """Return what each layer could do, in the order in which they were started."""
        found = []
        for layer in self._order:
            name = layer.name
            if name in self._refused:
                found.append(LayerResult(name, False, None, self._refused[name]))
                continue
            caught = name in self._controls and any(a.layer == name and a.component == CONTROL for a in self.seen)
            why = self._failed.get(name) or f"control: {self._controls.get(name, 'not made')}"
            found.append(LayerResult(name, True, caught, why, tuple(getattr(layer, "notes", ()))))
        return found


def verify(
    site: Site,
    options: Options,
    console: Console,
    *,
    sleep: Callable[[float], None] = time.sleep,
    lock: Path = leftovers.LOCK,
) -> Report:
    """Verify a running site and return the evidence.

    Args:
        site: what to verify.
        options: the operator's decisions.
        console: where steps and progress go.
        sleep: waits (a parameter for tests).
        lock: the file that lets one verification run at a time.

    Raises:
        EgressUnproven: nothing runs here, or another verification does.
    """
    started = stamp()
    steps: list[Step] = []

    @contextmanager
    def step(title: str) -> Iterator[None]:
        steps.append(Step(stamp(), title))
        with console.step(title):
            yield

    with leftovers.only_one(console, lock):
        with step("Read what runs and which addresses its configuration names"):
            components = site.components()
            if not components:
                raise EgressUnproven(
                    "no service of the site is running",
                    found="none",
                    expected="at least one",
                    hint="start the site first, and see that it answers",
                )
            for c in components:
                console.info(f"{c.name:<12} {c.unit} (user id {c.uid})")
            endpoints, allowed = _configured(site, options)
        capture = Capture(console)
        requests: list[RequestResult] = []
        probes: list[Probe] = []
        rules = ""
        about: dict[str, str] = {}
        host = {"kernel": platform.release(), "host": platform.node(), **getattr(site, "facts", dict)()}
        try:
            with step("Start to watch"):
                capture.start(site.layers(allowed), components)
            try:
                with step("Restart the services inside the capture"):
                    site.restart(components)
                with step("Read again what the restarted services are configured with"):
                    before = allowed
                    endpoints, allowed = _configured(site, options)
                    capture.problems += _differences(before, allowed, components, site.components())
                with step("Send a first request of every kind"):
                    requests = site.requests()
                    for r in requests:
                        console.info(f"{r.kind:<12} {r.status or '-':>3} {'ok' if r.ok else 'FAILED'} {r.note}")
                    about = site.subject()
                with step(f"Watch for {options.quiet_seconds:g} s more"):
                    _quiet(options.quiet_seconds, console, sleep)
            except MoatError as e:
                # A service that does not start because it was refused what it tried is the finding itself.
                console.problem(e)
                capture.problems.append(f"the capture was cut short: {e.message} ({e.found})")
            with step("Make one deliberate attempt for every layer"):
                capture.controls()
                sleep(options.settle_seconds)
            with step("Probe, and read the rules in force"):
                probes = site.probes()
                rules = site.rules()
                # To the end of the capture: a service that is down is as quiet as one that tries nothing.
                capture.problems += site.changes()
                now = site.subject()
                capture.problems += _replaced(about, now)
                about = about or now
        finally:
            with signals.deferred():
                steps.append(Step(stamp(), "Remove everything that was set for the capture"))
                try:
                    capture.stop()
                finally:
                    still = leftovers.remove(console)
        layers = capture.results()
        # Only a sinkhole that was alive to the end has all the questions.
        asked = any(n.name == "dns" and n.control_caught for n in layers)
        found = attribute(capture.seen, components, capture.names, name_servers() if asked else frozenset())
        return Report(
            site=site.kind,
            started=started,
            ended=stamp(),
            quiet_seconds=options.quiet_seconds,
            components=tuple(components),
            endpoints=tuple(endpoints),
            layers=tuple(layers),
            requests=tuple(requests),
            attempts=tuple(a for a in found if a.component != CONTROL),
            probes=tuple(probes),
            rules=rules,
            problems=(*capture.problems, *_unanswered(requests), *_not_removed(still)),
            host=host,
            steps=tuple(steps),
            allowed=allowed,
            subject=about,
        )


def _configured(site: Site, options: Options) -> tuple[list[Endpoint], tuple[str, ...]]:
    """Return what the configuration names, and the allow-list: the site's own first, then the operator's words."""
    endpoints = site.endpoints()
    return endpoints, tuple(dict.fromkeys((*getattr(site, "allowed", lambda: ())(), *options.allow)))


def _differences(
    before: Sequence[str], allowed: Sequence[str], watched: Sequence[Component], now: Sequence[Component]
) -> list[str]:
    """Say where the capture was set up by something else than what took force with the restart."""
    found = []
    if set(before) != set(allowed):
        gone = ", ".join(a for a in before if a not in allowed) or "nothing"
        new = ", ".join(a for a in allowed if a not in before) or "nothing"
        found.append(
            f"the allow-list changed with the restart ({gone} is no more on it, {new} is new), and the capture went by "
            "the one before: run it again"
        )
    # Root is known by its control group, everyone else by the user.
    known = {(c.name, c.uid) for c in watched}
    for c in now:
        if c.uid != 0 and (c.name, c.uid) not in known:
            found.append(f"{c.name} runs as user {c.uid} since its restart, who was not watched: run it again")
    return found


def _replaced(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A configuration that was pushed in the middle was watched for a part of the time only."""
    return [
        f"{name} changed during the capture ({before}, then {after}): run it again"
        for name, (before, after) in (differences(then, now) if then else {}).items()
    ]


def _unanswered(requests: Sequence[RequestResult]) -> list[str]:
    """A site that does not answer was not exercised: what a request would set off was not seen."""
    return [
        f"the first request `{r.kind}` was not answered as expected: {r.status} {r.note}" for r in requests if not r.ok
    ]


def _not_removed(still: Sequence[str]) -> list[str]:
    """The site is not as it was: it goes on being cut off from what the capture refused it, or does not run."""
    return [f"what was done for the capture could not be undone: {what}" for what in still]


def _quiet(seconds: float, console: Console, sleep: Callable[[float], None]) -> None:
    left = seconds
    while left > 0:
        part = min(left, _PROGRESS_EVERY)
        sleep(part)
        left -= part
        if left > 0:
            console.info(f"{left:.0f} s left")
