# SPDX-License-Identifier: Apache-2.0
"""Proves how a unit's sandbox is judged: by what its processes hold, and by the families that systemd leaves them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moat.site.egresscheck import lookups
from moat.site.egresscheck.systemd_probes import _unit, nobody_asks, sandbox, statuses

UNIT = "moat-gateway@1.service"
#: A bounding set with nothing in it, with CAP_NET_RAW alone, and with everything.
NONE, RAW, ALL = "0000000000000000", "0000000000002000", "000001ffffffffff"


def judged(families: str | None, *bounds: str, gain: bool = False) -> tuple[bool, str]:
    values = {"IPAddressDeny": "::/0 0.0.0.0/0"} | ({} if families is None else {"RestrictAddressFamilies": families})
    processes = {10 + i: {"CapBnd": b, "NoNewPrivs": "0" if gain else "1"} for i, b in enumerate(bounds)}
    probe = sandbox(UNIT, values, processes)
    return probe.ok, probe.found


@pytest.mark.parametrize("families", ["~", "~AF_NETLINK", "~AF_PACKET", "AF_INET AF_PACKET", "AF_XDP", None], ids=repr)
def test_a_unit_that_may_open_packet_sockets_and_has_the_capability_fails(families: str | None) -> None:
    for bound in (RAW, ALL):
        ok, found = judged(families, bound)
        assert not ok
        assert "may send raw packets (process 10)" in found
    assert judged(families, NONE) == (True, "no new privileges, no raw packets, IPAddressDeny=any")


@pytest.mark.parametrize("families", ["", "AF_INET AF_INET6 AF_UNIX", "~AF_PACKET AF_XDP"], ids=repr)
def test_without_such_sockets_the_capability_is_no_way_around(families: str) -> None:
    assert judged(families, ALL)[0]


def test_every_process_of_the_unit_counts() -> None:
    assert not judged("~", NONE, RAW)[0]
    assert judged("AF_INET", NONE, NONE, gain=True) == (
        False,
        "may gain privileges (processes 10, 11), no raw packets, IPAddressDeny=any",
    )
    assert judged("AF_INET") == (False, "no process to look at")


def test_the_processes_are_those_of_the_control_group(tmp_path: Path) -> None:
    for pid, unit in ((1, "init.scope"), (10, UNIT), (11, f"{UNIT}/worker"), (12, "moat-gateway@11.service")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(f"0::/system.slice/{unit}\n", "utf-8")
        (tmp_path / str(pid) / "status").write_text(f"Name:\tx\nNoNewPrivs:\t1\nCapBnd:\t{RAW}\n", "utf-8")
    assert statuses(UNIT, tmp_path) == {pid: {"Name": "x", "NoNewPrivs": "1", "CapBnd": RAW} for pid in (10, 11)}


def test_a_socket_at_which_names_are_looked_up_must_be_hidden_from_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "host/io.systemd.Resolve"
    path.parent.mkdir()
    monkeypatch.setattr(lookups, "SOCKETS", {path: "systemd-resolved"})
    # Process 10 has the host's own file system, 11 something else at the same place, 12 nothing.
    for pid, root in ((10, Path("/")), (11, tmp_path / "hidden"), (12, tmp_path / "empty")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "root").symlink_to(root)
        root.mkdir(exist_ok=True)
    other = tmp_path / "hidden" / path.relative_to("/")
    other.parent.mkdir(parents=True)
    other.touch()

    def judged(*pids: int, hidden: str = "") -> tuple[bool, str]:
        probe = nobody_asks(UNIT, {"InaccessiblePaths": hidden}, pids, tmp_path)
        return probe.ok, probe.found

    assert judged(10) == (True, "it reaches none of them"), "where nobody answers nobody can be asked"
    path.touch()
    assert judged(11, 12) == (True, "it reaches none of them")
    assert judged(11, 10) == (False, f"it reaches systemd-resolved ({path})")
    # A process that cannot be looked into: what systemd has hidden counts.
    assert not judged(13)[0]
    assert judged(13, hidden=f"-/boot -{path}")[0]
    assert judged() == (False, "no process to look at")


@pytest.mark.parametrize(("state", "probes"), [("inactive", 0), ("failed", 0), ("active", 2), ("", 2)])
def test_a_unit_that_does_not_run_has_no_sandbox_to_judge_and_one_that_runs_must_have_processes(
    state: str, probes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho ActiveState={state}\n", "ascii")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = _unit("moat-test-that-nobody-has.service")
    assert [probe.ok for probe in found] == [False] * probes
