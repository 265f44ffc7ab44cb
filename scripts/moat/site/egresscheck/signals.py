# SPDX-License-Identifier: Apache-2.0
"""The signals that would end a verification, while there is something on the host that must be undone.

A mask of the main thread is not enough: the readers of the layers are threads too, the kernel hands a signal to
whichever will take it, and Python runs the handler in the main thread all the same.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

#: Ctrl-C, `kill`, and a lost SSH session: exactly then nobody is there to clean up by hand.
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _taken() -> list[signal.Signals]:
    """Return the signals that end us; whoever started us may have had some ignored (nohup), and means it."""
    return [number for number in _ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def ended_once() -> Iterator[None]:
    """Turn the first of these signals into KeyboardInterrupt; from then on they are ignored, until the block ends.

    Impatience (a second Ctrl-C, a SIGTERM behind a SIGHUP) must not break off what the first one set going.
    """
    taken = _taken()

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(f"signal {number}")

    before = {number: signal.signal(number, interrupt) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Let no signal break off the block: what came meanwhile takes effect at its end."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in _taken()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
