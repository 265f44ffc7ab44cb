# SPDX-License-Identifier: Apache-2.0
"""Proves that nothing of the installed site tries to leave, by the product's own verification with its controls.

The verification restarts the services inside its capture, so this runs before the other files of the scenario.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

GATEWAY = "moat-gateway@1.service"
SYNC = "moat-config-sync.service"
ADDITION = f"/run/systemd/system/{GATEWAY}.d"
PROGRAM = "/run/test-leak.py"
#: For the reports that are not of the site as it is: the newest in its usual place goes into the evidence.
ASIDE = "/run/test-egress"
#: Started with the gateway, in its unit: with its user, its control group and its sandbox. All goes to documentation
#: addresses, from a host without any network.
LEAK = r"""
import socket, time
kept = []
def try_(family, kind, call, *args):
    s = socket.socket(family, kind)
    kept.append(s)  # who holds a socket is looked up while it is there
    s.settimeout(2)
    try:
        getattr(s, call)(*args)
    except OSError:
        pass
question = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\x08callback\6vendor\7example\0\0\1\0\1"
try_(socket.AF_INET, socket.SOCK_DGRAM, "sendto", question, ("203.0.113.53", 53))
try_(socket.AF_INET, socket.SOCK_DGRAM, "sendto", b"requests:1|c", ("203.0.113.30", 8125))
try_(socket.AF_INET, socket.SOCK_STREAM, "connect", ("203.0.113.20", 4318))
try_(socket.AF_INET6, socket.SOCK_STREAM, "connect", ("2001:db8:1::9", 443))
time.sleep(2)
"""


def verify(node, *more: str) -> tuple[int, dict]:
    """Return exit code and report of one verification."""
    done = node.run("moat", "egress", "verify", "--json", *more, timeout=600)
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def leak(node) -> Iterator[None]:
    """An addition to the first gateway's unit that tries to leave at its start; taken away again."""
    node.ok("mkdir", "-p", ADDITION)
    node.ok("tee", PROGRAM, stdin=LEAK)
    node.ok("tee", f"{ADDITION}/test-leak.conf", stdin=f"[Service]\nExecStartPost=-/usr/bin/python3 -I {PROGRAM}\n")
    node.ok("systemctl", "daemon-reload")
    yield
    node.ok("rm", "-r", ADDITION, PROGRAM)
    node.run("rm", "-r", f"{ASIDE}/leak")
    node.ok("systemctl", "daemon-reload")


@pytest.fixture
def stopped(node) -> Iterator[None]:
    """A service of the site that does not run."""
    node.ok("systemctl", "stop", SYNC)
    yield
    node.ok("systemctl", "start", SYNC)
    node.run("rm", "-r", f"{ASIDE}/stopped")


def test_nothing_tries_to_leave_and_every_control_is_caught(node) -> None:
    code, report = verify(node, "--quiet", "5")
    assert code == 0, json.dumps({k: report[k] for k in ("attempts", "problems", "probes", "requests")}, indent=1)
    assert report["ok"]
    assert report["attempts"] == []
    layers = {layer["name"]: layer for layer in report["layers"]}
    for name in ("packets", "dns", "syscalls"):
        assert layers[name]["available"], layers[name]["why"]
        assert layers[name]["control_caught"], layers[name]["why"]
    assert f"releases/{report['subject']['release']}" in node.ok("readlink", "/opt/moat/current")
    assert {"manifest", "packet filter's rules", "configuration of gateway-1"} <= report["subject"].keys()
    kept = node.ok("ls", report["folder"]).split()
    assert any(name.endswith(".json") for name in kept)
    assert any(name.endswith(".html") for name in kept)


@pytest.mark.usefixtures("leak")
def test_what_tries_to_leave_from_a_unit_is_caught_and_named(node) -> None:
    code, report = verify(node, "--quiet", "1", "--out", f"{ASIDE}/leak")
    seen = {(a["layer"], a["destination"]) for a in report["attempts"]}
    assert {
        ("dns", "name callback.vendor.example (A)"),
        ("packets", "udp 203.0.113.30:8125"),
        ("packets", "tcp 203.0.113.20:4318"),
        ("packets", "tcp [2001:db8:1::9]:443"),
    } <= seen
    assert {d.partition(" ")[2] for layer, d in seen if layer == "syscalls"} >= {
        "203.0.113.30:8125", "203.0.113.20:4318", "[2001:db8:1::9]:443"
    }  # fmt: skip
    # The three services of this user are told apart by the unit, and nobody else is blamed.
    assert {(a["component"], a["process"].partition("/")[2]) for a in report["attempts"]} == {("gateway-1", "python3")}
    # A finding is no reason to doubt the measurement.
    assert (code, report["clean"], report["proven"], report["problems"]) == (24, False, True, [])


@pytest.mark.long
@pytest.mark.usefixtures("stopped")
def test_a_service_that_does_not_run_proves_nothing(node) -> None:
    code, report = verify(node, "--quiet", "0", "--out", f"{ASIDE}/stopped")
    assert [p for p in report["problems"] if p.startswith(f"{SYNC} does not run")], report["problems"]
    assert report["attempts"] == []
    assert (code, report["clean"], report["proven"]) == (25, True, False)


def test_the_site_is_as_it_was(node) -> None:
    assert "moat_capture" not in node.ok("nft", "list", "tables")
    assert node.ok("systemctl", "--failed", "--no-legend", "--plain") == ""
