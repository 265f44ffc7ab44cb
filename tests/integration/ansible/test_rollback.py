# SPDX-License-Identifier: Apache-2.0
"""Proves which release ``rollback.yml`` returns a site to, what it moves on which host, and that nothing stops it.

The real playbook runs by the real Ansible, on hosts that are folders of this one. Roles are replaced by tasks that
write down what they were called with; what they do is proven elsewhere (the links of gateways: test_instances_return).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

ANSIBLE = Path(__file__).resolve().parents[3] / "ansible"
#: What stands in for the roles' tasks.
ROLL = """\
- name: Write down what the gateways were brought to
  ansible.builtin.shell: "echo roll {{ moat_release }} >>{{ moat_root }}/did"
"""
RECORD = """\
- name: Do what recording does with the links
  ansible.builtin.shell: |
    cd {{ moat_root }} && echo record {{ moat_release }} >>did
    ln -sfn $(readlink current) previous && ln -sfn releases/{{ moat_release }} current
- name: Stop where the test says so
  ansible.builtin.fail:
  when: stop_at | default('') == 'record'
"""
STUBS = {
    "config_sync/tasks/sidecar.yml": "- ansible.builtin.meta: noop\n",
    "gateway/tasks/roll.yml": ROLL,
    "gateway/tasks/outcome.yml": "- ansible.builtin.meta: noop\n",
    "bundle/tasks/record.yml": RECORD,
}


class Site:
    """Hosts by their groups; ``control`` is the control host.

    Args:
        folder: of everything.
        groups: the hosts of each group; all others are empty.
        at: the releases that ``current`` and ``previous`` of each host name.
    """

    def __init__(self, folder: Path, groups: Mapping[str, list[str]], at: Mapping[str, tuple[str, str]]) -> None:
        self.folder, self.ansible = folder, folder / "ansible"
        ignore = shutil.ignore_patterns(".ansible-lint", "__pycache__")
        shutil.copytree(ANSIBLE, self.ansible, ignore=ignore)
        for name, text in STUBS.items():
            (self.ansible / "roles" / name).write_text(text)
        hosts = {}
        for name in {"localhost", *at}:
            own = {"moat_root": str(folder / name), "moat_site_dir": str(folder / "site"), "ansible_become": False}
            hosts[name] = {**own, "ansible_connection": "local", "ansible_python_interpreter": sys.executable}
            (folder / name / "instances").mkdir(parents=True)
        (folder / "site").mkdir()
        kinds = ("moat_gateways", "moat_edge", "moat_store", "moat_counters")
        children = {g: {"hosts": {n: {} for n in groups.get(g, [])}} for g in kinds}
        (folder / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "children": children}}))
        for name, (current, previous) in at.items():
            for release in {current, previous} - {""}:
                self.release(name, release)
            for link, release in (("current", current), ("previous", previous)):
                if release:
                    (folder / name / link).symlink_to(f"releases/{release}")
            for n in (1, 2):
                if name in groups["moat_gateways"]:
                    self.instance(name, n, current)

    def release(self, host: str, name: str) -> None:
        """Place a whole release on a host."""
        for file in ("venv/.moat-complete.json", "bundle/manifest.json", "bundle/ansible/site.yml"):
            path = self.folder / host / "releases" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def instance(self, host: str, n: int, release: str) -> None:
        """Point a gateway's link to a release."""
        link = self.folder / host / "instances" / str(n)
        link.unlink(missing_ok=True)
        link.symlink_to(f"../releases/{release}")

    def current(self, host: str, link: str = "current") -> str:
        return (self.folder / host / link).readlink().name

    def did(self, host: str) -> list[str]:
        """Return what was done on a host, and forget it."""
        path = self.folder / host / "did"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def rollback(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ansible", "playbook", "-i", str(self.folder / "inventory.yml"),
             str(self.ansible / "rollback.yml"), *more],
            env={"PATH": os.environ["PATH"], "ANSIBLE_CONFIG": str(self.ansible / "ansible.cfg"), "LC_ALL": "C.UTF-8",
                 "ANSIBLE_HOME": str(self.folder / "home"), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
        )  # fmt: skip


def well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def everything(host: str) -> dict[str, list[str]]:
    return {g: [host] for g in ("moat_gateways", "moat_edge", "moat_store", "moat_counters")}


def test_a_finished_upgrade_goes_to_the_release_before_and_what_is_wrong_with_it_is_only_said(tmp_path: Path) -> None:
    site = Site(tmp_path, everything("localhost"), {"localhost": ("B", "A")})
    # A working copy that no check would let through, and no program that could look at it.
    (tmp_path / "site/config").mkdir()
    (tmp_path / "site/config/config.yaml").write_text("half: [written")
    said = well(site.rollback())
    assert site.did("localhost") == ["roll A", "record A"]
    assert (site.current("localhost"), site.current("localhost", "site")) == ("A", "A")
    assert "Warning: A would refuse the configuration that is in force" in " ".join(said.split())
    assert not (tmp_path / "site/rollback.begun").exists()


def test_an_upgrade_that_was_cut_short_goes_to_the_release_that_it_came_from(tmp_path: Path) -> None:
    """Not to the one before that; and one node that was moved counts for all of them."""
    groups = {**everything("one"), "moat_gateways": ["one", "two"]}
    site = Site(tmp_path, groups, {"one": ("B", "A"), "two": ("B", "A")})
    site.release("two", "C")
    site.instance("two", 1, "C")
    well(site.rollback())
    assert {h: site.did(h)[0] for h in ("one", "two")} == {"one": "roll B", "two": "roll B"}
    assert {h: site.current(h) for h in ("one", "two")} == {"one": "B", "two": "B"}


def test_a_rollback_that_was_cut_short_goes_on_to_the_same_release(tmp_path: Path) -> None:
    """Also after `current` has moved: `previous` is then the release that it came from."""
    site = Site(tmp_path, everything("localhost"), {"localhost": ("B", "A")})
    assert site.rollback("-e", "stop_at=record").returncode != 0
    site.instance("localhost", 1, "A")  # as far as it came
    site.did("localhost")
    well(site.rollback())
    assert site.did("localhost") == ["roll A", "record A"]


def test_every_host_and_the_control_host_go_back_so_that_the_next_run_does_not_undo_it(tmp_path: Path) -> None:
    """The control host runs no gateway here, and the store's host has no copy of the older release."""
    groups = {"moat_gateways": ["node"], "moat_edge": ["edge"], "moat_store": ["store"], "moat_counters": ["node"]}
    site = Site(tmp_path, groups, {"node": ("B", "A"), "edge": ("B", "A"), "store": ("B", "")})
    for release in "AB":
        site.release("localhost", release)
    (tmp_path / "localhost/site").symlink_to("releases/B")
    said = " ".join(well(site.rollback()).split())
    assert {h: site.current(h) for h in ("node", "edge", "store")} == {"node": "A", "edge": "A", "store": "B"}
    assert site.current("localhost", "site") == "A"
    assert "Warning: this host has no copy of A; the release before stays recorded here" in said
    assert site.did("edge") == ["record A"]
    assert not (tmp_path / "localhost/current").exists()
