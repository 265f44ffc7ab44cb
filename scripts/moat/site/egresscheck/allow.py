# SPDX-License-Identifier: Apache-2.0
"""One entry of the allow-list: a destination that is no leak.

Written ``[tcp|udp ]HOST[:PORT]``; HOST is an address, a network in CIDR form or a name. Without a port
every port is meant, without a protocol both.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from moat.errors import EgressUnproven

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_ENTRY: Final = re.compile(
    r"(?:(tcp|udp)[ /])?(?:\[([0-9a-fA-F:./%]+)\]|([^\s:\[\]]+|[0-9a-fA-F:]*:[0-9a-fA-F:.]+(?:/\d+)?))(?::(\d{1,5}))?"
)
_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True)
class Allowed:
    """One entry. ``networks`` holds what a name resolved to; ``port`` and ``protocol`` ``None`` mean any."""

    text: str
    networks: tuple[Network, ...]
    port: int | None = None
    protocol: str | None = None
    name: str | None = None

    def permits(self, address: str, port: int, protocol: str | None = None) -> bool:
        """Whether this destination is meant; an unknown protocol (``None``) counts as the right one."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return (
            (self.port is None or self.port == port)
            and (self.protocol is None or protocol is None or self.protocol == protocol)
            and any(ip in network for network in self.networks if network.version == ip.version)
        )

    def rules(self) -> list[str]:
        """Return what the packet filter matches, one text for each rule."""
        found = []
        for network in self.networks:
            match = f"{'ip' if network.version == 4 else 'ip6'} daddr {network}"
            if self.port is not None:
                for protocol in (self.protocol,) if self.protocol else ("tcp", "udp"):
                    found.append(f"{match} {protocol} dport {self.port}")
            else:
                found.append(f"{match} meta l4proto {self.protocol}" if self.protocol else match)
        return found


def _resolve(name: str) -> list[str]:
    """Ask the host's own resolver, as the services would."""
    try:
        return sorted({str(row[4][0]) for row in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def parse(text: str, resolve: Callable[[str], list[str]] = _resolve) -> Allowed:
    """Read one entry.

    Raises:
        EgressUnproven: it is none.
    """
    match = _ENTRY.fullmatch(text.strip())
    port = int(match[4]) if match and match[4] else None
    if match is None or (port is not None and not 1 <= port <= 65535):
        raise _malformed(text)
    host = match[2] or match[3]
    try:
        return Allowed(text, (ipaddress.ip_network(host, strict=False),), port, match[1])
    except ValueError:
        if match[2] or not _NAME.fullmatch(host) or re.fullmatch(r"[\d./]+", host):
            raise _malformed(text) from None
    name = host.rstrip(".").lower()
    return Allowed(text, tuple(ipaddress.ip_network(a.partition("%")[0]) for a in resolve(name)), port, match[1], name)


def parse_all(texts: Iterable[str]) -> list[Allowed]:
    """Read every entry.

    Raises:
        EgressUnproven: one of them is malformed.
    """
    return [parse(text) for text in texts]


def _malformed(text: str) -> EgressUnproven:
    return EgressUnproven(
        "an entry of the allow-list cannot be read",
        found=text,
        expected="[tcp|udp ]ADDRESS[:PORT], a network such as 10.20.0.0/24:8000, [fd00::5]:8000, or a name",
        hint="correct it; an allow-list that is misread would hide a leak",
    )
