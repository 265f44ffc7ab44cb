# SPDX-License-Identifier: Apache-2.0
"""What is proved about a systemd site besides the capture: the rules are in force, the sandboxes hold.

Each probe looks at what the kernel holds, not at what a file says. One thing the kernel tells nobody: which families of
sockets a process may open; there systemd is asked what it set.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moat.site.egresscheck import allow, filterrules, lookups
from moat.site.egresscheck.model import Component, NotAvailable, Probe
from moat.site.egresscheck.requests import Target
from moat.site.egresscheck.tools import run
from moat.site.egresscheck.who import Who

#: The table of the site (role no_egress).
TABLE: Final = "moat_egress"
#: CAP_NET_RAW (linux/capability.h), and the families of sockets that need it and pass no chain of netfilter.
_NET_RAW: Final = 1 << 13
_PACKET_FAMILIES: Final = frozenset({"AF_PACKET", "AF_XDP"})
#: What the role wrote, and so what the table should hold.
RULES_FILE: Final = Path("/etc/moat/nftables/no-egress.nft")


def _objects() -> list[dict[str, Any]]:
    try:
        raw = json.loads(run(["nft", "-j", "list", "table", "inet", TABLE]))
    except (NotAvailable, ValueError):
        return []
    return [x for x in raw.get("nftables", []) if isinstance(x, dict)]


def _written(path: Path = RULES_FILE) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def let_out(objects: Sequence[dict[str, Any]] | None = None, written: str | None = None) -> list[str]:
    """Return the destinations that the role lets the services reach, in the words of the allow-list.

    A rule that somebody else has added is no entry of the allow-list, however it is written: what goes out by it is
    an attempt like others.
    """
    found = _objects() if objects is None else objects
    chain = filterrules.base_chain(found, "output")
    known = filterrules.written_by_the_role(_written() if written is None else written)
    ways = filterrules.ways(filterrules.rules_of(found, chain["name"])) if chain else []
    return list(dict.fromkeys(d for w in ways if w.called_by_content and w.counter in known for d in w.destinations))


def ready(target: Target) -> bool:
    """Whether the entrance takes us to a gateway that is ready."""
    context = ssl.create_default_context(cafile=str(target.ca_file) if target.ca_file else None)
    context.check_hostname = False
    try:
        with (
            socket.create_connection((target.address, target.https_port), timeout=5) as raw,
            context.wrap_socket(raw) as s,
        ):
            s.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head = s.recv(64).split()
    except OSError:
        return False
    # Refused for want of a key is an answer of a gateway; nginx alone says 502, 503 or 504.
    return len(head) > 1 and head[1].isdigit() and int(head[1]) < 500


def probes(units: Sequence[str], allowed: Sequence[str] = ()) -> list[Probe]:
    """Return every probe; ``allowed`` is the allow-list, the gateways' own and the operator's for this run."""
    written = _written()
    objects = _objects()
    hooks = ["output"]
    # Left out where the role was told to (no_egress_forward: false): then another program closes the containers' ways.
    if not written or re.search(r"^\s*chain forward \{", written, re.MULTILINE):
        hooks.append("forward")
    # What a name stands for is none of the packet filter's business, which has addresses.
    entries = [allow.parse(text, lambda _: []) for text in allowed]
    policies = [_policy(hook, objects, entries, written) for hook in hooks]
    return [*policies, *(probe for unit in units for probe in _unit(unit))]


def _policy(hook: str, objects: Sequence[dict[str, Any]], entries: Sequence[allow.Allowed], written: str = "") -> Probe:
    """The chain refuses what no rule names, and no rule names more than the site's list."""
    chain = filterrules.base_chain(objects, hook)
    found, more = "no such table" if not objects else "no such chain, or the table sleeps", []
    if chain is not None:
        found = f"policy {chain.get('policy')}"
        rules = filterrules.rules_of(objects, chain["name"])
        if rules and any("reject" in e or "drop" in e for e in rules[-1].get("expr", [])):
            found += ", and its last rule refuses"
        known = filterrules.written_by_the_role(written)
        more = filterrules.surplus(filterrules.ways(rules), entries, known)
        if more:
            found += "; not on the site's list: " + "; ".join(_text(way.handle) for way in more)
    what = "lets nothing out" if hook == "output" else "passes nothing on for others"
    return Probe(
        name=f"the packet filter of this host (inet {TABLE}) {what} that is not listed",
        ok=found.startswith("policy drop") and not more,
        found=found,
        expected="policy drop, and no rule that opens more than the allow-list",
    )


