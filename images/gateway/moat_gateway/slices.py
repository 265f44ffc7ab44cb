# SPDX-License-Identifier: Apache-2.0
"""Long work on the event loop in short slices, and JSON read that way.

A thread would not help: what is long here is Python's own work, and while one thread does it every other waits for the
interpreter, up to 5 ms at a time.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

SLICE = 0.001  # seconds after which a slice is long enough

_BLANKS = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder()


class Slices:
    """Counts how long the loop is held, and lets it go in time.

    After each slice the loop has at least as long for everything else, so that a long change takes half of it at most.

    Attributes:
        longest: seconds of the longest slice so far.
        longest_own: seconds of the processor in the slice that took most of it: what a busy machine does not change.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        own: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._own = own
        self._begun, self._own_begun = clock(), own()
        self.longest = self.longest_own = 0.0

    async def pause(self, most: float = SLICE) -> None:
        """Go on if the slice is young; else let the loop do everything else first.

        Args:
            most: seconds of a young slice; less of it before a step that is long in itself.
        """
        if self._clock() - self._begun >= most:
            await self.rest()

    async def rest(self) -> None:
        """End the slice."""
        held = self.end()
        await self._sleep(held)
        self.begin()

    def end(self) -> float:
        """Count the slice that runs now, and return its seconds."""
        now, own = self._clock(), self._own()
        held = now - self._begun
        self.longest = max(self.longest, held)
        self.longest_own = max(self.longest_own, own - self._own_begun)
        self._begun, self._own_begun = now, own
        return held

    def begin(self) -> None:
        """Begin anew, after something else was awaited."""
        self._begun, self._own_begun = self._clock(), self._own()


async def loads(text: str, deep: frozenset[tuple[str, ...]], pause: Callable[[], Awaitable[None]]) -> Any:
    """Read JSON; what lies at the trails of ``deep`` is read member by member, with a pause after each.

    Args:
        text: one value. A name twice in one object: the last counts, as with :func:`json.loads`.
        deep: objects and lists to look into, by the names that lead there; ``()`` is the value itself.
        pause: awaited after each member.

    Raises:
        ValueError: it is not JSON, or something follows.
    """
    value, end = await _value(text, _skip(text, 0), (), deep, pause)
    if _skip(text, end) != len(text):
        raise ValueError("something follows the value")
    return value


async def _value(
    text: str,
    i: int,
    at: tuple[str, ...],
    deep: frozenset[tuple[str, ...]],
    pause: Callable[[], Awaitable[None]],
) -> tuple[Any, int]:
    first = text[i : i + 1]
    if at not in deep or first not in ("{", "["):
        return _decoder.raw_decode(text, i)
    out: Any = {} if first == "{" else []
    closing = "}" if first == "{" else "]"
    i = _skip(text, i + 1)
    if text[i : i + 1] == closing:
        return out, i + 1
    while True:
        if first == "{":
            name, i = _decoder.raw_decode(text, i)
            i = _skip(text, i)
            if not isinstance(name, str) or text[i : i + 1] != ":":
                raise ValueError("a name and a colon are missing")
            out[name], i = await _value(text, _skip(text, i + 1), (*at, name), deep, pause)
        else:
            item, i = _decoder.raw_decode(text, i)
            out.append(item)
        await pause()
        i = _skip(text, i)
        following = text[i : i + 1]
        if following == closing:
            return out, i + 1
        if following != ",":
            raise ValueError("a comma is missing")
        i = _skip(text, i + 1)


def _skip(text: str, i: int) -> int:
    match = _BLANKS.match(text, i)
    return match.end() if match else i
