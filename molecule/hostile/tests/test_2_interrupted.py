# SPDX-License-Identifier: Apache-2.0
"""Proves that an installation that is killed goes on with the same command: no undoing, no repair by hand.

The whole tree of processes is killed at once (SIGKILL, as when the machine loses power), in the middle of the steps
where a half-done state is worst: the copy of the release, Debian's package manager, the gateways' environment, and
the start of the gateways. After two of them the host starts anew, as after a power cut. Then the same command ends
well, a second one changes nothing, and a client is answered.
"""

from __future__ import annotations

import re
import time

import pytest

COMMAND = "exec sh /medium/install.sh --yes --key /test/release.pub >/run/install.log 2>&1"
#: Text of the log that shows the step has begun, how many seconds later the kill comes, and whether the host is
#: restarted after it: within Debian's package manager, and between the packages and the entrance.
POINTS = [
    pytest.param("stage the release", 0.4, False, marks=pytest.mark.long),
    ("Install the packages that are missing", 4.0, True),
    pytest.param("Make the environment of the release", 5.0, True, marks=pytest.mark.long),
    ("Bring the gateways to the release", 2.0, False),
]
#: Debian's services, and what they would listen on with their packages' own configuration.
DEBIANS = {"nginx.service": {80, 443}, "valkey-server.service": {6379}}


@pytest.mark.parametrize(("step", "after", "restart"), POINTS)
def test_it_is_killed(node, step: str, after: float, restart: bool) -> None:
    node.ok("systemd-run", "--quiet", "--collect", "--unit=install", "--service-type=exec", "sh", "-c", COMMAND)
    give_up = time.monotonic() + 1200
    while step not in (log := node.run("cat", "/run/install.log").stdout):
        assert time.monotonic() < give_up, f"{step!r} did not come:\n{log[-3000:]}"
        assert node.run("systemctl", "is-active", "install").returncode == 0, (
            f"it ended before {step!r}:\n{log[-3000:]}"
        )
        time.sleep(0.2)
    time.sleep(after)
    assert node.run("systemctl", "is-active", "install").returncode == 0, "it ended before it was killed"
    node.ok("systemctl", "kill", "--signal=KILL", "install")
    # Killed is not yet gone: systemd reaps the last process first, and a name that it still holds starts nothing new.
    give_up = time.monotonic() + 60
    while (state := node.show("install", "LoadState")["LoadState"]) != "not-found":
        assert time.monotonic() < give_up, f"the killed unit stays {state}"
        time.sleep(0.1)
    # The link that says what runs is not there before the end.
    assert node.run("test", "-e", "/var/lib/moat/installed.json").returncode != 0
    if restart:
        node.restart()
        only_ours_run(node)


def only_ours_run(node) -> None:
    """A package enables its service; what starts with the host has the addition that makes it Moat's."""
    for unit, ports in DEBIANS.items():
        if node.run("test", "-e", f"/etc/systemd/system/{unit}.d/moat.conf").returncode != 0:
            state = node.show(unit, "ActiveState", "LoadState")
            assert state["ActiveState"] == "inactive", (unit, state)
            assert not ports & {port for _, port, _ in node.listeners()}, unit


def test_the_same_command_goes_on_to_the_end(node) -> None:
    done = node.install()
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_a_second_run_changes_nothing(node) -> None:
    done = node.install()
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    recaps = re.findall(r"changed=(\d+)", done.stdout)
    assert recaps
    assert set(recaps) == {"0"}, done.stdout[-4000:]


def test_what_a_killed_run_had_placed_reaches_the_services_by_the_next_one(node) -> None:
    """Both runs are held up where the new unit is written and nothing is restarted yet, and are killed there."""
    change = {
        "minio": ("minio.service", "minio_memory_max=1100"),
        "valkey": ("valkey-server.service", "valkey_memory=96"),
    }
    before = {tag: node.pid(unit) for tag, (unit, _) in change.items()}
    # Programs can be started in /tmp of these hosts, and not in /run.
    node.ok("sh", "-c", "printf '#!/bin/sh\ntouch /run/held\nexec sleep 600\n' >/tmp/slow && chmod 755 /tmp/slow")
    node.ok("mount", "--bind", "/tmp/slow", "/usr/bin/diff")
    try:
        for tag, (_, value) in change.items():
            command = f"exec moat-site site --tags {tag} -e {value} >/run/change.log 2>&1"
            node.ok("systemd-run", "--quiet", "--collect", "--unit=change", "--service-type=exec", "sh", "-c", command)
            give_up = time.monotonic() + 600
            while node.run("rm", "/run/held").returncode != 0:
                assert time.monotonic() < give_up, node.ok("cat", "/run/change.log")[-3000:]
                time.sleep(0.2)
            node.ok("systemctl", "kill", "--signal=KILL", "change")
            while node.show("change", "LoadState")["LoadState"] != "not-found":
                assert time.monotonic() < give_up
                time.sleep(0.1)
    finally:
        node.ok("umount", "/usr/bin/diff")
    assert {tag: node.pid(unit) for tag, (unit, _) in change.items()} == before
    values = [word for _, value in change.values() for word in ("-e", value)]
    node.ok("moat-site", "site", "--tags", ",".join(change), *values)
    after = {tag: node.pid(unit) for tag, (unit, _) in change.items()}
    assert not set(after.values()) & set(before.values()), (before, after)


def test_a_client_is_answered(node, client_key: str) -> None:
    assert node.chat(client_key).status == 200
    assert node.chat(client_key, stream=True).done


def test_nothing_half_made_is_left(node) -> None:
    names = (".moat-install.*", "*.tmp", ".new*", "*.new.*")
    wanted = [word for name in names for word in ("-o", "-name", name)][1:]
    left = node.ok("find", "/opt", "-maxdepth", "3", "(", *wanted, ")")
    assert left == ""
    assert node.ok("dpkg", "--audit") == ""
    releases = node.ok("ls", "/opt/moat/releases").split()
    assert len(releases) == 1, releases
