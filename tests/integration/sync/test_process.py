# SPDX-License-Identifier: Apache-2.0
"""Proves the sidecar as a process: starts, follows a folder, tells, is asked, ends; one a node; no core, no secret."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.integration.sync.drive import Drive
from tests.integration.sync.sidecar import WAIT, Node, Sidecar, until

from moat_gateway.sync import reports
from moat_gateway.sync.files import boot_id, boottime
from moat_gateway.sync.nodefolder import Turn, kept
from moat_gateway.sync.reports import Report


def test_it_follows_a_folder_tells_and_ends(node: Node) -> None:
    with node.start() as sidecar:
        state = sidecar.wait("an answer", lambda: s if (s := sidecar.state()).source.reachable else None)
        assert (state.revision, state.pointer, state.node) == (None, None, "node-1")
        assert len(sidecar.said("sync.waiting")) == 1
        for number in (1, 2):
            node.drive.push()
            sidecar.wait_current(number)
        state = sidecar.wait("the state", lambda: s if (s := sidecar.state()).revision == 2 else None)
        assert (state.pointer, state.last_refused, state.interval) == (2, None, 1.0)
        assert 0 <= state.staleness() < 60
        assert kept(node.sync_dir) == (2, 1)
        assert sidecar.stop() == 0
    assert sidecar.said("sync.end")[0]["signal"] == "SIGTERM"
    assert [e["revision"] for e in sidecar.said("sync.accepted")] == [1, 2]
    assert sidecar.said("defect") == []


def test_the_nodes_report_lies_in_the_source(shared: Sidecar) -> None:
    node = shared.node
    report = Report("g1", 7, boot_id(), boottime(), 1, None, None, True, False, "now", ("something",))
    reports.write_report(node.reports_dir, report)
    path = node.drive.folder / "nodes" / "node-1.json"

    def look() -> dict[str, Any] | None:
        value = json.loads(path.read_bytes()) if path.exists() else {}
        return value if value.get("gateways") else None

    try:
        value = shared.wait("the report", look)
        assert value["node"] == "node-1"
        assert value["sync"]["revision"] == shared.node.current()
        [gateway] = value["gateways"]
        assert {k: v for k, v in gateway.items() if k != "age"} == report.to_dict()
        assert 0 <= gateway["age"] < 60
    finally:
        reports.remove_report(node.reports_dir, "g1")


def test_a_signal_and_a_gateway_have_it_look_at_once(node: Node) -> None:
    with node.start(MOAT_RELOAD_INTERVAL="3600") as sidecar:
        sidecar.wait("the first look", lambda: sidecar.state().source.reachable)
        sidecar.wait("the wait after it", lambda: sidecar.said("sync.waiting"))
        node.drive.push()
        sidecar.process.send_signal(signal.SIGHUP)
        sidecar.wait_current(1)
        node.drive.push()
        reports.ask_for_check(node.reports_dir)
        sidecar.wait_current(2)
        assert sidecar.stop() == 0


def test_a_second_one_is_refused(shared: Sidecar) -> None:
    node = shared.node
    second = Node(node.folder / "second", node.python, node.drive, {"MOAT_SYNC_DIR": str(node.sync_dir)})
    with second.start() as other:
        assert other.process.wait(WAIT) == 26
        assert "another config-sync holds the folder" in other.output
        assert f"process {shared.process.pid}" in other.output
    shared.alive()
    node.drive.push()
    shared.wait_current(node.drive.last)


@pytest.mark.parametrize(
    ("extra", "code", "text"),
    [
        ({"MOAT_SYNC_DIR": ""}, 3, "MOAT_SYNC_DIR is not set"),
        ({"MOAT_REPORTS_DIR": "/nowhere/at/all"}, 3, "reports is not there"),
        ({"MOAT_NODE": "a/b"}, 3, "the name of the node"),
        ({"MOAT_SYNC_DIR": "/dev/null/x"}, 26, "cannot be used"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(node: Node, extra: dict[str, str], code: int, text: str) -> None:
    with node.start(**extra) as sidecar:
        assert sidecar.process.wait(WAIT) == code, sidecar.output
        assert text in sidecar.output
        assert sidecar.said("start.refused")


def test_the_service_manager_is_told(node: Node, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(WAIT)
        node.drive.push()
        with node.start(NOTIFY_SOCKET=str(tmp_path / "notify")) as sidecar:
            assert b"READY=1" in manager.recv(4096)
            while b"STATUS=revision 1" not in manager.recv(4096):
                pass
            sidecar.process.send_signal(signal.SIGTERM)
            while b"STOPPING=1" not in manager.recv(4096):
                pass
            assert sidecar.process.wait(WAIT) == 0


def test_neither_a_core_file_nor_a_secret(shared: Sidecar) -> None:
    limits = Path(f"/proc/{shared.process.pid}/limits").read_text()
    [line] = [x for x in limits.splitlines() if x.startswith("Max core file size")]
    assert line.split()[4:6] == ["0", "0"]
    node = shared.node
    for path in (node.sync_dir, node.drive.folder, node.folder / "stdout", node.folder / "stderr"):
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                assert b"canary-4711" not in file.read_bytes(), file


def children(sidecar: Sidecar) -> list[int]:
    """Return the processes that config-sync started, once there is one."""
    path = Path(f"/proc/{sidecar.process.pid}/task/{sidecar.process.pid}/children")
    return [int(p) for p in sidecar.wait("the dry run's process", lambda: path.read_text().split())]


def test_the_end_does_not_wait_for_the_dry_run(node: Node) -> None:
    with node.start() as sidecar:
        pids = children(sidecar)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        node.drive.push()
        sidecar.wait("the pointer", lambda: sidecar.state().pointer == 1)
        sidecar.process.send_signal(signal.SIGTERM)
        # The dry run's process would be waited for three times as long.
        assert sidecar.process.wait(60) == 0
        assert not any(Path(f"/proc/{p}/exe").exists() for p in pids)
    assert node.current() is None


def test_the_dry_runs_process_ends_with_a_killed_sidecar(node: Node) -> None:
    with node.start() as sidecar:
        pids = children(sidecar)
        sidecar.process.kill()
        sidecar.process.wait()
        until("the end of the dry run's process", lambda: not any(Path(f"/proc/{p}/exe").exists() for p in pids))


def test_a_crash_of_native_code_leaves_where_it_was_and_no_values(node: Node) -> None:
    with node.start() as sidecar:
        pids = children(sidecar)
        sidecar.process.send_signal(signal.SIGSEGV)
        assert sidecar.process.wait(WAIT) == -signal.SIGSEGV
        assert "Fatal Python error: Segmentation fault" in sidecar.output
        assert "manager.py" in sidecar.output
        assert "canary-4711" not in sidecar.output
        until("the end of the dry run's process", lambda: not any(Path(f"/proc/{p}/exe").exists() for p in pids))


@pytest.mark.long
def test_a_dead_dry_run_is_started_again(node: Node) -> None:
    node.drive.push()
    with node.start() as sidecar:
        sidecar.wait_current(1)
        for pid in children(sidecar):
            os.kill(pid, signal.SIGKILL)
        node.drive.push()
        sidecar.wait_current(2)


def test_a_rolling_restart_is_one_after_the_other(shared: Sidecar) -> None:
    node = shared.node
    current = node.current()
    assert current is not None
    waiting = Report("", 7, boot_id(), 0.0, 0, None, None, True, False, "first", needs_restart=("callbacks",))
    gateways = {name: replace(waiting, name=name) for name in ("g1", "g2")}

    def turn_of(name: str | None) -> bool:
        # They all keep on saying that they live.
        for report in gateways.values():
            reports.write_report(node.reports_dir, replace(report, beat_boottime=boottime()))
        found = shared.state().turn
        return found == (Turn(name, current, "first") if name is not None else None)

    try:
        for name in ("g1", "g2"):
            shared.wait(f"the turn of {name}", partial(turn_of, name))
            gateways[name] = replace(waiting, name=name, revision=current, started_at="second", needs_restart=())
        shared.wait("the end", lambda: turn_of(None))
        words = [(e["instance"], e["turn"]) for e in shared.said("sync.turn")]
        assert words == [("g1", "given"), ("g1", "done"), ("g2", "given"), ("g2", "done")]
    finally:
        for name in gateways:
            reports.remove_report(node.reports_dir, name)


def test_two_nodes_restart_one_after_the_other(tmp_path: Path, python: Path) -> None:
    drive = Drive(tmp_path / "drive")
    nodes = {name: Node(tmp_path / name, python, drive, {"MOAT_NODE": name}) for name in ("a", "b")}
    drive.push()
    waiting = Report("g", 7, boot_id(), 0.0, 0, None, None, True, False, "first", needs_restart=("callbacks",))
    gateways = {name: replace(waiting, needs_restart=()) for name in nodes}
    with nodes["a"].start() as a, nodes["b"].start() as b:
        sidecars = {"a": a, "b": b}

        def turns() -> list[str]:
            for name, node in nodes.items():
                reports.write_report(node.reports_dir, replace(gateways[name], beat_boottime=boottime()))
            return [name for name, sidecar in sidecars.items() if sidecar.state().turn is not None]

        def gone(name: str) -> bool:
            return name not in turns()

        for sidecar in sidecars.values():
            sidecar.wait_current(1)
        until("both nodes' reports", lambda: turns() == [] and len(list((drive.folder / "nodes").iterdir())) == 2)
        gateways = dict.fromkeys(nodes, waiting)
        for name in ("a", "b"):
            seen = until(f"the turn of {name}", turns)
            assert seen == [name]
            # Longer than the nodes wait for each other's word; at the second turn nobody waits any more.
            deadline = time.monotonic() + (7 if name == "a" else 0)
            while time.monotonic() < deadline:
                assert turns() == [name]
                time.sleep(0.1)
            gateways[name] = replace(waiting, revision=1, started_at="second", needs_restart=())
            until(f"the end of the turn of {name}", partial(gone, name))
        for sidecar in sidecars.values():
            assert [e["turn"] for e in sidecar.said("sync.turn")] == ["given", "done"]
            assert sidecar.stop() == 0