def _text(handle: int) -> str:
    """Return a rule as nft writes it."""
    try:
        listed = run(["nft", "-a", "-s", "list", "table", "inet", TABLE])
    except NotAvailable:
        listed = ""
    end = f" # handle {handle}"
    line = next((n for n in listed.splitlines() if n.endswith(end) and not n.endswith("{" + end)), "")
    return f"`{line.removesuffix(end).strip()}`" if line else f"the rule with handle {handle}"


def _unit(unit: str) -> list[Probe]:
    """The second wall: what the unit's processes may do and reach, and systemd's own filter on its control group."""
    names = "ActiveState,IPAddressDeny,RestrictAddressFamilies,InaccessiblePaths"
    done = subprocess.run(["systemctl", "show", unit, "--property", names], capture_output=True, text=True, check=False)
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    processes = statuses(unit)
    if not processes and values.get("ActiveState") in ("inactive", "failed"):
        return []  # it does not run, which is a problem of the report, and no property of its sandbox
    return [sandbox(unit, values, processes), nobody_asks(unit, values, list(processes))]


def statuses(unit: str, proc: Path = Path("/proc")) -> dict[int, dict[str, str]]:
    """Return what the kernel holds of each process of a unit (``/proc/PID/status``)."""
    who = Who([Component(unit, unit, 0)], proc)
    found = {}
    for pid in (int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal()):
        if who.by_group(who.group(pid)):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                lines = (proc / str(pid) / "status").read_text("utf-8", "replace").splitlines()
                found[pid] = {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}
    return found


def sandbox(unit: str, values: Mapping[str, str], processes: Mapping[int, Mapping[str, str]]) -> Probe:
    """Judge a unit.

    Args:
        unit: its name.
        values: properties of systemd: ``RestrictAddressFamilies``, which no file of the kernel shows, and
            ``IPAddressDeny`` for the reader.
        processes: process id -> the fields of its ``/proc/PID/status``.
    """
    name, expected = f"{unit}: no way around the packet filter", "no new privileges, no raw packets"
    if not processes:
        return Probe(name, False, "no process to look at", expected)
    gain = [pid for pid, status in processes.items() if status.get("NoNewPrivs") != "1"]
    # The bounding set: what a process does not hold now it may get from a program with capabilities of its own.
    raw = [pid for pid, status in processes.items() if int(status.get("CapBnd", "ffffffff"), 16) & _NET_RAW]
    if not _packet_sockets(values.get("RestrictAddressFamilies")):
        raw = []
    found = [
        f"may gain privileges ({_numbers(gain)})" if gain else "no new privileges",
        f"may send raw packets ({_numbers(raw)})" if raw else "no raw packets",
        f"IPAddressDeny={_short(values.get('IPAddressDeny', ''))}",
    ]
    return Probe(name, not gain and not raw, ", ".join(found), expected)


def nobody_asks(unit: str, values: Mapping[str, str], pids: Sequence[int], proc: Path = Path("/proc")) -> Probe:
    """No process of the unit may have its names looked up by another program: whose they were could not be told."""
    # Where a process cannot be looked into (root without CAP_SYS_PTRACE), what systemd says it has hidden.
    hidden = {word.lstrip("-") for word in values.get("InaccessiblePaths", "").split()}
    open_ones = {}
    for path, who in lookups.SOCKETS.items():
        states = {lookups.reachable(pid, path, proc) for pid in pids}
        if True in states or (None in states and str(path) not in hidden):
            open_ones[str(path)] = who
    found = ", ".join(f"{who} ({path})" for path, who in open_ones.items())
    return Probe(
        name=f"{unit}: no other program looks up names for it",
        ok=bool(pids) and not open_ones,
        found=f"it reaches {found}" if found else "it reaches none of them" if pids else "no process to look at",
        expected="neither " + ", ".join(dict.fromkeys(lookups.SOCKETS.values())) + ": InaccessiblePaths= of the unit",
    )


def _packet_sockets(families: str | None) -> bool:
    """Whether a unit may open sockets whose frames no packet filter sees.

    systemctl writes what is allowed, or with ``~`` in front what is not; ``~`` alone is no restriction.
    """
    if families is None:
        return True
    named = set(families.removeprefix("~").split()) & _PACKET_FAMILIES
    return named != _PACKET_FAMILIES if families.startswith("~") else bool(named)


def _numbers(pids: Sequence[int]) -> str:
    return ("process " if len(pids) == 1 else "processes ") + ", ".join(map(str, sorted(pids)[:5]))


def _short(text: str) -> str:
    return "any" if re.search(r"(^| )(::/0|0\.0\.0\.0/0)", text) else text or "not set"


def rules() -> str:
    """Return the site's table as the kernel holds it: what holds when nobody watches, so without the capture's."""
    try:
        return run(["nft", "list", "table", "inet", TABLE]).strip() + "\n"
    except NotAvailable as e:
        return f"# inet {TABLE}: {e}\n"
