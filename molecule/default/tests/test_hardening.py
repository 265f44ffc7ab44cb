# SPDX-License-Identifier: Apache-2.0
"""Proves that the hardening of the units is in effect, not only written down.

What a unit file says can be ignored by systemd (a missing kernel feature, a container). So nothing here reads a unit
file: the kernel is asked about the running process, and things are tried from inside its namespaces.
"""

from __future__ import annotations

import pytest

SERVICES = ("moat-gateway@1.service", "moat-gateway@2.service", "minio.service", "valkey-server.service")


@pytest.mark.parametrize("unit", SERVICES)
def test_the_process_has_no_privilege_and_cannot_gain_one(node, unit: str) -> None:
    status = node.proc_status(node.pid(unit))
    assert status["NoNewPrivs"] == "1"
    assert {k: int(status[k], 16) for k in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == dict.fromkeys(
        ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"), 0
    )
    assert status["Seccomp"] == "2"
    assert status["Uid"].split()[0] != "0"


def test_the_control_a_process_without_a_unit_has_privileges(node) -> None:
    """The same questions on process 1: where they would read the same, the test above would prove nothing."""
    status = node.proc_status(1)
    assert int(status["CapEff"], 16) != 0
    assert status["NoNewPrivs"] == "0"


def test_nginx_workers_have_no_privilege(node) -> None:
    master = node.pid("nginx.service")
    workers = node.ok("ps", "-o", "pid=", "--ppid", str(master)).split()
    assert workers
    for pid in workers:
        status = node.proc_status(int(pid))
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == 0
        assert status["Seccomp"] == "2"
        assert status["Uid"].split()[0] != "0"


def _inside(node, unit: str, script: str) -> tuple[int, str]:
    """Run a script as root in the mount namespace of a unit's process: root is stopped by the mounts alone."""
    done = node.run("nsenter", "--target", str(node.pid(unit)), "--mount", "sh", "-c", script)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unit", [*SERVICES, "nginx.service"])
@pytest.mark.parametrize("path", ["/usr/x", "/etc/moat/x", "/opt/moat/x", "/boot/x"])
def test_the_file_system_is_read_only_for_the_unit(node, unit: str, path: str) -> None:
    code, error = _inside(node, unit, f": > {path}")
    assert code != 0, f"{unit} can write {path}"
    assert "Read-only" in error or "Permission denied" in error or "No such file" in error


def test_the_control_the_host_itself_can_write_there(node) -> None:
    assert node.run("sh", "-c", ": > /usr/x && rm /usr/x").returncode == 0


@pytest.mark.parametrize("unit", SERVICES)
def test_the_unit_does_not_see_the_sites_secrets(node, unit: str) -> None:
    code, _ = _inside(node, unit, "ls /etc/moat/site/secrets/* >/dev/null")
    assert code != 0, f"{unit} sees the site's secrets"


@pytest.mark.parametrize("unit", SERVICES)
def test_the_unit_does_not_see_the_homes(node, unit: str) -> None:
    code, _ = _inside(node, unit, 'test -n "$(ls -A /root 2>/dev/null)"')
    assert code != 0, f"{unit} sees /root"


@pytest.mark.parametrize("unit", SERVICES)
def test_tmp_is_the_units_own(node, unit: str) -> None:
    node.ok("touch", "/tmp/of-the-host")
    code, _ = _inside(node, unit, "test -e /tmp/of-the-host")
    assert code != 0
