# SPDX-License-Identifier: Apache-2.0
"""Where a piece of configuration points, and whether the site's allow-list covers it. Pure: no name is resolved.

The gateway has the same rules for its own configuration (``moat_gateway.allowlist``); this half runs on
the host's Python, where that package is not. What is said here about a destination is its host and port and
nothing else: a URL may carry a password or a token in every other part.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moat.errors import EgressUnproven
from moat.site.egresscheck import allow

_NAME: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s\"'<>]*)")
_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443, "redis": 6379, "rediss": 6379, "grpc": 4317}


@dataclass(frozen=True)
class Destination:
    """A host name or address in lower case, and a port if one is known; an empty host is one that cannot be read."""

    host: str
    port: int | None = None
    scheme: str = ""

    def __str__(self) -> str:
        if not self.host:
            return "an address that cannot be read" + (f" ({self.scheme})" if self.scheme else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port is not None else host

    @property
    def local(self) -> bool:
        """Whether it is the loopback or the unspecified address: it does not leave the host."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host == "localhost"
        return address.is_loopback or address.is_unspecified


def read(text: str) -> Destination | None:
    """Return ``host``, ``host:port``, ``[v6]``, ``[v6]:port`` or a bare IPv6 address, or ``None`` for anything else."""
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            return None
        port = rest[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        return None
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
        host = str(getattr(found, "ipv4_mapped", None) or found)
    except ValueError:
        host = host.lower().removesuffix(".")
        if not _NAME.fullmatch(host):
            return None
    return Destination(host, int(port) if port else None)


def in_text(text: str) -> list[Destination]:
    """Return where each URL inside ``text`` points; one whose host cannot be read has none, and is on no list."""
    found = []
    for written, authority in _URL.findall(text):
        scheme = written.lower()
        if not authority and scheme in ("file", "unix"):
            continue
        # Several hosts in one URL (sentinels, brokers) are each a destination. What is before the last @ is a secret.
        for part in authority.rpartition("@")[2].split(","):
            d = None if "\\" in authority or "%" in part else read(part)
            if d is None:
                found.append(Destination("", None, scheme))
            else:
                found.append(Destination(d.host, d.port if d.port is not None else _PORTS.get(scheme), scheme))
    return found


class AllowList:
    """The allow-list, and what is allowed besides it.

    Args:
        texts: entries as the capture reads them (:func:`moat.site.egresscheck.allow.parse`); one that is none allows
            nothing. Configuration seldom says whether it means TCP or UDP: either will do.
        own: names and addresses of the site's own services, whatever the port.
    """

    def __init__(self, texts: Iterable[str], own: Iterable[str] = ()) -> None:
        self._own = {d.host for name in own if (d := read(name)) is not None}
        self._entries = []
        for text in texts:
            with contextlib.suppress(EgressUnproven):
                self._entries.append(allow.parse(text, resolve=lambda _: []))

    def allows(self, d: Destination) -> bool:
        """Say whether a destination is this host, the site's own, or on the list."""
        if not d.host:
            return False
        if d.local or d.host in self._own:
            return True
        # No entry has port 0: an unknown port is allowed only where every port is.
        return any(
            (e.name == d.host and e.port in (None, d.port)) or e.permits(d.host, d.port or 0) for e in self._entries
        )
