# SPDX-License-Identifier: Apache-2.0
"""An end to what another side could draw out for ever: requests by the clock, and a step that nothing else ends.

A socket's own time-out counts from one byte to the next: who sends a byte a second is never too late for it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType


class Unfinished(Exception):
    """An answer did not come to its end in time, or in the size that it may have; the text says which."""


class Deadline:
    """Shuts the connections of a request down when its time is over, whatever the other side sends meanwhile.

    For one request at a time. Between two requests it does nothing but close what is idle, which is opened again.

    Args:
        seconds: for one request with its whole answer.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        #: The time of the last request was over before its end.
        self.over = False
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._handles: set[socket.socket] = set()
        self._left: list[socket.socket] = []  # of connections that were closed while a request was running

    def begin(self) -> None:
        """Begin a request."""
        self.end()
        with self._lock:
            self.over = False
            self._timer = threading.Timer(self.seconds, self._fire)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """The answer has come to its end."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            for handle in self._left:
                self._handles.discard(handle)
                handle.close()
            self._left.clear()

    def watch(self, connection: socket.socket) -> socket.socket:
        """Return a second handle of a connection, through which it is shut down.

        One of its own, since TLS takes the first one over when it begins.
        """
        handle = connection.dup()
        with self._lock:
            self._handles.add(handle)
            if self.over:
                _shut(handle)
        return handle

    def leave(self, handle: socket.socket) -> None:
        """Let a connection go that was closed: at the end of the request, for an answer may still be read from it."""
        with self._lock:
            self._left.append(handle)
            running = self._timer is not None
        if not running:
            self.end()

    def late(self) -> Unfinished:
        """Return what is wrong when the time was over."""
        return Unfinished(f"no whole answer within {self.seconds:g} s")

    def _fire(self) -> None:
        with self._lock:
            if threading.current_thread() is not self._timer:
                return  # its request had ended
            self.over = True
            for handle in self._handles:
                _shut(handle)


class Step:
    """Knows since when a step runs, so that another thread can tell one that will not end any more.

    Args:
        seconds: more than all limits within a step together.
        clock: for tests.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._until: float | None = None

    def __enter__(self) -> None:
        self._until = self._clock() + self._seconds

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._until = None

    def stuck(self) -> float | None:
        """Return for how many seconds the step has been running if that is too long, else ``None``."""
        until = self._until
        if until is None or (now := self._clock()) <= until:
            return None
        return now - until + self._seconds


def _shut(handle: socket.socket) -> None:
    with suppress(OSError):
        handle.shutdown(socket.SHUT_RDWR)
