# SPDX-License-Identifier: Apache-2.0
"""Runs inside a test host before anything is installed and proves that no way out exists; exit code 0 only then.

Three questions, each asked of the kernel or the C library, without sending a packet anywhere:

- is there a route to an outside address? (``connect`` of a UDP socket looks the route up and sends nothing), IPv4 and
  IPv6, to documentation addresses; the one answer that counts is "network is unreachable";
- does a TCP connect to an outside address fail at once for the same reason?
- does an outside name resolve?

A proof that could not fail would be none. So the same three questions are asked again where the answers must be
"alive": in a network namespace of their own with a default route to its own loopback and a name server on it. If any
of them says "dead" there, this program fails too.

    python3 - < network_is_dead.py
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

#: Addresses of the documentation ranges (RFC 5737, RFC 3849): nobody's.
OUTSIDE = ((socket.AF_INET, "198.51.100.7"), (socket.AF_INET, "203.0.113.9"), (socket.AF_INET6, "2001:db8::7"))
NAME = "www.example.net"
CLONE_NEWNET, CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_BIND = 0x40000000, 0x20000, 0x4000, 1 << 18, 4096
#: What the kernel answers where no route exists, or where IPv6 is off altogether.
NO_ROUTE = {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def ways_out() -> list[str]:
    """Return every way out that was found, in words; empty is dead."""
    found = []
    for family, address in OUTSIDE:
        for kind, what in ((socket.SOCK_DGRAM, "route"), (socket.SOCK_STREAM, "TCP")):
            try:
                with socket.socket(family, kind) as s:
                    s.settimeout(1)
                    s.connect((address, 443))
                found.append(f"{what} to {address}: there is one")
            except OSError as e:
                # A time-out or a refusal means that packets leave: only "no route" is dead.
                if e.errno not in NO_ROUTE:
                    found.append(f"{what} to {address}: {e!r}, not 'unreachable'")
    try:
        answers = socket.getaddrinfo(NAME, 443)
        found.append(f"{NAME} resolves to {answers[0][4][0]}")
    except socket.gaierror as e:
        # "No such name" would be a name server's answer; "try again" is what the C library says without one.
        if e.errno != socket.EAI_AGAIN:
            found.append(f"{NAME}: a name server answered ({e})")
    return found


def _answer_names(server: socket.socket) -> None:
    """Answer every question for an IPv4 address with a documentation address, and any other with nothing."""
    while True:
        query, client = server.recvfrom(512)
        end = query.index(b"\0", 12) + 5
        kind = struct.unpack("!H", query[end - 4 : end - 2])[0]
        count = 1 if kind == 1 else 0
        answer = b"\xc0\x0c" + struct.pack("!HHIH4s", 1, 1, 1, 4, socket.inet_aton("198.51.100.7")) if count else b""
        header = query[:2] + struct.pack("!HHHHH", 0x8180, 1, count, 0, 0)
        server.sendto(header + query[12:end] + answer, client)


def control() -> list[str]:
    """Ask the same questions where the network is alive, and return what was wrongly called dead.

    Runs in a process of its own, because it enters another network namespace.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | CLONE_NEWNS) != 0:
        return [f"the control's namespace cannot be made: {os.strerror(ctypes.get_errno())}"]
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    for words in (
        ("link", "set", "lo", "up"),
        ("addr", "add", "198.51.100.7/32", "dev", "lo"),
        ("addr", "add", "203.0.113.9/32", "dev", "lo"),
        ("route", "add", "default", "dev", "lo"),
    ):
        subprocess.run(["ip", *words], check=True)
    # IPv6 may be off in the kernel; then there is no way out by it, and nothing to control.
    six = ["ip", "addr", "add", "2001:db8::7/128", "dev", "lo", "nodad"]
    has6 = subprocess.run(six, capture_output=True, check=False).returncode == 0
    resolver = Path("/run/control-resolv.conf")
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n", "utf-8")
    if libc.mount(bytes(resolver), b"/etc/resolv.conf", None, MS_BIND, None) != 0:
        return [f"the control's resolver cannot be set: {os.strerror(ctypes.get_errno())}"]
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", 53))
    threading.Thread(target=_answer_names, args=(names,), daemon=True).start()
    listeners = [socket.create_server((a, 443), family=f) for f, a in OUTSIDE if f == socket.AF_INET or has6]
    found = "\n".join(ways_out())
    for listener in listeners:
        listener.close()
    wanted = [f"{what} to {a}" for f, a in OUTSIDE if f == socket.AF_INET or has6 for what in ("route", "TCP")]
    return [f"{w}: not seen" for w in [*wanted, f"{NAME} resolves"] if w not in found]


def main() -> int:
    """Ask here, then run the control; say what came out."""
    alive = ways_out()
    child = os.fork()
    if child == 0:
        missed = control()
        for line in missed:
            print(f"CONTROL FAILED: {line}", flush=True)
        os._exit(1 if missed else 0)
    controlled = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for line in alive:
        print(f"ALIVE: {line}")
    if alive or not controlled:
        return 1
    print(
        f"dead: no route and no TCP to {', '.join(a for _, a in OUTSIDE)}; {NAME} does not resolve; control: all seen"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
