# SPDX-License-Identifier: Apache-2.0
"""The BPF program at the tracepoint ``sys_enter``, and the record that it hands over for each call.

It looks at connect, sendto, sendmsg and sendmmsg, reads the address from the caller's memory and says who
called. It reads and never changes anything. :mod:`moat.site.egresscheck.syscalls` loads it and judges.

The strings that a program gives as its licence decide which helpers the kernel lets it call: reading the
caller's memory is for GPL-compatible programs. The program assembled here may be used under the MIT licence
or the GPL, version 2, besides this file's own licence; hence "Dual MIT/GPL".
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import Final

from moat.site.egresscheck import bpf
from moat.site.egresscheck.bpf import Assembler

LICENSE: Final = "Dual MIT/GPL"
#: x86_64 (arch/x86/entry/syscalls/syscall_64.tbl).
CONNECT, SENDTO, SENDMSG, SENDMMSG = 42, 44, 46, 307
WORDS: Final = {CONNECT: "connect", SENDTO: "sendto", SENDMSG: "sendmsg", SENDMMSG: "sendmmsg"}
#: struct pt_regs: where the arguments of a system call are.
_REGS: Final = {"di": 112, "si": 104, "dx": 96, "r10": 56, "r8": 72, "r9": 64}
_REGS_SIZE: Final = 120
#: Messages of one sendmmsg() that are looked at.
MESSAGES: Final = 8
#: The family of a record whose address the kernel could not read.
UNREADABLE: Final = 0xFFFF
_RESOLVED: Final = b"/run/systemd/resolve/io."
_AF_UNSPEC, _AF_NETLINK = 0, 16

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
    for number in WORDS:
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
    for index in range(MESSAGES):
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
    a.store_imm(8, 10, at, UNREADABLE)
    a.jump(send)

    a.label(f"{name} family")
    a.load(2, 1, 10, at)
    a.jump_if(1, "==", _AF_NETLINK, done)
    a.jump_if(1, "!=", _AF_UNSPEC, f"{name} named")
    # To connect() no family means to disconnect; a call that sends takes it for IPv4.
    a.jump_if(7, "==", CONNECT, done)
    a.jump(f"{name} inet")
    a.label(f"{name} named")
    a.jump_if(1, "==", socket.AF_INET, f"{name} inet")
    a.jump_if(1, "==", socket.AF_INET6, f"{name} inet6")
    a.jump_if(1, "!=", socket.AF_UNIX, send)
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
    if family == _AF_UNSPEC and call != CONNECT:
        family = socket.AF_INET
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
        word=WORDS.get(call, f"call {call}"),
        fd=fd,
        count=count,
        index=index,
        family=family,
        address=address,
        port=port,
    )
