# SPDX-License-Identifier: Apache-2.0
"""Doing something inside a container's network namespace, with nothing of ours in the container."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

_CLONE_NEWNET: Final = 0x40000000
T = TypeVar("T")


def network_of(pid: int) -> Path:
    """Return the network namespace of a process, as a file."""
    return Path(f"/proc/{pid}/ns/net")


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


def inside(namespace: Path, make: Callable[[], T]) -> T:
    """Run ``make`` in a thread that is in a network namespace.

    A socket stays in the namespace that it was made in, and so does a process that the thread starts.

    Raises:
        OSError: there is no such namespace, or we may not enter it; and whatever ``make`` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) != 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code), str(namespace))
            finally:
                os.close(fd)
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
