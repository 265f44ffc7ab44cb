# SPDX-License-Identifier: Apache-2.0
"""Proves that numbers and truth values given with ``-e NAME=VALUE`` to install.sh and moat-site arrive as such.

The real scripts run with the real Ansible, from a medium that stands in for a bundle: its playbook writes down what it
was given, and its moat.pyz only copies. They see folders of their own in place of /opt, /etc, /run, /var/log and
/usr/local/sbin (a mount namespace); nothing of this host is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
ANSIBLE = ROOT / "ansible"

#: What is given, and what a playbook must find.
GIVEN: dict[str, Any] = {
    "t_false=false": False,
    "t_true=true": True,
    "t_python=False": False,
    "t_number=12": 12,
    "t_zero=0": 0,
    "t_less=-3": -3,
    "t_half=0.5": 0.5,
    # Text stays text.
    "t_zeros=007": "007",
    "t_version=1.10": "1.10",
    "t_address=192.0.2.1": "192.0.2.1",
    "t_size=1G": "1G",
    "t_minus=-": "-",
    "t_none=": "",
    "t_yes=yes": "yes",
    "t_path=/a b=true": "/a",  # two variables in one argument, as Ansible reads it
    't_quoted="5"': "5",
    # Other forms are Ansible's own.
    '{"t_list": [1, "2"], "t_text": "false"}': None,
    "@{folder}/more.yml": None,
}
ALSO = {"t_list": [1, "2"], "t_text": "false", "t_file": 7}
FOUND = {key.partition("=")[0]: value for key, value in GIVEN.items() if value is not None} | ALSO

PLAYBOOK = """\
- hosts: localhost
  gather_facts: false
  tags: [preflight]
  tasks:
    - ansible.builtin.copy:
        dest: "{folder}/found-{{{{ ansible_run_tags | join }}}}.json"
        content: "{{{{ dict(names | zip(query('ansible.builtin.vars', *names))) | to_json }}}}"
        mode: "0644"
      vars:
        names: "{{{{ query('ansible.builtin.varnames', '^(t_|bundle_)') }}}}"
"""
#: Says and does what install.sh needs of it.
TOOL = """\
import json, pathlib, shutil, sys
if sys.argv[1] == "verify":
    print(json.dumps({"bundle": {"version": "1.0"}, "key": "RW", "manifest_sha256": "0" * 64, "files": 1}))
else:
    shutil.copytree(sys.argv[2], pathlib.Path(sys.argv[4]) / "releases" / ("1.0-" + "0" * 12) / "bundle")
"""
#: Runs "$@" with folders of its own; $folder/own holds what lies in them.
INSIDE = """\
set -eu
folder=$1
shift
for place in opt etc run var/log usr/local/sbin; do mount --bind "$folder/own/$place" "/$place"; done
exec "$@"
"""


def can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None or not Path("/usr/bin/python3").exists():
        return False
    argv = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(argv, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_mount(), reason="needs root, unshare and mount")


class Host:
    """A host with a medium, and nothing installed but the control environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.medium = folder, folder / "medium"
        for place in ("opt", "etc", "run", "var/log", "usr/local/sbin"):
            (folder / "own" / place).mkdir(parents=True)
        for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache", "os-release"):
            if Path("/etc", name).exists():
                shutil.copy(Path("/etc", name), folder / "own/etc")
        (self.medium / "ansible/inventory").mkdir(parents=True)
        (self.medium / "wheels").mkdir()
        for name in ("ansible.cfg", "moat-site", "inventory/localhost.yml"):
            shutil.copy(ANSIBLE / name, self.medium / "ansible" / name)
        shutil.copy(ANSIBLE / "install.sh", self.medium)
        (self.medium / "manifest.json").write_text("{}")
        (self.medium / "moat.pyz").write_text(TOOL)
        (self.medium / "wheels/control-requirements.txt").write_text("ansible-core\n")
        (self.medium / "ansible/site.yml").write_text(PLAYBOOK.format(folder=folder))
        (folder / "more.yml").write_text("t_file: 7\n")
        self.control()

    def control(self) -> None:
        """Put this environment's Ansible where install.sh keeps the one it has made."""
        show = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = subprocess.run(["/usr/bin/python3", "-Ic", show], capture_output=True, text=True, check=True).stdout
        name = hashlib.sha256(f"{version}ansible-core\n".encode()).hexdigest()[:12]
        python = self.folder / "own/opt/moat/control" / name / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)

    def run(self, *argv: str) -> str:
        """Run a command on this host, which must succeed."""
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", INSIDE, "sh", str(self.folder), *argv],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def found(self, tags: str = "all") -> dict[str, Any]:
        """Return what the playbook was given, and forget it."""
        path = self.folder / f"found-{tags}.json"
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        path.unlink()
        return values


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A host where install.sh has run through both phases, with everything that is given."""
    host = Host(tmp_path_factory.mktemp("host"))
    given = [word for g in GIVEN for word in ("-e", g.replace("{folder}", str(host.folder)))]
    said = host.run("sh", f"{host.medium}/install.sh", "--yes", "--allow-older", *given)
    assert "Done in " in said
    return host


def exactly(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare values and their types: 0 is not false."""
    assert found == wanted
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in wanted.items()}


def test_install_sh_keeps_the_type_in_both_phases(host: Host) -> None:
    for tags in ("preflight", "all"):
        exactly(host.found(tags), {**FOUND, "bundle_allow_older": True})


@pytest.mark.parametrize(
    "argv",
    [
        ["-e", "t_a=false", "-e", "t_b=12"],
        ["--extra-vars", "t_a=false", "--extra-vars=t_b=12"],
        ["-et_a=false", '-e{"t_b": 12}'],
        ["--tags", "all", "-e", '{"t_a": false,\n "t_b": 12}', "--diff"],
    ],
    ids=" ".join,
)
def test_moat_site_keeps_the_type_in_every_spelling(host: Host, argv: list[str]) -> None:
    host.run("/usr/local/sbin/moat-site", "site", *argv)
    exactly(host.found(), {"t_a": False, "t_b": 12})


def test_moat_site_leaves_text_alone(host: Host) -> None:
    given = [word for g in GIVEN for word in ("-e", g.replace("{folder}", str(host.folder)))]
    host.run("/usr/local/sbin/moat-site", "site", *given)
    exactly(host.found(), FOUND)
