# SPDX-License-Identifier: Apache-2.0
"""Proves that the check of isolation passes in an empty network namespace and fails in every other.

Nothing is sent: where there is an interface, the check refuses before it probes; elsewhere there is none to send by.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moat.build.namespace import MARK, Isolation, judge, prove, reexec_argv
from moat.errors import BuildFailed

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
GOOD = (("203.0.113.1", "ENETUNREACH"), ("2001:db8::1", "EADDRNOTAVAIL"))


def test_an_empty_namespace_passes() -> None:
    judge(Isolation(("lo",), GOOD))
    judge(Isolation((), GOOD))


@pytest.mark.parametrize(
    "seen",
    [
        Isolation(("eth0", "lo"), GOOD),
        Isolation(("lo",), (("203.0.113.1", "connected"),)),
        Isolation(("lo",), (("203.0.113.1", "ETIMEDOUT"),)),
        Isolation(("lo",), (("203.0.113.1", "ECONNREFUSED"),)),
        Isolation(("lo",), (("203.0.113.1", "EADDRNOTAVAIL"),)),
        Isolation(("lo",), ()),
    ],
)
def test_anything_else_is_refused(seen: Isolation) -> None:
    with pytest.raises(BuildFailed, match="not cut off"):
        judge(seen)


def test_with_an_interface_it_refuses_without_probing(monkeypatch: pytest.MonkeyPatch) -> None:
    if {n for _, n in socket.if_nameindex()} <= {"lo"}:
        pytest.skip("this machine itself has no interface")

    def probe(*_: object) -> str:
        raise AssertionError("a packet would have been sent")

    monkeypatch.setattr("moat.build.namespace._probe", probe)
    with pytest.raises(BuildFailed, match="not cut off"):
        prove()


def test_the_mark_in_the_environment_does_not_replace_the_proof() -> None:
    """Whoever sets the mark skips the second start, and is refused by the check."""
    if {n for _, n in socket.if_nameindex()} <= {"lo"}:
        pytest.skip("this machine itself has no interface")
    done = subprocess.run(
        [sys.executable, "-m", "moat", "build", "--profile", "demo", "-o", "unused"],
        env={**os.environ, MARK: "1", "PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == BuildFailed.exit_code, done.stderr
    assert "not cut off" in done.stderr


@pytest.mark.parametrize("root", [True, False])
def test_the_second_start_is_isolated(root: bool) -> None:
    if root and os.geteuid() != 0:
        pytest.skip("needs root")
    argv = reexec_argv([], root=root)
    program = "from moat.build.namespace import prove; print(prove().text)"
    command = [*argv[: argv.index("--") + 1], sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "connect to 203.0.113.1: ENETUNREACH" in done.stdout
