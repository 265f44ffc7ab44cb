# SPDX-License-Identifier: Apache-2.0
"""Positive controls: a small process that runs as a component's user and does one forbidden thing.

Nothing of it may leave a machine that has a way out. So it is made only after the rule that drops it was
seen in force, and its packets live for one hop (TTL 1) in case that rule vanishes in between.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Final

#: The program gives up after two by itself; a host that is busy may take longer to start it.
_SECONDS: Final = 30
#: argv: kind (see attempt), address, port, hex of what to send. Every refusal is as good as an answer.
_PROGRAM: Final = """
import socket, struct, sys
kind, address, port, data = sys.argv[1], sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4])
six = ":" in address
family = socket.AF_INET6 if six else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM if kind in ("tcp", "stream") else socket.SOCK_DGRAM)
if six:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
else:
    s.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
s.settimeout(2)

def calls():
    # A stream that is connected to nobody: what it should send ends at once, in the kernel.
    import ctypes
    t = socket.socket(family, socket.SOCK_STREAM)
    if six:
        place = struct.pack("=HHI16sI", family, socket.htons(port), 0, socket.inet_pton(family, address), 0)
    else:
        place = struct.pack("=HH4s8x", family, socket.htons(port), socket.inet_aton(address))
    to, text = ctypes.create_string_buffer(place, len(place)), ctypes.create_string_buffer(b"x")
    part = ctypes.create_string_buffer(struct.pack("@PN", ctypes.addressof(text), 1))
    head = struct.pack("@PIPNPNi4xI4x", ctypes.addressof(to), len(place), ctypes.addressof(part), 1, 0, 0, 0, 0)
    messages = ctypes.create_string_buffer(head, len(head))
    for send in (
        lambda: t.sendto(b"x", (address, port)),
        lambda: t.sendmsg([b"x"], [], 0, (address, port)),
        lambda: ctypes.CDLL(None).sendmmsg(t.fileno(), messages, 1, socket.MSG_NOSIGNAL),
    ):
        try:
            send()
        except OSError:
            pass

try:
    if kind == "calls":
        calls()
    if kind == "udp":
        s.sendto(data, (address, port))
        if data:
            sys.stdout.write(s.recv(4096).hex())
    else:
        s.connect((address, port))  # without a word on a datagram socket: no packet
    if kind == "stream":
        s.sendall(data)
        sys.stdout.write(s.recv(4096).hex())
except OSError as e:
    sys.stderr.write(str(e))
"""


def attempt(uid: int, kind: str, address: str, port: int, data: bytes = b"") -> str:
    """Let a process of user ``uid`` try once, and return what it received (hex).

    Args:
        uid: the component's user.
        kind: ``udp`` sends one datagram, ``tcp`` connects, ``stream`` connects and sends; ``connect`` connects a
            datagram socket, ``calls`` also makes every call that sends to an address: both without a packet.
        address: a documentation address.
        port: of the destination.
        data: of the datagram or stream.

    Raises:
        OSError: the process could not be started, failed, or did not end in time.
    """
    # The host's own Python: the one that runs us may be in a place that the service's user cannot read.
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    try:
        done = subprocess.run(
            [python, "-I", "-S", "-c", _PROGRAM, kind, address, str(port), data.hex()],
            user=uid,
            group=_group(uid),
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            cwd="/",
            env={"PATH": os.defpath},
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise OSError(f"the control as user {uid} did not end within {_SECONDS} s and was killed") from e
    if done.returncode != 0:
        raise OSError(f"the control as user {uid} ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
    return done.stdout


def _group(uid: int) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:  # a container's user
        return uid


def name_of(uid: int) -> str:
    """Return a user's name where the host knows it, else the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
