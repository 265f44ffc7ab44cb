# SPDX-License-Identifier: Apache-2.0
"""Proves that whatever arrives at the sinkhole is reported, also what is no question: it is somebody's way out.

The layer runs as it does in a verification, in a network namespace of its own; the clients run as a component's user.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.sinkhole import DnsLayer

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sets packet filter rules: needs root")
USER = 64801

#: argv: seconds to wait before the end, entry of the allow-list or empty, program of the client.
PROGRAM = f"""
import json, subprocess, sys, time
from moat.site.egresscheck import sinkhole
from moat.site.egresscheck.allow import parse
from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.model import Component
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
# The packets must have a way, or there are none: to loopback, where the redirect takes them.
for family in ("-4", "-6"):
    subprocess.run(["ip", family, "route", "add", "default", "dev", "lo"], check=True)
sinkhole._MAX_CONNECTIONS = 4
layer = sinkhole.DnsLayer([parse(sys.argv[2], lambda name: ["10.20.0.5"])] if sys.argv[2] else [], draw())
layer.start([Component("gateway-1", "standin.service", {USER})])
subprocess.run(
    ["/usr/bin/python3", "-I", "-c", sys.argv[3]], user={USER}, group={USER}, extra_groups=[], cwd="/", check=True
)
time.sleep(float(sys.argv[1]))
seen = layer.stop()
print(json.dumps({{"seen": [[a.layer, a.component, a.destination] for a in seen], "problems": layer.problems}}))
"""
CONNECT = """
import socket, struct, time
def connect(data=b"", wait=0.0, address="203.0.113.53"):
    s = socket.create_connection((address, 53), timeout=5)
    s.sendall(data)
    time.sleep(wait)
    return s
def query(name):
    labels = b"".join(bytes([len(p)]) + p.encode() for p in name.split("."))
    return b"\\x12\\x34\\x01\\x00\\x00\\x01" + b"\\0" * 6 + labels + b"\\0\\0\\1\\0\\1"
def framed(name):
    message = query(name)
    return struct.pack(">H", len(message)) + message
""".replace("\\\\", "\\")


def seen(client: str, *, wait: float = 0.5, allowed: str = "") -> list[list[str]]:
    """Return layer, component and destination of what the layer reports."""
    argv = ["unshare", "--net", sys.executable, "-c", PROGRAM, str(wait), allowed, CONNECT + client]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["problems"] == []
    found: list[list[str]] = report["seen"]
    return found


def no_query(size: int) -> list[str]:
    return ["dns", "gateway-1", f"tcp port 53: {size} bytes that are no query"]


@pytest.mark.parametrize(
    ("client", "size"),
    [
        ("connect()", 0),
        ("connect(b'GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')", 27),
        ("connect(bytes.fromhex('16030100') + b'x' * 300)", 304),
        ("connect(b'\\xff\\xff' + b'x' * 6000, 0.5)", 6002),
        ("connect(b'\\0')", 1),
        ("connect(b'', address='2001:db8:1::53')", 0),
    ],
)
def test_a_connection_without_a_question_is_an_attempt(client: str, size: int) -> None:
    found = seen(client)
    assert len(found) == 1
    # Above what a message may have the connection is ended, whatever is still on its way.
    assert found == [no_query(size)] or (size > 4098 and found[0][2].endswith("bytes that are no query"))


def test_one_that_stays_open_is_reported_too_and_so_is_what_follows_a_question() -> None:
    assert seen("connect(b'x' * 30)\nimport os\nif os.fork() == 0: time.sleep(30)", wait=0.3) == [no_query(30)]
    found = seen("connect(framed('llm.site.example') + b'\\xff' * 500)", allowed="llm.site.example")
    assert sorted(found) == [["answered", "gateway-1", "name llm.site.example (A)"], no_query(500)]


def test_questions_alone_are_what_they_were() -> None:
    found = seen("connect(framed('a.example') + framed('b.example'), 0.3)")
    assert found == [["dns", "gateway-1", f"name {name} (A)"] for name in ("a.example", "b.example")]
    assert seen("connect(framed('llm.site.example'), 0.3)", allowed="llm.site.example") == [
        ["answered", "gateway-1", "name llm.site.example (A)"]
    ]


def test_a_connection_too_many_is_reported() -> None:
    found = seen(
        "kept = [connect(framed('llm.site.example')) for _ in range(7)]\ntime.sleep(0.5)", allowed="llm.site.example"
    )
    refused = ["dns", "gateway-1", "tcp port 53: a connection that was not taken, 4 were open"]
    assert found.count(refused) == 3


def test_the_control_asks_by_udp_and_tcp_over_both_kinds_of_address_and_each_must_be_caught() -> None:
    argv = ["unshare", "--net", sys.executable, "-c", PROGRAM.replace("seen = ", "layer.control()\nTHEN\nseen = ")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}

    def problems(then: str) -> list[str]:
        words = [*argv[:-1], argv[-1].replace("THEN", then), "0.3", "", "pass"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)["problems"]
        return found

    assert problems("assert len(layer._caught) == 4, layer._caught") == []
    assert problems("layer._caught = {c for c in layer._caught if c[2] == 2}") == [
        f"the control by {protocol} (IPv6) as {USER} was not caught" for protocol in ("tcp", "udp")
    ]


def test_names_beyond_the_number_of_addresses_share_one_and_the_report_says_so() -> None:
    layer = DnsLayer([], draw())
    given = [layer._addresses(f"n{i}.example") for i in range(254 * 7)]
    assert layer._addresses("n0.example") == given[0] == given[254][:1] + given[0][1:]
    assert len({six for _, six in given}) == len(given), "of IPv6 each has its own"
    assert layer.answers[given[1][1]] == "n1.example"
    shared = ", ".join(f"n{1 + 254 * i}.example" for i in range(5))
    assert layer.answers[given[1][0]] == f"one of {shared}, ..."
