# SPDX-License-Identifier: Apache-2.0
"""Proves that the sinkhole reads questions right, answers as a resolver expects, and survives hostile ones."""

from __future__ import annotations

import random
import struct

import pytest

from moat.site.egresscheck import dnswire


def question(name: str = "api.example.com", kind: int = dnswire.A) -> dnswire.Question:
    parsed = dnswire.parse(dnswire.query(4711, name, kind))
    assert parsed is not None
    return parsed


def test_a_question_is_read() -> None:
    q = question("Api.Example.COM", dnswire.AAAA)
    assert (q.identity, q.name, q.kind_name) == (4711, "api.example.com", "AAAA")
    assert question(kind=65280).kind_name == "TYPE65280"


def test_an_answer_holds_the_address_of_the_right_family() -> None:
    addresses = ["203.0.113.9", "2001:db8:53::9"]
    four = dnswire.answer(question(), addresses)
    assert struct.unpack(">HHHHHH", four[:12])[0::3] == (4711, 1)
    assert four.endswith(bytes([203, 0, 113, 9]))
    six = dnswire.answer(question(kind=dnswire.AAAA), addresses)
    assert six.endswith(bytes.fromhex("20010db8005300000000000000000009"))
    text = dnswire.answer(question(kind=16), addresses)
    assert struct.unpack(">HHHHHH", text[:12])[3] == 0


def test_no_such_name() -> None:
    assert dnswire.answer(question(), None)[3] & 15 == 3


def test_a_name_with_odd_bytes_is_shown_and_not_believed() -> None:
    head = struct.pack(">HHHHHH", 1, 0x0100, 1, 0, 0, 0)
    q = dnswire.parse(head + b"\x05a.b\x1b\xff\x00\x00\x01\x00\x01")
    assert q is not None
    assert q.name == "a\\046b\\027\\255"


HEAD = struct.pack(">HHHHHH", 1, 0x0100, 1, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEAD[:11],
        HEAD,
        HEAD + b"\x03abc",
        HEAD + b"\x03abc\x00\x00",
        HEAD + b"\xc0\x0c\x00\x01\x00\x01",  # a pointer to itself
        HEAD + b"\x40" + b"a" * 64 + b"\x00\x00\x01\x00\x01",
        HEAD + (b"\x3f" + b"a" * 63) * 5 + b"\x00\x00\x01\x00\x01",  # longer than a name may be
        struct.pack(">HHHHHH", 1, 0x8100, 1, 0, 0, 0) + b"\x00\x00\x01\x00\x01",  # a response
        struct.pack(">HHHHHH", 1, 0x0100, 2, 0, 0, 0) + b"\x00\x00\x01\x00\x01" * 2,
    ],
)
def test_what_is_no_question_is_refused(data: bytes) -> None:
    assert dnswire.parse(data) is None


def test_random_bytes_are_no_exception() -> None:
    rng = random.Random(4)
    good = dnswire.query(1, "a.example.com", 1)
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        q = dnswire.parse(bytes(data[: rng.randrange(len(data) + 1)]))
        if q is not None:
            dnswire.answer(q, ["203.0.113.1", "2001:db8:53::1"])
