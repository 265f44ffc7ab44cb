# SPDX-License-Identifier: Apache-2.0
"""What a host's own packet filter lets out: its rules as the kernel holds them, each with what it opens.

Pure: the rules come as nft's JSON. A rule that lets something out is either one of the few that every host has
(:func:`_of_every_host`), or an entry of the site's list, or more than the site knows of. Anything that is not
understood whole counts as the last: a range, a named set, a jump, a statement that changes a packet.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from moat.errors import EgressUnproven
from moat.site.egresscheck import allow

Rule = dict[str, Any]

#: Statements that decide nothing, and those that end a rule without letting anything out (a base chain returns to its
#: policy, which is a matter of its own).
_INERT: Final = frozenset({"match", "counter", "log", "limit"})
_REFUSING: Final = frozenset({"drop", "reject", "return"})
_NEIGHBOURS: Final = frozenset({"nd-neighbor-solicit", "nd-neighbor-advert", "nd-router-solicit"})
_LISTENERS: Final = frozenset({"mld-listener-report", "mld-listener-done", "mld2-listener-report"})
#: The host's own servers: what they are called, and the ports that they may have.
_SERVERS: Final = {"moat_out_ntp": {("udp", "123")}, "moat_out_dns": {("udp", "53"), ("tcp", "53")}}


@dataclass(frozen=True)
class Way:
    """One rule by which something gets out that is not among what every host needs.

    Attributes:
        handle: the rule's number in the kernel.
        destinations: where to, in the words of the allow-list; empty if it is not narrowed to addresses.
        counter: the named counter of the rule, or empty.
    """

    handle: int
    destinations: tuple[str, ...]
    counter: str

    @property
    def called_by_content(self) -> bool:
        """Whether its counter is called by its one destination, as the role no_egress calls its entries."""
        return len(self.destinations) == 1 and self.counter == counter_of(self.destinations[0])

    def permitted(self, entries: Sequence[allow.Allowed]) -> bool:
        """Whether entries of the allow-list cover all that it opens."""
        return bool(self.destinations) and all(any(_covers(e, d) for e in entries) for d in self.destinations)


def counter_of(destination: str) -> str:
    """Return the counter of an entry of the role no_egress (filter_plugins/moat_egress.py has the same rule)."""
    protocol, _, place = destination.partition(" ")
    address, _, port = place.rpartition(":")
    return "moat_out_" + re.sub(r"[.:]", "_", address.strip("[]").replace("/", "n")) + f"_{protocol}_{port}"


def written_by_the_role(text: str) -> frozenset[str]:
    """Return the counters of the entries in the role's rule file."""
    return frozenset(re.findall(r"^\s*ip6? daddr \S+ (?:tcp|udp) dport \d+ counter name (\S+) accept$", text, re.M))


def base_chain(objects: Sequence[dict[str, Any]], hook: str) -> dict[str, Any] | None:
    """Return the chain that filters at a hook; ``None`` also where the table sleeps (flag ``dormant``)."""
    if any(x["table"].get("flags") for x in objects if "table" in x):
        return None
    chains = [x["chain"] for x in objects if "chain" in x]
    found = [c for c in chains if c.get("hook") == hook and c.get("type") == "filter"]
    return next((c for c in found if c.get("name") == hook), found[0] if found else None)


def rules_of(objects: Sequence[dict[str, Any]], chain: str) -> list[Rule]:
    """Return the rules of a chain, in their order."""
    return [x["rule"] for x in objects if "rule" in x and x["rule"].get("chain") == chain]


def ways(rules: Sequence[Rule]) -> list[Way]:
    """Return every way out that the rules of a chain leave."""
    return [way for rule in rules if (way := _way(rule)) is not None]


def surplus(found: Sequence[Way], entries: Sequence[allow.Allowed], written: AbstractSet[str]) -> list[Way]:
    """Return the ways that neither the role wrote (by its file's counters) nor the allow-list covers."""
    return [w for w in found if not (w.called_by_content and w.counter in written) and not w.permitted(entries)]


