# SPDX-License-Identifier: Apache-2.0
"""Layer ``bridges``: every packet from the containers' bridges that goes anywhere but to the site's containers.

A container's packets never pass the host's output; they arrive at the host from a bridge. An nftables table
of our own looks at them first of all, before address translation and before every filter: answers, the
site's own networks and the allow-list pass, the rest is counted and logged (NFLOG) and then left to the
site's own rules, which have to refuse it. One more chain at the very end counts and drops what these rules
let through, so that nothing leaves this host during the capture even where they are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Final

from moat.site.egresscheck import control, nflog
from moat.site.egresscheck.allow import Allowed
from moat.site.egresscheck.leftovers import PACKETS_TABLE
from moat.site.egresscheck.marks import CONTROL, Marks
from moat.site.egresscheck.model import Attempt, Component, NotAvailable
from moat.site.egresscheck.namespaces import inside, ipv6_of, network_of
from moat.site.egresscheck.tools import run
from moat.site.egresscheck.when import stamp

#: Behind connection tracking (-200), before destination translation (-100).
_FIRST: Final = -145
#: Behind source translation (100) and everything else.
_LAST: Final = 350
_DRAIN_SECONDS: Final = 3.0


@dataclass(frozen=True)
class Bridge:
    """One container network: its device on the host, its IPv4 network, and the host's own address on it."""

    device: str
    subnet: str
    gateway: str


