# SPDX-License-Identifier: Apache-2.0
"""What every gateway of every node serves, from the reports of the nodes; and which do not serve a revision, and why.

Reports come from machines that may be broken: what cannot be read of one is said, and the rest is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moat_gateway import revstore
from moat_gateway.revstore import NodeReport
from moat_gateway.settings import Settings
from moat_gateway.sync import nodefolder, reports
from moat_gateway.sync.files import seconds, whole

NODE_SILENT = 30.0  # seconds after which a node that wrote nothing counts as gone; it writes every 10
GATEWAY_SILENT = reports.ALIVE


@dataclass(frozen=True)
class Gateway:
    """One gateway, as its node told.

    Attributes:
        name: its instance.
        node: its node.
        pid: its process.
        revision: what it serves; 0 for local files.
        sha256: of that revision's manifest.
        applied_at: since when, by its node's clock.
        ready: it takes requests.
        draining: it is ending.
        degraded: what a person should know.
        last_refused: ``{"revision", "reason"}`` or ``None``.
        needs_restart: what only a restart can change.
        started_at: when it was started.
        age: seconds since it said so; ``None`` if its machine was started since.
        alive: it and its node report.
    """

    name: str
    node: str
    pid: int
    revision: int
    sha256: str | None
    applied_at: str | None
    ready: bool
    draining: bool
    degraded: tuple[str, ...]
    last_refused: Mapping[str, Any] | None
    needs_restart: tuple[str, ...]
    started_at: str
    age: float | None
    alive: bool


@dataclass(frozen=True)
class Node:
    """One node, as its config-sync told.

    Attributes:
        name: its name.
        age: seconds since its report, or ``None`` if its source cannot tell.
        alive: it reports, as far as can be told.
        revision: what it accepted, or ``None``.
        pointer: what it saw at the source, or ``None``.
        reachable: it reaches its source; ``None`` if it does not know.
        where: its source.
        why: why it does not reach it, or ``None``.
        last_refused: ``{"revision", "kind", "reason", "at"}`` or ``None``.
        degraded: what a person should know.
        gateways: how many report there.
    """

    name: str
    age: float | None
    alive: bool
    revision: int | None
    pointer: int | None
    reachable: bool | None
    where: str
    why: str | None
    last_refused: Mapping[str, Any] | None
    degraded: tuple[str, ...]
    gateways: int


@dataclass(frozen=True)
class Fleet:
    """All nodes and gateways, by name."""

    nodes: tuple[Node, ...] = ()
    gateways: tuple[Gateway, ...] = ()


@dataclass(frozen=True)
class Lag:
    """A gateway (or a whole node) that does not serve a revision.

    Attributes:
        node: its node; ``the reports`` if these could not be read, so that nobody knows.
        gateway: its name; ``None`` if it is the node.
        kind: ``silent``, ``refused``, ``store-not-seen``, ``needs-restart``, ``other-content``, ``behind`` or
            ``reports-not-read``.
        why: one line.
    """

    node: str
    gateway: str | None
    kind: str
    why: str

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.node}/{self.gateway}" if self.gateway else self.node


def from_reports(found: Mapping[str, NodeReport]) -> Fleet:
    """Return what the nodes' reports say."""
    nodes: list[Node] = []
    gateways: list[Gateway] = []
    for name, report in sorted(found.items()):
        try:
            value = json.loads(report.raw)
            node, own = _node(name, value, report.age)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            unreadable = ("its report cannot be read",)
            node, own = Node(name, report.age, False, None, None, None, "", None, None, unreadable, 0), ()
        nodes.append(node)
        gateways += own
    return Fleet(tuple(nodes), tuple(gateways))


def from_here(settings: Settings) -> Fleet:
    """Return what this node's own folders say; nothing if it has none."""
    if not settings.sync_dir:
        return Fleet()
    sync = nodefolder.read_sync(Path(settings.sync_dir))
    found = reports.Reports(Path(settings.reports_dir)).read() if settings.reports_dir else {}
    if sync is None and not found:
        return Fleet()
    own = [{**r.to_dict(), "age": r.age()} for r in found.values()]
    value = {"sync": sync.to_dict() if sync else None, "gateways": own}
    node, gateways = _node(sync.node if sync else settings.node or "this node", value, 0.0)
    return Fleet((node,), gateways)


def highest(fleet: Fleet, most: int = revstore.MAX_NUMBER) -> tuple[int, tuple[str, ...]]:
    """Return the highest revision that a node accepted or a gateway serves, and who names one that cannot be.

    Args:
        fleet: what is known.
        most: a higher number is nobody's revision, and does not count.
    """
    named = [(n.name, n.revision or 0) for n in fleet.nodes]
    named += [(f"{g.node}/{g.name}", g.revision) for g in fleet.gateways]
    return max([0, *(n for _, n in named if n <= most)]), tuple(who for who, n in named if n > most)


