# SPDX-License-Identifier: Apache-2.0
"""Proves what moat_preflight decides: a wrong clock, two places on one disk, whose port it is, another deployment.

Ports and processes are real; that whole refusals reach the operator is proven by the Molecule scenario `hostile`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from tests.unit.ansible.modules import module

PREFLIGHT = module("moat_preflight")
LOCKED = 1_790_000_000
DAY = 86400


def words(now: float, *, control: float | None = None, installed: bool = False) -> list[str]:
    found = PREFLIGHT.clock(LOCKED, 330, now if control is None else control, now, installed)
    return [one["do"] for one in found]


def test_a_clock_within_the_life_of_the_bundle_is_believed() -> None:
    assert words(LOCKED) == []
    assert words(LOCKED + 330 * DAY) == []
    # Time zones of whoever locked it, and a clock that lags a little.
    assert words(LOCKED - DAY + 1) == []


@pytest.mark.parametrize(("shift", "word"), [(-365, "the clock is behind"), (365, "the clock is ahead")])
def test_a_clock_that_is_off_by_a_year_is_refused_on_a_new_host(shift: int, word: str) -> None:
    (found,) = words(LOCKED + shift * DAY)
    assert word in found
    assert "date -u -s" in found


def test_a_site_that_runs_for_years_is_not_stopped_by_the_age_of_its_bundle() -> None:
    assert words(LOCKED + 3000 * DAY, installed=True) == []
    # A clock behind the bundle is wrong on any host.
    assert len(words(LOCKED - 365 * DAY, installed=True)) == 1


def test_two_hosts_whose_clocks_contradict_each_other_are_refused() -> None:
    assert words(LOCKED, control=LOCKED + 60) == []
    assert ["time server" in w for w in words(LOCKED, control=LOCKED + 61)] == [True]


def test_two_places_on_one_disk_need_the_sum_of_both(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    if tmp_path.stat().st_dev != Path("/var").stat().st_dev:
        pytest.skip("the temporary folder and /var are on different file systems here")
    part = free * 6 // 10
    params = {"memory": 0, "store": str(tmp_path / "opt"), "release": "r", "store_bytes": part, "var_bytes": part}
    (found,) = PREFLIGHT.room(params)
    assert found["what"] == f"disk of {tmp_path}/opt and /var"
    assert list(PREFLIGHT.room({**params, "var_bytes": 0})) == []
    # What is staged takes its room already.
    (tmp_path / "opt/releases/r/venv").mkdir(parents=True)
    assert list(PREFLIGHT.room(params)) == []


def test_a_port_is_free_ours_or_refused_with_its_holder_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        wanted = {"port": port, "variable": "nginx_https_port", "units": ["nginx.service"]}
        (found,) = PREFLIGHT.ports([wanted])
        assert found["what"] == f"port {port}"
        assert f"(process {os.getpid()})" in found["found"]
        assert "nginx_https_port" in found["do"]
    assert list(PREFLIGHT.ports([wanted])) == []


def test_a_deployment_with_containers_in_the_store_is_refused(tmp_path: Path) -> None:
    assert list(PREFLIGHT.strangers([], str(tmp_path))) == []
    (tmp_path / "compose.yaml").touch()
    (found,) = PREFLIGHT.strangers([], str(tmp_path))
    assert found["what"] == "other deployment"
    assert "docker compose" in found["do"]
