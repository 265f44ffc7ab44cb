# SPDX-License-Identifier: Apache-2.0
"""Proves the hardening on the running containers, as the engine and the kernel show it, for every service.

The engine's view says what was asked for; `/proc` says what the process really has.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from tests.acceptance.stack import RUNNING, SERVICES, Stack, run

#: Volumes; everything else that is writable is in memory, and the container's alone.
WRITABLE = {
    "minio": {"/data"},
    "config-sync": {"/var/lib/moat/sync", "/run/moat-reports"},
    "gateway-1": {"/run/moat", "/run/moat-reports"},
    "gateway-2": {"/run/moat", "/run/moat-reports"},
}
NETWORKS = {name: {"moat-core"} for name in SERVICES} | {"nginx": {"moat-edge", "moat-core"}}


@pytest.mark.parametrize("service", SERVICES)
def test_the_engine_was_asked_for_the_hardening(stack: Stack, service: str) -> None:
    c = stack.inspect(service)
    host = c["HostConfig"]
    assert c["Config"]["User"] == f"{SERVICES[service]}:{SERVICES[service]}"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Privileged"] is False
    assert host["PidMode"] == ""
    assert host["IpcMode"] in ("private", "shareable")
    assert not host["Devices"]
    assert host["Memory"] > 0
    assert host["MemorySwap"] == host["Memory"]
    assert host["NanoCpus"] > 0
    assert 0 < host["PidsLimit"] <= 256
    assert host["LogConfig"]["Config"]["max-size"] == "10m"
    assert set(c["NetworkSettings"]["Networks"]) == NETWORKS[service]
    writable = {m["Destination"] for m in c["Mounts"] if m["RW"]}
    assert writable == WRITABLE.get(service, set())
    for mount in c["Mounts"]:
        inside = Path(mount["Source"]).is_relative_to(stack.folder) if mount["Type"] == "bind" else True
        assert inside, mount
        assert "docker.sock" not in mount["Source"]


@pytest.mark.parametrize("service", RUNNING)
def test_the_kernel_gives_the_process_nothing_more(stack: Stack, service: str) -> None:
    pid = stack.inspect(service)["State"]["Pid"]
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split()) == {str(SERVICES[service])}
    assert set(status["Gid"].split()) == {str(SERVICES[service])}
    for capability in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[capability], 16) == 0, capability
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"^Max core file size\s+0\s+0\s", limits, re.MULTILINE)
    root = next(line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines() if line.split()[1] == "/")
    assert "ro" in root[3].split(",")
    # A check that can fail: this process of ours, on the host, has capabilities.
    own = re.search(r"CapEff:\t(\w+)", Path("/proc/self/status").read_text())
    assert own is not None
    assert int(own[1], 16) != 0


@pytest.mark.parametrize("service", RUNNING)
def test_there_is_no_shell_in_the_container(stack: Stack, service: str) -> None:
    for shell in ("sh", "/bin/sh", "/bin/bash", "busybox", "/usr/bin/dash"):
        done = run("docker", "exec", stack.container(service), shell, "-c", "true", check=False)
        assert done.returncode != 0, shell


@pytest.mark.parametrize("service", RUNNING)
def test_the_health_check_prints_one_readable_line(stack: Stack, service: str) -> None:
    health = stack.inspect(service)["State"]["Health"]
    assert health["Status"] == "healthy"
    lines = health["Log"][-1]["Output"].strip().splitlines()
    assert len(lines) == 1
    assert re.search(r"healthy|ready|PONG", lines[0])


def test_an_unhealthy_service_says_why_in_one_line(stack: Stack) -> None:
    # The same checks, asked of a port where nobody listens.
    for service, check in (
        ("nginx", ["/usr/bin/moat-health", "127.0.0.1", "9", "/"]),
        ("gateway-1", ["python3", "-IS", "/opt/moat/health/ready.py", "9", "/"]),
    ):
        done = run("docker", "exec", stack.container(service), *check, check=False)
        assert done.returncode == 1
        assert re.fullmatch(r"(unhealthy|not ready): 127\.0\.0\.1:9/?: .*refused.*\n", done.stdout), done.stdout


# --- secrets ---


def test_every_secret_has_mode_0600_and_its_services_user(stack: Stack) -> None:
    owners = {
        "gateway": 10102, "minio": 10103, "minio-init": 10102, "valkey": 10104, "config-sync": 10102, "admin": 10102,
    }  # fmt: skip
    found = [p for p in (stack.folder / "secrets").rglob("*") if p.is_file()]
    assert {p.parent.name for p in found} == set(owners)
    for path in [*found, stack.folder / "tls/key.pem", stack.key_file]:
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == 0o600, path
        if path in found:
            assert status.st_uid == owners[path.parent.name], path
    assert stat.S_IMODE((stack.folder / "secrets").stat().st_mode) == 0o700
    assert (stack.folder / "tls/key.pem").stat().st_uid == 10101


def test_a_service_sees_its_own_secrets_and_no_others(stack: Stack) -> None:
    for service in RUNNING:
        sources = {m["Source"] for m in stack.inspect(service)["Mounts"] if m["Destination"] == "/run/secrets"}
        # config-sync checks with the gateways' secrets that they can resolve every reference.
        own = {"nginx": "tls", "model": None, "config-sync": "secrets/gateway"}
        mine = own.get(service, f"secrets/{service.partition('-')[0]}")
        assert sources == (set() if mine is None else {str(stack.folder / mine)})
        stores = {m["Source"] for m in stack.inspect(service)["Mounts"] if m["Destination"] == "/run/store-secrets"}
        assert stores == ({str(stack.folder / "secrets/config-sync")} if service == "config-sync" else set())


def test_the_secret_site_key_is_in_no_container_that_stays(stack: Stack) -> None:
    folder = str(stack.folder / "secrets/admin")
    for container in run("docker", "ps", "--quiet").stdout.split():
        mounts = json.loads(run("docker", "inspect", "--format", "{{json .Mounts}}", container).stdout)
        assert not [m for m in mounts if folder in m["Source"] or m["Source"] in (str(stack.folder), "/")], mounts
    admin = json.loads(stack.compose("--profile", "tools", "config", "--format", "json").stdout)["services"]["admin"]
    assert [v for v in admin["volumes"] if v.get("source") == folder]  # the one place where it is
    assert admin["restart"] == "no"


def everything_that_shows(stack: Stack) -> dict[str, str]:
    """Return all places where a secret must not be: logs, the engine's view, process arguments and environments."""
    shown: dict[str, str] = {}
    for service in SERVICES:
        shown[f"log of {service}"] = stack.logs(service)
        shown[f"inspect of {service}"] = json.dumps(stack.inspect(service))
    for service in RUNNING:
        top = run("docker", "top", stack.container(service), "-eo", "pid").stdout.split()[1:]
        for pid in top:
            for name in ("cmdline", "environ"):
                shown[f"{name} of {service}/{pid}"] = (
                    Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace")
                )
    shown["compose config"] = stack.compose("config").stdout
    for path in (stack.folder / ".env", stack.folder / "compose.yaml", *(stack.folder / "state").iterdir()):
        shown[str(path)] = path.read_text("utf-8")
    for path in stack.config_dir.iterdir():
        shown[str(path)] = path.read_text("utf-8")
    return shown


