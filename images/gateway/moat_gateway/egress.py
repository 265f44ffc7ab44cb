# SPDX-License-Identifier: Apache-2.0
"""The process refuses, counts and logs every connection and look-up outside the allow-list.

Two parts work together. An audit hook (PEP 578) sees ``connect``, ``sendto``, ``sendmsg`` and every look-up that goes
through Python's ``socket`` module, and raises before the system call. A wrapper around ``socket.getaddrinfo`` keeps
which addresses an allowed name led to, so that a connection to such an address is allowed too, and wrappers around the
four methods of ``socket.socket`` refuse a *name* given to them, since C would look it up before the hook is asked.

Limits, plainly: this is a tripwire and a counter, not a prison. Native code that opens sockets by itself (uvloop,
c-ares, Rust) and child processes are not seen: the gateway therefore runs on asyncio's own loop, without aiodns, with
LiteLLM's Rust routes off or closed, and starts no programs. Python code that wants to get around the hook can (ctypes).
What holds against all of those is outside of the process: container networks without a way out, and the firewall.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from moat_gateway.allowlist import AllowList, Destination, as_address, is_local

_RESOLVED_FOR = 3600.0  # seconds for which an address stays tied to the name it was looked up for
_LOG_EVERY = 10.0  # seconds between two events about one destination
_MAX_KEPT = 4096  # addresses and destinations that are remembered


class EgressGuard:
    """Decides on connections and look-ups.

    Args:
        allow: the site's allow-list.
        denied: called with operation, destination and count for a refusal that is to be logged.
        clock: monotonic seconds.
    """

    def __init__(
        self, allow: AllowList, denied: Callable[[str, str, int], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._allow = allow
        self._denied = denied
        self._clock = clock
        self._resolved: dict[str, dict[str, float]] = {}  # address -> name -> when
        self._logged: dict[str, tuple[float, int]] = {}
        self._installed = False
        self._handlers: dict[str, Callable[[tuple[Any, ...]], None]] = {
            "socket.connect": lambda args: self._check_address("connect", args[0], args[1]),
            "socket.sendto": lambda args: self._check_address("sendto", args[0], args[1]),
            "socket.sendmsg": lambda args: self._check_address("sendmsg", args[0], args[1]),
            "socket.getaddrinfo": lambda args: self.check_name("getaddrinfo", args[0], args[1]),
            "socket.gethostbyname": lambda args: self.check_name("gethostbyname", args[0], None),
            "socket.gethostbyaddr": lambda args: self.check_name("gethostbyaddr", args[0], None),
            "socket.getnameinfo": lambda args: self._check_reverse(args[0]),
        }
        self.denied_total = 0

    def install(self) -> None:
        """Watch this process from now on; it cannot be taken back.

        The socket methods are patched on the Python class that every library uses; see the module's docstring.
        """
        if self._installed:
            return
        self._installed = True
        sys.addaudithook(self._hook)
        lookup = socket.getaddrinfo

        def getaddrinfo(host: Any, port: Any, *args: Any, **more: Any) -> Any:
            found = lookup(host, port, *args, **more)
            self.remember(host, (entry[4][0] for entry in found))
            return found

        socket.getaddrinfo = getaddrinfo
        for method in ("connect", "connect_ex", "sendto", "sendmsg"):
            setattr(socket.socket, method, self._named_first(method, getattr(socket.socket, method)))

    def _named_first(self, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def checked(sock: socket.socket, *args: Any) -> Any:
            # The address is the last argument of sendto, the fourth of sendmsg, the only one of connect.
            address = args[3] if method == "sendmsg" and len(args) > 3 else args[-1] if method != "sendmsg" else None
            if isinstance(address, tuple) and address and isinstance(address[0], str | bytes) and address[0]:
                host = _text(address[0])
                if sock.family in (socket.AF_INET, socket.AF_INET6) and as_address(host) is None:
                    self.check_name(method, host, address[1] if len(address) > 1 else None)
            return original(sock, *args)

        return checked

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        handler = self._handlers.get(event)
        if handler is not None:
            handler(args)

    # --- decisions ---

    def check_name(self, operation: str, host: Any, port: Any) -> None:
        """Allow or refuse a look-up.

        Raises:
            OSError: ``socket.gaierror``: the name may not be looked up.
        """
        if host is None or host in ("", b""):
            return  # this machine's own addresses
        name = _text(host)
        address = as_address(name)
        if address is not None:
            if operation not in ("gethostbyaddr",) or is_local(name) or self._known(name, None):
                return  # an address is not looked up; connecting to it is another question
        elif is_local(name) or self._allow.knows_name(name):
            return
        self._refuse(operation, Destination(name, port if isinstance(port, int) else None))
        raise socket.gaierror(socket.EAI_FAIL, f"refused by Moat: {name} is not in the allow-list")

    def check_connect(self, operation: str, host: str, port: int) -> None:
        """Allow or refuse a connection or datagram to an address.

        Raises:
            OSError: ``PermissionError``: the destination is not on the list.
        """
        if is_local(host) or self._known(host, port):
            return
        destination = Destination(host, port)
        if as_address(host) is None and self._allow.allows(destination):
            return
        self._refuse(operation, destination)
        raise PermissionError(errno.EACCES, f"refused by Moat: {destination} is not in the allow-list")

    def remember(self, name: Any, addresses: Any) -> None:
        """Tie addresses to the allowed name that they were looked up for."""
        if name is None:
            return
        text = _text(name).lower().removesuffix(".")
        if as_address(text) is not None or not self._allow.knows_name(text):
            return
        if len(self._resolved) > _MAX_KEPT:
            self._resolved.clear()
        for address in addresses:
            self._resolved.setdefault(str(address).partition("%")[0], {})[text] = self._clock()

    def _known(self, host: str, port: int | None) -> bool:
        address = as_address(host)
        if address is None:
            return False
        if self._allow.allows_address(address, port):
            return True
        names = self._resolved.get(host.partition("%")[0], {})
        now = self._clock()
        return any(
            now - when < _RESOLVED_FOR and (port is None or self._allow.allows(Destination(name, port)))
            for name, when in names.items()
        )

    def _check_address(self, operation: str, sock: Any, address: Any) -> None:
        if getattr(sock, "family", None) not in (socket.AF_INET, socket.AF_INET6) or not isinstance(address, tuple):
            return  # Unix sockets and the kernel's own families do not leave the machine
        host = _text(address[0])
        self.check_connect(operation, host, address[1] if isinstance(address[1], int) else 0)

    def _check_reverse(self, address: Any) -> None:
        host = _text(address[0]) if isinstance(address, tuple) and address else ""
        if host and not is_local(host) and not self._known(host, None):
            self._refuse("getnameinfo", Destination(host, None))
            raise socket.gaierror(socket.EAI_FAIL, "refused by Moat: a reverse look-up outside the allow-list")

    def _refuse(self, operation: str, destination: Destination) -> None:
        self.denied_total += 1
        key = str(destination)
        now = self._clock()
        last, since = self._logged.get(key, (-_LOG_EVERY, 0))
        since += 1
        if now - last < _LOG_EVERY:
            self._logged[key] = (last, since)
            return
        if len(self._logged) > _MAX_KEPT:
            self._logged.clear()
        self._logged[key] = (now, 0)
        self._denied(operation, key, since)


def _text(host: Any) -> str:
    return host.decode("ascii", "backslashreplace") if isinstance(host, bytes | bytearray) else str(host)
