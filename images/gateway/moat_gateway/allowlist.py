# SPDX-License-Identifier: Apache-2.0
"""Which destinations the gateway may name and reach: host names, addresses, networks, with or without a port.

The loopback is always allowed: what is sent there does not leave the machine (in a container, not even the
container). Everything here is pure: no name is ever resolved.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
_AUTHORITY = re.compile(r"://([^/?#\s\"'<>]*)")
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+\Z")
_SCHEME_MAX = 64  # characters that are looked at: a search over the whole text takes the square of its length
DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443, "redis": 6379, "rediss": 6379, "grpc": 4317}


@dataclass(frozen=True)
class Destination:
    """Where something points: a host name or address in lower case, and a port if one is known."""

    host: str
    port: int | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port is not None else host


@dataclass(frozen=True)
class Entry:
    """One line of the allow-list: a name or a network, and a port or all of them."""

    name: str | None
    network: Network | None
    port: int | None

    def fits_port(self, port: int | None) -> bool:
        """Say whether the entry covers ``port``; an unknown port fits only an entry without one."""
        return self.port is None or self.port == port


class NotADestination(ValueError):
    """A text is neither a host name, nor an address, nor either with a port."""


def as_address(host: str) -> Address | None:
    """Return ``host`` as an address, IPv4 in IPv6 unwrapped, or ``None`` if it is a name.

    Forms that only the C library reads as addresses (``127.1``, ``0x7f000001``) are names here: they are on no list.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_local(host: str) -> bool:
    """Say whether ``host`` is this machine: the loopback, the unspecified address, or ``localhost``."""
    address = as_address(host)
    if address is None:
        return host.lower().rstrip(".") == "localhost"
    return address.is_loopback or address.is_unspecified


def parse_host_port(text: str) -> Destination:
    """Parse ``host``, ``host:port``, ``[v6]``, ``[v6]:port`` or a bare IPv6 address.

    Raises:
        NotADestination: for anything else; a name is ASCII letters, digits, ``-``, ``_`` and dots.
    """
    host, port_text = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            raise NotADestination(text)
        port_text = rest[1:]
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
    port = None
    if port_text:
        if not re.fullmatch(r"[0-9]{1,5}", port_text) or not 0 < int(port_text) < 65536:
            raise NotADestination(text)
        port = int(port_text)
    elif text.endswith(":") and as_address(text) is None:
        raise NotADestination(text)
    address = as_address(host)
    if address is not None:
        return Destination(str(address), port)
    host = host.lower().removesuffix(".")
    if not _NAME.fullmatch(host):
        raise NotADestination(text)
    return Destination(host, port)


def destinations_of_urls(text: str) -> Iterator[Destination | NotADestination]:
    """Yield where each URL inside ``text`` points, or why that cannot be told (then it must be refused).

    The reading is the strictest of those that clients use: what is before the last ``@`` is credentials, a
    backslash or a blank in the authority is refused, a scheme without an authority (``file:///x``) points nowhere.
    """
    at = 0
    while (found := _AUTHORITY.search(text, at)) is not None:
        name = _SCHEME.search(text[max(at, found.start() - _SCHEME_MAX) : found.start()])
        at = found.end() if name is not None else found.start() + 1
        if name is None:
            continue
        scheme, authority = name.group(), found.group(1)
        if not authority and scheme.lower() == "file":
            continue
        try:
            if "\\" in authority or "%" in authority.rpartition("@")[2]:
                raise NotADestination(f"{scheme} URL with an unusual host")
            # Several hosts in one URL (redis-sentinel, postgres, mongodb) are each a destination.
            for part in authority.rpartition("@")[2].split(","):
                d = parse_host_port(part)
                yield d if d.port is not None else Destination(d.host, DEFAULT_PORTS.get(scheme.lower()))
        except NotADestination:
            yield NotADestination(f"{scheme} URL whose host cannot be read")


class AllowList:
    """The site's list of destinations.

    Args:
        entries: see :meth:`parse`.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = tuple(entries)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> AllowList:
        """Build a list from ``host``, ``host:port``, addresses and networks (``10.1.0.0/16``).

        Raises:
            NotADestination: naming the text that is none of these.
        """
        entries = []
        for text in texts:
            if "/" in text:
                try:
                    entries.append(Entry(None, ipaddress.ip_network(text.strip("[]")), None))
                except ValueError as e:
                    raise NotADestination(text) from e
                continue
            d = parse_host_port(text)
            address = as_address(d.host)
            if address is not None:
                entries.append(Entry(None, ipaddress.ip_network(address), d.port))
            else:
                entries.append(Entry(d.host, None, d.port))
        return cls(entries)

    def allows(self, destination: Destination) -> bool:
        """Say whether the gateway may name or reach ``destination`` (no name is resolved)."""
        if is_local(destination.host):
            return True
        address = as_address(destination.host)
        if address is not None:
            return self.allows_address(address, destination.port)
        name = destination.host.lower().removesuffix(".")
        return any(e.name == name and e.fits_port(destination.port) for e in self.entries)

    def allows_address(self, address: Address, port: int | None) -> bool:
        """Say whether an address is listed itself, or is inside a listed network."""
        return any(
            e.network is not None
            and e.network.version == address.version
            and address in e.network
            and e.fits_port(port)
            for e in self.entries
        )

    def knows_name(self, name: str) -> bool:
        """Say whether ``name`` may be looked up at all, whatever the port."""
        name = name.lower().removesuffix(".")
        return any(e.name == name for e in self.entries)

    def __str__(self) -> str:
        def show(e: Entry) -> str:
            host = e.name or (str(e.network) if e.network is not None else "")
            return f"{host}:{e.port}" if e.port is not None else host

        return ", ".join(show(e) for e in self.entries) or "nothing but the loopback"
