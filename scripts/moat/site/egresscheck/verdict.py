# SPDX-License-Identifier: Apache-2.0
"""What the evidence says, in words: the verdict with its reasons, and thousands of attempts as few groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from moat.site.egresscheck.model import Attempt, Report


class Word(Enum):
    """The verdict in one word."""

    PASS = "PASS"  # noqa: S105 - a word, not a secret
    FAIL = "FAIL"
    NOT_PROVEN = "NOT PROVEN"


@dataclass(frozen=True)
class Verdict:
    """What the reviewer reads first.

    Attributes:
        word: the verdict.
        sentence: what it means.
        reasons: why, one sentence each; for a pass, what it rests on.
        mind: what this run did not look at, one sentence each; a pass has some too.
    """

    word: Word
    sentence: str
    reasons: tuple[str, ...]
    mind: tuple[str, ...]


def verdict(report: Report) -> Verdict:
    """Say in words what :attr:`Report.ok` says: something found, nothing proven, or a pass."""
    found = _found(report)
    lacking = _lacking(report)
    mind = _unseen(report)
    if found:
        tried = "Something tried to leave this site."
        open_ = "Nothing tried to leave, but the site is not closed as it should be."
        return Verdict(Word.FAIL, tried if report.attempts else open_, (*found, *lacking), mind)
    if lacking:
        return Verdict(
            Word.NOT_PROVEN,
            "Nothing was found, but this run does not prove that there is nothing to find.",
            lacking,
            mind,
        )
    layers = [layer.name for layer in report.layers if layer.available]
    return Verdict(
        Word.PASS,
        "Nothing tried to leave this site.",
        (
            f"{count(len(report.components), 'component')} were watched from start to first requests and through "
            f"{report.quiet_seconds:g} seconds of quiet; not one attempt was seen.",
            f"The watching worked: each of {count(len(layers), 'layer')} ({', '.join(layers)}) caught the attempt "
            "that was made on purpose to test it.",
            f"{count(len(report.endpoints), 'address', 'addresses')} of the configuration are all on the allow-list "
            f"or the site's own; {count(len(report.probes), 'further probe')} held.",
        ),
        mind,
    )


def _unseen(report: Report) -> tuple[str, ...]:
    sentences = []
    for layer in report.layers:
        if not layer.available:
            sentences.append(f"The layer “{layer.name}” is not available on this host: {layer.why}")
        sentences += [f"The layer “{layer.name}”: {note}." for note in layer.notes]
    if not report.requests:
        sentences.append(
            "No request was sent: this host has no entrance and no gateway, or the run did not come so far. What a "
            "request sets off was not seen."
        )
    sentences.append(
        f"The watching ended {report.quiet_seconds:g} seconds after the first requests. What a program does later (an "
        "hourly report, a daily look-up of updates) is not covered: a longer time is `--quiet SECONDS`."
    )
    return tuple(sentences)


def _found(report: Report) -> tuple[str, ...]:
    sentences = []
    for component, groups in by_component(report.attempts).items():
        shown = ", ".join(_short(g.destination) for g in groups[:3])
        more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
        who = "A process of no known component" if component == "unknown" else component
        sentences.append(f"{who} tried to reach {shown}{more}.")
    sentences += [
        f"The configuration names {e.url} ({e.setting}), which is not on the allow-list."
        for e in report.endpoints
        if not e.allowed
    ]
    sentences += [f"The probe “{p.name}” found: {p.found}; expected: {p.expected}." for p in report.probes if not p.ok]
    return tuple(sentences)


def _lacking(report: Report) -> tuple[str, ...]:
    sentences = [_sentence(problem) for problem in report.problems]
    able = [layer for layer in report.layers if layer.available]
    if not any(layer.name in ("packets", "bridges", "syscalls") for layer in able):
        sentences.append("Neither packets nor system calls could be watched on this host.")
    sentences += [
        f"The layer “{layer.name}” did not catch the attempt that was made on purpose to test it: {layer.why}"
        for layer in able
        if not layer.control_caught
    ]
    return tuple(sentences)


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def count(number: int, one: str, many: str = "") -> str:
    """Return ``1 thing`` or ``3 things``."""
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"


@dataclass
class Group:
    """Every sighting of one destination by one component.

    Attributes:
        seen: sightings by layer.
        processes: sightings by the process's name, or what the layer knew instead.
        pids: the process ids, where a layer knew them.
        details: the first of each layer's words.
    """

    component: str
    destination: str
    first: str
    last: str
    seen: dict[str, int] = field(default_factory=dict)
    processes: dict[str, int] = field(default_factory=dict)
    pids: dict[str, None] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)

    @property
    def sightings(self) -> int:
        """Of all layers together: one attempt may be seen by several."""
        return sum(self.seen.values())


def by_component(attempts: Iterable[Attempt]) -> dict[str, list[Group]]:
    """Group attempts by component and destination, each in the order of its first sighting."""
    groups: dict[tuple[str, str], Group] = {}
    for a in sorted(attempts, key=lambda a: a.when):
        group = groups.setdefault(
            (a.component, a.destination), Group(a.component, a.destination, first=a.when, last=a.when)
        )
        group.last = a.when
        group.seen[a.layer] = group.seen.get(a.layer, 0) + 1
        pid, slash, name = a.process.partition("/")
        if slash and pid.isdecimal():
            group.pids[pid] = None
        else:
            name = a.process
        group.processes[name] = group.processes.get(name, 0) + 1
        if a.detail and a.detail not in group.details and len(group.details) < 3:
            group.details.append(a.detail)
    found: dict[str, list[Group]] = {}
    for group in groups.values():
        found.setdefault(group.component, []).append(group)
    return found
