# SPDX-License-Identifier: Apache-2.0
"""Proves that JSON read in slices is what `json.loads` reads, and that a slice ends in time and is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway import slices

DEEP = frozenset({(), ("a",), ("a", "b"), ("list",)})
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "list", "é"]), inner),
    max_leaves=25,
)


async def _no_pause() -> None:
    pass


def _loads(text: str) -> Any:
    return asyncio.run(slices.loads(text, DEEP, _no_pause))


@given(_values, st.sampled_from([None, 1]), st.booleans())
def test_reads_what_json_reads(value: Any, indent: int | None, ascii_: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_)
    assert _loads(text) == json.loads(text)
    assert _loads(f" \n{text}\t ") == json.loads(text)


BAD = [
    "", "{", "[", "{}x", "[] []", '{"a"}', '{"a":}', '{"a":1,}', "{1:2}", '{"a":[1 2]}', '{"list":[1,]}', '{"a" 1}',
    "nul", '{"a":{"b":[1}}', '{"a":1 "b":2}', "{,}",
]  # fmt: skip


def _refused(read: Callable[[str], Any], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("bad", BAD)
def test_refuses_what_json_refuses(bad: str) -> None:
    assert _refused(json.loads, bad)
    assert _refused(_loads, bad)


def test_a_pause_comes_after_each_member_of_what_is_deep() -> None:
    paused = 0

    async def pause() -> None:
        nonlocal paused
        paused += 1

    text = '{"a":{"b":[1,2,3],"c":[1,2,3]},"list":[[],[1]],"x":[1,2,3]}'
    assert asyncio.run(slices.loads(text, DEEP, pause)) == json.loads(text)
    # 3 of a.b, a's two, list's two, the three of the whole.
    assert paused == 10


def test_a_slice_ends_when_it_is_long_enough_and_the_longest_is_known() -> None:
    now = 0.0
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    async def work() -> slices.Slices:
        nonlocal now
        # Half of the time the processor is somewhere else, also while the loop sleeps.
        s = slices.Slices(lambda: now, sleep, lambda: now / 2)
        for took in (0.0004, 0.0004, 0.0004, 0.003, 0.0002):
            now += took
            await s.pause()
        now += 0.0002
        await s.pause(0.0003)
        s.end()
        return s

    s = asyncio.run(work())
    assert slept == [pytest.approx(0.0012), pytest.approx(0.003), pytest.approx(0.0004)]
    assert s.longest == pytest.approx(0.003)
    assert s.longest_own == pytest.approx(0.0015)