def _way(rule: Rule) -> Way | None:
    words: list[dict[str, Any]] = rule.get("expr", [])
    kinds = {kind for word in words for kind in word}
    counter = next((e["counter"] for e in words if isinstance(e.get("counter"), str)), "")
    whole = Way(int(rule.get("handle", 0)), (), counter)
    if kinds - _INERT - _REFUSING - {"accept"}:
        return whole
    if "accept" not in kinds:
        return None
    matches = [e["match"] for e in words if "match" in e]
    if _of_every_host(matches):
        return None
    hosts: list[str] | None = None
    ports: list[tuple[str, str]] | None = None
    for m in matches:
        field = _field(m)
        values = _values(m) if m.get("op") == "==" else None
        if field in ("ip daddr", "ip6 daddr") and hosts is None:
            hosts = _addresses(values)
        elif field in ("tcp dport", "udp dport") and ports is None:
            ports = [(field[:3], v) for v in values] if values and all(v.isdecimal() for v in values) else []
        # Whatever else it asks for makes it narrower still.
    if not hosts or ports == []:
        return whole
    if counter in _SERVERS and len(matches) == 2 and ports is not None and set(ports) <= _SERVERS[counter]:
        return None
    written = [f"[{h}]" if ":" in h else h for h in hosts]
    if ports is None:
        return Way(whole.handle, tuple(hosts), counter)
    return Way(whole.handle, tuple(f"{protocol} {h}:{port}" for h in written for protocol, port in ports), counter)


def _of_every_host(matches: Sequence[dict[str, Any]]) -> bool:
    """Whether a rule is one of those that open nothing to the outside: loopback, answers, neighbours, DHCP."""
    asked = {_field(m): _values(m) or [] for m in matches}
    if len(asked) != len(matches) or any(m.get("op") not in ("==", "in") for m in matches):
        return False
    fields = set(asked)
    if fields in ({"meta oif"}, {"meta oifname"}):
        return asked[fields.pop()] == ["lo"]
    if fields == {"ct state"}:
        return bool(asked["ct state"]) and set(asked["ct state"]) <= {"established", "related"}
    if fields == {"tcp sport", "tcp flags ack"}:  # answers of a server: a segment with ACK opens no connection
        return bool(asked["tcp sport"]) and asked["tcp flags ack"] == ["ack"]
    if fields == {"icmpv6 type", "ip6 hoplimit"}:
        types, hops = set(asked["icmpv6 type"]), asked["ip6 hoplimit"]
        return bool(types) and ((types <= _NEIGHBOURS and hops == ["255"]) or (types <= _LISTENERS and hops == ["1"]))
    ends = {"udp sport": ["68"], "udp dport": ["67"]}
    ends6 = {"udp sport": ["546"], "udp dport": ["547"], "ip6 daddr": ["ff02::1:2"]}
    return asked in (ends, ends6)


def _field(match: dict[str, Any]) -> str:
    """Return what a match looks at, ``ip daddr``; of TCP's flags also the mask; empty if it is something else."""
    left = match.get("left")
    mask = ""
    if isinstance(left, dict) and isinstance(left.get("&"), list) and len(left["&"]) == 2:
        left, mask = left["&"][0], f" {left['&'][1]}"
    if not isinstance(left, dict):
        return ""
    for kind in ("meta", "ct"):
        if isinstance(left.get(kind), dict):
            return f"{kind} {left[kind].get('key')}{mask}"
    payload = left.get("payload")
    return f"{payload.get('protocol')} {payload.get('field')}{mask}" if isinstance(payload, dict) else ""


def _values(match: dict[str, Any]) -> list[str] | None:
    """Return what a match compares with; ``None`` if a part of it is neither a value nor a network."""
    found: list[str] = []
    for value in _each(match.get("right")):
        if isinstance(value, str | int):
            found.append(str(value))
        elif isinstance(value, dict) and set(value) == {"prefix"}:
            found.append(f"{value['prefix']['addr']}/{value['prefix']['len']}")
        else:
            return None
    return found


def _each(right: Any) -> Iterator[Any]:
    if isinstance(right, dict) and set(right) == {"set"}:
        right = right["set"]
    yield from right if isinstance(right, list) else [right]


def _addresses(values: Iterable[str] | None) -> list[str]:
    """Return addresses and networks; none at all if one of them is something else, or the whole address space."""
    found = list(values or ())
    try:
        return [] if any(ipaddress.ip_network(v).prefixlen == 0 for v in found) else found
    except ValueError:
        return []


def _covers(entry: allow.Allowed, destination: str) -> bool:
    try:
        d = allow.parse(destination, lambda _: [])
    except EgressUnproven:
        return False
    return (
        (entry.port is None or entry.port == d.port)
        and (entry.protocol is None or entry.protocol == d.protocol)
        and any(
            isinstance(n, type(m)) and n.subnet_of(m)  # type: ignore[arg-type]
            for n in d.networks
            for m in entry.networks
        )
    )
