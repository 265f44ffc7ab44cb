# SPDX-License-Identifier: Apache-2.0
"""Proves that moat_apt lets no service run with its package's own configuration, whenever the power is cut.

systemd and apt are stood in for by a few lines that keep links as they do; the scenario `hostile` has the real ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.unit.ansible.modules import module

APT = module("moat_apt")
UNIT = "nginx.service"


class Host:
    """A host's folders of units, below a temporary one; ``cut`` says before which program the power goes."""

    def __init__(self, root: Path) -> None:
        self.etc, self.run = root / "etc", root / "run"
        self.links = self.etc / "multi-user.target.wants"
        self.links.mkdir(parents=True)
        self.active: set[str] = set()
        self.cut = ""

    def program(self, argv: Sequence[str], what: str) -> str:
        """Stand in for the programs that the module runs."""
        if self.cut and self.cut in argv:
            os._exit(0)
        if argv[0] == "apt-get" and "install" in argv:
            (self.links / UNIT).touch()  # as deb-systemd-helper does
            if not self.held_back():
                self.active.add(UNIT)
            if self.cut == "after":
                os._exit(0)
        if argv[:2] == ["systemctl", "disable"]:
            (self.links / argv[-1]).unlink()
        if argv[:2] == ["systemctl", "show"]:
            active = "active" if argv[-1] in self.active else "inactive"
            enabled = "enabled" if (self.links / argv[-1]).exists() else "disabled"
            return f"ActiveState={active}\nUnitFileState={enabled}\n"
        return ""

    def held_back(self) -> bool:
        """Say whether systemd would refuse or pass over the unit now."""
        return (self.run / UNIT).is_symlink() or (self.etc / f"{UNIT}.d" / APT.HOLD).exists()

    def boot(self) -> bool:
        """Start the host again; return whether the unit runs then."""
        for mask in self.run.glob("*"):
            mask.unlink()
        return (self.links / UNIT).exists() and not self.held_back()

    def install(self) -> None:
        """Do what the module does where the package is missing."""
        with APT.held_back([UNIT]):
            APT.install(["nginx"], "x.sources")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(APT, "UNITS", made.etc)
    monkeypatch.setattr(APT, "MASKS", made.run)
    monkeypatch.setattr(APT, "run", made.program)
    return made


def in_a_child(action: Callable[[], None]) -> None:
    """Do it in a process of its own, which may end at any point without tidying up."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "it was not cut"


def test_afterwards_the_service_is_neither_running_nor_enabled_and_nothing_is_left(host: Host) -> None:
    host.install()
    assert not host.active
    assert not host.boot()
    assert [p.name for p in host.etc.rglob("*")] == [host.links.name]
    assert list(host.run.iterdir()) == []
    assert not APT.release()


@pytest.mark.parametrize("when", ["install", "after", "disable"])
def test_a_power_cut_within_leaves_no_service_that_starts_with_the_host(host: Host, when: str) -> None:
    host.cut = when
    in_a_child(host.install)
    assert not host.boot()
    host.cut = ""
    if when == "install":
        host.install()
    else:
        assert APT.release()
    assert not host.boot()
    assert [p.name for p in host.etc.rglob("*")] == [host.links.name]


def test_the_control_without_the_condition_it_would_start(host: Host) -> None:
    host.cut = "after"
    in_a_child(host.install)
    (host.etc / f"{UNIT}.d" / APT.HOLD).unlink()
    assert host.boot()


@pytest.mark.parametrize("whose", ["somebody's", "ours"])
def test_a_service_that_is_used_is_not_disabled(host: Host, whose: str) -> None:
    (host.links / UNIT).touch()
    if whose == "ours":
        (host.etc / f"{UNIT}.d").mkdir()
        (host.etc / f"{UNIT}.d" / APT.OURS).touch()
    else:
        host.active.add(UNIT)
    host.install()
    assert (host.links / UNIT).exists()
    assert (host.etc / f"{UNIT}.d" / APT.OURS).exists() is (whose == "ours")


def test_the_condition_is_one_that_is_never_met() -> None:
    (condition,) = [line for line in APT.HELD.splitlines() if line.startswith("Condition")]
    assert condition == "ConditionPathExists=!/"
