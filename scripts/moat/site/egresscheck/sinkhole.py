# SPDX-License-Identifier: Apache-2.0
"""Layer ``dns``: a name server that logs every question of the components' users and answers each.

The answer is an address of TEST-NET-3 (2001:db8:53::/48 over IPv6), one for each name: so the connect that
follows is seen by the other layers, and the report says which name it was for. The questions get here by a
redirect rule for those users alone, wherever they were sent; the host's ``resolv.conf`` is not touched and
nobody else's names are. Each user has ports of its own, so the port tells whose question it was.

Not seen here: lookups that another program does for the service (systemd-resolved over its socket, nscd) and
encrypted ones (DNS over TLS or HTTPS), which are connections like others.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moat.site.egresscheck import control, dnswire, lookups
from moat.site.egresscheck.allow import Allowed
from moat.site.egresscheck.attribute import ANSWERED
from moat.site.egresscheck.leftovers import DNS_TABLE
from moat.site.egresscheck.marks import CONTROL, Marks
from moat.site.egresscheck.model import Attempt, Component, NotAvailable
from moat.site.egresscheck.packets import ipv6_here
from moat.site.egresscheck.tools import run
from moat.site.egresscheck.when import stamp
from moat.site.egresscheck.who import Who

_MAX_CONNECTIONS: Final = 64
_CONNECTION_SECONDS: Final = 5.0
_MAX_MESSAGE: Final = 4096
#: How many of the names that share an address are told.
_SHOWN_NAMES: Final = 5


@dataclass
class _Port:
    """One socket of the sinkhole and the user whose questions arrive there."""

    uid: int
    protocol: str  # udp, tcp
    family: int
    socket: socket.socket

    @property
    def number(self) -> int:
        return int(self.socket.getsockname()[1])


@dataclass
class _Connection:
    """One TCP connection. ``who``: process and component; ``total``: bytes so far; ``judged``: messages among them."""

    port: _Port
    until: float
    when: str
    who: tuple[str, str]
    data: bytes = b""
    total: int = 0
    judged: int = 0


def ruleset(ports: Sequence[tuple[int, str, int, int]]) -> str:
    """Return the table as ``nft -f`` reads it, from (user, protocol, address family, port of the sinkhole)."""
    lines = [
        f"table inet {DNS_TABLE} {{",
        '  comment "moat egress verify: only while it runs"',
        "  chain output {",
        "    type nat hook output priority -105; policy accept;",
    ]
    for uid, protocol, family, number in ports:
        nfproto = "ipv4" if family == socket.AF_INET else "ipv6"
        lines.append(f"    meta skuid {uid} meta nfproto {nfproto} {protocol} dport 53 redirect to :{number}")
    return "\n".join([*lines, "  }", "}"]) + "\n"


class DnsLayer:
    """See the module. Names in ``allowed`` are answered truly and are no attempt."""

    name = "dns"

    def __init__(self, allowed: Sequence[Allowed], marks: Marks) -> None:
        self._allowed = {a.name: a for a in allowed if a.name}
        self._marks = marks
        self._who = Who(())
        self._ports: list[_Port] = []
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._attempts: list[Attempt] = []
        #: Questions that were answered truly, one a second and component: each explains the call that carried it.
        self._answered: dict[tuple[str, int], Attempt] = {}
        self._given: dict[str, int] = {}
        self._shared: dict[str, list[str]] = {}
        #: User, protocol and address family of each control, made and caught.
        self._controls: set[tuple[int, str, int]] = set()
        self._caught: set[tuple[int, str, int]] = set()
        self._malformed = 0
        #: The name behind each address that was given out, for the other layers.
        self.answers: dict[str, str] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []

    def start(self, components: Sequence[Component]) -> None:
        """Listen on loopback, then set the redirect."""
        self._who = Who(components)
        if not self._who.uids:
            raise NotAvailable("no component has a user of its own")
        run(["nft", "list", "tables"])
        families = [(socket.AF_INET, "127.0.0.1")] + ([(socket.AF_INET6, "::1")] if ipv6_here() else [])
        for uid in self._who.uids:
            for family, address in families:
                self._listen(uid, "udp", family, address)
                self._listen(uid, "tcp", family, address)
        self._thread = threading.Thread(target=self._serve, name="sinkhole", daemon=True)
        self._thread.start()
        run(["nft", "-f", "-"], ruleset([(p.uid, p.protocol, p.family, p.number) for p in self._ports]))
        for path, who in lookups.SOCKETS.items():
            if path.exists() and "bus" not in who:
                self.notes.append(f"{who} runs: what it looks up for a service is not seen by this layer")

    def _listen(self, uid: int, protocol: str, family: int, address: str) -> None:
        s = socket.socket(family, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM)
        port = _Port(uid, protocol, family, s)
        self._ports.append(port)
        s.setblocking(False)
        s.bind((address, 0))
        if protocol == "tcp":
            s.listen(16)
        self._selector.register(s, selectors.EVENT_READ, port)

    # --- the server's thread ---

    def _serve(self) -> None:
        while not self._end.is_set():
            for key, _ in self._selector.select(0.2):
                try:
                    if isinstance(key.data, _Connection):
                        self._read(key.fileobj, key.data)  # type: ignore[arg-type]
                    elif key.data.protocol == "udp":
                        self._datagram(key.data)
                    else:
                        self._accept(key.data)
                except OSError:
                    continue  # this client is gone; the others are not to suffer
                except Exception as e:
                    self.problems.append(f"a question could not be handled: {e!r}")
            self._drop_idle()

    def _datagram(self, port: _Port) -> None:
        data, peer = port.socket.recvfrom(_MAX_MESSAGE)
        reply = self._answer(data, port, *self._whose(port, int(peer[1])))
        if reply:
            port.socket.sendto(reply, peer)

    def _accept(self, port: _Port) -> None:
        connection, peer = port.socket.accept()
        # Now: a client that sends nothing may be gone when that is known.
        who = self._whose(port, int(peer[1]))
        if sum(isinstance(k.data, _Connection) for k in self._selector.get_map().values()) >= _MAX_CONNECTIONS:
            connection.close()
            self._enter(*who, f"tcp port 53: a connection that was not taken, {_MAX_CONNECTIONS} were open", "")
            return
        connection.setblocking(False)
        c = _Connection(port, time.monotonic() + _CONNECTION_SECONDS, stamp(), who)
        self._selector.register(connection, selectors.EVENT_READ, c)

    def _read(self, s: socket.socket, c: _Connection) -> None:
        try:
            data = s.recv(_MAX_MESSAGE)
        except OSError:
            data = b""
        c.data += data
        c.total += len(data)
        while data and len(c.data) >= 2 and len(c.data) >= 2 + (size := int.from_bytes(c.data[:2], "big")):
            reply = self._answer(c.data[2 : 2 + size], c.port, *c.who)
            c.judged += 1
            c.data = c.data[2 + size :]
            if not reply:
                data = b""
                break
            try:
                s.sendall(struct.pack(">H", len(reply)) + reply)
            except OSError:
                data = b""  # it asked and did not wait
                break
        if not data or len(c.data) > _MAX_MESSAGE + 2:
            self._close(s, c)

    def _close(self, s: socket.socket, c: _Connection) -> None:
        """End a connection, and log what came over it and was no question: nothing at all counts, too."""
        self._selector.unregister(s)
        s.close()
        if not c.judged or c.data:
            size = len(c.data) if c.judged else c.total
            self._malformed += 1
            self._enter(*c.who, f"tcp port 53: {size} bytes that are no query", "", c.when)

    def _drop_idle(self, *, every: bool = False) -> None:
        now = time.monotonic()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Connection) and (every or key.data.until < now):
                self._close(key.fileobj, key.data)  # type: ignore[arg-type]

    def _whose(self, port: _Port, peer: int) -> tuple[str, str]:
        """Return process and component of a client that waits for us: its socket still exists."""
        pid = self._who.process_of_port(port.protocol, peer, port.uid)
        process = self._who.words(pid) if pid is not None else f"uid {port.uid}"
        return process, self._who.component(port.uid, pid) or "unknown"

    def _answer(self, data: bytes, port: _Port, process: str, component: str) -> bytes | None:
        """Log a question and return the response; ``None`` for what is none."""
        question = dnswire.parse(data)
        if question is None:
            self._malformed += 1
            text = f"{port.protocol} port 53: {len(data)} bytes that are no query"
            self._enter(process, component, text, "")
            return None
        name = question.name.rstrip(".")
        entry = self._allowed.get(name)
        if entry is not None:
            said = Attempt(stamp(), ANSWERED, process, component, f"name {question.name} ({question.kind_name})")
            self._answered.setdefault((component, int(time.time())), said)
            return dnswire.answer(question, [str(n.network_address) for n in entry.networks if n.num_addresses == 1])
        if name == self._marks.name:
            self._caught.add((port.uid, port.protocol, int(port.family)))
            component = CONTROL
        addresses = self._addresses(name)
        given = {dnswire.A: addresses[0], dnswire.AAAA: addresses[1]}.get(question.kind)
        detail = f"answered with {given}" if given else "answered with nothing"
        self._enter(process, component, f"name {question.name} ({question.kind_name})", detail)
        return dnswire.answer(question, addresses if question.kind != 12 else None)

    def _enter(self, process: str, component: str, destination: str, detail: str, when: str = "") -> None:
        self._attempts.append(Attempt(when or stamp(), self.name, process, component, destination, detail))

    def _addresses(self, name: str) -> list[str]:
        """Return the addresses that stand for a name: the same ones each time it is asked for."""
        known = name in self._given
        number = self._given.setdefault(name, len(self._given))
        # IPv4 has 254 of them: from then on several names have one, and the report says so.
        addresses = [f"203.0.113.{number % 254 + 1}", f"2001:db8:53::{number + 1:x}"]
        for address in () if known else addresses:
            shared = self._shared.setdefault(address, [])
            shared.append(name)
            more = ", ..." if len(shared) > _SHOWN_NAMES else ""
            self.answers[address] = name if len(shared) == 1 else f"one of {', '.join(shared[:_SHOWN_NAMES])}{more}"
        return addresses

    # --- the layer ---

    def in_place(self, uid: int) -> bool:
        """Whether this user's questions are redirected at this moment."""
        try:
            text = run(["nft", "list", "chain", "inet", DNS_TABLE, "output"])
        except NotAvailable:
            return False
        return all(
            re.search(rf"meta skuid {uid} .*{p.protocol} dport 53 redirect to :{p.number}\b", text)
            for p in self._ports
            if p.uid == uid
        )

    def control(self) -> str:
        """Ask for a name that exists nowhere, as every user, at an address that nobody has."""
        for uid in self._who.uids:
            if not self.in_place(uid):
                raise RuntimeError(f"the redirect for user {uid} is not in force, so nothing may be asked")
            question = dnswire.query(4242, self._marks.name, dnswire.A)
            framed = struct.pack(">H", len(question)) + question
            places = {socket.AF_INET: self._marks.ipv4} | ({socket.AF_INET6: self._marks.ipv6} if ipv6_here() else {})
            for family, address in places.items():
                self._controls |= {(uid, "udp", int(family)), (uid, "tcp", int(family))}
                control.attempt(uid, "udp", address, 53, question)
                control.attempt(uid, "stream", address, 53, framed)
        users = ", ".join(control.name_of(uid) for uid in self._who.uids)
        return f"the name {self._marks.name} by udp and tcp over each kind of address, as each of {users}"

    def stop(self) -> list[Attempt]:
        """Remove the redirect, end the server, and return every question."""
        with contextlib.suppress(NotAvailable):
            run(["nft", "delete", "table", "inet", DNS_TABLE])
        if self._thread is not None and not self._thread.is_alive():
            self.problems.append("the sinkhole ended during the capture")
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None
        if self._selector.get_map():
            self._drop_idle(every=True)
        for key in list((self._selector.get_map() or {}).values()):
            key.fileobj.close()  # type: ignore[union-attr]
        for port in self._ports:
            port.socket.close()
        self._selector.close()
        self._ports = []
        for uid, protocol, family in sorted(self._controls - self._caught):
            kind = "IPv4" if family == socket.AF_INET else "IPv6"
            self.problems.append(f"the control by {protocol} ({kind}) as {control.name_of(uid)} was not caught")
        self._controls = set()
        return [*self._attempts, *self._answered.values()]