def ruleset(bridges: Sequence[Bridge], allowed: Sequence[Allowed], group: int) -> str:
    """Return the table as ``nft -f`` reads it."""
    devices = "{ " + ", ".join(f'"{b.device}"' for b in bridges) + " }"
    passes = [f"    {rule} accept" for entry in allowed for rule in entry.rules()]
    lines = [
        f"table inet {PACKETS_TABLE} {{",
        '  comment "moat egress verify: only while it runs"',
        "  counter left { }",
        *(f"  counter from_{i} {{ }}" for i in range(len(bridges))),
        "  chain from_containers {",
        f"    type filter hook prerouting priority {_FIRST}; policy accept;",
        f"    iifname != {devices} accept",
        "    ct direction reply accept",
        "    ct state established,related accept",
        # The rest of a connection that the engine forgot when it restarted the container; opens nothing.
        "    ct state invalid tcp flags & (rst | fin | ack) != 0x0 accept",
        # The host's own addresses are not the site's: they come before the networks.
        *(f"    ip daddr {b.gateway} goto found" for b in bridges),
        *(f"    ip daddr {b.subnet} accept" for b in bridges),
        *passes,
        # The kernel's own, on every link; no process can make the host pass them on.
        "    ip6 daddr ff02::/16 meta l4proto icmpv6 accept",
        "    ip daddr 224.0.0.0/24 meta l4proto igmp accept",
        "    goto found",
        "  }",
        "  chain found {",
        *(
            f'    iifname "{b.device}" counter name from_{i} log group {group} snaplen 256 queue-threshold 1 '
            f'prefix "{b.device}" accept'
            for i, b in enumerate(bridges)
        ),
        "  }",
        "  chain way_out {",
        f"    type filter hook postrouting priority {_LAST}; policy accept;",
        f"    iifname != {devices} accept",
        f"    oifname {devices} accept",
        "    ct direction reply accept",
        "    ct state established,related accept",
        *passes,
        "    counter name left drop",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def counters() -> dict[str, int]:
    """Return the packets of each counter of the table.

    Raises:
        NotAvailable: the table is not there.
    """
    found: dict[str, int] = {}
    name = ""
    for line in run(["nft", "list", "counters", "table", "inet", PACKETS_TABLE]).splitlines():
        words = line.split()
        if words[:1] == ["counter"]:
            name = words[1]
        elif words[:1] == ["packets"] and name:
            found[name] = int(words[1])
    return found


class BridgesLayer:
    """See the module.

    Args:
        bridges: the site's networks.
        allowed: destinations that are no leak.
        marks: where the controls go.
        senders: for each bridge's device, the container whose packets take it: process id and user id. Asked when
            the control is made, because a restart changes the process.
        calls_seen: whether system calls are watched at this moment.
        own: (address, port) of packets that are ours although they go to no mark, the probes'; it may grow.
    """

    name = "bridges"

    def __init__(
        self,
        bridges: Sequence[Bridge],
        allowed: Sequence[Allowed],
        marks: Marks,
        senders: Callable[[], Mapping[str, tuple[int, int]]],
        calls_seen: Callable[[], bool],
        own: AbstractSet[tuple[str, int]],
    ) -> None:
        self._bridges = tuple(bridges)
        self._allowed = allowed
        self._marks = marks
        self._senders = senders
        self._calls_seen = calls_seen
        self._own = own
        self._reader: nflog.Reader | None = None
        self._components: dict[str, Component] = {}
        self._flows: dict[tuple[object, ...], tuple[nflog.Event, int]] = {}
        self._handled = 0
        #: Device and kind of address (4, 6) of each control.
        self._expected: list[tuple[str, int]] = []
        self._set = False
        self.problems: list[str] = []
        self.notes: list[str] = []

    def start(self, components: Sequence[Component]) -> None:
        """Open the log, set the table."""
        self._components = {address: c for c in components for address in c.addresses}
        self._reader = nflog.Reader(self._handle)
        try:
            self._reader.open()
        except OSError as e:
            raise NotAvailable(f"the kernel offers no packet log (NFLOG): {e.strerror or e}") from e
        self._set = True
        run(["nft", "-f", "-"], ruleset(self._bridges, self._allowed, self._reader.group))

    def _handle(self, event: nflog.Event) -> None:
        self._handled += 1
        # Retransmissions of one attempt have the same ends.
        key = (event.prefix, event.packet)
        first, count = self._flows.get(key, (event, 0))
        self._flows[key] = (first, count + 1)

    def control(self) -> str:
        """Send one datagram into each bridge, from inside a container, as its user; by IPv6 too where it is there.

        The table is read back first: what is logged there is dropped at the way out, and the datagram lives for
        one hop.
        """
        if not (self._set and "left" in counters()):
            raise NotAvailable("the table of the capture is not in force; no control is sent without it")
        senders = self._senders()
        for bridge in self._bridges:
            sender = senders.get(bridge.device)
            if sender is None:
                # Newer engines give an internal network no default route: an attempt ends before it is a packet.
                why = f"no container on {bridge.device} has a way to the host, so that there is no packet to see"
                if self._calls_seen():
                    self.notes.append(f"{why}; “syscalls” sees the attempts")
                else:
                    self.problems.append(f"{why}, and system calls are not watched either")
                continue
            pid, uid = sender
            kinds = {4: self._marks.ipv4} | ({6: self._marks.ipv6} if ipv6_of(pid) else {})
            for kind, address in kinds.items():
                inside(network_of(pid), partial(control.attempt, uid, "udp", address, self._marks.port))
                self._expected.append((bridge.device, kind))
        if not self._expected:
            raise NotAvailable("no container has a way to the host")
        six = any(kind == 6 for _, kind in self._expected)
        if not six:
            self.notes.append("the containers have no IPv6 beyond loopback: such attempts have no packets")
        to = f"{self._marks.ipv4} and {self._marks.ipv6} port {self._marks.port}" if six else ""
        devices = " and ".join(dict.fromkeys(device for device, _ in self._expected))
        return f"udp {to or f'{self._marks.ipv4}:{self._marks.port}'} by {devices}"

    def stop(self) -> list[Attempt]:
        """Wait for what the counters already have, remove the table, and return what was seen."""
        if self._reader is None:
            return []
        counted = 0
        if self._set:
            try:
                counted = sum(n for name, n in counters().items() if name.startswith("from_"))
                until = time.monotonic() + _DRAIN_SECONDS
                while self._handled < counted and time.monotonic() < until:
                    time.sleep(0.05)
            except NotAvailable as e:
                self.problems.append(f"the table of the capture vanished while it ran: {e}")
            try:
                run(["nft", "delete", "table", "inet", PACKETS_TABLE])
            except NotAvailable as e:
                self.problems.append(str(e))
            self._set = False
        self._reader.close()
        if self._reader.failure:
            self.problems.append(self._reader.failure)
        if self._handled < counted or self._reader.lost:
            self.problems.append(f"{counted} packets were counted, but only {self._handled} could be read")
        self._reader = None
        return self._attempts()

    def _attempts(self) -> list[Attempt]:
        found, caught = [], set()
        for event, count in self._flows.values():
            packet = event.packet
            address, port = (packet.destination, packet.destination_port) if packet else ("", 0)
            ours = packet is not None and self._marks.is_control(address, port)
            if (address, port) in self._own and not ours:
                continue
            if ours:
                caught.add((event.prefix, 6 if ":" in address else 4))
            sender = self._components.get(packet.source) if packet else None
            found.append(
                Attempt(
                    when=stamp(event.when),
                    layer=self.name,
                    process=f"uid {sender.uid}" if sender else f"a container on {event.prefix}",
                    component=CONTROL if ours else sender.name if sender else "unknown",
                    destination=packet.text if packet else "a packet that cannot be read",
                    detail=f"from {packet.source if packet else '?'} by {event.prefix}, packets: {count}",
                )
            )
        missed = [d if kind == 4 else f"{d} (IPv6)" for d, kind in self._expected if (d, kind) not in caught]
        if missed:
            self.problems.append(f"the control by {', '.join(missed)} was not seen")
            found = [a for a in found if a.component != CONTROL]
        return found
