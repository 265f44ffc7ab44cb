# SPDX-License-Identifier: Apache-2.0
"""Proves the judgements of ``moat doctor`` on the facts of hosts that one does not have: each can pass and fail."""

from __future__ import annotations

import socket

import pytest

from moat.manifest import BundleInfo, FileEntry, ImageEntry, Manifest
from moat.site import checks
from moat.site.checks import Check, Need
from moat.site.doctor import port_is_taken
from moat.site.engine import Container, parse_version

GIB = 1024**3
NGINX = Container("moat/nginx:1", "moat", "nginx", (8443, 8080))
STRANGER = Container("web:1", "shop", "web", (8443,))


@pytest.mark.parametrize(
    ("check", "ok"),
    [
        (checks.architecture("x86_64", "debian13-amd64"), True),
        (checks.architecture("aarch64", "debian13-amd64"), False),
        (checks.architecture("aarch64", "debian13-arm64"), True),
        (checks.architecture("riscv64", None), False),
        (checks.processor(["sse2", "avx2"], "demo"), True),
        (checks.processor(["sse2", "avx"], "demo"), False),
        (checks.processor([], None), False),
        (checks.processor([], "site"), True),
        (checks.python((3, 11, 2)), True),
        (checks.python((3, 9, 2)), False),
        (checks.python((4, 0, 0)), True),
        (checks.engine("20.10.24+dfsg1"), True),
        (checks.engine("19.03.5"), False),
        (checks.engine("26.1.5"), True),
        (checks.engine("unknown"), False),
        (checks.engine(None, "no such socket"), False),
        (checks.compose("2.26.1-4"), True),
        (checks.compose("v2.20.0"), True),
        (checks.compose("1.29.2"), False),
        (checks.compose("2.3.4"), False),
        (checks.compose("2"), False),
        (checks.compose(None, "is not a docker command"), False),
        (checks.port(8443, "--https-port", False, []), True),
        (checks.port(8443, "--https-port", True, []), False),
        (checks.port(8443, "--https-port", True, [NGINX]), True),
        (checks.port(8443, "--https-port", True, [STRANGER]), False),
        (checks.port(8443, "--https-port", False, [STRANGER]), False),
        (checks.port(9000, "--https-port", False, [STRANGER]), True),
        (checks.memory(4 * GIB, "demo"), True),
        (checks.memory(int(2.4 * GIB), "site"), True),
        (checks.memory(2 * GIB, "site"), False),
        (checks.clock(1_760_000_000, 1_760_000_000), True),
        (checks.clock(1_760_000_000 - 3600, 1_760_000_000), True),
        (checks.clock(1_760_000_000 - 2 * 86400, 1_760_000_000), False),
        (checks.clock(0, None), False),
        (checks.clock(1_760_000_000, None), True),
        (checks.clock(1_760_000_000 + 11 * 366 * 86400, 1_760_000_000), False),
        (checks.clock(1e18, 1_760_000_000), False),
        (checks.clock_runs(0.05, 0.05), True),
        (checks.clock_runs(3600, 0.05), False),
        (checks.clock_runs(-5, 0.05), False),
        (checks.networks([("eth0", "0.0.0.0/0"), ("eth0", "10.0.0.0/8")]), True),
        (checks.networks([("moat-edge", "172.30.241.0/24")]), True),
        (checks.networks([("br-x", "172.30.0.0/16")]), False),
        (checks.networks([("vpn", "172.30.242.128/25")]), False),
    ],
    ids=str,
)
def test_each_check_can_pass_and_fail(check: Check, ok: bool) -> None:
    assert check.ok is ok
    assert check.found
    assert check.expected
    assert bool(check.hint) is not ok, "what to do is said exactly when something is to be done"


def _need(use: str, size: int, device: int, free: int) -> Need:
    return Need(use, "/" + use, size, device, free, f"move {use}")


def test_uses_on_one_file_system_are_added_up() -> None:
    both = [_need("images", 6 * GIB, 1, 10 * GIB), _need("deployment", 5 * GIB, 1, 10 * GIB)]
    apart = [both[0], _need("deployment", 5 * GIB, 2, 10 * GIB)]
    assert [c.ok for c in checks.disk(both)] == [False]
    assert [c.ok for c in checks.disk(apart)] == [True, True]
    (full,) = checks.disk(both)
    assert full.name == "disk /images"
    assert "move images" in full.hint
    assert "11.0 GiB (images 6.0 GiB in /images, deployment 5.0 GiB in /deployment)" in full.expected


def test_space_for_images_counts_what_is_there_already() -> None:
    def file(path: str, size: int) -> FileEntry:
        return FileEntry(path, size, "0" * 64, "image", "x", "1", "x", "x")

    manifest = Manifest(
        BundleInfo("1.0.0", "site", "debian13-amd64", 0),
        (file("images/a.tar", 100), file("images/b.tar", 300)),
        (
            ImageEntry("a", "moat/a:1", "sha256:a", "images/a.tar", 1000),
            ImageEntry("b", "moat/b:1", "sha256:b", "images/b.tar", 2000),
        ),
    )
    margin = checks.ENGINE_MARGIN
    assert checks.image_space(manifest, []) == 3000 + 300 + margin
    assert checks.image_space(manifest, ["sha256:b"]) == 1000 + 100 + margin
    assert checks.image_space(manifest, ["sha256:a", "sha256:b"]) == margin


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_listener_on_any_address_takes_the_port(family: socket.AddressFamily) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as s:
        try:
            s.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        except OSError:
            pytest.skip("this host has no IPv6")
        s.listen()
        number = s.getsockname()[1]
        assert port_is_taken(number)
    assert not port_is_taken(number)


def test_versions_are_read_from_what_programs_print() -> None:
    assert parse_version("20.10.24+dfsg1") == (20, 10, 24)
    assert parse_version(" v2.26.1-4\n") == (2, 26, 1)
    with pytest.raises(ValueError, match="not a version"):
        parse_version("dev")
