# SPDX-License-Identifier: Apache-2.0
"""Filters that turn the site's allow-list, and the inventory's groups, into the packet filter's entries.

They run on the control host, before anything is changed: a wrong entry is refused with its index, what was found and
what was expected. No name is ever looked up.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

FIELDS = ("address", "port", "protocol", "name", "comment")
PROTOCOLS = ("tcp", "udp")
#: Where gateways, store and counters listen and are reached, if not under ``moat_address``.
SERVICES = ("gateway_listen_address", "minio_address", "valkey_address")
_COMMENT = re.compile(r"[^\"\\\x00-\x1f\x7f]{0,100}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


def _refuse(where: str, what: str, found: object, expected: str) -> AnsibleFilterError:
    return AnsibleFilterError(
        f"{where}: {what}; found: {found!r}; expected: {expected}; do: correct it in vars.yml or the inventory"
    )


def network(value: object, where: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return an address or a network in CIDR form; ``where`` names the variable in the refusal."""
    expected = "an IPv4 or IPv6 address, or a network such as 10.20.0.0/24 (a name is never looked up)"
    if not isinstance(value, str) or "%" in value:
        raise _refuse(where, "not an address", value, expected)
    try:
        found = ipaddress.ip_network(value, strict=True)
    except ValueError as e:
        if "host bits" in str(e):
            right = ipaddress.ip_network(value, strict=False)
            raise _refuse(where, "the network has host bits set", value, f"{right}, or the single address") from None
        raise _refuse(where, "not an address", value, expected) from None
    if found.prefixlen == 0:
        raise _refuse(where, "the whole address space is no allow-list", value, "the site's own servers or networks")
    return found


def entry(raw: object, where: str) -> dict[str, Any]:
    """Return one normalised entry: address, family (``ip`` or ``ip6``), port, protocol, name, comment, counter.

    Raises:
        AnsibleFilterError: a field is missing, unknown or malformed.
    """
    if not isinstance(raw, Mapping):
        raise _refuse(where, "not an entry", raw, "{address: 10.20.0.5, port: 8000}")
    unknown = sorted(set(raw) - set(FIELDS))
    if unknown:
        raise _refuse(where, "unknown field", unknown[0], "one of " + ", ".join(FIELDS))
    for field in ("address", "port"):
        if raw.get(field) is None:
            raise _refuse(where, f"{field} is missing", dict(raw), "{address: 10.20.0.5, port: 8000}")
    net = network(raw["address"], f"{where}.address")
    port = raw["port"]
    if isinstance(port, bool) or not re.fullmatch(r"[0-9]{1,5}", str(port)) or not 0 < int(port) < 65536:
        raise _refuse(f"{where}.port", "not a port", port, "a whole number from 1 to 65535")
    protocol = raw.get("protocol") or "tcp"
    if protocol not in PROTOCOLS:
        raise _refuse(f"{where}.protocol", "not a protocol of the allow-list", protocol, "tcp or udp")
    name = raw.get("name") or ""
    if name and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise _refuse(f"{where}.name", "not a host name", name, "a name such as vllm-1.site.example")
    comment = raw.get("comment") or ""
    if not isinstance(comment, str) or not _COMMENT.fullmatch(comment):
        raise _refuse(f"{where}.comment", "not one plain line", comment, 'at most 100 characters without " and \\')
    single = net.prefixlen == net.max_prefixlen
    address = str(net.network_address) if single else str(net)
    return {
        "address": address,
        "family": "ip" if net.version == 4 else "ip6",
        "port": int(port),
        "protocol": protocol,
        "name": name,
        "comment": comment,
        "loopback": net.is_loopback,
        # A name by content: an entry that moves in the list keeps its counter, and a reader knows what it counts.
        "counter": "moat_out_" + re.sub(r"[.:]", "_", address.replace("/", "n")) + f"_{protocol}_{int(port)}",
    }


def entries(value: object, where: str = "moat_egress_allow") -> list[dict[str, Any]]:
    """Return the normalised entries of an allow-list; a destination that is listed twice is refused."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _refuse(where, "not a list", value, "a list of {address, port}")
    done: list[dict[str, Any]] = []
    for i, raw in enumerate(value):
        one = entry(raw, f"{where}[{i}]")
        for j, other in enumerate(done):
            if other["counter"] == one["counter"]:
                raise _refuse(f"{where}[{i}]", f"the same as {where}[{j}]", one["address"], "each destination once")
        done.append(one)
    return done


def addresses(value: object, where: str) -> list[dict[str, str]]:
    """Return a list of plain addresses or networks, each with its family."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _refuse(where, "not a list", value, "a list of addresses")
    nets = [network(raw, f"{where}[{i}]") for i, raw in enumerate(value)]
    return [
        {
            "address": str(n.network_address) if n.prefixlen == n.max_prefixlen else str(n),
            "family": "ip" if n.version == 4 else "ip6",
        }
        for n in nets
    ]


