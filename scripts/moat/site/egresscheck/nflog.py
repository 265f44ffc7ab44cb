# SPDX-License-Identifier: Apache-2.0
"""A reader of NFLOG: the packet filter's own log, over a netlink socket, with nothing but the standard library.

The kernel's side: linux/netfilter/nfnetlink_log.h. Each message carries the beginning of one packet and
the user whose socket sent it. Messages are numbered and the socket says when it dropped some, so that a
lost one never goes unnoticed.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

_NETLINK_NETFILTER: Final = 12
_SO_RCVBUFFORCE: Final = 33
_ULOG: Final = 4 << 8
_PACKET, _CONFIG = 0, 1
_NLMSG_ERROR: Final = 2
_ATTRIBUTE_TYPE: Final = 0x3FFF
# NFULA_*
_PAYLOAD, _PREFIX, _UID, _SEQ, _GID = 9, 10, 11, 12, 14
# NFULA_CFG_*
_CFG_CMD, _CFG_MODE, _CFG_QTHRESH, _CFG_FLAGS = 1, 2, 5, 6
_BIND, _COPY_PACKET, _F_SEQ = 1, 2, 1

_PROTOCOLS: Final = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "icmpv6", 132: "sctp", 136: "udplite"}
_WITH_PORTS: Final = frozenset({6, 17, 33, 132, 136})
#: IPv6 extension headers that stand between the address and the protocol; 44 (fragment) has a fixed length.
_EXTENSIONS: Final = frozenset({0, 43, 44, 60})


@dataclass(frozen=True)
class Packet:
    """Where a packet goes. Ports are 0 where the protocol has none or the packet is cut off."""

    protocol: str
    source: str
    source_port: int
    destination: str
    destination_port: int

    @property
    def text(self) -> str:
        """``tcp 203.0.113.5:443``, ``udp [2001:db8::1]:53``, ``icmp 203.0.113.5``."""
        return place(self.protocol, self.destination, self.destination_port)


@dataclass(frozen=True)
class Event:
    """One logged packet. ``when`` is seconds since 1970; ``uid`` is ``None`` where no socket sent it."""

    when: float
    prefix: str
    uid: int | None
    sequence: int | None
    packet: Packet | None


def place(protocol: str, address: str, port: int) -> str:
    """Return a destination as the report shows it."""
    if protocol.startswith(("icmp", "igmp", "protocol")):
        return f"{protocol} {address}"
    return f"{protocol} [{address}]:{port}" if ":" in address else f"{protocol} {address}:{port}"


def parse_packet(data: bytes) -> Packet | None:
    """Read the beginning of an IP packet; ``None`` if it is none, or too short for its addresses."""
    if len(data) >= 20 and data[0] >> 4 == 4:
        number, rest = data[9], data[(data[0] & 15) * 4 :]
        source, destination = str(ipaddress.IPv4Address(data[12:16])), str(ipaddress.IPv4Address(data[16:20]))
        if int.from_bytes(data[6:8], "big") & 0x1FFF:
            rest = b""  # a later fragment has no ports
    elif len(data) >= 40 and data[0] >> 4 == 6:
        number, rest = data[6], data[40:]
        source, destination = str(ipaddress.IPv6Address(data[8:24])), str(ipaddress.IPv6Address(data[24:40]))
        while number in _EXTENSIONS and len(rest) >= 8:
            size = 8 if number == 44 else (rest[1] + 1) * 8
            number, rest = rest[0], rest[size:]
    else:
        return None
    ports = struct.unpack(">HH", rest[:4]) if number in _WITH_PORTS and len(rest) >= 4 else (0, 0)
    return Packet(_PROTOCOLS.get(number, f"protocol-{number}"), source, ports[0], destination, ports[1])


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each netlink attribute; stops at the first malformed one."""
    at = 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        if size < 4 or at + size > len(data):
            return
        yield kind & _ATTRIBUTE_TYPE, data[at + 4 : at + size]
        at += (size + 3) & ~3


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of each netlink message of a datagram; stops at the first malformed one."""
    at = 0
    while at + 16 <= len(data):
        size, kind = struct.unpack_from("=IH", data, at)
        if size < 16 or at + size > len(data):
            return
        yield kind, data[at + 16 : at + size]
        at += (size + 3) & ~3


def parse(data: bytes, now: Callable[[], float] = time.time) -> list[Event]:
    """Return the packets of one datagram from the kernel. Other messages are passed over."""
    events = []
    for kind, body in messages(data):
        if kind != _ULOG | _PACKET or len(body) < 4:
            continue
        prefix, uid, sequence, packet = "", None, None, None
        for name, value in attributes(body[4:]):
            if name == _PAYLOAD:
                packet = parse_packet(value)
            elif name == _PREFIX:
                prefix = value.rstrip(b"\0").decode("ascii", "replace")
            elif name == _UID and len(value) == 4:
                uid = int.from_bytes(value, "big")
            elif name == _SEQ and len(value) == 4:
                sequence = int.from_bytes(value, "big")
        # The kernel gives packets of the host itself no time: ours is a moment later.
        events.append(Event(now(), prefix, uid, sequence, packet))
    return events


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


class Reader:
    """Reads one NFLOG group in a thread and hands over each event.

    Args:
        handle: called in the reader's thread for every event.
    """

    def __init__(self, handle: Callable[[Event], None]) -> None:
        self._handle = handle
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._next: int | None = None
        self.group = 0
        #: Messages that the kernel could not deliver, as far as their numbers tell.
        self.lost = 0
        #: What went wrong in the thread.
        self.failure: str | None = None

    def open(self) -> None:
        """Bind a free group and begin to read.

        Raises:
            OSError: the kernel has no NFLOG, or we may not use it.
        """
        s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket = s
        s.bind((0, 0))
        s.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        s.settimeout(5)
        for _ in range(20):
            self.group = 20000 + secrets.randbelow(40000)
            code = self._configure(s, _attribute(_CFG_CMD, bytes([_BIND])))
            if code != errno.EBUSY:
                break
        if code:
            raise OSError(code, os.strerror(code))
        for attribute in (
            _attribute(_CFG_MODE, struct.pack(">IBB", 256, _COPY_PACKET, 0)),
            _attribute(_CFG_FLAGS, struct.pack(">H", _F_SEQ)),
            _attribute(_CFG_QTHRESH, struct.pack(">I", 1)),  # at once: the process may soon be gone
        ):
            code = self._configure(s, attribute)
            if code:
                raise OSError(code, os.strerror(code))
        s.settimeout(0.2)
        self._thread = threading.Thread(target=self._read, args=(s,), name="nflog", daemon=True)
        self._thread.start()

    def _configure(self, s: socket.socket, attribute: bytes) -> int:
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, self.group) + attribute
        s.send(struct.pack("=IHHII", 16 + len(body), _ULOG | _CONFIG, 5, 1, 0) + body)
        while True:
            for kind, answer in messages(s.recv(65536)):
                if kind == _NLMSG_ERROR and len(answer) >= 4:
                    return -int(struct.unpack_from("=i", answer)[0])

    def _read(self, s: socket.socket) -> None:
        while True:
            try:
                data = s.recv(1 << 18)
            except TimeoutError:
                if self._end.is_set():
                    return
                continue
            except OSError as e:
                if e.errno == errno.ENOBUFS:  # the numbers of the next messages tell how many are lost
                    self.lost += 1
                    continue
                self.failure = f"the reader of the packet log ended: {e}"
                return
            for event in parse(data):
                if event.sequence is not None:
                    if self._next is not None and event.sequence != self._next:
                        self.lost += (event.sequence - self._next) & 0xFFFFFFFF
                    self._next = (event.sequence + 1) & 0xFFFFFFFF
                try:
                    self._handle(event)
                except Exception as e:  # one bad event must not blind us; it is reported
                    self.failure = f"an event of the packet log could not be handled: {e!r}"

    def close(self) -> None:
        """Read what is still queued, then end."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
