# SPDX-License-Identifier: Apache-2.0
"""Layer ``syscalls``: every call that names a destination, seen as it enters the kernel.

A BPF program at the tracepoint ``sys_enter`` (:mod:`moat.site.egresscheck.sysenter`) hands over the address of
each connect, sendto, sendmsg and sendmmsg, and who called. So an attempt is seen that dies before there is a
packet: no route, refused by ``IPAddressDeny=``, IPv6 switched off.

Not seen here: io_uring, 32-bit programs, a socket that was connected by somebody else, and socket families
that the unit's ``RestrictAddressFamilies=`` already refuses at socket() (there is no destination yet).
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import platform
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from moat.site.egresscheck import bpf, control, lookups
from moat.site.egresscheck.allow import Allowed
from moat.site.egresscheck.marks import CONTROL, Marks
from moat.site.egresscheck.model import Attempt, Component, NotAvailable
from moat.site.egresscheck.namespaces import inside, network_of, processes_of
from moat.site.egresscheck.sysenter import LICENSE, MESSAGES, UNREADABLE, WORDS, Call, parse, program
from moat.site.egresscheck.tools import run
from moat.site.egresscheck.when import stamp
from moat.site.egresscheck.who import UNKNOWN, Who

_RING_BYTES: Final = 1 << 20
#: The name space of processes that is not in a container (include/linux/proc_ns.h).
_INIT_PID_NS: Final = 0xEFFFFFFC


class Groups:
    """Control groups by the number that the kernel gives them: the inode of their folder."""

    def __init__(self, mounts: Path = Path("/proc/self/mounts")) -> None:
        self._root: Path | None = None
        with contextlib.suppress(OSError):
            for line in mounts.read_text("utf-8", "replace").splitlines():
                fields = line.split()
                if len(fields) > 2 and fields[2] == "cgroup2":
                    self._root = Path(fields[1])
        self._paths: dict[int, str] = {}
        self._scanned = 0.0

    def path(self, number: int) -> str:
        """Return the path of a control group; empty if it is not known (any more)."""
        if number not in self._paths and time.monotonic() - self._scanned > 0.5:
            self.scan()
        return self._paths.get(number, "")

    def scan(self) -> None:
        """Look at every control group that there is now."""
        if self._root is None:
            return
        for folder, _, _ in os.walk(self._root):
            with contextlib.suppress(OSError):
                self._paths[Path(folder).stat().st_ino] = folder[len(str(self._root)) :] or "/"
        self._scanned = time.monotonic()


@dataclass(frozen=True)
class _Seen:
    """A call and whose it was, looked up at once: a moment later the process may be gone.

    ``nowhere``: nobody answers at the socket that it asked for.
    """

    call: Call
    component: str | None
    protocol: str
    foreign: bool
    nowhere: bool = False


class SyscallsLayer:
    """See the module.

    Args:
        allowed: destinations that are no leak.
        marks: where the controls go.
        containers: where the services run in containers, asks for a running container's process of each user: the
            control is made in its namespaces, as the container's own processes are what has to be seen.
    """

    name = "syscalls"

    def __init__(
        self, allowed: Sequence[Allowed], marks: Marks, containers: Callable[[], Mapping[int, int]] | None = None
    ) -> None:
        self._containers = containers
        self._allowed = allowed
        self._marks = marks
        self._who = Who(())
        self._fds: list[int] = []
        self._ring: bpf.RingBuffer | None = None
        self._lost_fd = -1
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._offset = time.time() - time.monotonic()
        self._groups = Groups()
        self._seen: list[_Seen] = []
        self._expected: set[tuple[int, int, str]] = set()
        self.problems: list[str] = []
        self.notes: list[str] = []

    @property
    def watching(self) -> bool:
        """Whether it runs at this moment."""
        return self._thread is not None

    def start(self, components: Sequence[Component]) -> None:
        """Load the program, attach it, and read."""
        if platform.machine() != "x86_64":
            raise NotAvailable(f"the program is for x86_64, this is {platform.machine()}")
        own = own_namespace()
        if own is not None and self._containers is not None:
            raise NotAvailable(
                "this program runs in a container itself: processes in namespaces of their own are not seen from there"
            )
        self._who = Who(components)
        bpf.raise_memory_limit()
        try:
            self._ring = bpf.RingBuffer(_RING_BYTES)
            self._lost_fd = bpf.create_counter()
            self._fds.append(self._lost_fd)
            loaded = bpf.load(program(self._ring.fd, self._lost_fd, own), LICENSE)
            self._fds.append(loaded)
            self._fds.append(bpf.attach_raw_tracepoint(loaded, "sys_enter"))
        except (OSError, ValueError) as e:
            raise NotAvailable(
                f"the kernel does not let us trace system calls (BPF, Linux 5.8 or newer, as root): {e}"
            ) from e
        self._groups.scan()
        self._thread = threading.Thread(target=self._read, args=(self._ring,), name="syscalls", daemon=True)
        self._thread.start()

    def _read(self, ring: bpf.RingBuffer) -> None:
        poll = select.poll()
        poll.register(ring.fd, select.POLLIN)
        while True:
            ended = self._end.is_set()
            for record in ring.read():
                try:
                    self._enter(parse(record, self._offset))
                except Exception as e:
                    self.problems.append(f"a record could not be handled: {e!r}")
            if ended:
                return
            poll.poll(100)

    def _enter(self, call: Call) -> None:
        group = self._who.group(call.pid) or self._groups.path(call.group)
        component = self._who.by_group(group)
        foreign = component is None and _elsewhere(call.pid)
        if component is None and not foreign:
            component = self._who.neighbour(call.uid, group) or self._who.by_uid(call.uid)
        if component is None and not self._is_control(call):
            return  # not the site's; kept nowhere: what others on this host do is not our subject
        nowhere = call.family == socket.AF_UNIX and lookups.reachable(call.pid, lookups.RESOLVED) is False
        self._seen.append(_Seen(call, component, protocol_of(call), foreign, nowhere))

    def _is_control(self, call: Call) -> bool:
        return call.uid in self._who.uids and self._marks.is_control(call.address, call.port)

    def control(self) -> str:
        """Make every call with a destination once as every user, over IPv4 and IPv6: none of them becomes a packet."""
        m = self._marks
        families = {socket.AF_INET: m.ipv4} | ({socket.AF_INET6: m.ipv6} if _ipv6_sockets() else {})
        places = self._containers() if self._containers else {}
        for uid in self._who.uids:
            for family, address in families.items():
                self._expected |= {(uid, int(family), word) for word in WORDS.values()}
                make = partial(control.attempt, uid, "calls", address, m.call_port)
                if uid in places:
                    inside(network_of(places[uid]), make, processes_of(places[uid]))
                else:
                    make()
        if not self._who.uids:
            raise RuntimeError("no component has a user of its own")
        users = ", ".join(control.name_of(uid) for uid in self._who.uids)
        calls = ", ".join(WORDS.values())
        return f"{calls} without a packet to {' and '.join(families.values())} port {m.call_port}, as each of {users}"

    def stop(self) -> list[Attempt]:
        """Detach, read what is left, and return what was not local and not allowed."""
        for fd in self._fds[:0:-1]:  # the link and the program; the counter is read at the end
            os.close(fd)
        self._end.set()
        if self._thread is not None:
            if not self._thread.is_alive():
                self.problems.append("the reader of the system calls ended during the capture")
            self._thread.join(timeout=10)
            self._thread = None
        if self._fds:
            lost = bpf.read_counter(self._lost_fd)
            if lost:
                self.problems.append(f"{lost} system calls were lost: more came at once than could be read")
            os.close(self._fds[0])
            self._fds = []
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        local = own_addresses()
        attempts = [self._attempt(s) for s in self._seen if not self._permitted(s, local)]
        calls = [s.call for s in self._seen if s.call.port == self._marks.call_port and self._is_control(s.call)]
        for uid, family, word in sorted(self._expected - {(c.uid, c.family, c.word) for c in calls}):
            kind = "IPv4" if family == socket.AF_INET else "IPv6"
            self.problems.append(f"the control {word} ({kind}) as {control.name_of(uid)} was not caught")
        self._expected = set()
        return attempts

    def _permitted(self, seen: _Seen, local: set[str]) -> bool:
        c = seen.call
        if c.family == socket.AF_UNIX:
            # Which name it asks for is not to be seen: one on the allow-list is no excuse. Where the unit hides the
            # socket, the program asks the name servers next, and the name is heard there.
            return seen.nowhere
        if not c.address:
            return False
        ip = ipaddress.ip_address(c.address)
        if ip.is_loopback or ip.is_unspecified or c.address in local:
            return True
        return any(a.permits(c.address, c.port, seen.protocol or None) for a in self._allowed)

    def _attempt(self, seen: _Seen) -> Attempt:
        c = seen.call
        word = seen.protocol or c.word
        if c.address:
            place = f"{word} [{c.address}]:{c.port}" if ":" in c.address else f"{word} {c.address}:{c.port}"
        elif c.family == socket.AF_UNIX:
            place = "name lookup through systemd-resolved"
        elif c.family == UNREADABLE:
            place = f"{c.word} to an address that could not be read"
        else:
            place = f"{c.word} to socket family {c.family}"
        more = f"; the first {MESSAGES} of {c.count} messages were looked at" if c.count > MESSAGES else ""
        return Attempt(
            when=stamp(c.when),
            layer=self.name,
            process=f"{c.pid}/{c.comm}",
            component=CONTROL if self._is_control(c) else seen.component or UNKNOWN,
            destination=place,
            detail=f"system call {c.word}{more}",
        )


def _ipv6_sockets() -> bool:
    """Whether there are sockets for IPv6, be it without an address: a call on one names a destination."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True


