# SPDX-License-Identifier: Apache-2.0
"""Layer ``packets``: every packet of the components' users that goes anywhere it should not.

An nftables table of our own on the host's output, by user id: what is an answer, local or on the
allow-list passes; the rest is counted, logged (NFLOG) and refused, so that nothing leaves during the
capture. It stands behind address translation (a name query that the sinkhole takes is local by then) and
before every filter, so that the site's own ``moat_egress`` cannot hide an attempt from us.

Where the host knows no way to a destination there is no packet, and a counter proves nothing. So each
user gets a way of last resort, to loopback: a routing rule *behind* the host's own tables, which decides
only where those find none, and only for the components' users.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from moat.site.egresscheck import control, nflog
from moat.site.egresscheck.allow import Allowed
from moat.site.egresscheck.leftovers import PACKETS_TABLE, ROUTES, RULE_PRIORITY
from moat.site.egresscheck.marks import CONTROL, Marks
from moat.site.egresscheck.model import Attempt, Component, NotAvailable
from moat.site.egresscheck.tools import run
from moat.site.egresscheck.when import stamp
from moat.site.egresscheck.who import Who, listening_ports

#: Behind destination translation (-100), before every filter (0).
_PRIORITY: Final = -90
_FAMILIES: Final = (("-4", "127.0.0.1"), ("-6", "::1"))
#: How long to wait for logged packets that the counters already have (seconds).
_DRAIN_SECONDS: Final = 3.0
_LOOK_UP_FLOWS: Final = 500


@dataclass
class _Flow:
    """One attempt: packets with the same ends. ``process`` is what was found at the first one."""

    event: nflog.Event
    uid: int
    component: str
    process: str
    packets: int = 1


@dataclass
class _Seen:
    """What the readers collect; each field is written by one thread."""

    flows: dict[tuple[object, ...], _Flow] = field(default_factory=dict)
    by_uid: dict[int, int] = field(default_factory=dict)
    foreign: int = 0


def ruleset(
    uids: Sequence[int], allowed: Sequence[Allowed], listening: Sequence[int], group: int, other_group: int
) -> str:
    """Return the table as ``nft -f`` reads it."""
    log = "snaplen 256 queue-threshold 1"
    lines = [
        f"table inet {PACKETS_TABLE} {{",
        '  comment "moat egress verify: only while it runs"',
        *(f"  counter u{uid} {{ }}" for uid in uids),
        "  chain refuse {",
        # A reset ends a connect at once, also where the error message would be a martian (from loopback).
        "    meta l4proto tcp reject with tcp reset",
        "    reject with icmpx admin-prohibited",
        "  }",
        "  chain output {",
        f"    type filter hook output priority {_PRIORITY}; policy accept;",
        "    ct direction reply accept",
        "    fib daddr type local accept",
        *(f"    {rule} accept" for entry in allowed for rule in entry.rules()),
    ]
    if listening:
        # A connection that came in before we began has no entry in connection tracking: our packets on it look
        # like the first of a new one. They come from a port that is listened on, and open nothing (no bare SYN).
        ports = ", ".join(map(str, listening))
        lines.append(f"    tcp sport {{ {ports} }} tcp flags & (syn | ack) != syn accept")
    for uid in uids:
        lines.append(f'    meta skuid {uid} counter name u{uid} log group {group} {log} prefix "u{uid}" goto refuse')
    # Everyone else's new connections are looked at (a master process that runs as root), never touched.
    lines.append(f'    meta skuid 0-4294967294 ct state new log group {other_group} {log} prefix "other"')
    lines += ["  }", "}"]
    return "\n".join(lines) + "\n"


def ipv6_here() -> bool:
    """Whether this host (this network namespace) speaks IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
            s.bind(("::1", 0))
    except OSError:
        return False
    return True


