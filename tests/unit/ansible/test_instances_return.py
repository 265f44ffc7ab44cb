# SPDX-License-Identifier: Apache-2.0
"""Proves where gateways return to when a release does not start, above all after a run that was killed in the middle.

The module runs whole, on real links and processes; what stands in for systemd starts a process of the release that a
unit's link names, and fails for one release.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ansible.modules import module

instances = module("moat_instances")


class Ended(Exception):
    """The module is done."""


class Site:
    """A node with gateways, their links and releases.

    Args:
        root: the release store.
        bad: the release whose gateways do not start.
    """

    def __init__(self, root: Path, bad: str = "B") -> None:
        self.root, self.bad = root, bad
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.failed: set[int] = set()
        self.restarts: list[int] = []
        for name in "ABC":
            program = root / "releases" / name / "venv" / "bin" / "sleep"
            program.parent.mkdir(parents=True)
            program.symlink_to("/usr/bin/sleep")
        (root / "instances").mkdir()

    def point(self, link: str, release: str) -> None:
        """Point ``current``, or ``instances/N``, to a release."""
        (self.root / link).unlink(missing_ok=True)
        (self.root / link).symlink_to(f"{'../' if '/' in link else ''}releases/{release}")

    def links(self) -> dict[int, str]:
        return {int(x.name): x.readlink().name for x in sorted((self.root / "instances").iterdir())}

    def start(self, n: int) -> None:
        """Start the process of the release that the link of a gateway names."""
        self.stop(n)
        release = (self.root / "instances" / str(n)).readlink().name
        program = self.root / "releases" / release / "venv" / "bin" / "sleep"
        self.processes[n] = subprocess.Popen([str(program), "300"])
        while not Path(f"/proc/{self.processes[n].pid}/cmdline").read_bytes():
            time.sleep(0.01)

    def stop(self, n: int) -> None:
        if n in self.processes:
            self.processes[n].kill()
            self.processes.pop(n).wait()

    def installed(self, release: str, count: int = 2) -> None:
        """Have gateways serve with a release, which is the node's."""
        self.point("current", release)
        for n in range(1, count + 1):
            self.point(f"instances/{n}", release)
            self.start(n)

    def crashes(self, n: int) -> None:
        """Have a gateway be one that systemd starts again and again."""
        self.start(n)
        self.failed.add(n)

    def runs(self) -> dict[int, str]:
        """Return what each gateway's process runs."""
        found = {}
        for n, process in sorted(self.processes.items()):
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
            found[n] = Path(words[0].decode()).relative_to(self.root / "releases").parts[0]
        return found

    # --- what the module asks of systemd ---

    def run(self, *argv: str, check: bool = True) -> str:
        if argv[:2] == ("systemctl", "restart"):
            for n in [int(u.partition("@")[2].partition(".")[0]) for u in argv[2:]]:
                self.restarts.append(n)
                self.failed.discard(n)
                if (self.root / "instances" / str(n)).readlink().name == self.bad:
                    self.stop(n)
                    raise instances.Refused("it does not start")
                self.start(n)
        return ""

    def properties(self, n: int) -> dict[str, str]:
        process = self.processes.get(n)
        state = "activating" if n in self.failed else "active" if process else "failed"
        pid = str(process.pid if process else 0)
        return {"ActiveState": state, "MainPID": pid, "InvocationID": f"of {pid}", "UnitFileState": "enabled"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path / "opt")
    monkeypatch.setattr(instances, "run", site.run)
    monkeypatch.setattr(instances, "properties", site.properties)
    monkeypatch.setattr(instances, "RECORD", tmp_path / "gateways.json")
    monkeypatch.setattr(instances.Node, "ask", lambda *_, **__: (200, {"data": []}))
    monkeypatch.setattr(instances.Node, "stale", lambda *_: False)
    yield site
    for n in list(site.processes):
        site.stop(n)