def test_no_secret_is_in_logs_inspect_arguments_or_environments(stack: Stack) -> None:
    master = (stack.folder / "secrets/gateway/master_key").read_text("ascii").strip()
    with stack.client() as client, stack.client(master) as admin, stack.client("sk-moat-wrong-" + "w" * 40) as wrong:
        body = {"model": stack.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert admin.get("/v1/models").status_code == 200
        assert wrong.get("/v1/models").status_code == 401
    shown = everything_that_shows(stack)
    secrets = stack.secrets()
    assert len(secrets) >= 7
    found = [f"{name} in {place}" for name, value in secrets.items() for place, text in shown.items() if value in text]
    assert found == []
    assert [place for place, text in shown.items() if "sk-moat-wrong-" in text] == []
    # The scan can find things: the model's name, for one, is in the configuration and in the gateways' logs.
    assert sum(stack.model in text for text in shown.values()) >= 2


def test_no_secret_is_in_the_bundle(stack: Stack) -> None:
    values = [v.encode() for v in stack.secrets().values()]
    for path in (stack.bundle / "compose").rglob("*"):
        if path.is_file():
            assert not any(v in path.read_bytes() for v in values), path
    assert os.access(stack.bundle / "manifest.json", os.R_OK)


# --- the stores ---


def test_valkey_lets_nobody_in_without_the_password(stack: Stack) -> None:
    def cli(*words: str) -> str:
        return run("docker", "exec", "-i", stack.container("valkey"), "valkey-cli", *words, check=False).stdout.strip()

    assert cli("ping") == "PONG"
    for words in (("get", "x"), ("set", "x", "1"), ("config", "get", "*"), ("keys", "*"), ("acl", "list"), ("info",)):
        assert cli(*words).startswith("NOPERM"), words
    password = (stack.folder / "secrets/gateway/valkey_password").read_text("ascii").strip()
    cid = stack.container("valkey")

    def talk(commands: str) -> list[str]:
        argv = ["docker", "exec", "-i", cid, "valkey-cli"]
        done = subprocess.run(argv, input=commands, capture_output=True, text=True, check=True)
        return done.stdout.split("\n")

    assert talk("AUTH moat wrong\nget x\n")[0].startswith("WRONGPASS")
    answers = talk(f"AUTH moat {password}\nset acceptance 1 ex 5\nget acceptance\nconfig get maxmemory\n")
    assert answers[:3] == ["OK", "OK", "1"]
    assert answers[3].startswith("NOPERM")  # counters yes, the server's own settings no


def test_the_bucket_is_there_and_versioned_and_the_store_is_closed_to_strangers(stack: Stack) -> None:
    again = stack.compose("run", "--rm", "--no-deps", "-T", "minio-init", "store", "check", "--json")
    state = json.loads(again.stdout)
    assert (state["bucket"], state["created"], state["versioning_enabled"]) == ("moat-config", False, False)

    def anonymous() -> bytes:
        with socket.create_connection(("172.30.242.13", 9000), 5) as s:
            s.sendall(b"GET /moat-config HTTP/1.0\r\nHost: minio\r\n\r\n")
            return s.makefile("rb").readline()

    assert b" 403 " in stack.inside("gateway-1", anonymous)
