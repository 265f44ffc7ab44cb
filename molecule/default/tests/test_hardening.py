# SPDX-License-Identifier: Apache-2.0
"""Proves that the hardening of the units is in effect, not only written down.

What a unit file says can be ignored by systemd (a missing kernel feature, a container). So nothing here reads a unit
file: the kernel is asked about the running process, and things are tried from inside its namespaces.
"""

from __future__ import annotations

import os

import pytest

SYNC = "moat-config-sync.service"
#: The scenario debian12 runs these tests, too; Debian 12 has no Valkey.
DEBIAN12 = os.environ["MOLECULE_SCENARIO_NAME"] == "debian12"
COUNTERS = "redis-server.service" if DEBIAN12 else "valkey-server.service"
GATEWAYS = ("moat-gateway@1.service", "moat-gateway@2.service")
SERVICES = (*GATEWAYS, SYNC, "minio.service", COUNTERS)


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


#: Opens a path as a process of the unit would find it: below its own root folder, through its mounts. As root, whom
#: only the mounts stop, or as the unit's user. No program is run in there: some units could not even start a shell.
_TRY = """
import os, sys
pid, user, path, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY)
if user:
    os.setgroups([]), os.setresgid(user, user, user), os.setresuid(user, user, user)
try:
    os.open(path.lstrip("/"), flags, 0o600, dir_fd=root)
    print("opened")
except OSError as e:
    print(os.strerror(e.errno))
"""


def _open(node, unit: str, path: str, flags: int, *, user: int = 0) -> str:
    """Return ``opened``, or the error's text."""
    return node.ok("python3", "-c", _TRY, str(node.pid(unit)), str(user), path, str(flags)).strip()


def _user_of(node, unit: str) -> int:
    return int(node.proc_status(node.pid(unit))["Uid"].split()[0])


WRITE = os.O_WRONLY | os.O_CREAT
OWN = {
    **dict.fromkeys(GATEWAYS, ("/etc/moat/secrets/gateway/master_key",)),
    SYNC: ("/etc/moat/secrets/gateway/master_key", "/etc/moat/secrets/config-sync/store_reader_secret_key"),
}
#: The last one: the folder itself is not there for the unit.
REFUSED = ("Read-only file system", "Permission denied", "No such file or directory")


@pytest.mark.parametrize("unit", [*SERVICES, "nginx.service"])
@pytest.mark.parametrize("folder", ["/usr", "/usr/lib", "/etc/moat", "/opt/moat", "/opt/moat/releases", "/root"])
def test_the_file_system_is_read_only_for_the_unit(node, unit: str, folder: str) -> None:
    assert _open(node, unit, f"{folder}/x", WRITE) in REFUSED


def test_the_control_the_host_itself_can_write_there(node) -> None:
    for path in ("/usr/x", "/opt/moat/releases/x"):
        assert _open(node, "test-model.service", path, WRITE) == "opened"
        node.ok("rm", path)


@pytest.mark.parametrize("unit", SERVICES)
@pytest.mark.parametrize(
    "path",
    [
        "/etc/moat/site/secrets/master_key",
        "/etc/moat/site/secrets/site_key",
        "/etc/moat/secrets/gateway/master_key",
        "/etc/moat/secrets/config-sync/store_reader_secret_key",
        "/etc/moat/secrets/minio/store_root_password",
    ],
)
def test_a_service_reads_its_own_secrets_as_files_and_no_others(node, unit: str, path: str) -> None:
    found = _open(node, unit, path, os.O_RDONLY, user=_user_of(node, unit))
    if path in OWN.get(unit, ()):
        assert found == "opened"
        assert _open(node, unit, path, os.O_WRONLY) == "Read-only file system", "its mount can be written"
        assert _open(node, unit, f"{path}.new", WRITE) == "Read-only file system"
    else:
        assert found in ("Permission denied", "No such file or directory")
    # The control: for root of the host it is there.
    assert _open(node, "test-model.service", path, os.O_RDONLY) == "opened"


@pytest.mark.parametrize("unit", GATEWAYS)
def test_a_gateway_reads_revisions_and_cannot_write_them(node, unit: str) -> None:
    user = _user_of(node, unit)
    assert _open(node, unit, "/var/lib/moat/sync/current.json", os.O_RDONLY, user=user) == "opened"
    assert _open(node, unit, "/var/lib/moat/sync/current.json", os.O_WRONLY, user=user) == "Read-only file system"
    # The control: its owner, config-sync, writes there.
    assert _open(node, SYNC, "/var/lib/moat/sync/x", WRITE, user=user) == "opened"
    node.ok("rm", "/var/lib/moat/sync/x")


@pytest.mark.parametrize("unit", SERVICES)
def test_tmp_and_homes_are_not_the_hosts(node, unit: str) -> None:
    node.ok("touch", "/tmp/of-the-host", "/home/of-the-host")
    for path in ("/tmp/of-the-host", "/home/of-the-host"):
        assert _open(node, unit, path, os.O_RDONLY) != "opened"
        assert _open(node, "test-model.service", path, os.O_RDONLY) == "opened"