def bring(site: Site, monkeypatch: pytest.MonkeyPatch, release: str, *, check: bool = False, **more: Any) -> Any:
    """Run the module and return what it says."""

    class Module:
        def __init__(self, argument_spec: dict[str, Any], **_: Any) -> None:
            given = {"release": release, "count": 2, "root": str(site.root), "settle": 0.0, "probe": "models", **more}
            self.params = {k: v.get("default") for k, v in argument_spec.items()} | given
            self.check_mode = check

        def exit_json(self, **said: Any) -> None:
            raise Ended(said)

        def fail_json(self, **said: Any) -> None:
            raise Ended(said)

    monkeypatch.setattr(instances, "AnsibleModule", Module)
    with pytest.raises(Ended) as ended:
        instances.main()
    return ended.value.args[0]


def test_an_upgrade_that_was_cut_short_at_the_first_gateway_is_returned(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.installed("A")
    site.point("instances/1", "B")
    site.crashes(1)
    said = bring(site, monkeypatch, "B")
    assert (said["returned"], said["before"]) == ([1], "A")
    assert said["msg"].endswith("Gateways [1] run their old release again and serve.")
    assert site.runs() == site.links() == {1: "A", 2: "A"}


def test_a_gateway_that_the_run_before_had_moved_returns_with_the_one_that_fails(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One release for all: a gateway that came up with the new one before the cut is not left there."""
    site.bad = ""
    site.installed("A")
    site.point("instances/1", "B")
    site.start(1)
    site.bad = "B"
    said = bring(site, monkeypatch, "B")
    assert said["returned"] == [1, 2]
    assert site.runs() == site.links() == {1: "A", 2: "A"}


def test_a_gateway_whose_link_alone_was_moved_is_not_restarted_for_its_return(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.installed("A")
    site.point("instances/2", "B")  # cut between the link and the restart
    assert bring(site, monkeypatch, "B")["returned"] == [1, 2]
    assert site.runs() == site.links() == {1: "A", 2: "A"}
    assert 2 not in site.restarts


def test_another_medium_after_a_cut_returns_to_the_release_of_the_node(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.bad = "C"
    site.installed("A")
    site.point("instances/1", "B")
    site.start(1)
    site.point("instances/2", "B")
    said = bring(site, monkeypatch, "C")
    assert (said["returned"], said["before"]) == ([1, 2], "A")
    assert site.runs() == site.links() == {1: "A", 2: "A"}


def test_a_way_back_that_fails_leaves_the_gateways_with_what_they_ran(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the node's own release, for instance: what serves now is better than nothing."""
    site.bad = "A"
    site.installed("C")
    site.point("current", "A")
    assert bring(site, monkeypatch, "A")["returned"] == [1]
    assert site.runs() == site.links() == {1: "C", 2: "C"}


def test_the_only_gateway_that_gets_requests_is_not_restarted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one was taken out of nginx; the release, or any other reason for a restart, has to wait."""
    site.bad = ""
    site.installed("A")
    said = bring(site, monkeypatch, "B", only=1)
    assert "drain_back=HOST/N" in said["msg"]
    assert said["msg"].endswith("Nothing was changed on this node.")
    assert (site.restarts, site.links()) == ([], {1: "A", 2: "A"})
    # With another one in, with nothing to restart, or where it does not serve anyway: as ever.
    assert bring(site, monkeypatch, "B", only=0)["restarted"] == [1, 2]
    assert "msg" not in bring(site, monkeypatch, "B", only=1)
    site.stop(1)
    assert bring(site, monkeypatch, "B", only=1)["started"] == [1]


def test_where_there_is_nothing_to_return_to_it_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    said = bring(site, monkeypatch, "B")
    assert said["msg"].splitlines()[-1].startswith("There is no other release to return to.")
    assert (said["before"], said["returned"]) == ("", [])


def test_what_a_cut_had_moved_is_told_where_nothing_is_left_to_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The role returns a node by that, when another node fails; and asks for it without a change, where none is due."""
    site.bad = ""
    site.installed("A")
    for n in (1, 2):
        site.point(f"instances/{n}", "B")
        site.start(n)
    for check in (True, False):
        said = bring(site, monkeypatch, "B", check=check)
        assert (said["changed"], said["before"]) == (False, "A")
    assert site.restarts == []


def test_a_look_changes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.installed("A")
    said = bring(site, monkeypatch, "A", check=True)
    assert said["changed"] is False
    assert not instances.RECORD.exists(), "check mode has noted what the gateways were started with"
    bring(site, monkeypatch, "A")
    assert set(json.loads(instances.RECORD.read_text("utf-8"))) == {"1", "2"}
