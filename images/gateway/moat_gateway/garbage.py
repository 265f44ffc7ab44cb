# SPDX-License-Identifier: Apache-2.0
"""When the interpreter looks for garbage: between two steps of the event loop, never in the middle of an allocation.

CPython before 3.12 collects wherever an object is allocated, also inside ``ContextVar.set``. A finaliser that runs
there and sets a context variable itself frees the tree that is being copied: the process dies of SIGSEGV, or gets a
``MemoryError`` out of nowhere (python/cpython#148891). LiteLLM sets several at each request, and the finaliser of its
streams (``CustomStreamWrapper.__del__``) sets two. From 3.12 on the interpreter collects between two instructions only,
and nothing here changes it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable

#: Whether this interpreter collects in the middle of an allocation.
AT_ALLOCATION = sys.version_info < (3, 12)

INTERVAL = 0.05  # seconds between two looks at the counts
#: A full collection may take this part of the time at most: what is alive is looked through each time.
SHARE = 0.02


def hold() -> None:
    """Collect at no allocation from now on; :class:`Collector` has to run instead."""
    if AT_ALLOCATION:
        gc.disable()


class Collector:
    """Collects by the interpreter's own counts and thresholds, when it is called.

    Args:
        collect: of one generation.
        counts: objects and collections since the last collection, of each generation.
        clock: seconds.
    """

    def __init__(
        self,
        collect: Callable[[int], object] = gc.collect,
        counts: Callable[[], tuple[int, int, int]] = gc.get_count,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._collect = collect
        self._counts = counts
        self._clock = clock
        self._next_full = 0.0

    def step(self) -> int | None:
        """Collect what is due; return which generation that was."""
        limits = gc.get_threshold()
        over = [count > limit for count, limit in zip(self._counts(), limits, strict=True)]
        # A first threshold of 0 means never, as for the interpreter itself.
        if not over[0] or not limits[0]:
            return None
        if over[2] and self._clock() >= self._next_full:
            begun = self._clock()
            self._collect(2)
            ended = self._clock()
            self._next_full = ended + (ended - begun) / SHARE
            return 2
        generation = 1 if over[1] else 0
        self._collect(generation)
        return generation


async def run(interval: float = INTERVAL) -> None:
    """Collect on the running event loop for ever, where :func:`hold` stopped the interpreter from it."""
    if not AT_ALLOCATION:
        return
    collector = Collector()
    while True:
        await asyncio.sleep(interval)
        collector.step()
