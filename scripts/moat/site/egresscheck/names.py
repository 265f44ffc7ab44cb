# SPDX-License-Identifier: Apache-2.0
"""Layer ``dns`` with Compose: every name that a process in a container asks for.

Containers ask the engine's resolver at 127.0.0.11, inside their own network namespace: no packet of that
ever reaches the host. So a packet socket is opened in each namespace, which hears what is sent to that
resolver and to port 53 of any other; nothing in the container is changed. The engine makes a namespace for
each start and puts it in a folder, which is watched: the socket is there before the container's program
runs, and where it was not, that is a problem of the report.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from moat.site.egresscheck import control, dnswire
from moat.site.egresscheck.marks import CONTROL, Marks
from moat.site.egresscheck.model import Attempt, Component, NotAvailable
from moat.site.egresscheck.namespaces import holder_of_port, inside
from moat.site.egresscheck.packets import ipv6_here
from moat.site.egresscheck.when import stamp

RESOLVER: Final = "127.0.0.11"
_ETH_P_ALL: Final = 3
_PACKET_OUTGOING: Final = 4
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_SIOCGIFCONF: Final = 0x8912
_IN_CREATE, _IN_CLOEXEC, _IN_NONBLOCK = 0x100, 0o2000000, 0o4000
_APPEAR_SECONDS: Final = 3.0
_FIN, _SYN, _RST = 0x01, 0x02, 0x04
_MAX_MESSAGE: Final = 65535 + 2
#: The engine's resolver passes a question on, from the same namespace: that is the same question.
_SAME_SECONDS: Final = 5.0

#: For the kernel: IPv4 to the resolver; UDP or TCP to port 53, IPv4 or IPv6. Everything else stays out.
_FILTER: Final = (
    (0x30, 0, 0, 0), (0x54, 0, 0, 0xF0), (0x15, 0, 9, 0x40),  # version 4? else to 12
    (0x20, 0, 0, 16), (0x15, 13, 0, 0x7F00000B),              # to 127.0.0.11: take
    (0x30, 0, 0, 9), (0x15, 1, 0, 17), (0x15, 0, 11, 6),      # UDP or TCP, else drop
    (0xB1, 0, 0, 0), (0x48, 0, 0, 2), (0x15, 7, 0, 53), (0x05, 0, 0, 7),
    (0x15, 0, 6, 0x60), (0x30, 0, 0, 6), (0x15, 1, 0, 17), (0x15, 0, 3, 6),
    (0x28, 0, 0, 42), (0x15, 0, 1, 53),
    (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One name asked for, and by which process (``pid/comm``, or empty); ``other`` if it is something else instead."""

    when: float
    process: str
    addresses: tuple[str, ...]
    name: str
    kind: str
    server: str
    other: str = ""


@dataclass(frozen=True)
class Sent:
    """What one packet brings to a name server. ``sequence`` and ``flags`` are TCP's; UDP has no sequence."""

    server: str
    source: int
    data: bytes
    sequence: int | None = None
    flags: int = 0


@dataclass
class Stream:
    """One TCP connection to a name server: each message has its length in front, wherever the segments are cut."""

    following: int
    data: bytes = b""
    total: int = 0
    messages: int = 0

    def take(self, sent: Sent) -> list[bytes]:
        """Take a segment and return the messages that are complete with it."""
        sequence = sent.sequence or 0
        if sent.flags & _SYN:
            sequence += 1
        known = (self.following - sequence) & 0xFFFFFFFF
        # Sent again: only what is new. One that is far ahead follows what we did not hear.
        new = sent.data[known:] if known < 1 << 31 else sent.data
        if not new:
            return []
        self.following = (sequence + len(sent.data)) & 0xFFFFFFFF
        self.data += new
        self.total += len(new)
        found = []
        while len(self.data) >= 2 and len(self.data) >= 2 + (size := int.from_bytes(self.data[:2], "big")):
            found.append(self.data[2 : 2 + size])
            self.data = self.data[2 + size :]
        self.messages += len(found)
        return found

    @property
    def left(self) -> int | None:
        """Bytes that are no message; ``None`` if there are none, or if it was a connection without a word, 0."""
        return len(self.data) if self.data else (0 if not self.messages else None)