def lagging(fleet: Fleet, revision: int, sha256: str | None = None) -> tuple[Lag, ...]:
    """Return who does not serve a revision or a newer one; everybody is asked, also who is silent.

    Args:
        fleet: what is known.
        revision: the number.
        sha256: of its manifest; another content under the same number does not count.
    """
    nodes = {n.name: n for n in fleet.nodes}
    out = [lag for g in fleet.gateways if (lag := _lag(g, nodes[g.node], revision, sha256)) is not None]
    out += [Lag(n.name, None, "silent", _silence(n)) for n in fleet.nodes if not n.gateways and not n.alive]
    return tuple(out)


def _lag(gateway: Gateway, node: Node, revision: int, sha256: str | None) -> Lag | None:
    def lag(kind: str, why: str) -> Lag:
        return Lag(gateway.node, gateway.name, kind, why)

    if not node.alive:
        return lag("silent", _silence(node))
    if not gateway.alive:
        age = f"for {duration(gateway.age)}" if gateway.age is not None else "since its machine was started"
        return lag("silent", f"the gateway has not reported {age}")
    if gateway.revision > revision:
        return None
    if gateway.revision == revision:
        same = sha256 is None or gateway.sha256 is None or gateway.sha256 == sha256
        return None if same else lag("other-content", f"serves another revision {revision}: two sites pushed apart")
    for refused in (gateway.last_refused, node.last_refused):
        if refused is not None and refused.get("revision") in (revision, None):
            return lag("refused", f"refused{kind_of(refused)}: {refused.get('reason')}")
    if gateway.needs_restart:
        return lag("needs-restart", f"needs a restart: {', '.join(gateway.needs_restart)}")
    if node.reachable is False:
        return lag("store-not-seen", f"its node does not reach {node.where}: {node.why}")
    what = f"revision {gateway.revision}" if gateway.revision else "local files"
    return lag("behind", f"still serves {what}" + (", is ending" if gateway.draining else ""))


def _silence(node: Node) -> str:
    return (
        node.degraded[0] if not node.where and node.degraded else f"the node has not reported for {duration(node.age)}"
    )


def _node(name: str, value: Mapping[str, Any], age: float | None) -> tuple[Node, tuple[Gateway, ...]]:
    sync = value["sync"]
    alive, age = age is None or age <= NODE_SILENT, None if age is None else round(age, 3)
    gateways = tuple(sorted((_gateway(name, g, age, alive) for g in value["gateways"]), key=lambda g: g.name))
    if sync is None:
        none = ("config-sync does not run here",)
        return Node(name, age, alive, None, None, None, "", None, None, none, len(gateways)), gateways
    source = sync["source"]
    node = Node(
        name=name,
        age=age,
        alive=alive,
        revision=whole(sync["revision"]) if sync["revision"] is not None else None,
        pointer=whole(sync["pointer"]) if sync["pointer"] is not None else None,
        reachable=source["reachable"],
        where=_line(source["where"]),
        why=_line(source["why"]) if source["why"] is not None else None,
        last_refused=_refused(sync["last_refused"]),
        degraded=tuple(_line(d) for d in sync.get("degraded", ())),
        gateways=len(gateways),
    )
    return node, gateways


def _gateway(node: str, value: Mapping[str, Any], node_age: float | None, node_alive: bool) -> Gateway:
    quiet = None if value["age"] is None else seconds(value["age"])
    age = None if quiet is None else round(quiet + (node_age or 0.0), 3)
    return Gateway(
        name=_line(value["name"]),
        node=node,
        pid=whole(value["pid"]),
        revision=whole(value["revision"]),
        sha256=value["sha256"],
        applied_at=_line(value["applied_at"]) if value["applied_at"] is not None else None,
        ready=value["ready"] is True,
        draining=value["draining"] is True,
        degraded=tuple(_line(d) for d in value["degraded"]),
        last_refused=_refused(value["last_refused"]),
        needs_restart=tuple(_line(n) for n in value["needs_restart"]),
        started_at=_line(value["started_at"]),
        age=age,
        # Between two reports of the node nothing is heard of its gateways either.
        alive=node_alive and quiet is not None and quiet <= GATEWAY_SILENT,
    )


def _refused(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if value is None else {k: v if v is None or type(v) is int else _line(v) for k, v in value.items()}


def kind_of(refused: Mapping[str, Any]) -> str:
    """Return the kind of a refusal in brackets, if its teller named one."""
    return f" ({refused['kind']})" if refused.get("kind") else ""


def _line(value: Any) -> str:
    """Return a text from another machine as one line that is safe on a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:300]


def duration(seconds: float | None) -> str:
    """Return a length of time as people say it."""
    if seconds is None:
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{seconds:.0f} s"
