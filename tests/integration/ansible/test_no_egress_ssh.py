# SPDX-License-Identifier: Apache-2.0
"""Proves over real SSH that good rules stay, and that rules which cut the control connection are taken back in time.

A test host with systemd and sshd stands on an internal docker network; this machine is its control host. The host has
no way out, and the rules are its own.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moat.build.cache import Cache

ROOT = Path(__file__).resolve().parents[3]
PATIENCE, ROLLBACK = 60, 8  # seconds: for rules that are good, and for rules that cut the connection


def engine_answers() -> bool:
    if shutil.which("docker") is None or shutil.which("ssh") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def nftables_packages() -> list[Path]:
    """Return nft and its libraries as locked for the bundle, from the build host's cache."""
    wanted = {"libedit2", "libjansson4", "libmd0", "libmnl0", "libnftables1", "libnftnl11", "libxtables12", "nftables"}
    lines = (ROOT / "bundles/locks/debs-debian13-amd64.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [Cache().path(e["sha256"]) for e in entries if e["name"] in wanted and "host" in e["uses"]]


pytestmark = [
    pytest.mark.skipif(not engine_answers(), reason="needs docker and ssh"),
    pytest.mark.skipif(
        not all(p.exists() for p in nftables_packages()),
        reason="the cache lacks the locked packages: run `make demo` once",
    ),
]


@dataclass(frozen=True)
class Node:
    """A test host and how to reach it."""

    name: str
    address: str
    folder: Path

    def run(self, *argv: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run a program on the host by the container engine: it also works when SSH is cut."""
        return subprocess.run(["docker", "exec", "-i", self.name, *argv], input=stdin, capture_output=True, timeout=300)

    def rules(self) -> str:
        return self.run("nft", "-s", "list", "table", "inet", "moat_egress").stdout.decode()

    def ssh(self) -> bool:
        """Say whether a fresh SSH connection can be made."""
        argv = ["ssh", *self.options(), "-o", "ConnectTimeout=15", "-o", "BatchMode=yes"]
        return subprocess.run([*argv, f"root@{self.address}", "true"], capture_output=True).returncode == 0

    def wait_ssh(self) -> None:
        """Wait until a connection can be made."""
        deadline = time.monotonic() + 180
        while not self.ssh():
            assert time.monotonic() < deadline, self.run("systemctl", "status", "ssh").stdout.decode()
            time.sleep(0.3)

    def journal(self) -> list[dict[str, Any]]:
        """Return what systemd wrote of the rules' trial and of their return."""
        units = ["-u", "moat-no-egress-apply", "-u", "moat-no-egress-rollback"]
        lines = self.run("journalctl", "--no-pager", "-o", "json", *units).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def options(self) -> list[str]:
        known, key = self.folder / "known_hosts", self.folder / "key"
        return [
            "-o",
            f"UserKnownHostsFile={known}",
            "-o",
            "StrictHostKeyChecking=accept-new",
            "-i",
            str(key),
            "-F",
            "none",
        ]

    def play(self, **variables: object) -> tuple[int, str]:
        """Apply the role by SSH, from this machine, and return exit code and output."""
        values = {
            "moat_egress_allow": [],
            "no_egress_rollback_seconds": PATIENCE,
            "moat_root": "/opt/moat",
            **variables,
        }
        (self.folder / "vars.json").write_text(json.dumps(values))
        ansible = ROOT / "ansible"
        environment = {
            "PATH": "/usr/bin:/bin", "HOME": str(self.folder), "LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CONFIG": str(ansible / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ansible / "roles"),
            "ANSIBLE_LIBRARY": str(ansible / "library"), "PYTHONDONTWRITEBYTECODE": "1",
            "ANSIBLE_MODULE_UTILS": str(ansible / "module_utils"),
            "ANSIBLE_FILTER_PLUGINS": str(ansible / "filter_plugins"), "ANSIBLE_HOME": str(self.folder / "ansible"),
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=60s -o ServerAliveInterval=15",
        }  # fmt: skip
        argv = [sys.executable, "-m", "ansible", "playbook", "-i", str(self.folder / "inventory.json")]
        argv += ["-e", f"@{self.folder / 'vars.json'}", str(self.folder / "play.yml")]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("ssh")
    name = f"moat-test-ssh-{secrets.token_hex(4)}"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    build = [sys.executable, str(ROOT / "molecule/testhost/build.py"), "debian13"]
    image = subprocess.run(build, capture_output=True, text=True, check=True).stdout.split()[-1]
    subprocess.run(["docker", "network", "create", "--internal", name], check=True, capture_output=True)
    try:
        # NET_ADMIN for the rules. SYS_ADMIN, because without it systemd cannot set up the sandbox of a unit, and
        # because the rules are tried in a network namespace of their own first.
        start = ["docker", "run", "-d", "--name", name, "--network", name, "--stop-signal", "SIGRTMIN+3"]
        start += ["--cap-add", "NET_ADMIN", "--cap-add", "SYS_ADMIN", "--cgroupns", "host"]
        start += [
            "-v",
            "/sys/fs/cgroup:/sys/fs/cgroup:rw",
            "--tmpfs",
            "/run",
            "--tmpfs",
            "/run/lock",
            "--tmpfs",
            "/tmp",
        ]
        start += [image, "sh", "-c", "mount --make-rshared / && exec /lib/systemd/systemd"]
        subprocess.run(start, check=True, capture_output=True)
        found = subprocess.run(
            ["docker", "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        made = Node(name, found, folder)
        made.run("systemctl", "is-system-running", "--wait")
        for package in nftables_packages():
            made.run("sh", "-c", f"cat > /var/tmp/{package.name[:12]}.deb", stdin=package.read_bytes())
        installed = made.run("sh", "-c", "dpkg -i /var/tmp/*.deb")
        assert installed.returncode == 0, installed.stderr.decode()
        public = (folder / "key.pub").read_bytes()
        made.run("sh", "-c", "cd && install -d -m 700 .ssh && cat > .ssh/authorized_keys", stdin=public)
        made.run("sh", "-c", "ssh-keygen -A && systemctl reset-failed ssh; systemctl start ssh")
        inventory = {
            "all": {"hosts": {"node1": {
                "ansible_host": found, "moat_address": found, "ansible_user": "root",
                "ansible_ssh_common_args": " ".join(made.options()),
            }}}
        }  # fmt: skip
        (folder / "inventory.json").write_text(json.dumps(inventory))
        play = "- hosts: all\n  gather_facts: false\n  become: false\n  roles: [no_egress]\n"
        (folder / "play.yml").write_text(play)
        made.wait_ssh()
        yield made
    finally:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True)
        subprocess.run(["docker", "network", "rm", name], capture_output=True)


def test_good_rules_stay_and_a_second_run_changes_nothing(node: Node) -> None:
    assert node.ssh()
    code, output = node.play()
    assert code == 0, output
    assert "policy drop" in node.rules()
    assert node.ssh()
    # Nobody takes them back: the timer is gone.
    timers = node.run("systemctl", "list-timers", "--all", "moat-*").stdout.decode()
    assert "moat-no-egress" not in timers
    code, output = node.play()
    assert code == 0, output
    assert "changed=0" in output


def test_a_host_with_these_rules_reaches_nothing_else(node: Node) -> None:
    # The control host's own address answers SSH's packets, but nothing new can be opened towards it.
    gateway = node.address.rpartition(".")[0] + ".1"
    script = f"import socket; socket.create_connection(('{gateway}', 22), 5)"
    done = node.run("python3", "-c", script)
    assert done.returncode != 0
    assert b"No route to host" in done.stderr


def test_rules_that_cut_ssh_are_taken_back_and_never_written(node: Node) -> None:
    before, file = node.rules(), node.run("cat", "/etc/moat/nftables/no-egress.nft").stdout
    assert "policy drop" in before
    code, output = node.play(no_egress_extra_output=["tcp sport 22 drop"], no_egress_rollback_seconds=ROLLBACK)
    assert code != 0
    assert "this host returned to its former rules by itself" in " ".join(output.split())
    assert node.rules() == before
    assert node.run("cat", "/etc/moat/nftables/no-egress.nft").stdout == file
    assert node.ssh()
    # They were really in force: loaded a second after the timer was set, and replaced by the timer, not by the run.
    loaded, returned = (
        max(int(e["__REALTIME_TIMESTAMP"]) / 1e6 for e in node.journal() if file in str(e["MESSAGE"]))
        for file in ("pending.nft", "previous.nft")
    )
    assert ROLLBACK - 2 < returned - loaded < ROLLBACK + 30


def test_a_control_connection_to_another_port_than_the_rules_know_is_refused_before_anything_changes(
    node: Node,
) -> None:
    before = node.rules()
    code, output = node.play(no_egress_ssh_ports=[2222])
    assert code != 0
    assert "add 22 to no_egress_ssh_ports" in " ".join(output.split())
    assert node.rules() == before


def test_the_rules_survive_a_restart_of_the_hosts_own_and_a_reboot(node: Node) -> None:
    for action in ("restart", "reload", "stop", "start"):
        done = node.run("systemctl", action, "nftables")
        assert done.returncode == 0, done.stderr
        assert "policy drop" in node.rules(), action
    subprocess.run(["docker", "restart", "-t", "10", node.name], check=True, capture_output=True)
    node.wait_ssh()
    assert "policy drop" in node.rules()
    order = node.run("systemctl", "show", "-p", "Before", "moat-no-egress.service").stdout
    assert b"network-pre.target" in order


def test_a_damaged_rule_file_leaves_the_host_closed(node: Node) -> None:
    damage = "cp /etc/moat/nftables/no-egress.nft /var/tmp/kept && echo nonsense >> /etc/moat/nftables/no-egress.nft"
    node.run("sh", "-c", f"{damage}; nft delete table inet moat_egress; systemctl restart moat-no-egress")
    deadline = time.monotonic() + 120
    while not node.rules() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "rules could not be loaded" in node.rules()
    assert "policy drop" in node.rules()
    assert node.ssh()
    code, output = node.play()  # mends it
    assert code == 0, output
    assert "rules could not be loaded" not in node.rules()


def test_absent_leaves_nothing_behind(node: Node) -> None:
    code, output = node.play(no_egress_state="absent")
    assert code == 0, output
    assert node.rules() == ""
    left = node.run(
        "sh", "-c", "ls -d /etc/moat/nftables; find /etc/systemd /run -name '*no-egress*' -o -name 'moat.conf'"
    ).stdout
    assert left == b""
    assert b"changed=0" in node.play(no_egress_state="absent")[1].encode()
