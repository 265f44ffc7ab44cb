# SPDX-License-Identifier: Apache-2.0
"""Proves that a run on the host itself keeps no rules that cut the SSH connection of the operator who started it.

The operator is the machine that runs the tests: on the hosts' network, and no host of the site.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Remote = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def by_ssh(site, tmp_path_factory: pytest.TempPathFactory) -> Remote:
    """Run a command on the first host by SSH; its exit code and what it said."""
    folder: Path = tmp_path_factory.mktemp("ssh")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    place = "umask 077; mkdir -p ~/.ssh; cat >>~/.ssh/authorized_keys"
    site.hosts["node1"].ok("sh", "-c", place, stdin=(folder / "key.pub").read_text())
    known = site.hosts["node1"].ok("cut", "-d", " ", "-f", "1,2", "/etc/ssh/ssh_host_ed25519_key.pub")
    (folder / "known_hosts").write_text(f"{site.addresses['node1']} {known}")

    def run(*argv: str) -> tuple[int, str]:
        ssh = ["ssh", "-F", "none", "-i", str(folder / "key"), "-o", f"UserKnownHostsFile={folder / 'known_hosts'}"]
        ssh += ["-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", f"root@{site.addresses['node1']}"]
        done = subprocess.run([*ssh, *argv], capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


def _site(by_ssh: Remote, **variables: object) -> tuple[int, str]:
    return by_ssh("moat-site", "site", "--tags", "no_egress", "-e", f"'{json.dumps(variables)}'")


def _rules(site) -> str:
    return str(site.hosts["node1"].ok("nft", "-s", "list", "table", "inet", "moat_egress"))


def test_rules_that_cut_the_operators_connection_are_taken_back(site, by_ssh: Remote) -> None:
    before = _rules(site)
    file = site.hosts["node1"].ok("cat", "/etc/moat/nftables/no-egress.nft")
    code, said = _site(by_ssh, no_egress_extra_output=["tcp sport 22 drop"], no_egress_rollback_seconds=20)
    assert code == 28, said[-3000:]
    assert "they would have locked you out" in said
    assert _rules(site) == before
    assert site.hosts["node1"].ok("cat", "/etc/moat/nftables/no-egress.nft") == file
    assert by_ssh("true")[0] == 0


def test_the_control_rules_that_spare_it_stay(site, by_ssh: Remote) -> None:
    code, said = _site(by_ssh, no_egress_log_burst=21)
    assert code == 0, said[-3000:]
    assert "burst 21 packets" in _rules(site)
    assert site.hosts["node1"].run("systemctl", "is-active", "moat-no-egress-rollback.timer").returncode != 0
