# SPDX-License-Identifier: Apache-2.0
"""Proves that what cannot succeed is refused in phase 1, in the words of the page, with nothing changed.

The faults are real for the program under test: bytes of the medium are changed on an overlay of it, the disk is a
small file system, the port is held by another program, the clock is moved under every process by the C library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "install.md").read_text("utf-8")
OVERLAY = "/run/overlay"
MEDIUM = f"{OVERLAY}/medium"
#: What a refusal must leave as it was; /var/log holds the journal, which goes on by itself.
WATCHED = ["/etc", "/opt", "/usr", "/var/lib", "/root", "/home"]


def _state(node) -> str:
    """Return the path, type, mode, size and time of everything that counts."""
    leave = ["-path", "/var/lib/systemd", "-prune", "-o"]
    return node.ok("find", *WATCHED, "-xdev", *leave, "!", "-type", "d", "-printf", "%p %y %m %s %T@\\n")


@pytest.fixture(autouse=True)
def nothing_changes(node) -> Iterator[None]:
    """Hold the host's files before and after each refusal against each other."""
    before = set(_state(node).splitlines())
    assert len(before) > 1000, "there is nothing to compare: the check is looking in the wrong place"
    yield
    assert set(_state(node).splitlines()) ^ before == set()


@pytest.fixture
def medium(node) -> Iterator[str]:
    """A copy of the medium that can be damaged: an overlay whose changes live in memory."""
    node.ok("mkdir", "-p", f"{OVERLAY}/up", f"{OVERLAY}/work", MEDIUM)
    layers = f"lowerdir=/medium,upperdir={OVERLAY}/up,workdir={OVERLAY}/work"
    node.ok("mount", "-t", "overlay", "overlay", "-o", layers, MEDIUM)
    yield MEDIUM
    node.ok("umount", MEDIUM)
    node.ok("rm", "-rf", OVERLAY)


def _check(node, medium: str = "/medium", *, before: tuple[str, ...] = (), key: bool = True) -> tuple[int, str]:
    """Run phase 1 and return its code and everything it said."""
    options = ["--key", "/test/release.pub"] if key else []
    done = node.run(*before, "sh", f"{medium}/install.sh", "--check", *options)
    return done.returncode, done.stdout + done.stderr


def _promised(code: int) -> None:
    """The page has a row for this exit code."""
    rows = [line for line in PAGE.splitlines() if re.match(r"\| [0-9]", line)]
    ranges = [row.split("|")[1] for row in rows]
    numbers: set[int] = set()
    for text in ranges:
        for part in text.replace(" ", "").split(","):
            low, _, high = part.partition("to")
            numbers |= set(range(int(low), int(high or low) + 1))
    assert code in numbers, f"docs/install.md does not say what {code} means"


def _refused(result: tuple[int, str], code: int, *words: str, row: str = "") -> None:
    """The code and the words came, with what was found, expected and what to do, and the page names both."""
    assert result[0] == code, result[1][-3000:]
    for word in words:
        assert word in result[1], f"{word!r} is not in\n{result[1][-3000:]}"
    assert "do:" in result[1]
    _promised(code)
    if row:
        assert re.search(rf"^\|.*`{re.escape(row)}", PAGE, re.MULTILINE), f"docs/install.md has no row for {row}"


def test_the_control_the_host_as_it_is_passes(node) -> None:
    """Without it, a host where everything is refused for another reason would look fine."""
    code, said = _check(node)
    assert code == 0, said[-3000:]
    assert "nothing was changed" in said


def test_a_changed_byte_is_found(node, medium: str) -> None:
    node.ok("sh", "-c", f"printf X | dd of={medium}/debs/Packages bs=1 seek=100 conv=notrunc status=none")
    _refused(_check(node, medium), 6, "debs/Packages")


def test_a_missing_file_is_found(node, medium: str) -> None:
    node.ok("rm", f"{medium}/wheels/requirements.txt")
    _refused(_check(node, medium), 5, "wheels/requirements.txt")


