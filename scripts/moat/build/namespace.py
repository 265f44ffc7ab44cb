# SPDX-License-Identifier: Apache-2.0
"""A build without a network, by construction: the command runs again in an empty network namespace.

A promise ("nothing is downloaded") is checked by the kernel instead: in a new network namespace
there is no interface but a loopback that is down, and every connect ends at once with
ENETUNREACH. Both are looked at from inside before anything is built.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from moat.errors import BuildFailed

#: Set for the second run, so that it does not start a third one. It is not trusted: the proof is.
MARK = "MOAT_BUILD_NAMESPACE"
#: Documentation addresses (RFC 5737, RFC 3849): nobody answers there, wherever this runs.
PROBES = ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1"))


@dataclass(frozen=True)
class Isolation:
    """What was seen from inside: interfaces by name, and the error of each probe."""

    interfaces: tuple[str, ...]
    probes: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """One line for the person who watches."""
        probes = ", ".join(f"connect to {a}: {e}" for a, e in self.probes)
        return f"no network: interfaces {', '.join(self.interfaces) or 'none'}; {probes}"


def reexec_argv(argv: Sequence[str], *, root: bool, python: str = sys.executable) -> list[str]:
    """Return the command that runs ``moat`` with ``argv`` in an empty network namespace."""
    # Without root a user namespace gives the rights for the network and mount namespaces, and for chroot.
    flags = ["--net", "--mount"] if root else ["--user", "--map-root-user", "--net", "--mount"]
    return ["unshare", *flags, "--", python, "-m", "moat", *argv]


def enter(argv: Sequence[str]) -> None:
    """Replace this process by the same command without a network; return at once if that has happened."""
    if os.environ.get(MARK):
        return
    command = reexec_argv(argv, root=os.geteuid() == 0)
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, MARK: "1", "PYTHONPATH": path}
    try:
        os.execvpe(command[0], command, env)  # noqa: S606 - a list, no shell
    except OSError as e:
        raise BuildFailed(
            "cannot start unshare for a build without a network",
            found=str(e),
            hint="install util-linux, or run as root if user namespaces are disabled",
        ) from e


def _probe(family: socket.AddressFamily, address: str) -> str:
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(2.0)
        try:
            s.connect((address, 9))
        except TimeoutError:
            return "ETIMEDOUT"
        except OSError as e:
            return errno.errorcode.get(e.errno or 0, str(e))
    return "connected"


def judge(seen: Isolation) -> None:
    """Refuse anything but an empty network.

    Raises:
        BuildFailed: there is an interface besides loopback, or a probe did not end at once in the kernel.
    """
    # EADDRNOTAVAIL and EAFNOSUPPORT: without an IPv6 address, or without IPv6, nothing can be sent by it either.
    cut = all(e == "ENETUNREACH" or (":" in a and e in ("EADDRNOTAVAIL", "EAFNOSUPPORT")) for a, e in seen.probes)
    if set(seen.interfaces) - {"lo"} or not cut or not seen.probes:
        raise BuildFailed(
            "the build is not cut off from the network",
            found=seen.text,
            expected="no interface but lo, and ENETUNREACH for every connect",
            hint=f"run `moat build` without {MARK} in the environment",
        )


def prove() -> Isolation:
    """Look at this process's network and return what was seen.

    Nothing is sent where there is an interface to send it by: the names of the interfaces are judged first.

    Raises:
        BuildFailed: this process is not cut off.
    """
    # Not /sys/class/net: that shows the namespace in which /sys was mounted.
    interfaces = tuple(sorted(name for _, name in socket.if_nameindex()))
    if set(interfaces) - {"lo"}:
        judge(Isolation(interfaces, ()))
    seen = Isolation(interfaces, tuple((address, _probe(family, address)) for family, address in PROBES))
    judge(seen)
    return seen
