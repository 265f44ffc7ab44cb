# SPDX-License-Identifier: Apache-2.0
"""Doing something inside a container's network namespace, with nothing of ours in the container."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWPID: Final = 0x20000000
T = TypeVar("T")


def network_of(pid: int) -> Path:
    """Return the network namespace of a process, as a file."""
    return Path(f"/proc/{pid}/ns/net")


def processes_of(pid: int) -> Path:
    """Return the process namespace of a process, as a file."""
    return Path(f"/proc/{pid}/ns/pid")


def default_gateway(pid: int) -> str | None:
    """Return the IPv4 address of a process's default way, or ``None`` if it has none."""
    try:
        lines = Path(f"/proc/{pid}/net/route").read_text("ascii").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        # interface, destination, gateway, ... as hexadecimal numbers in the machine's byte order
        words = line.split()
        if len(words) > 7 and words[1] == words[7] == "00000000":
            return socket.inet_ntoa(struct.pack("=I", int(words[2], 16)))
    return None


def ipv6_of(pid: int) -> bool:
    """Whether a process has an IPv6 address other than loopback."""
    try:
        lines = Path(f"/proc/{pid}/net/if_inet6").read_text("ascii").splitlines()
    except OSError:
        return False  # no IPv6 at all
    return any(line.split()[-1] != "lo" for line in lines)


def holder_of_port(inode: int, port: int) -> str:
    """Return ``pid/comm`` of the process that has a socket bound to a port, in the namespace with this inode.

    Empty if it is gone: a process may ask and end at once.
    """
    members = [p for p in Path("/proc").iterdir() if p.name.isdecimal() and _in(p, inode)]
    sockets = {f"socket:[{number}]" for p in members[:1] for number in _sockets(p, port)}
    for process in members if sockets else ():
        with contextlib.suppress(OSError):  # it ended while we looked
            if any(str(fd.readlink()) in sockets for fd in (process / "fd").iterdir()):
                return f"{process.name}/{(process / 'comm').read_text('utf-8', 'replace').strip()}"
    return ""


def _in(process: Path, inode: int) -> bool:
    try:
        return (process / "ns/net").stat().st_ino == inode
    except OSError:
        return False


def _sockets(process: Path, port: int) -> Iterator[str]:
    for table in ("udp", "udp6", "tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (process / "net" / table).read_text("ascii", "replace").splitlines()[1:]:
                # number, local address:port, remote, state, queues, timer, retransmits, user, timeout, inode
                words = line.split()
                if len(words) > 9 and int(words[1].rpartition(":")[2], 16) == port and words[9] != "0":
                    yield words[9]


def inside(namespace: Path, make: Callable[[], T], processes: Path | None = None) -> T:
    """Run ``make`` in a thread that is in a network namespace.

    A socket stays in the namespace that it was made in, and so does a process that the thread starts; that one is in
    the process namespace ``processes`` as well, if it is given.

    Raises:
        OSError: there is no such namespace, or we may not enter it; and whatever ``make`` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if processes is not None:
                _enter(processes, _CLONE_NEWPID)
            _enter(namespace, _CLONE_NEWNET)
            results.append(make())
        except BaseException as e:
            errors.append(e)

    # A thread of its own that ends here: it never returns to where it came from.
    thread = threading.Thread(target=work, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(namespace: Path, kind: int) -> None:
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, kind) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(namespace))
    finally:
        os.close(fd)
