# SPDX-License-Identifier: Apache-2.0
"""Proves that uninstall.yml leaves what it says and nothing else: files, units, users and packages before and after."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .test_1_effects import V
from .test_2_changes import moat_site

SNAPSHOT = (Path(__file__).parents[1] / "snapshot.py").read_text("utf-8")

#: Paths that may be new or others, each with the reason.
MAY_DIFFER = {
    r"/opt/moat(/control(/.*)?)?": "uninstall.yml says so: it runs from there",
    r"/usr/local/sbin/moat-site": "uninstall.yml says so",
    r"/srv/store(/drive)?(/.*)?": "uninstall.yml says so: a drive outside of /var/lib/moat is the operator's to empty",
    r"/var/(lib|cache)/(dpkg|apt|debconf|systemd)(/.*)?": "apt's and systemd's own records of Debian's packages",
    r"/var/log(/.*)?": "logs of the host",
    r"/var/(lib|log)/(nginx|valkey)(/.*)?": "made by Debian's packages, which stay",
    r"/var/cache/ldconfig(/.*)?": "made by Debian's packages, which stay",
    r"/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?": "users are compared by themselves",
    r"/etc/(ld\.so\.cache|\.pwd\.lock|\.updated|valkey(/.*)?)": "made by Debian's packages, which stay",
    r"/etc/(default|init\.d|rc[0-6S]\.d|logrotate\.d|apparmor\.d|nginx|ufw)(/.*)?": "of Debian's packages",
    r"/etc/systemd/system/[a-z.-]+\.wants": "folders of systemd",
    r"/var/www(/.*)?": "made by Debian's nginx",
    r".*/__pycache__(/.*)?": "Debian's Python compiles what its packages bring",
    r"/usr/share/.*|/usr/lib/.*": "Debian's packages, which stay",
}


@pytest.fixture(scope="module")
def removed(node) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Remove with the data; what the host was like before the installation, what it is like now, and what was said."""
    done = moat_site(node, "uninstall", "-e", "uninstall_confirm=yes", "-e", "uninstall_data=yes")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    node.ok("python3", "-", "/run/after.json", stdin=SNAPSHOT)
    before, after = (json.loads(node.ok("cat", f"/run/{n}.json")) for n in ("before", "after"))
    return before, after, done.stdout


def expected(path: str) -> bool:
    """Say whether there is a reason for a path that is new or another."""
    return any(re.fullmatch(pattern, path) for pattern in MAY_DIFFER)


def packaged(node) -> set[str]:
    """Return every path of the installed Debian packages, as it is on a host whose /bin is a link."""
    listed = node.ok("sh", "-c", "cat /var/lib/dpkg/info/*.list").split("\n")
    return {re.sub(r"^/(bin|sbin|lib|lib64)(?=/)", r"/usr/\1", p) for p in listed}


def test_no_file_is_left_but_what_was_said(node, removed) -> None:
    before, after, _ = removed
    ours = packaged(node)
    new = sorted(p for p in set(after["files"]) - set(before["files"]) if p not in ours and not expected(p))
    assert new == []


def test_no_file_of_the_host_is_gone_or_changed(removed) -> None:
    before, after, _ = removed
    gone = sorted(p for p in set(before["files"]) - set(after["files"]) if not expected(p))
    assert gone == []
    both = set(before["files"]) & set(after["files"])
    other = sorted(p for p in both if before["files"][p] != after["files"][p] and not expected(p))
    assert [f"{p}: {before['files'][p]} -> {after['files'][p]}" for p in other] == []


def test_the_comparison_sees_something(removed) -> None:
    """The control: what is said to stay has been found as a difference, so a file of Moat's would have been too."""
    before, after, _ = removed
    new = set(after["files"]) - set(before["files"])
    assert "/usr/local/sbin/moat-site" in new
    assert any(p.startswith("/opt/moat/control/") for p in new)
    assert f"{V['minio_drives'][0]}" in new
    assert not expected("/etc/moat")
    assert not expected("/etc/systemd/system/minio.service")


def test_units_users_and_groups_are_those_of_before_and_of_debians_packages(removed) -> None:
    before, after, _ = removed
    moats = re.compile(r"moat|minio")
    assert [u for u in after["unit_files"] if moats.search(u)] == []
    assert [u for u in after["active"] if moats.search(u)] == []
    # Reached once since the host has started, by Debian's nginx and the packet filter; a target is nothing that runs.
    reached = {"network-online.target", "network-pre.target"}
    assert sorted(set(after["active"]) - set(before["active"]) - reached) == []
    assert sorted(set(before["active"]) - set(after["active"])) == []
    changed = {u for u, s in before["unit_files"].items() if after["unit_files"].get(u) != s}
    assert changed == set()
    assert set(after["users"]) - set(before["users"]) <= {"valkey"}
    assert set(after["groups"]) - set(before["groups"]) <= {"valkey"}
    assert {*V["apt_offline_extra_packages"], "nginx", "nftables"} <= set(after["packages"]) - set(before["packages"])


def test_the_packet_filter_is_open_again(node, removed) -> None:
    assert "moat" not in node.ok("nft", "list", "ruleset")


def test_the_hosts_own_sources_are_back(node, removed) -> None:
    assert node.ok("cat", "/etc/apt/sources.list") == "# the host own sources: none\n"
    assert not node.host.file("/etc/apt/moat-disabled").exists


def test_what_is_left_is_said(removed) -> None:
    _, _, said = removed
    words = " ".join(said.split())
    assert "Left: /opt/moat/control" in words
    assert "Drives of minio_drives outside of /var/lib/moat are left" in words
    assert "The data is gone" in words
