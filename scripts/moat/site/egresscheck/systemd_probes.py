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
from collections.abc import Iterator, Sequence
from typing import Any, Final

from moat.site.egresscheck.model import NotAvailable, Probe
from moat.site.egresscheck.requests import Target
from moat.site.egresscheck.tools import run

#: The table of the site (role no_egress).
TABLE: Final = "moat_egress"
#: Counters of rules that let the *host* out (time, names, its own address): they are not for the services.
_HOST_COUNTERS: Final = frozenset({"moat_out_ntp", "moat_out_dns", "moat_out_dhcp", "moat_out_neighbours"})


def _objects() -> list[dict[str, Any]]:
    try:
        raw = json.loads(run(["nft", "-j", "list", "table", "inet", TABLE]))
    except (NotAvailable, ValueError):
        return []
    return [x for x in raw.get("nftables", []) if isinstance(x, dict)]


def let_out(objects: Sequence[dict[str, Any]] | None = None) -> list[str]:
    """Return the destinations that the site's packet filter lets the services reach, in the words of the allow-list."""
    found = []
    for rule in (x["rule"] for x in (_objects() if objects is None else objects) if "rule" in x):
        words = rule.get("expr", [])
        counters = {e["counter"] for e in words if isinstance(e.get("counter"), str)}
        if rule.get("chain") != "output" or not any("accept" in e for e in words) or counters & _HOST_COUNTERS:
            continue
        hosts: list[str] = []
        ports: list[tuple[str, str]] = []
        for match in (e["match"] for e in words if "match" in e):
            payload = match.get("left", {}).get("payload", {}) if isinstance(match.get("left"), dict) else {}
            values = list(_values(match.get("right")))
            if payload.get("field") == "daddr" and match.get("op") == "==":
                hosts = values
            elif payload.get("field") == "dport" and match.get("op") == "==":
                ports = [(str(payload.get("protocol")), v) for v in values]
        for host in hosts:
            written = f"[{host}]" if ":" in host else host
            found += [f"{protocol} {written}:{port}" for protocol, port in ports]
    return list(dict.fromkeys(found))


def _values(right: Any) -> Iterator[str]:
    if isinstance(right, str | int):
        yield str(right)
    elif isinstance(right, dict) and "prefix" in right:
        yield f"{right['prefix']['addr']}/{right['prefix']['len']}"
    elif isinstance(right, dict) and "set" in right:
        for value in right["set"]:
            yield from _values(value)


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


def probes(units: Sequence[str]) -> list[Probe]:
    """Return every probe."""
    return [_policy("output"), *(_sandbox(unit) for unit in units)]


def _policy(hook: str) -> Probe:
    chains = [x["chain"] for x in _objects() if "chain" in x]
    chain = next((c for c in chains if c.get("hook") == hook), None)
    found = "no such table" if not chains else "no such chain"
    if chain is not None:
        found = f"policy {chain.get('policy')}"
        last = [x["rule"] for x in _objects() if "rule" in x and x["rule"].get("chain") == chain.get("name")]
        if last and any("reject" in e or "drop" in e for e in last[-1].get("expr", [])):
            found += ", and its last rule refuses"
    return Probe(
        name=f"the packet filter of this host (inet {TABLE}) lets nothing out that is not listed",
        ok=found.startswith("policy drop"),
        found=found,
        expected="policy drop",
    )


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
