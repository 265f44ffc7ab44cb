# SPDX-License-Identifier: Apache-2.0
"""What is proved about a systemd site besides the capture: the rules are in force, the sandboxes hold.

Each probe looks at what the kernel holds, not at what a file says.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from moat.site.egresscheck import allow, filterrules
from moat.site.egresscheck.model import NotAvailable, Probe
from moat.site.egresscheck.requests import Target
from moat.site.egresscheck.tools import run

#: The table of the site (role no_egress).
TABLE: Final = "moat_egress"
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
    return [*(_policy(hook, objects, entries, written) for hook in hooks), *(_sandbox(unit) for unit in units)]


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


def _sandbox(unit: str) -> Probe:
    """The second wall: systemd's own filter on the unit's control group."""
    names = "IPAddressDeny,IPAddressAllow,NoNewPrivileges,CapabilityBoundingSet,RestrictAddressFamilies,PrivateNetwork"
    done = subprocess.run(["systemctl", "show", unit, "--property", names], capture_output=True, text=True, check=False)
    values = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    raw = "cap_net_raw" in values.get("CapabilityBoundingSet", "").split()
    privileges = values.get("NoNewPrivileges") == "yes"
    families = values.get("RestrictAddressFamilies", "")
    packets = not families or "AF_PACKET" in families.split() if not families.startswith("~") else False
    found = [
        "may gain privileges" if not privileges else "no new privileges",
        "may send raw packets" if raw and packets else "no raw packets",
        f"IPAddressDeny={_short(values.get('IPAddressDeny', ''))}",
    ]
    return Probe(
        name=f"{unit}: no way around the packet filter",
        ok=privileges and not (raw and packets),
        found=", ".join(found),
        expected="no new privileges, no raw packets",
    )


def _short(text: str) -> str:
    return "any" if re.search(r"(^| )(::/0|0\.0\.0\.0/0)", text) else text or "not set"


def rules() -> str:
    """Return the site's table as the kernel holds it: what holds when nobody watches, so without the capture's."""
    try:
        return run(["nft", "list", "table", "inet", TABLE]).strip() + "\n"
    except NotAvailable as e:
        return f"# inet {TABLE}: {e}\n"