class PacketsLayer:
    """See the module. ``allowed`` are the destinations that are no leak; ``marks`` where the controls go."""

    name = "packets"

    def __init__(self, allowed: Sequence[Allowed], marks: Marks) -> None:
        self._allowed = allowed
        self._marks = marks
        self._who = Who(())
        self._seen = _Seen()
        self._reader: nflog.Reader | None = None
        self._others: nflog.Reader | None = None
        self._set = False
        self._expected: list[tuple[int, str]] = []
        self.problems: list[str] = []
        self.notes: list[str] = []

    def start(self, components: Sequence[Component]) -> None:
        """Open the log, set the table, then the ways of last resort."""
        self._who = Who(components)
        uids = self._who.uids
        if not uids:
            raise NotAvailable("no component has a user of its own: packets cannot be told from root's")
        run(["nft", "list", "tables"])
        self._reader, self._others = nflog.Reader(self._handle), nflog.Reader(self._handle_other)
        try:
            self._reader.open()
            self._others.open()
        except OSError as e:
            raise NotAvailable(f"the kernel offers no packet log (NFLOG): {e.strerror or e}") from e
        self._set = True
        run(
            ["nft", "-f", "-"],
            ruleset(uids, self._allowed, listening_ports(), self._reader.group, self._others.group),
        )
        self._add_ways(uids)

    def _add_ways(self, uids: Sequence[int]) -> None:
        for family, source in _FAMILIES:
            try:
                run(["ip", family, "route", "replace", "default", "dev", "lo", "src", source, "table", ROUTES])
                for uid in uids:
                    run(
                        [
                            "ip",
                            family,
                            "rule",
                            "add",
                            "uidrange",
                            f"{uid}-{uid}",
                            "lookup",
                            ROUTES,
                            "priority",
                            RULE_PRIORITY,
                        ]
                    )
            except NotAvailable as e:
                if family == "-4":
                    raise
                if ipv6_here():
                    self.problems.append(f"IPv6 attempts may die before there is a packet: {e}")
                else:
                    self.notes.append("IPv6 is off on this host: such attempts have no packets")

    def _handle(self, event: nflog.Event) -> None:
        uid = int(event.prefix[1:]) if re.fullmatch(r"u\d+", event.prefix) else -1
        self._seen.by_uid[uid] = self._seen.by_uid.get(uid, 0) + 1
        self._enter(event, uid)

    def _handle_other(self, event: nflog.Event) -> None:
        if event.packet is None or event.uid is None:
            return
        pid = self._who.process_of_port(event.packet.protocol, event.packet.source_port, event.uid)
        if pid is None and event.uid == 0 and self._who.root:
            # It has ended. It may have been a component's, which has processes of root: nobody can say that it was not.
            self._enter(event, 0)
            return
        # By the control group alone: other users of this host (the operator's own session) are not our subject.
        if pid is None or self._who.by_group(self._who.group(pid)) is None:
            self._seen.foreign += 1
            return
        self._enter(event, event.uid, pid)

    def _enter(self, event: nflog.Event, uid: int, pid: int | None = None) -> None:
        p = event.packet
        key = (uid, p.protocol, p.source, p.source_port, p.destination, p.destination_port) if p else (uid, None)
        flow = self._seen.flows.get(key)
        if flow is not None:
            flow.packets += 1
            return
        # Looking for the process takes milliseconds: in a flood the log must be read instead.
        if pid is None and p is not None and p.source_port and len(self._seen.flows) < _LOOK_UP_FLOWS:
            pid = self._who.process_of_port(p.protocol, p.source_port, uid)
        component = self._who.component(uid, pid) or "unknown"
        process = self._who.words(pid) if pid is not None else f"uid {uid}"
        self._seen.flows[key] = _Flow(event, uid, component, process)

    def in_place(self, uid: int) -> bool:
        """Whether the rule that refuses this user's packets is in force at this moment."""
        try:
            text = run(["nft", "list", "chain", "inet", PACKETS_TABLE, "output"])
        except NotAvailable:
            return False
        return re.search(rf"meta skuid {uid} .*goto refuse", text) is not None

    def control(self) -> str:
        """One datagram without connect and one TCP connect for every user, over IPv4 and IPv6."""
        m = self._marks
        places = [m.ipv4] + ([m.ipv6] if ipv6_here() else [])
        for uid in self._who.uids:
            if not self.in_place(uid):
                raise RuntimeError(f"the rule for user {uid} is not in force, so nothing may be sent")
            for address in places:
                for kind in ("udp", "tcp"):
                    self._expected.append((uid, nflog.place(kind, address, m.port)))
                    control.attempt(uid, kind, address, m.port)
        users = ", ".join(control.name_of(uid) for uid in self._who.uids)
        return f"udp and tcp to {' and '.join(places)} port {m.port}, as each of {users}"

    def stop(self) -> list[Attempt]:
        """Compare the log with the counters, remove everything, and return what was seen."""
        if self._set:
            self._compare()
            self._set = False
        for argv in (
            ["nft", "delete", "table", "inet", PACKETS_TABLE],
            *(["ip", family, "route", "flush", "table", ROUTES] for family, _ in _FAMILIES),
        ):
            try:
                run(argv)
            except NotAvailable:
                continue  # not there (any more); leftovers.remove looks once more and says what it cannot remove
        self._remove_rules()
        for reader, ours in ((self._reader, True), (self._others, False)):
            if reader is None:
                continue
            reader.close()
            if reader.failure:
                self.problems.append(reader.failure)
            if reader.lost and ours:
                self.problems.append(f"{reader.lost} messages of the packet log were lost")
            elif reader.lost:
                self.notes.append(f"{reader.lost} packets of other users were not looked at: too many at once")
        self._reader = self._others = None
        if self._seen.foreign:
            self.notes.append(f"{self._seen.foreign} packets of users outside the site were left alone")
        attempts = [self._attempt(flow) for flow in self._seen.flows.values()]
        got = {(f.uid, f.event.packet.text) for f in self._seen.flows.values() if f.event.packet}
        for uid, target in self._expected:
            if (uid, target) not in got:
                self.problems.append(f"the control {target} as {control.name_of(uid)} was not caught")
        self._expected = []
        return attempts

    def _remove_rules(self) -> None:
        for family, _ in _FAMILIES:
            try:
                while True:
                    run(["ip", family, "rule", "del", "priority", RULE_PRIORITY])
            except NotAvailable:
                continue

    def _counters(self) -> dict[int, int]:
        text = run(["nft", "list", "counters", "table", "inet", PACKETS_TABLE])
        found = re.findall(r"counter u(\d+) \{\s*packets (\d+)", text)
        return {int(uid): int(packets) for uid, packets in found}

    def _compare(self) -> None:
        """Every counted packet must have been read: a log that loses some would hide an attempt."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        try:
            counted = self._counters()
            while time.monotonic() < deadline:
                if all(self._seen.by_uid.get(uid, 0) >= packets for uid, packets in counted.items()):
                    break
                time.sleep(0.05)
            counted = self._counters()
        except NotAvailable as e:
            self.problems.append(f"the table {PACKETS_TABLE} vanished during the capture: {e}")
            return
        if set(counted) != set(self._who.uids):
            self.problems.append(f"the table {PACKETS_TABLE} was changed during the capture")
        for uid, packets in counted.items():
            read = self._seen.by_uid.get(uid, 0)
            if read < packets:
                name = control.name_of(uid)
                self.problems.append(
                    f"{packets} packets of {name} were counted, but only {read} were read from the log"
                )

    def _attempt(self, flow: _Flow) -> Attempt:
        p = flow.event.packet
        ours = p is not None and self._marks.is_control(p.destination, p.destination_port)
        refused = "refused by the capture" if flow.event.prefix != "other" else "not stopped by the capture"
        return Attempt(
            when=stamp(flow.event.when),
            layer=self.name,
            process=flow.process,
            component=CONTROL if ours else flow.component,
            destination=p.text if p else "a packet that cannot be read",
            detail=refused if flow.packets == 1 else f"{flow.packets} packets, {refused}",
        )
