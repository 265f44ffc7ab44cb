# SPDX-License-Identifier: Apache-2.0
"""Proves which units a systemd site consists of, and that one that does not run all the time is no silent success.

`systemctl` is a small program that answers from a file, which a test changes between two questions. The verification
of a site that systemd really runs is in molecule/default.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from moat.console import Console
from moat.errors import EgressUnproven
from moat.site.egresscheck.systemd_site import SystemdSite, users_of

SYSTEMCTL = r"""
import fnmatch, json, pathlib, sys
folder = pathlib.Path(sys.argv[0]).parent
units = json.loads((folder / "units.json").read_text())
words = [w for w in sys.argv[1:] if w != "--no-pager"]
if words[0] == "show":
    for name in words[3].split(","):
        if name in units.get(words[1], {}):
            print(f"{name}={units[words[1]][name]}")
elif words[0] == "list-units":
    for unit, state in units.items():
        if fnmatch.fnmatch(unit, words[1]) and ("--all" in words or state["ActiveState"] == "active"):
            print(unit, "loaded")
elif words[0] == "restart":
    (folder / "restarted").write_text(" ".join(words[1:]))
"""


def unit(state: str = "active", sub: str = "running", pid: int = 0, user: str = "", **more: str) -> dict[str, str]:
    return {
        "LoadState": "loaded",
        "Type": "notify",
        "ActiveState": state,
        "SubState": sub,
        "MainPID": str(pid),
        "NRestarts": "0",
        "Result": "success",
        "User": user,
        **more,
    }


class Systemd:
    """What the stand-in of ``systemctl`` answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units: dict[str, dict[str, Any]] = {
            "moat.target": {"ActiveState": "active", "ConsistsOf": "minio.service nginx.service moat-once.service"},
            "moat-gateway@1.service": unit(pid=2000001),
            "minio.service": unit(pid=2000002),
            "nginx.service": unit(pid=2000003),
            "moat-once.service": unit(sub="exited", Type="oneshot"),
        }
        program = folder / "systemctl"
        program.write_text(f"#!{sys.executable} -IS\n{SYSTEMCTL}")
        program.chmod(0o755)
        self.write()

    def write(self) -> None:
        (self.folder / "units.json").write_text(json.dumps(self.units))

    def change(self, name: str, **values: str) -> None:
        self.units[name] |= values
        self.write()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Systemd(tmp_path)


@pytest.fixture
def site(systemd: Systemd, tmp_path: Path) -> SystemdSite:
    return SystemdSite(Console(quiet=True), tmp_path / "no-key")


def restart(site: SystemdSite) -> None:
    # The entrance of a test's nginx is nowhere: nothing is waited for.
    site.restart(site.components())


def test_every_service_of_the_site_is_a_component_whether_it_runs_or_not(site: SystemdSite, systemd: Systemd) -> None:
    systemd.change("minio.service", ActiveState="activating", SubState="auto-restart", MainPID="0", User="www-data")
    systemd.change("nginx.service", ActiveState="failed", SubState="failed", MainPID="0", User="daemon")
    found = {c.unit: c.uid for c in site.components()}
    assert found == {"moat-gateway@1.service": 0, "minio.service": 33, "nginx.service": 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
def test_the_processes_of_a_unit_are_those_of_its_control_group(tmp_path: Path) -> None:
    minio = "/system.slice/minio.service"
    groups = [minio, f"/docker/5f{minio}", f"{minio}/child", f"{minio}.d", "/"]
    for pid, group in enumerate(groups, start=1):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(f"9:name=systemd:{group}\n0::{group}\n", "utf-8")
        os.chown(tmp_path / str(pid), 100 + pid, -1)
    assert users_of(minio, tmp_path) == {101, 103}
    assert users_of(f"/docker/5f{minio}", tmp_path) == {102}
    assert users_of("", tmp_path) == users_of("/", tmp_path) == set()


def test_what_was_stopped_is_not_started_and_is_named(site: SystemdSite, systemd: Systemd) -> None:
    systemd.change("minio.service", ActiveState="failed", SubState="failed", MainPID="0", Result="exit-code")
    restart(site)
    assert (systemd.folder / "restarted").read_text() == "moat-gateway@1.service nginx.service"
    state = "ActiveState=failed, SubState=failed, Result=exit-code"
    assert site.changes() == [f"minio.service does not run ({state}): what it would try was not seen"]


def test_what_runs_all_the_time_is_no_change(site: SystemdSite) -> None:
    restart(site)
    assert site.changes() == []


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (
            {"ActiveState": "failed", "SubState": "failed", "MainPID": "0", "Result": "signal"},
            "minio.service ended during the capture (ActiveState=failed, SubState=failed, Result=signal)",
        ),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "MainPID": "0"},
            "minio.service ended during the capture (ActiveState=activating",
        ),
        (
            {"MainPID": "2000009", "NRestarts": "1"},
            "minio.service was started again during the capture (main process 2000002, then 2000009)",
        ),
        ({"NRestarts": "1"}, "minio.service was started again during the capture"),
    ],
)
def test_what_ends_after_the_restart_is_named(
    site: SystemdSite, systemd: Systemd, values: dict[str, str], found: str
) -> None:
    restart(site)
    systemd.change("minio.service", **values)
    (problem,) = site.changes()
    assert problem.startswith(found)


def test_the_gateways_are_asked_again_after_the_restart(
    site: SystemdSite, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = ["10.0.0.0/8"]
    monkeypatch.setattr("moat.site.egresscheck.endpoints.of_gateway", lambda name, pid: ([], tuple(allowed)))
    assert site.allowed()[0] == "10.0.0.0/8"
    allowed[0] = "10.0.0.1:8000"
    restart(site)
    assert site.allowed()[0] == "10.0.0.1:8000"


def test_a_unit_that_does_not_come_back_is_an_error(site: SystemdSite, systemd: Systemd) -> None:
    components = site.components()
    systemd.change("nginx.service", ActiveState="active")
    program = systemd.folder / "systemctl"
    failing = (
        "    units['nginx.service']['ActiveState'] = 'failed'\n    json.dump(units, open(folder / 'units.json', 'w'))\n"
    )
    program.write_text(program.read_text().rstrip("\n") + "\n" + failing)
    with pytest.raises(EgressUnproven, match=r"nginx\.service does not run after its restart"):
        site.restart(components)


def test_a_host_on_which_nothing_runs_has_no_site(site: SystemdSite, systemd: Systemd) -> None:
    for name in ("moat-gateway@1.service", "minio.service", "nginx.service"):
        systemd.change(name, ActiveState="inactive", SubState="dead", MainPID="0")
    assert site.components() == []
