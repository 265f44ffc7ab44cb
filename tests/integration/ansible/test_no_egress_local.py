# SPDX-License-Identifier: Apache-2.0
"""Proves that a run on the host itself, which somebody started by SSH, keeps no rules that cut that connection.

A real connection to port 22, the kernel's own counts and the role's own rules, in a network namespace without a way
out. What stands in is systemd's timer, which here strikes after two seconds; all of it runs in molecule/multinode.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ansible.egress_rules import in_namespace, namespaces_possible, render

pytestmark = pytest.mark.skipif(not namespaces_possible(), reason="needs root, nft and network namespaces")

ROOT = Path(__file__).resolve().parents[3]
#: The far end is a network namespace of its own, as another host is: the rules spare what stays on one host.
SCRIPT = """
import json, os, socket, subprocess, sys, time
from pathlib import Path
from tests.unit.ansible.modules import module
MODULE = module("moat_no_egress")
def sh(line): subprocess.run(line.split(), check=True)
r, w = os.pipe()
far = os.fork()
if far == 0:
    os.unshare(os.CLONE_NEWNET) if hasattr(os, "unshare") else __import__("ctypes").CDLL(None).unshare(0x40000000)
    os.write(w, b"x")
    for _ in range(100):
        if b"in0" in subprocess.run(["ip", "-o", "link"], capture_output=True).stdout: break
        time.sleep(0.05)
    sh("ip addr add 203.0.113.2/24 dev in0"); sh("ip link set in0 up")
    for _ in range(100):
        try: c = socket.create_connection(("203.0.113.1", 22), 1); break
        except OSError: time.sleep(0.05)
    while c.recv(4096): pass
    os._exit(0)
os.read(r, 1)
sh("ip link set lo up"); sh(f"ip link add out0 type veth peer name in0 netns {far}")
sh("ip addr add 203.0.113.1/24 dev out0"); sh("ip link set out0 up")
server = socket.create_server(("203.0.113.1", 22)); near, peer = server.accept()
near.sendall(b"before" * 100)
if sys.argv[2] == "ssh":
    os.environ["SSH_CONNECTION"] = f"{peer[0]} {peer[1]} 203.0.113.1 22"
else:
    MODULE.inherited = lambda name: ""
MODULE.RUN = Path(sys.argv[1])
for name in ("PENDING", "PREVIOUS", "SEEN"):
    setattr(MODULE, name, MODULE.RUN / getattr(MODULE, name).name)
started = time.monotonic()
MODULE.timer_active = lambda: time.monotonic() < started + 2
MODULE.stop_timer = lambda: None
class Answer(Exception): pass
class Module:
    params = {"local": True, "check_ssh": True, "ssh_ports": [22]}
    def fail_json(self, msg): raise Answer(msg)
MODULE.keep(MODULE.PREVIOUS, MODULE.DELETE)
subprocess.run(["nft", "-f", "-"], input=sys.stdin.read(), text=True, check=True)
try:
    MODULE.note_sessions(Module())
    if sys.argv[3] == "output": near.sendall(b"TASK [...]" * 10)
    MODULE.await_proof(Module())
    said = ""
except Answer as e:
    said = str(e)
print(json.dumps([said, bool(MODULE.loaded())]))
os.kill(far, 9)
"""


def run_by(way: str, output: str, rules: str, folder: Path) -> tuple[str, bool]:
    """Put rules on trial; return what is refused, and whether they are in force then."""
    done: subprocess.CompletedProcess[str] = in_namespace(
        ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", SCRIPT, str(folder), way, output], rules
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found[0], found[1]


GOOD = render()
BAD = render(no_egress_extra_output=["tcp sport 22 drop"])


def test_rules_that_spare_the_operators_connection_stay(tmp_path: Path) -> None:
    assert run_by("ssh", "output", GOOD, tmp_path) == ("", True)


def test_rules_that_cut_it_are_taken_back(tmp_path: Path) -> None:
    said, there = run_by("ssh", "output", BAD, tmp_path)
    assert "they would have locked you out" in said
    assert "no answer from 203.0.113.2 port " in said
    assert "; do: see `journalctl" in said
    assert not there
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_carries_nothing_proves_nothing(tmp_path: Path) -> None:
    said, there = run_by("ssh", "nothing", GOOD, tmp_path)
    assert "they would have locked you out" in said
    assert not there


def test_a_run_at_the_console_has_nothing_to_prove(tmp_path: Path) -> None:
    assert run_by("console", "nothing", BAD, tmp_path) == ("", True)
