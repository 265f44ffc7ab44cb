# SPDX-License-Identifier: Apache-2.0
"""Proves that the names that a container asks for are heard, whatever form the question has.

A container is a network namespace with an address here, named as the engine names its own; the layer is the product's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="opens packet sockets in other namespaces: needs root")

#: argv: what the container's process does, statements after it.
PROGRAM = """
import ipaddress, json, subprocess, sys, time
from pathlib import Path
from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.model import Component
from moat.site.egresscheck.names import NamesLayer
for words in (
    "netns add c1", "-n c1 link set lo up", "link add far type veth peer name eth0 netns c1",
    "link set far up", "-n c1 link set eth0 up",
    "-n c1 address add 172.30.242.11/24 dev eth0", "-n c1 route add default via 172.30.242.1",
    "-n c1 neighbour add 172.30.242.1 lladdr 02:00:00:00:00:02 dev eth0",
):
    subprocess.run(["ip", *words.split()], check=True)
place = Path("/run/netns/c1")
marks = draw()
layer = NamesLayer(
    place.parent, marks, ["minio"], [ipaddress.IPv4Network("172.30.242.0/24")], lambda: {"gateway-1": (place, 9e9)}
)
layer.start([Component("gateway-1", "c1", 64801, ("172.30.242.11",))])
client = ["ip", "netns", "exec", "c1", "/usr/bin/python3", "-I", "-c", sys.argv[1]]
if sys.argv[1]:
    subprocess.run(client, check=True)
exec(sys.argv[2])
time.sleep(0.5)
seen = layer.stop()
print(json.dumps({"seen": [[a.component, a.destination, a.detail] for a in seen], "problems": layer.problems}))
"""


def heard(client: str, then: str = "") -> dict[str, Any]:
    script = 'mount -t tmpfs tmpfs /run && mkdir /run/netns && exec "$@"'
    argv = ["unshare", "--net", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", PROGRAM, client, then]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_control_is_heard_over_both_kinds_of_address() -> None:
    report = heard("", "layer.control()")
    assert report["problems"] == []
    assert [component for component, _, _ in report["seen"]] == ["control", "control"]
    deaf = heard("", "layer.control(); time.sleep(0.5); layer._questions = layer._questions[:1]")
    assert len(deaf["problems"]) == 1
    assert "was not heard" in deaf["problems"][0]


CLIENT = """
import socket, struct, time
def query(name, questions=1):
    labels = b"".join(bytes([len(p)]) + p.encode() for p in name.split("."))
    return struct.pack(">HHHHHH", 7, 256, questions, 0, 0, 0) + labels + bytes((0, 0, 1, 0, 1))
def udp(data):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(data, ("203.0.113.53", 53))
def tcp(*parts):
    server = socket.create_server(("127.0.0.1", 53))
    s = socket.create_connection(("127.0.0.1", 53))
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for part in parts:
        s.sendall(part)
        time.sleep(0.1)
    s.close()
framed = struct.pack(">H", len(query("a.example"))) + query("a.example")
"""


@pytest.mark.parametrize(
    ("client", "destination"),
    [
        ("udp(query('a.example'))", "name a.example (A)"),
        ("udp(query('a.example', 2))", "udp port 53: 27 bytes that are no query"),
        ("udp(b'secret')", "udp port 53: 6 bytes that are no query"),
        ("tcp(framed)", "name a.example (A)"),
        ("tcp(framed[:2], framed[2:])", "name a.example (A)"),
        ("tcp(framed[:1], framed[1:9], framed[9:])", "name a.example (A)"),
        ("tcp(b'GET / HTTP/1.1')", "tcp port 53: 14 bytes that are no query"),
        ("tcp()", "tcp port 53: 0 bytes that are no query"),
    ],
)
def test_whatever_is_sent_to_a_name_server_is_heard(client: str, destination: str) -> None:
    report = heard(CLIENT + client)
    assert report["problems"] == []
    assert [(component, found) for component, found, _ in report["seen"]] == [("gateway-1", destination)]
