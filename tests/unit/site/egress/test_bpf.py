# SPDX-License-Identifier: Apache-2.0
"""Proves that the BPF assembler writes the bytes that the kernel's documents give, and that records are read right."""

from __future__ import annotations

import socket
import struct

import pytest

from moat.site.egresscheck import sysenter
from moat.site.egresscheck.bpf import Assembler


def one(write: str, *args: object) -> bytes:
    a = Assembler()
    getattr(a, write)(*args)
    return a.code()


@pytest.mark.parametrize(
    ("write", "args", "expected"),
    [
        # As clang and bpftool show them.
        ("mov", (6, 1), "bf16000000000000"),
        ("mov_imm", (2, 16), "b702000010000000"),
        ("mov_imm", (0, -1), "b7000000ffffffff"),
        ("add_imm", (1, -64), "07010000c0ffffff"),
        ("load", (8, 7, 6, 8), "7967080000000000"),
        ("load", (4, 1, 10, -8), "61a1f8ff00000000"),
        ("load", (2, 1, 10, -8), "69a1f8ff00000000"),
        ("load", (1, 1, 10, -8), "71a1f8ff00000000"),
        ("store", (8, 10, -8, 0), "7b0af8ff00000000"),
        ("store", (4, 10, -4, 7), "637afcff00000000"),
        ("store_imm", (8, 10, -8, 0), "7a0af8ff00000000"),
        ("atomic_add", (0, 0, 1), "db10000000000000"),
        ("call", (14,), "850000000e000000"),
        ("exit", (), "9500000000000000"),
        ("mov_map", (1, 5), "1811000005000000" + "0000000000000000"),
        ("mov_imm64", (2, 0x1122334455667788), "1802000088776655" + "0000000044332211"),
    ],
)
def test_each_instruction(write: str, args: tuple[object, ...], expected: str) -> None:
    assert one(write, *args).hex() == expected


def test_jumps_forward_and_backward() -> None:
    a = Assembler()
    a.label("start")
    a.jump_if(1, "==", 42, "end")
    a.jump_if_reg(1, "!=", 2, "start")
    a.jump("start")
    a.label("end")
    a.exit()
    assert a.code().hex() == "151002002a000000".replace("1510", "1501") + "5d21feff00000000" + "0500fdff00000000" + (
        "9500000000000000"
    )


def test_mistakes_are_refused() -> None:
    a = Assembler()
    a.jump("nowhere")
    with pytest.raises(ValueError, match="no label nowhere"):
        a.code()
    b = Assembler()
    b.label("x")
    with pytest.raises(ValueError, match="twice"):
        b.label("x")
    c = Assembler()
    c.mov_imm(1, 1 << 40)
    with pytest.raises(ValueError, match="does not fit"):
        c.code()


def record(family: int, address: bytes, call: int = sysenter.CONNECT) -> bytes:
    head = struct.pack(
        "=QQQQ16sIIII", 2_500_000_000, 77 << 32 | 78, 99 << 32 | 64801, 5, b"python3\0junk", call, 3, 0, 0
    )
    return head + (struct.pack("<H", family) + address).ljust(32, b"\0")


def test_a_record_over_ipv4() -> None:
    call = sysenter.parse(record(socket.AF_INET, b"\x01\xbb\xcb\x00\x71\x05"), 1000.0)
    assert (call.when, call.pid, call.uid, call.group, call.comm) == (1002.5, 77, 64801, 5, "python3")
    assert (call.word, call.address, call.port) == ("connect", "203.0.113.5", 443)


def test_a_sending_call_without_a_family_means_ipv4_and_a_connect_means_nothing() -> None:
    raw = b"\x01\xbb\xcb\x00\x71\x05"
    sent = sysenter.parse(record(socket.AF_UNSPEC, raw, sysenter.SENDTO), 0.0)
    assert (sent.word, sent.family, sent.address, sent.port) == ("sendto", socket.AF_INET, "203.0.113.5", 443)
    assert sysenter.parse(record(socket.AF_UNSPEC, raw), 0.0).address == ""


def test_a_record_over_ipv6_and_a_mapped_one() -> None:
    raw = b"\x01\xbb" + bytes(4) + bytes.fromhex("20010db8000000000000000000000009")
    assert sysenter.parse(record(socket.AF_INET6, raw), 0.0).address == "2001:db8::9"
    mapped = b"\x00\x35" + bytes(4) + bytes.fromhex("00000000000000000000ffffcb007105")
    assert sysenter.parse(record(socket.AF_INET6, mapped), 0.0).address == "203.0.113.5"


def test_a_record_of_another_family_has_no_address() -> None:
    call = sysenter.parse(record(40, b"\0\0\x02\0\0\0"), 0.0)
    assert (call.family, call.address, call.port) == (40, "", 0)


def test_the_program_assembles_for_the_host_and_for_a_container() -> None:
    whole, inside = sysenter.program(3, 4, None), sysenter.program(3, 4, (4, 4026532000))
    assert len(whole) % 8 == 0
    assert len(inside) > len(whole)
    assert len(inside) // 8 < 4096  # what the kernel takes from anybody; ours is far below