def test_a_file_too_many_is_found(node, medium: str) -> None:
    node.ok("touch", f"{medium}/debs/extra.deb")
    _refused(_check(node, medium), 7, "debs/extra.deb")


def test_a_changed_manifest_has_no_signature(node, medium: str) -> None:
    node.ok("sed", "-i", "s/demo/site/", f"{medium}/manifest.json")
    _refused(_check(node, medium), 3, "the signature does not match", "do not use this medium")


def test_a_key_on_the_medium_does_not_count(node) -> None:
    result = _check(node, key=False)
    _refused(result, 4, "A key on the medium would prove")


def _clock(node, shift: str) -> tuple[str, ...]:
    """Return what to run a program with so that it and all that it starts see another time of day."""
    library = node.ok("sh", "-c", "ls /usr/lib/*/faketime/libfaketime.so.1").strip()
    return ("env", f"LD_PRELOAD={library}", f"FAKETIME={shift}", "FAKETIME_DONT_FAKE_MONOTONIC=1")


def test_all_that_is_in_the_way_is_shown_at_once(node) -> None:
    """A full disk, a deployment with containers, a taken port and a clock that is a year ahead, in one answer."""
    listen = "import socket, time; s = socket.create_server(('127.0.0.1', 8443)); time.sleep(600)"
    node.ok("systemd-run", "--quiet", "--collect", "--unit=squatter", "--service-type=exec", "python3", "-c", listen)
    # Enough for Ansible's temporary folder, too little for the release.
    node.ok("mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", "/opt")
    node.ok("sh", "-c", "mkdir /opt/moat && touch /opt/moat/compose.yaml")
    try:
        result = _check(node, before=_clock(node, "+370d"))
    finally:
        node.ok("umount", "/opt")
        node.ok("systemctl", "stop", "squatter")
    _refused(result, 20, "disk of /opt/moat", "free", row="disk of ...")
    _refused(result, 20, "other deployment", "/opt/moat/compose.yaml", row="other deployment")
    _refused(result, 20, "port 8443", "python3", "nginx_https_port", row="port N")
    _refused(result, 20, "if the clock is ahead", "date -u -s", row="clock")


def test_a_clock_that_is_a_year_behind_is_refused(node) -> None:
    _refused(_check(node, before=_clock(node, "-370d")), 20, "the clock is behind", "date -u -s", row="clock")


def test_no_room_even_for_the_tools_is_said(node) -> None:
    node.ok("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/opt")
    try:
        _refused(_check(node), 28, "the control environment cannot be made", "make room")
    finally:
        node.ok("umount", "/opt")


def test_another_architecture_is_refused(node) -> None:
    # The host's own word for its architecture is dpkg's.
    program = "#!/bin/sh\necho arm64\n"
    node.ok("sh", "-c", "mkdir /tmp/arm && cat > /tmp/arm/dpkg && chmod 755 /tmp/arm/dpkg", stdin=program)
    node.ok("mount", "--bind", "/tmp/arm/dpkg", "/usr/bin/dpkg")
    try:
        _refused(_check(node), 10, "arm64", "amd64")
    finally:
        node.ok("umount", "/usr/bin/dpkg")
        node.ok("rm", "-r", "/tmp/arm")


def test_another_release_of_debian_is_refused(node) -> None:
    node.ok("sh", "-c", "sed 's/^VERSION_ID=.*/VERSION_ID=\"12\"/' /usr/lib/os-release > /run/os-release")
    node.ok("mount", "--bind", "/run/os-release", "/usr/lib/os-release")
    try:
        _refused(_check(node), 10, "debian12-amd64", "debian13-amd64")
    finally:
        node.ok("umount", "/usr/lib/os-release")


def test_a_user_who_is_not_root_is_refused(node) -> None:
    result = _check(node, before=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))
    _refused(result, 2, "needs root")
