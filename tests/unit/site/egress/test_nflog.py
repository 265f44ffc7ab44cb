# SPDX-License-Identifier: Apache-2.0
"""Proves that the packet log is read right: messages as the kernel sent them, and broken ones without an exception.

The two datagrams were captured from Linux 6.18: a UDP packet over IPv4 and a TCP SYN over IPv6.
"""

from __future__ import annotations

import random
import struct

import pytest

from moat.site.egresscheck.nflog import Packet, parse, parse_packet, place

UDP4 = bytes.fromhex(
    "6c0000000004000000000000000000000200863c08000100080003000b000a007536353030310000080005000000000108000b000000fde9"
    "08000e000000fdea08000c0000000000210009004500001d97a540004011e8237f000001cb007105bf661fbd0009bb2178000000"
)
TCP6 = bytes.fromhex(
    "9c0000000004000000000000000000000a00863c0800010086dd03000b000a007536353030310000080005000000000108000b000000fde9"
    "08000e000000fdea08000c000000000154000900600ee165002806400000000000000000000000000000000120010db80000000000000000"
    "00000007a6a001bb09c6116e00000000a002ffc42def00000204ffc40402080afcd20829000000000103030a"
)


def test_a_udp_packet_over_ipv4() -> None:
    (event,) = parse(UDP4, lambda: 7.5)
    assert (event.when, event.prefix, event.uid, event.sequence) == (7.5, "u65001", 65001, 0)
    assert event.packet == Packet("udp", "127.0.0.1", 48998, "203.0.113.5", 8125)
    assert event.packet.text == "udp 203.0.113.5:8125"


def test_a_tcp_packet_over_ipv6() -> None:
    (event,) = parse(TCP6)
    assert event.sequence == 1
    assert event.packet is not None
    assert event.packet.text == "tcp [2001:db8::7]:443"


def test_several_messages_in_one_datagram() -> None:
    assert [e.sequence for e in parse(UDP4 + TCP6 + UDP4)] == [0, 1, 0]


@pytest.mark.parametrize("whole", [UDP4, TCP6])
def test_a_cut_off_datagram_is_no_exception(whole: bytes) -> None:
    for size in range(len(whole)):
        parse(whole[:size])


def test_random_damage_is_no_exception() -> None:
    rng = random.Random(4)
    for _ in range(4000):
        data = bytearray(UDP4 + TCP6)
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        parse(bytes(data))


def test_a_packet_of_another_protocol_has_no_ports() -> None:
    header = bytearray(20)
    header[0], header[9] = 0x45, 1
    header[16:20] = bytes([203, 0, 113, 9])
    packet = parse_packet(bytes(header) + b"\x08\x00\xff\xff")
    assert packet is not None
    assert packet.text == "icmp 203.0.113.9"
    header[9] = 253
    assert (parse_packet(bytes(header) + bytes(8)) or Packet("", "", 0, "", 0)).text == "protocol-253 203.0.113.9"


def test_a_later_fragment_is_not_misread_as_ports() -> None:
    header = bytearray(20)
    header[0], header[9] = 0x45, 17
    header[6:8] = struct.pack(">H", 185)
    packet = parse_packet(bytes(header) + b"\x00\x35\x00\x35")
    assert packet is not None
    assert packet.destination_port == 0


def test_ipv6_extension_headers_are_passed() -> None:
    base = bytearray(40)
    base[0], base[6] = 0x60, 0  # hop-by-hop first
    base[24:40] = bytes.fromhex("20010db8000000000000000000000001")
    hop = bytes([44, 0]) + bytes(6)
    fragment = bytes([17, 0]) + bytes(6)
    packet = parse_packet(bytes(base) + hop + fragment + struct.pack(">HHHH", 1000, 53, 8, 0))
    assert packet is not None
    assert packet.text == "udp [2001:db8::1]:53"


def test_endless_extension_headers_end() -> None:
    base = bytearray(40)
    base[0], base[6] = 0x60, 0
    parse_packet(bytes(base) + bytes(2000))


def test_places() -> None:
    assert place("tcp", "203.0.113.1", 443) == "tcp 203.0.113.1:443"
    assert place("icmpv6", "2001:db8::1", 0) == "icmpv6 2001:db8::1"