def own_namespace() -> tuple[int, int] | None:
    """Return device and inode of our process namespace if we are in a container, else ``None``: all of the host."""
    status = Path("/proc/self/ns/pid").stat()
    if status.st_ino == _INIT_PID_NS:
        return None
    return os.major(status.st_dev) << 20 | os.minor(status.st_dev), status.st_ino


def own_addresses() -> set[str]:
    """Return the addresses of this host."""
    try:
        links = json.loads(run(["ip", "-j", "addr", "show"]) or "[]")
    except (NotAvailable, ValueError):
        return set()
    return {str(a["local"]) for link in links for a in link.get("addr_info", []) if "local" in a}


def _elsewhere(pid: int) -> bool:
    """Whether a process lives in another network (a container that is none of the site's)."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        return False


_libc = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD: Final = 438


def protocol_of(call: Call) -> str:
    """Return ``tcp`` or ``udp``, from the caller's socket; empty if it is gone, not to be seen, or another by now."""
    try:
        process = os.pidfd_open(call.pid)
    except OSError:
        return ""
    try:
        copy = int(_libc.syscall(_PIDFD_GETFD, process, call.fd, 0))
    finally:
        os.close(process)
    if copy < 0:
        return ""
    try:
        s = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return ""
    with s:
        if s.family not in (socket.AF_INET, socket.AF_INET6):
            return ""
        protocol = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}.get(s.type, "")
        # The number may stand for the next socket already: believe only what fits to the call.
        if call.word != "connect":
            return protocol if protocol == "udp" else ""
        try:
            peer, port = s.getpeername()[:2]
        except OSError:
            return protocol if protocol == "tcp" else ""  # refused by now; a datagram socket keeps its peer
        return protocol if (str(peer).removeprefix("::ffff:"), port) == (call.address, call.port) else ""
