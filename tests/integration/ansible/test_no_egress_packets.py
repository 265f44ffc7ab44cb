# SPDX-License-Identifier: Apache-2.0
"""Proves by real packets what the rules of the role no_egress let out, refuse, and count, for IPv4 and IPv6.

All of it happens in a network namespace whose only devices are virtual cables that end in the same namespace, and is
aimed at documentation addresses: no packet can leave this machine.
"""

from __future__ import annotations

import json
import sys
import textwrap
from typing import Any

import pytest
from tests.unit.ansible.egress_rules import in_namespace, namespaces_possible, render

pytestmark = pytest.mark.skipif(not namespaces_possible(), reason="needs root, nft and network namespaces")

ALLOW = [
    {"address": "198.51.100.5", "port": 8000},
    {"address": "2001:db8:5::/64", "port": 8000},
    {"address": "198.51.100.9", "port": 5514, "protocol": "udp"},
]

#: Two cables: out0-in0 is the host's way out, out1-in1 a second network that somebody might want to reach through it.
SETUP = """
import json, socket, struct, subprocess, sys, time
def sh(line): subprocess.run(line.split(), check=True)
def nft(text): subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
sh("ip link set lo up")
for i in (0, 1):
    sh(f"ip link add out{i} type veth peer name in{i}")
    # No duplicate address detection: the addresses are usable at once.
    open(f"/proc/sys/net/ipv6/conf/out{i}/accept_dad", "w").write("0")
    sh(f"ip addr add 203.0.113.{1 + 128 * i}/25 dev out{i}")
    sh(f"ip -6 addr add 2001:db8:{i + 1}::1/64 dev out{i} nodad")
    sh(f"ip link set out{i} up"); sh(f"ip link set in{i} up")
sh("ip route add 198.51.100.0/24 via 203.0.113.2")
sh("ip -6 route add 2001:db8:5::/64 via 2001:db8:1::2")
sh("ip -6 route add 2001:db8:6::/64 via 2001:db8:1::2")
# The far ends answer to nobody; their link addresses are known, so that packets are sent.
links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True).stdout)
macs = {link["ifname"]: link["address"] for link in links}
mac = {i: macs[f"in{i}"] for i in (0, 1)}
sh(f"ip neigh add 203.0.113.2 lladdr {mac[0]} dev out0"); sh(f"ip -6 neigh add 2001:db8:1::2 lladdr {mac[0]} dev out0")
sh(f"ip neigh add 203.0.113.130 lladdr {mac[1]} dev out1")
nft(sys.stdin.read())
def counters():
    out = subprocess.run(["nft", "-j", "list", "counters"], capture_output=True, text=True, check=True).stdout
    return {o["counter"]["name"]: o["counter"]["packets"] for o in json.loads(out)["nftables"] if "counter" in o}
def attempt(kind, address, port, patience=0.3):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    before, started = counters(), time.monotonic()
    s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    s.settimeout(patience)
    try:
        if kind == "tcp": s.connect((address, port))
        else: s.sendto(b"x", (address, port))
        said = "sent"
    except OSError as e:
        said = type(e).__name__ + ":" + str(e.errno)
    seconds = round(time.monotonic() - started, 2)
    after = counters()
    return {"said": said, "seconds": seconds,
            "counted": sorted(k for k in after if after[k] > before[k] and k not in BACKGROUND)}
# The kernel's own: reports of IPv6 groups at any time, and the refusal's message on its way to the program.
BACKGROUND = {"moat_out_neighbours", "moat_out_loopback"}
"""


def ask(body: str, text: str) -> Any:
    done = in_namespace([sys.executable, "-c", SETUP + textwrap.dedent(body)], text)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_listed_goes_out_and_the_rest_is_refused_at_once_and_counted() -> None:
    found = ask(
        """
        tries = [("tcp", "198.51.100.5", 8000), ("tcp", "2001:db8:5::7", 8000), ("udp", "198.51.100.9", 5514),
                 ("tcp", "198.51.100.5", 443), ("tcp", "198.51.100.6", 8000), ("udp", "198.51.100.5", 8000),
                 ("tcp", "2001:db8:6::7", 8000), ("udp", "2001:db8:5::7", 53), ("udp", "198.51.100.9", 53)]
        print(json.dumps([attempt(*t, patience=0.3 if i < 3 else 10) for i, t in enumerate(tries)]))
        """,
        render(ALLOW),
    )
    allowed, denied = found[:3], found[3:]
    assert [a["counted"] for a in allowed] == [
        ["moat_out_198_51_100_5_tcp_8000"],
        ["moat_out_2001_db8_5__n64_tcp_8000"],
        ["moat_out_198_51_100_9_udp_5514"],
    ]
    assert [a["said"] for a in allowed] == ["TimeoutError:None", "TimeoutError:None", "sent"]
    for one in denied:
        assert "moat_out_denied" in one["counted"], one
        assert not [c for c in one["counted"] if "tcp" in c or "udp" in c], one
    # Refused, not swallowed: "no route to host" and "operation not permitted" come at once, far within the ten seconds
    # of patience. An IPv6 connection hears "permission denied" from the answer to its second segment, a second later.
    no_route, not_permitted, denied_v6 = "OSError:113", "PermissionError:1", "PermissionError:13"
    assert [d["said"] for d in denied] == [no_route, no_route, not_permitted, denied_v6, not_permitted, not_permitted]
    assert all(d["seconds"] < 5 for d in denied), denied