def parse_question(message: bytes) -> tuple[str, str] | None:
    """Return name and type of the question of a DNS message; ``None`` for an answer, or for anything else."""
    question = dnswire.parse(message)
    if question is None:
        return None
    return question.name, dnswire.TYPES.get(question.kind, f"type {question.kind}")


def parse_packet(data: bytes) -> Sent | None:
    """Return what an IP packet brings to a name server, or ``None`` if it goes to none."""
    if len(data) >= 28 and data[0] >> 4 == 4:
        protocol, rest = data[9], data[(data[0] & 15) * 4 :]
        address = socket.inet_ntop(socket.AF_INET, data[16:20])
    elif len(data) >= 48 and data[0] >> 4 == 6:
        protocol, rest = data[6], data[40:]
        address = socket.inet_ntop(socket.AF_INET6, data[24:40])
    else:
        return None
    # A packet that came before the filter was in place may be any.
    source = int.from_bytes(rest[:2], "big")
    if address != RESOLVER and rest[2:4] != b"\0\x35":
        return None
    if protocol == 17 and len(rest) >= 8:
        return Sent(address, source, rest[8:])
    if protocol == 6 and len(rest) >= 20:
        return Sent(address, source, rest[(rest[12] >> 4) * 4 :], int.from_bytes(rest[4:8], "big"), rest[13])
    return None


@dataclass
class _Ear:
    """The sockets in one namespace: one hears, the other knows the addresses of the interfaces."""

    key: str
    listener: socket.socket
    asker: socket.socket
    since: float
    inode: int
    addresses: tuple[str, ...] = ()
    lost: int = 0
    recent: dict[tuple[str, str], float] = field(default_factory=dict)
    streams: dict[tuple[str, int], Stream] = field(default_factory=dict)


def _open(key: str) -> _Ear:
    """Open the sockets; runs inside the namespace."""
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.htons(_ETH_P_ALL))
    try:
        code = b"".join(struct.pack("=HBBI", *line) for line in _FILTER)
        keep = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("@HP", len(_FILTER), ctypes.addressof(keep))
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        listener.setblocking(False)
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    except BaseException:
        listener.close()
        raise
    return _Ear(key, listener, asker, time.time(), Path("/proc/thread-self/ns/net").stat().st_ino)


def _addresses(asker: socket.socket) -> tuple[str, ...]:
    """Return the IPv4 addresses of a namespace without its loopback."""
    size, room = 40, 64 * 40
    buffer = ctypes.create_string_buffer(room)
    request = bytearray(struct.pack("@iP", room, ctypes.addressof(buffer)))
    fcntl.ioctl(asker.fileno(), _SIOCGIFCONF, request)
    used = struct.unpack_from("@i", request)[0]
    found = [socket.inet_ntoa(buffer.raw[at + 20 : at + 24]) for at in range(0, used, size)]
    return tuple(a for a in found if not a.startswith("127."))


