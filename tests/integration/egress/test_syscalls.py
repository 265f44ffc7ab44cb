# SPDX-License-Identifier: Apache-2.0
"""Proves that the layer of the system calls sees what containers do, and says so where it cannot.

A container is a process in network and process namespaces of its own here, as the engine makes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moat.site.egresscheck.syscalls import own_namespace

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loads BPF programs: needs root")

#: argv: statements of the test in the middle of a capture.
PROGRAM = """
import json, subprocess, sys, time
from pathlib import Path
from moat.site.egresscheck import control
from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.model import Component, NotAvailable
from moat.site.egresscheck.syscalls import SyscallsLayer
USER = 64801
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
forker = subprocess.Popen(["unshare", "--net", "--pid", "--fork", "--kill-child", "sleep", "300"])
children = Path(f"/proc/{forker.pid}/task/{forker.pid}/children")
while not children.read_text().split():
    time.sleep(0.05)
container = int(children.read_text().split()[0])
marks = draw()
layer = SyscallsLayer([], marks, lambda: {USER: container})
report = {"container": container, "why": ""}
try:
    layer.start([Component("gateway-1", "standin", USER)])
    exec(sys.argv[1])
    time.sleep(0.3)
except NotAvailable as e:
    report["why"] = str(e)
finally:
    seen = layer.stop()
    forker.kill()
report |= {"seen": [[a.component, a.destination, a.detail] for a in seen], "problems": layer.problems}
print(json.dumps(report))
"""


def capture(statements: str, *more: str) -> dict[str, Any]:
    argv = ["unshare", "--net", *more, sys.executable, "-c", PROGRAM, statements]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.skipif(own_namespace() is not None, reason="these tests run in a container, which sees no other one")
def test_the_control_is_made_where_the_containers_processes_are() -> None:
    note = "made = []\nreal = control.attempt\n" + (
        "def attempt(*a):\n"
        "    import os\n"
        "    made.append([os.stat('/proc/thread-self/ns/pid_for_children').st_ino, "
        "os.stat('/proc/thread-self/ns/net').st_ino])\n"
        "    return real(*a)\n"
        "control.attempt = attempt\nlayer.control()\n"
        "import os\n"
        "report['where'] = [os.stat(f'/proc/{container}/ns/{n}').st_ino for n in ('pid', 'net')]\n"
        "report['made'] = made\n"
    )
    report = capture(note)
    assert report["why"] == ""
    assert report["made"]
    assert all(place == report["where"] for place in report["made"])
    assert report["problems"] == []
    assert {component for component, _, _ in report["seen"]} == {"control"}


def test_from_inside_a_container_others_are_not_seen_and_the_layer_says_so() -> None:
    report = capture("layer.control()", "--pid", "--fork", "--kill-child", "--mount-proc")
    assert "this program runs in a container itself" in report["why"]
    assert report["seen"] == []


@pytest.mark.skipif(own_namespace() is not None, reason="these tests run in a container, which sees no other one")
def test_the_control_makes_every_call_over_both_kinds_of_address_and_each_is_missed_if_it_is_not_seen() -> None:
    report = capture("layer.control()")
    assert report["problems"] == []
    for call in ("connect", "sendto", "sendmsg", "sendmmsg"):
        places = {place.partition(" ")[2][0] for _, place, detail in report["seen"] if detail == f"system call {call}"}
        assert places == {"1", "["}, call  # 198.51.100.x and [2001:db8::x]
    # A control of IPv4 or of one call does not stand for the others.
    blind = capture(
        "layer.control()\ntime.sleep(0.5)\n"
        "layer._seen = [s for s in layer._seen if s.call.family == 2 and s.call.word != 'sendmmsg']"
    )
    assert len(blind["problems"]) == 5
    assert "the control sendmmsg (IPv4) as 64801 was not caught" in blind["problems"]
    assert "the control connect (IPv6) as 64801 was not caught" in blind["problems"]


@pytest.mark.skipif(own_namespace() is not None, reason="these tests run in a container, which sees no other one")
def test_a_datagram_whose_address_has_no_family_goes_to_ipv4_and_is_seen() -> None:
    leak = (
        "import ctypes, socket, struct, time\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for family, to in ((0, '203.0.113.5'), (0, '127.0.0.1')):\n"
        "    place = struct.pack('=HH4s8x', family, socket.htons(8125), socket.inet_aton(to))\n"
        "    ctypes.CDLL(None).sendto(s.fileno(), b'x', 1, 0, place, len(place))\n"
        "    ctypes.CDLL(None).connect(s.fileno(), place, len(place))\n"
        "time.sleep(1)\n"
    )
    report = capture(
        f"subprocess.run(['/usr/bin/python3', '-I', '-c', {leak!r}], user=USER, group=USER, extra_groups=[], cwd='/')"
    )
    assert report["seen"] == [["gateway-1", "udp 203.0.113.5:8125", "system call sendto"]]