def test_a_host_without_rules_would_have_sent_all_of_it() -> None:
    # The control of the test above: the same attempts, the same cables, no rules. Nothing is refused.
    found = ask(
        """
        tries = [("tcp", "198.51.100.5", 443), ("tcp", "2001:db8:6::7", 8000), ("udp", "198.51.100.9", 53)]
        print(json.dumps([attempt(*t)["said"] for t in tries]))
        """,
        "",
    )
    assert found == ["TimeoutError:None", "TimeoutError:None", "sent"]


def test_programs_of_the_host_reach_each_other() -> None:
    found = ask(
        """
        said = []
        v4, v6 = socket.AF_INET, socket.AF_INET6
        for family, address in ((v4, "127.0.0.1"), (v6, "::1"), (v4, "203.0.113.1")):
            server = socket.create_server((address, 0), family=family)
            client = socket.create_connection(server.getsockname()[:2], timeout=2)
            served, _ = server.accept(); client.sendall(b"hello"); said.append(served.recv(5).decode())
        print(json.dumps([said, counters()["moat_out_denied"]]))
        """,
        render(),
    )
    assert found == [["hello"] * 3, 0]


def test_what_the_host_needs_is_let_out_only_where_it_is_asked_for() -> None:
    body = """
        tries = [("udp", "198.51.100.1", 123), ("udp", "198.51.100.2", 53), ("tcp", "198.51.100.2", 53),
                 ("udp", "198.51.100.3", 123)]
        print(json.dumps([attempt(*t)["counted"] for t in tries]))
        """
    wanted = {"no_egress_ntp_servers": ["198.51.100.1"], "no_egress_name_servers": ["198.51.100.2"]}
    assert ask(body, render(**wanted)) == [["moat_out_ntp"], ["moat_out_dns"], ["moat_out_dns"], ["moat_out_denied"]]
    assert ask(body, render()) == [["moat_out_denied"]] * 4


def test_ipv6_neighbours_are_found_and_nothing_else_of_icmp_goes_out() -> None:
    found = ask(
        """
        # No neighbour entry for ::9: the kernel asks for it before it can send; echo is no neighbour discovery.
        raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        before = counters()
        s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.sendto(b"x", ("2001:db8:1::9", 8000))
        time.sleep(0.2)
        middle = counters()
        try: raw.sendto(bytes([128, 0, 0, 0, 0, 1, 0, 1]), ("2001:db8:6::7", 0))
        except OSError: pass
        after = counters()
        print(json.dumps([middle["moat_out_neighbours"] - before["moat_out_neighbours"],
                          after["moat_out_denied"] - middle["moat_out_denied"]]))
        """,
        render([{"address": "2001:db8:1::/64", "port": 8000, "protocol": "udp"}]),
    )
    assert found[0] >= 1
    assert found[1] == 1


def test_an_answer_of_the_ssh_server_passes_even_if_nobody_knows_the_connection() -> None:
    # Connections that were there before the rules: the first packet after loading is the server's, and unknown.
    body = """
        def segment(sport, flags):
            header = struct.pack("!HHIIBBHHH", sport, 40000, 1, 1, 5 << 4, flags, 512, 0, 0)
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
            before = counters()
            try: raw.sendto(header, ("198.51.100.5", 0))
            except OSError: pass
            after = counters()
            return sorted(k for k in after if after[k] > before[k] and k not in BACKGROUND)
        ACK, SYN, PSH = 0x10, 0x02, 0x08
        print(json.dumps([segment(22, ACK | PSH), segment(22, SYN), segment(443, ACK)]))
        """
    assert ask(body, render()) == [["moat_out_ssh_answers"], ["moat_out_denied"], ["moat_out_denied"]]


FORWARD = """
        open("/proc/sys/net/ipv4/ip_forward", "w").write("1")
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); wire.bind(("in0", 0))
        far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); far.bind(("in1", 3))
        far.settimeout(0.5)
        def checksum(data):
            total = sum(struct.unpack(f"!{len(data) // 2}H", data)); total = (total >> 16) + (total & 0xffff)
            return ~(total + (total >> 16)) & 0xffff
        def address(text): return socket.inet_aton(text)
        udp = struct.pack("!HHHH", 1000, 53, 9, 0) + b"x"
        ends = address("203.0.113.2"), address("203.0.113.130")
        head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, *ends)
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
        to = bytes.fromhex(macs["out0"].replace(":", ""))
        wire.send(to + bytes.fromhex(mac[0].replace(":", "")) + b"\\x08\\x00" + head + udp)
        arrived = False
        try:
            while not arrived: arrived = address("203.0.113.130") in far.recv(2000)
        except TimeoutError: pass
        print(json.dumps([arrived, counters().get("moat_forward_denied")]))
        """


def test_the_host_forwards_nothing_even_if_somebody_switches_forwarding_on() -> None:
    assert ask(FORWARD, render()) == [False, 1]


def test_the_same_packet_is_forwarded_without_the_chain() -> None:
    assert ask(FORWARD, render(no_egress_forward=False)) == [True, None]