def ports(value: object, where: str) -> list[int]:
    """Return a list of ports as whole numbers, sorted, each once."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _refuse(where, "not a list", value, "a list of ports")
    for i, port in enumerate(value):
        if isinstance(port, bool) or not re.fullmatch(r"[0-9]{1,5}", str(port)) or not 0 < int(port) < 65536:
            raise _refuse(f"{where}[{i}]", "not a port", port, "a whole number from 1 to 65535")
    return sorted({int(port) for port in value})


def is_outside(value: object) -> bool:
    """Say whether a value is one address by which a host is known to others: no name, no network, no loopback."""
    try:
        address = ipaddress.ip_address(str(value))
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


def peers(hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the addresses that hosts are known to have: their own, and those of their services in other networks.

    A packet comes from the address in the network that it is sent through, which may be any of them.
    """
    names = ("moat_address", *SERVICES)
    found = [str(hostvars[h][n]) for h in hosts for n in names if is_outside(hostvars[h].get(n))]
    return list(dict.fromkeys(found))


def nodes(
    me: str,
    groups: Mapping[str, Iterable[str]],
    hostvars: Mapping[str, Mapping[str, Any]],
    gateway_ports: Sequence[int],
    store_ports: Sequence[int],
    counters_ports: Sequence[int],
    ssh_ports: Sequence[int],
) -> list[dict[str, Any]]:
    """Return what host ``me`` needs of the inventory's other hosts, as entries of an allow-list.

    The edge reaches the gateways; gateways, store nodes and the edge's own services reach what they use, each under the
    address that the service has of its own, or else under the host's; the control host, if it is one of the hosts
    (``ansible_connection: local``), reaches the others by SSH, under ``ansible_host`` where that is an address.
    """

    def members(group: str) -> list[str]:
        return list(groups.get(group, ()))

    gateway, store, counters = SERVICES
    wanted: list[tuple[str, str, int, str]] = []
    if me in members("moat_edge"):
        wanted += [(h, gateway, p, "gateway on") for h in members("moat_gateways") for p in gateway_ports]
    if me in members("moat_gateways"):
        wanted += [(h, store, p, "store on") for h in members("moat_store") for p in store_ports]
        wanted += [(h, counters, p, "counters on") for h in members("moat_counters") for p in counters_ports]
    if me in members("moat_store"):
        wanted += [(h, store, p, "store on") for h in members("moat_store") for p in store_ports]
    if hostvars[me].get("ansible_connection") == "local":
        every = [h for g in ("moat_gateways", "moat_edge", "moat_store", "moat_counters") for h in members(g)]
        wanted += [(h, "ansible_host", p, "administration of") for h in dict.fromkeys(every) for p in ssh_ports]
    done: dict[str, dict[str, Any]] = {}
    for host, own, port, what in wanted:
        if host == me:
            continue
        # Ansible's own may be a name, which nothing here looks up, or the near end of a tunnel.
        usable = own != "ansible_host" or is_outside(hostvars[host].get(own))
        variable = own if hostvars[host].get(own) and usable else "moat_address"
        where, address = f"{variable} of host {host}", hostvars[host].get(variable)
        first = ipaddress.ip_address(str(network(address, where).network_address))
        if first.is_loopback or first.is_unspecified:
            kind = "a loopback address" if first.is_loopback else "an address that means all of its own"
            raise _refuse(where, f"host {me} cannot reach it under {kind}", address, "its site address")
        one = entry({"address": address, "port": port, "comment": f"{what} {host}"}, where)
        done.setdefault(one["counter"], one)
    return list(done.values())


def joined(listed: Sequence[dict[str, Any]], computed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the packet filter's entries: what the operator lists, and what is computed and not listed too.

    A destination on the loopback is none of the packet filter's: programs of one host reach each other in any case.
    """
    known = {one["counter"] for one in listed}
    return [one for one in listed if not one["loopback"]] + [one for one in computed if one["counter"] not in known]


def gateway_allow(value: object) -> list[str]:
    """Return the list for the gateway's ``MOAT_EGRESS_ALLOW``: ``name:port``, ``address:port`` and networks."""
    found: list[str] = []
    for one in entries(value):
        if one["protocol"] != "tcp":
            continue
        if one["name"]:
            found.append(f"{one['name']}:{one['port']}")
        if "/" in one["address"]:
            found.append(one["address"])
        else:
            host = f"[{one['address']}]" if one["family"] == "ip6" else one["address"]
            found.append(f"{host}:{one['port']}")
    return list(dict.fromkeys(found))


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "moat_egress_entries": entries,
            "moat_egress_addresses": addresses,
            "moat_egress_ports": ports,
            "moat_egress_nodes": nodes,
            "moat_egress_peers": peers,
            "moat_egress_joined": joined,
            "moat_egress_gateway_allow": gateway_allow,
        }
