# SPDX-License-Identifier: Apache-2.0
"""Layer ``syscalls``: every call that names a destination, seen as it enters the kernel.

A BPF program at the tracepoint ``sys_enter`` looks at connect, sendto, sendmsg and sendmmsg, reads the
address from the caller's memory and hands over who called. So an attempt is seen that dies before there is
a packet: no route, refused by ``IPAddressDeny=``, IPv6 switched off. It reads and never changes anything.

The strings that a program gives as its licence decide which helpers the kernel lets it call: reading the
caller's memory is for GPL-compatible programs. The program assembled here may be used under the MIT licence
or the GPL, version 2, besides this file's own licence; hence "Dual MIT/GPL".

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
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moat.site.egresscheck import bpf, control
from moat.site.egresscheck.allow import Allowed
from moat.site.egresscheck.bpf import Assembler
from moat.site.egresscheck.marks import CONTROL, Marks
from moat.site.egresscheck.model import Attempt, Component, NotAvailable
from moat.site.egresscheck.tools import run
from moat.site.egresscheck.when import stamp
from moat.site.egresscheck.who import UNKNOWN, Who

LICENSE: Final = "Dual MIT/GPL"
#: x86_64 (arch/x86/entry/syscalls/syscall_64.tbl).
CONNECT, SENDTO, SENDMSG, SENDMMSG = 42, 44, 46, 307
_WORDS: Final = {CONNECT: "connect", SENDTO: "sendto", SENDMSG: "sendmsg", SENDMMSG: "sendmmsg"}
#: struct pt_regs: where the arguments of a system call are.
_REGS: Final = {"di": 112, "si": 104, "dx": 96, "r10": 56, "r8": 72, "r9": 64}
_REGS_SIZE: Final = 120
#: Messages of one sendmmsg() that are looked at.
_MESSAGES: Final = 8
_RING_BYTES: Final = 1 << 20
#: The name space of processes that is not in a container (include/linux/proc_ns.h).
_INIT_PID_NS: Final = 0xEFFFFFFC
_UNREADABLE: Final = 0xFFFF
_AF_UNSPEC, _AF_UNIX, _AF_NETLINK = 0, 1, 16
_RESOLVED: Final = b"/run/systemd/resolve/io."

# The record, on the program's stack: time, pid_tgid, uid_gid, cgroup, comm[16], call, fd, messages, index, address[32].
_RECORD: Final = struct.Struct("=QQQQ16sIIII32s")
_TIME, _PID, _UID, _CGROUP, _COMM, _CALL, _FD, _COUNT, _INDEX, _ADDRESS = 0, 8, 16, 24, 32, 48, 52, 56, 60, 64


def program(ring: int, lost: int, namespace: tuple[int, int] | None) -> bytes:
    """Return the program's code.

    Args:
        ring: file descriptor of the ring buffer.
        lost: file descriptor of the counter of records that found no room.
        namespace: device and inode of the only process namespace to look at, or ``None`` for all.
    """
    a = Assembler()
    rec, regs, hdr, ns = -_RECORD.size, -_RECORD.size - _REGS_SIZE, -_RECORD.size - _REGS_SIZE - 16, -256

    # r6: arguments of the tracepoint (struct pt_regs *, long number). Most calls end here.
    a.mov(6, 1)
    a.load(8, 7, 6, 8)
    for number in _WORDS:
        a.jump_if(7, "==", number, "ours")
    a.jump("end")
    a.label("ours")
    a.load(8, 3, 6, 0)
    a.mov(1, 10)
    a.add_imm(1, regs)
    a.mov_imm(2, _REGS_SIZE)
    a.call(bpf.PROBE_READ_KERNEL)
    a.jump_if(0, "!=", 0, "end")

    for offset in range(0, _RECORD.size, 8):
        a.store_imm(8, 10, rec + offset, 0)
    if namespace is None:
        a.call(bpf.GET_CURRENT_PID_TGID)
        a.store(8, 10, rec + _PID, 0)
    else:
        a.store_imm(8, 10, ns, 0)
        a.mov_imm64(1, namespace[0])
        a.mov_imm64(2, namespace[1])
        a.mov(3, 10)
        a.add_imm(3, ns)
        a.mov_imm(4, 8)
        a.call(bpf.GET_NS_CURRENT_PID_TGID)
        a.jump_if(0, "!=", 0, "end")
        for source, target in ((0, 0), (4, 4)):  # pid, tgid, as in pid_tgid on a little-endian machine
            a.load(4, 1, 10, ns + source)
            a.store(4, 10, rec + _PID + target, 1)
    a.call(bpf.KTIME_GET_NS)
    a.store(8, 10, rec + _TIME, 0)
    a.call(bpf.GET_CURRENT_UID_GID)
    a.store(8, 10, rec + _UID, 0)
    a.call(bpf.GET_CURRENT_CGROUP_ID)
    a.store(8, 10, rec + _CGROUP, 0)
    a.mov(1, 10)
    a.add_imm(1, rec + _COMM)
    a.mov_imm(2, 16)
    a.call(bpf.GET_CURRENT_COMM)
    a.store(4, 10, rec + _CALL, 7)
    a.load(4, 1, 10, regs + _REGS["di"])
    a.store(4, 10, rec + _FD, 1)

    a.jump_if(7, "==", SENDTO, "sendto")
    a.jump_if(7, "!=", CONNECT, "messages")
    a.load(8, 8, 10, regs + _REGS["si"])
    a.load(4, 9, 10, regs + _REGS["dx"])
    a.jump("single")
    a.label("sendto")
    a.load(8, 8, 10, regs + _REGS["r8"])
    a.load(4, 9, 10, regs + _REGS["r9"])
    a.label("single")
    _address(a, "single", rec, ring, lost)
    a.jump("end")

    # sendmsg: one struct msghdr; sendmmsg: an array of them, each 64 bytes apart. r6: the next one.
    a.label("messages")
    a.load(8, 6, 10, regs + _REGS["si"])
    a.mov_imm(1, 1)
    a.jump_if(7, "==", SENDMSG, "counted")
    a.load(4, 1, 10, regs + _REGS["dx"])
    a.label("counted")
    a.store(4, 10, rec + _COUNT, 1)
    for index in range(_MESSAGES):
        a.load(4, 1, 10, rec + _COUNT)
        a.jump_if(1, "<=", index, "end")
        a.store_imm(4, 10, rec + _INDEX, index)
        a.mov(1, 10)
        a.add_imm(1, hdr)
        a.mov_imm(2, 16)
        a.mov(3, 6)
        a.call(bpf.PROBE_READ_USER)
        a.jump_if(0, "!=", 0, "end")
        a.load(8, 8, 10, hdr)
        a.load(4, 9, 10, hdr + 8)
        _address(a, f"message{index}", rec, ring, lost)
        a.add_imm(6, 64)
    a.label("end")
    a.mov_imm(0, 0)
    a.exit()
    return a.code()


def _address(a: Assembler, name: str, rec: int, ring: int, lost: int) -> None:
    """Append: read the address at r8 (r9 bytes) into the record and hand it over, unless it is local."""
    at, done, send = rec + _ADDRESS, f"{name} done", f"{name} send"
    a.jump_if(8, "==", 0, done)
    a.jump_if(9, "<", 2, done)
    for offset in range(0, 32, 8):
        a.store_imm(8, 10, at + offset, 0)
    a.mov(2, 9)
    a.jump_if(2, "<=", 28, f"{name} read")
    a.mov_imm(2, 28)
    a.label(f"{name} read")
    a.mov(1, 10)
    a.add_imm(1, at)
    a.mov(3, 8)
    a.call(bpf.PROBE_READ_USER)
    a.jump_if(0, "==", 0, f"{name} family")
    a.store_imm(8, 10, at, _UNREADABLE)
    a.jump(send)

    a.label(f"{name} family")
    a.load(2, 1, 10, at)
    a.jump_if(1, "==", _AF_UNSPEC, done)
    a.jump_if(1, "==", _AF_NETLINK, done)
    a.jump_if(1, "==", socket.AF_INET, f"{name} inet")
    a.jump_if(1, "==", socket.AF_INET6, f"{name} inet6")
    a.jump_if(1, "!=", _AF_UNIX, send)
    # Of local sockets only the one by which systemd-resolved takes names.
    # In pieces that lie as the verifier wants them: each at a multiple of its size.
    for offset, size in ((0, 2), (2, 4), (6, 8), (14, 8), (22, 2)):
        a.load(size, 1, 10, at + 2 + offset)
        a.mov_imm64(2, int.from_bytes(_RESOLVED[offset : offset + size], "little"))
        a.jump_if_reg(1, "!=", 2, done)
    a.jump(send)
    a.label(f"{name} inet")
    a.load(4, 1, 10, at + 4)
    a.jump_if(1, "==", 0, done)  # 0.0.0.0 is this host
    a.load(1, 1, 10, at + 4)
    a.jump_if(1, "==", 127, done)
    a.jump(send)
    a.label(f"{name} inet6")
    a.load(8, 1, 10, at + 8)
    a.jump_if(1, "!=", 0, send)
    a.load(4, 1, 10, at + 16)
    a.jump_if(1, "!=", 0, send)
    a.load(4, 1, 10, at + 20)
    a.jump_if(1, "==", 0, done)  # ::
    a.jump_if(1, "==", 0x01000000, done)  # ::1, as a little-endian machine loads it

    a.label(send)
    a.mov_map(1, ring)
    a.mov(2, 10)
    a.add_imm(2, rec)
    a.mov_imm(3, _RECORD.size)
    a.mov_imm(4, 0)
    a.call(bpf.RINGBUF_OUTPUT)
    a.jump_if(0, "==", 0, done)
    a.store_imm(4, 10, rec + _INDEX, 0)
    a.mov_map(1, lost)
    a.mov(2, 10)
    a.add_imm(2, rec + _INDEX)
    a.call(bpf.MAP_LOOKUP_ELEM)
    a.jump_if(0, "==", 0, done)
    a.mov_imm(1, 1)
    a.atomic_add(0, 0, 1)
    a.label(done)


@dataclass(frozen=True)
class Call:
    """One record of the program. ``when`` is seconds since 1970; ``address`` is empty where it is no IP address."""

    when: float
    pid: int
    uid: int
    group: int
    comm: str
    word: str
    fd: int
    count: int
    index: int
    family: int
    address: str
    port: int


def parse(record: bytes, wall_minus_monotonic: float) -> Call:
    """Read a record.

    Args:
        record: as the program wrote it.
        wall_minus_monotonic: seconds since 1970 at the kernel's monotonic zero.
    """
    now, pid_tgid, uid_gid, group, comm, call, fd, count, index, raw = _RECORD.unpack(record[: _RECORD.size])
    family = int.from_bytes(raw[:2], "little")
    address, port = "", 0
    if family in (socket.AF_INET, socket.AF_INET6):
        port = int.from_bytes(raw[2:4], "big")
        if family == socket.AF_INET:
            address = str(ipaddress.IPv4Address(raw[4:8]))
        else:
            ip = ipaddress.IPv6Address(raw[8:24])
            address = str(ip.ipv4_mapped or ip)
    return Call(
        when=now / 1e9 + wall_minus_monotonic,
        pid=pid_tgid >> 32,
        uid=uid_gid & 0xFFFFFFFF,
        group=group,
        comm=comm.partition(b"\0")[0].decode("ascii", "backslashreplace"),
        word=_WORDS.get(call, f"call {call}"),
        fd=fd,
        count=count,
        index=index,
        family=family,
        address=address,
        port=port,
    )


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
    """A call and whose it was, looked up at once: a moment later the process may be gone."""

    call: Call
    component: str | None
    protocol: str
    foreign: bool


class SyscallsLayer:
    """See the module. ``allowed`` are the destinations that are no leak; ``marks`` where the controls go."""

    name = "syscalls"

    def __init__(self, allowed: Sequence[Allowed], marks: Marks) -> None:
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
        self._expected: set[int] = set()
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
        self._who = Who(components)
        bpf.raise_memory_limit()
        try:
            self._ring = bpf.RingBuffer(_RING_BYTES)
            self._lost_fd = bpf.create_counter()
            self._fds.append(self._lost_fd)
            loaded = bpf.load(program(self._ring.fd, self._lost_fd, own_namespace()), LICENSE)
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
            component = self._who.by_uid(call.uid)
        if component is None and not self._is_control(call):
            return  # not the site's; kept nowhere: what others on this host do is not our subject
        self._seen.append(_Seen(call, component, protocol_of(call), foreign))

    def _is_control(self, call: Call) -> bool:
        return call.uid in self._who.uids and self._marks.is_control(call.address, call.port)

    def control(self) -> str:
        """Connect a datagram socket as every user: a call with a destination, and no packet."""
        for uid in self._who.uids:
            self._expected.add(uid)
            control.attempt(uid, "connect", self._marks.ipv4, self._marks.call_port)
        if not self._who.uids:
            raise RuntimeError("no component has a user of its own")
        users = ", ".join(control.name_of(uid) for uid in self._who.uids)
        return f"connect without a packet to {self._marks.ipv4} port {self._marks.call_port}, as each of {users}"

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
        caught = {s.call.uid for s in self._seen if s.call.port == self._marks.call_port and self._is_control(s.call)}
        missing = self._expected - caught
        self.problems += [f"the control as {control.name_of(uid)} was not caught" for uid in sorted(missing)]
        self._expected = set()
        return attempts

    def _permitted(self, seen: _Seen, local: set[str]) -> bool:
        c = seen.call
        if c.family == _AF_UNIX:  # names on the allow-list are looked up this way, too
            return any(a.name for a in self._allowed)
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
        elif c.family == _AF_UNIX:
            place = "name lookup through systemd-resolved"
        elif c.family == _UNREADABLE:
            place = f"{c.word} to an address that could not be read"
        else:
            place = f"{c.word} to socket family {c.family}"
        more = f"; the first {_MESSAGES} of {c.count} messages were looked at" if c.count > _MESSAGES else ""
        return Attempt(
            when=stamp(c.when),
            layer=self.name,
            process=f"{c.pid}/{c.comm}",
            component=CONTROL if self._is_control(c) else seen.component or UNKNOWN,
            destination=place,
            detail=f"system call {c.word}{more}",
        )


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