class NamesLayer:
    """See the module.

    Args:
        folder: where the engine keeps the namespaces of running containers.
        marks: the controls' name.
        own: names that are the site's own, or on the allow-list.
        networks: the site's: other containers of the host are none of our business.
        running: asks for each running component's namespace (a file below ``folder``) and start (seconds).
    """

    name = "dns"

    def __init__(
        self,
        folder: Path,
        marks: Marks,
        own: Sequence[str],
        networks: Sequence[ipaddress.IPv4Network],
        running: Callable[[], dict[str, tuple[Path, float]]],
    ) -> None:
        self._folder = folder
        self._marks = marks
        self._own = frozenset(name.lower().rstrip(".") for name in own)
        self._networks = tuple(networks)
        self._running = running
        self._components: dict[str, Component] = {}
        self._by_name: dict[str, Component] = {}
        self._ears: dict[str, _Ear] = {}
        self._questions: list[Question] = []
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._watch = -1
        #: Component and kind of address (4, 6) of each control.
        self._controls: list[tuple[str, int]] = []
        self.problems: list[str] = []
        self.notes: list[str] = []

    def start(self, components: Sequence[Component]) -> None:
        """Watch the folder, and open an ear in what runs already."""
        self._components = {address: c for c in components for address in c.addresses}
        self._by_name = {c.name: c for c in components}
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
        if self._watch < 0 or libc.inotify_add_watch(self._watch, os.fsencode(self._folder), _IN_CREATE) < 0:
            raise NotAvailable(f"{self._folder} cannot be watched: {os.strerror(ctypes.get_errno())}")
        self._selector.register(self._watch, selectors.EVENT_READ)
        try:
            for namespace, _ in self._running().values():
                self._listen(namespace.name, 0)
        except OSError as e:
            raise NotAvailable(f"no packet socket can be opened in a container's network: {e}") from e
        self._thread = threading.Thread(target=self._read, name="names", daemon=True)
        self._thread.start()

    def _listen(self, key: str, patience: float) -> None:
        """Open an ear. The engine makes the file first and mounts the namespace on it a moment later."""
        until = time.monotonic() + patience
        while key not in self._ears:
            try:
                ear = inside(self._folder / key, partial(_open, key))
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.0005)
                continue
            self._ears[key] = ear
            self._selector.register(ear.listener, selectors.EVENT_READ, ear)

    def _read(self) -> None:
        while not self._end.is_set():
            for selected, _ in self._selector.select(0.2):
                try:
                    if selected.data is None:
                        self._appeared()
                    else:
                        self._hear(selected.data)
                except Exception as e:  # one bad packet must not make us deaf; it is reported
                    self.problems.append(f"names could not be watched without a gap: {e!r}")

    def _appeared(self) -> None:
        data = os.read(self._watch, 65536)
        at = 0
        while at + 16 <= len(data):
            size = struct.unpack_from("=iIII", data, at)[3]
            key = data[at + 16 : at + 16 + size].rstrip(b"\0").decode("utf-8", "replace")
            at += 16 + size
            # One that vanishes again (a start that failed) was never anybody's.
            with contextlib.suppress(OSError):
                self._listen(key, _APPEAR_SECONDS)

    def _hear(self, ear: _Ear) -> None:
        while True:
            try:
                data, sender = ear.listener.recvfrom(65536)
            except BlockingIOError:
                return
            # On loopback every packet passes twice, out and in.
            if sender[2] == _PACKET_OUTGOING and sender[0] == "lo":
                continue
            if sender[2] != _PACKET_OUTGOING and sender[0] != "lo":
                continue
            sent = parse_packet(data)
            if sent is None:
                continue
            if not ear.addresses:
                ear.addresses = _addresses(ear.asker)
            if sent.sequence is None:
                self._message(ear, sent, sent.data)
            else:
                self._segment(ear, sent)

    def _segment(self, ear: _Ear, sent: Sent) -> None:
        key = (sent.server, sent.source)
        if sent.flags & _SYN and key in ear.streams and ear.streams[key].total:
            self._ended(ear, *key)
        first = ((sent.sequence or 0) + (1 if sent.flags & _SYN else 0)) & 0xFFFFFFFF
        stream = ear.streams.setdefault(key, Stream(first))
        for message in stream.take(sent):
            self._message(ear, sent, message)
        if sent.flags & (_FIN | _RST) or len(stream.data) > _MAX_MESSAGE:
            self._ended(ear, *key)

    def _ended(self, ear: _Ear, server: str, source: int) -> None:
        left = ear.streams.pop((server, source)).left
        if left is not None:
            self._other(ear, server, source, f"tcp port 53: {left} bytes that are no query")

    def _other(self, ear: _Ear, server: str, source: int, what: str) -> None:
        who = holder_of_port(ear.inode, source)
        self._questions.append(Question(time.time(), who, ear.addresses, "", "", server, what))

    def _message(self, ear: _Ear, sent: Sent, message: bytes) -> None:
        asked = parse_question(message)
        if asked is None:
            word = "udp" if sent.sequence is None else "tcp"
            self._other(ear, sent.server, sent.source, f"{word} port 53: {len(message)} bytes that are no query")
            return
        now = time.time()
        passed_on = sent.server.startswith("127.") and sent.server != RESOLVER
        if passed_on and now - ear.recent.get(asked, 0) < _SAME_SECONDS:
            return
        ear.recent[asked] = now
        # At once: a moment later the process may be gone.
        who = "" if asked[0] in self._own else holder_of_port(ear.inode, sent.source)
        self._questions.append(Question(now, who, ear.addresses, asked[0], asked[1], sent.server))

    def control(self) -> str:
        """Ask for the control's name in every container, as its user."""
        query = dnswire.query(0x4D6F, self._marks.name, dnswire.A)
        places = {n: place for n, (place, _) in self._running().items() if n in self._by_name}
        if not places:
            raise NotAvailable("no container runs")
        # A container without IPv6 to the outside mostly has its loopback: there a question is heard just as well.
        six = [n for n, place in places.items() if inside(place, ipv6_here)]
        self._controls = [*((n, 4) for n in places), *((n, 6) for n in six)]
        # All at once: the engine's resolver may not answer at all, and each then waits for its time.
        with ThreadPoolExecutor(len(self._controls)) as pool:
            asked = [
                pool.submit(inside, places[n], partial(control.attempt, self._by_name[n].uid, "udp", server, 53, query))
                for n, server in ((n, RESOLVER if kind == 4 else "::1") for n, kind in self._controls)
            ]
            for one in asked:
                one.result()
        also = f", over IPv6 in {', '.join(six)}" if six else ""
        return f"name {self._marks.name} (A) in {', '.join(places)}{also}"

    def stop(self) -> list[Attempt]:
        """End, and return the names that are not the site's own."""
        if self._thread is None:
            return self._close()
        self._late()
        time.sleep(0.05)
        self._end.set()
        self._thread.join(timeout=10)
        self._thread = None
        for ear in list(self._ears.values()):
            for key in list(ear.streams):
                self._ended(ear, *key)
            _, lost = struct.unpack("=II", ear.listener.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
            if lost:
                self.problems.append(f"{lost} packets that may have held names could not be read")
        found = self._attempts()
        self._close()
        return found

    def _close(self) -> list[Attempt]:
        for ear in self._ears.values():
            ear.listener.close()
            ear.asker.close()
        self._ears.clear()
        self._selector.close()
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1
        return []

    def _late(self) -> None:
        """See that each ear was there before the container's program."""
        for name, (namespace, started) in self._running().items():
            ear = self._ears.get(namespace.name)
            if ear is None:
                self.problems.append(f"the names that {name} asks for were not watched")
            elif ear.since > started:
                self.problems.append(
                    f"the names of {name} were watched only {ear.since - started:.2f} s after its start"
                )

    def _component(self, question: Question) -> Component | None:
        return next((self._components[a] for a in question.addresses if a in self._components), None)

    def _attempts(self) -> list[Attempt]:
        found, caught = [], set()
        for q in self._questions:
            if not any(ipaddress.ip_address(a) in n for a in q.addresses for n in self._networks):
                continue
            component = self._component(q)
            ours = q.name == self._marks.name
            if ours and component is not None:
                caught.add((component.name, 6 if ":" in q.server else 4))
            if not q.other and (q.name in self._own or self._is_own_address(q)):
                continue
            found.append(
                Attempt(
                    when=stamp(q.when),
                    layer=self.name,
                    process=q.process
                    or (f"uid {component.uid}" if component else f"a container at {', '.join(q.addresses)}"),
                    component=CONTROL if ours else component.name if component else "unknown",
                    destination=q.other or f"name {q.name} ({q.kind})",
                    detail="" if q.server == RESOLVER else f"asked at {q.server}",
                )
            )
        missed = [n if kind == 4 else f"{n} (IPv6)" for n, kind in self._controls if (n, kind) not in caught]
        if missed:
            self.problems.append(f"the control in {', '.join(missed)} was not heard")
            found = [a for a in found if a.component != CONTROL]
        return found

    def _is_own_address(self, q: Question) -> bool:
        """Whether the question is for the name of one of the site's own addresses."""
        if q.kind != "PTR" or not q.name.endswith(".in-addr.arpa"):
            return False
        address = ".".join(reversed(q.name.removesuffix(".in-addr.arpa").split(".")))
        return address in self._components or address.startswith("127.")
