# SPDX-License-Identifier: Apache-2.0
"""Bring together what several layers saw of one attempt.

The layer of the system calls knows the process, the one of the packets knows the protocol: an attempt
without a process takes it from a call of the same component to the same address and port at about the
same time. Two layers that saw one attempt are two lines of evidence. One thing only is left out: the call that
carries a question to the host's name server, where the ``dns`` layer watched, and has that question or answered it
because its name is on the allow-list. A call to a name server that no question belongs to is an attempt.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Final

from moat.site.egresscheck.model import Attempt, Component
from moat.site.egresscheck.who import OR

#: A call and its packet are microseconds apart; clocks and queues are given this much (seconds).
_NEAR: Final = 2.0
#: A question reaches the sinkhole at once, and is read when its thread comes to it.
_CARRIED: Final = 10.0
#: The layer of an :class:`Attempt` that is none: a question that was answered truly, which explains its call.
ANSWERED: Final = "answered"
#: The layers that see packets, of a host's services and of containers.
_PACKETS: Final = frozenset({"packets", "bridges"})


def _target(attempt: Attempt) -> str:
    """Return the address and port of a destination, without its first word."""
    return attempt.destination.partition(" ")[2]


def _seconds(attempt: Attempt) -> float:
    return datetime.fromisoformat(attempt.when).timestamp()


def attribute(
    seen: Sequence[Attempt],
    components: Sequence[Component],
    names: Mapping[str, str] | None = None,
    name_servers: frozenset[str] = frozenset(),
) -> list[Attempt]:
    """Return every attempt in the order of time, each with what the other layers know about it.

    Args:
        seen: what the layers saw.
        components: the site's services.
        names: for each address that the sinkhole gave as an answer, the name it was asked for.
        name_servers: the host's, if the layer ``dns`` took the questions to them; else empty.
    """
    shares: dict[int, list[str]] = {}
    for c in components:
        shares.setdefault(c.uid, []).append(c.name)
    calls = _Timeline(a for a in seen if a.layer == "syscalls")
    packets = _Timeline(a for a in seen if a.layer in _PACKETS)
    asking = [a for a in seen if a.layer == "syscalls" and _target(a).endswith(":53")]
    questions = sorted((_seconds(a), a.component) for a in seen if a.layer in ("dns", ANSWERED))
    carried = {a for a in asking if _address(a) in name_servers and _has_question(a, questions, shares)}
    result = []
    for a in seen:
        if a.layer == ANSWERED:
            continue
        better = a
        if a.layer == "dns" and a.process.startswith("uid "):
            better = _asked_by(a, asking, shares)
        if a.layer in _PACKETS and a.process.startswith("uid "):
            call = calls.nearest(a, shares)
            if call is not None:
                better = replace(a, process=call.process, component=call.component)
        elif a.layer == "syscalls":
            if a in carried:
                continue
            packet = packets.nearest(a, shares)
            if packet is not None:
                better = replace(a, destination=packet.destination, detail=a.detail or "by " + _word(a))
        name = (names or {}).get(_address(better))
        if name is not None:
            better = replace(better, detail=_joined(better.detail, f"this address was the sinkhole's answer to {name}"))
        result.append(better)
    return sorted(_same_asker(result, shares), key=lambda a: (a.when, a.layer, a.destination))


def _has_question(call: Attempt, questions: Sequence[tuple[float, str]], shares: Mapping[int, list[str]]) -> bool:
    """Whether a question of the same component came at the time of a call to a name server."""
    when = _seconds(call)
    at = bisect.bisect_left(questions, when - _NEAR, key=lambda q: q[0])
    while at < len(questions) and questions[at][0] <= when + _CARRIED:
        component = questions[at][1]
        if component == call.component or _alike(component, call.component, shares):
            return True
        at += 1
    return False


def _asked_by(a: Attempt, asking: Sequence[Attempt], shares: Mapping[int, list[str]]) -> Attempt:
    """Return a question with its process, if just one process spoke to a name server at that time."""
    near = {
        (o.process, o.component)
        for o in asking
        if abs(_seconds(o) - _seconds(a)) <= _NEAR and _alike(o.component, a.component, shares)
    }
    if len(near) != 1:
        return a
    ((process, component),) = near
    return replace(a, process=process, component=component)


def _same_asker(attempts: Sequence[Attempt], shares: Mapping[int, list[str]]) -> Iterator[Attempt]:
    """Give a repeated question (a resolver that got no answer) the process of the one before it, if it is just one."""
    known: dict[str, set[tuple[str, str]]] = {}
    for a in attempts:
        if a.layer == "dns" and not a.process.startswith("uid "):
            known.setdefault(a.destination, set()).add((a.process, a.component))
    for a in attempts:
        askers = known.get(a.destination, set())
        if a.layer == "dns" and a.process.startswith("uid ") and len(askers) == 1:
            ((process, component),) = askers
            if _alike(component, a.component, shares):
                yield replace(a, process=process, component=component)
                continue
        yield a


class _Timeline:
    """Attempts by where they went, each list in the order of time: a storm of thousands must not take minutes."""

    def __init__(self, attempts: Iterable[Attempt]) -> None:
        self._lists: dict[str, list[tuple[float, Attempt]]] = {}
        for a in attempts:
            self._lists.setdefault(_target(a), []).append((_seconds(a), a))
        for rows in self._lists.values():
            rows.sort(key=lambda row: row[0])

    def nearest(self, a: Attempt, shares: Mapping[int, list[str]]) -> Attempt | None:
        """Return the attempt of the same component at the same target that is nearest in time, if any is near."""
        rows = self._lists.get(_target(a), [])
        when = _seconds(a)
        middle = bisect.bisect_left(rows, when, key=lambda row: row[0])
        best: tuple[float, Attempt] | None = None
        for step in (-1, 1):
            at = middle if step == 1 else middle - 1
            while 0 <= at < len(rows) and abs(rows[at][0] - when) <= _NEAR:
                distance, other = abs(rows[at][0] - when), rows[at][1]
                if other.component == a.component or _alike(other.component, a.component, shares):
                    if best is None or distance < best[0]:
                        best = (distance, other)
                    break  # further away in this direction is further away in time
                at += step
        return best[1] if best else None


def _word(attempt: Attempt) -> str:
    return attempt.destination.partition(" ")[0]


def _address(attempt: Attempt) -> str:
    return _target(attempt).rpartition(":")[0].strip("[]")


def _joined(one: str, other: str) -> str:
    return f"{one}; {other}" if one else other


def _alike(one: str, other: str, shares: Mapping[int, list[str]]) -> bool:
    """Whether two components run as the same user: by the user alone they cannot be told apart."""
    both = {*one.split(OR), *other.split(OR)}
    return any(both <= set(names) for names in shares.values())


def name_servers(path: Path = Path("/etc/resolv.conf")) -> frozenset[str]:
    """Return the addresses of the name servers that this host's programs ask."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(w[1].partition("%")[0] for line in lines if len(w := line.split()) > 1 and w[0] == "nameserver")
