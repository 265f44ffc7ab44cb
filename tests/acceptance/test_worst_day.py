# SPDX-License-Identifier: Apache-2.0
"""Proves what the operator reads on the worst day, and that doing what it says mends it.

A missing image, a port in use, a full disk, a wrong clock, a lost or opened secret, a firewall that somebody flushed:
each is really made, on the running stack or beside it, and mended again. docs/compose.md (Worst day) shows these
messages; the words asserted here are those of that page.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.stack import ROOT, Stack, run

PAGE = (ROOT / "docs/compose.md").read_text("utf-8") if (ROOT / "docs/compose.md").exists() else ""


def trust(stack: Stack) -> list[str]:
    return [str(stack.bundle), "--key", stack.public_key, "--state-dir", str(stack.folder / "state")]


def env_of(stack: Stack) -> dict[str, str]:
    lines = (stack.folder / ".env").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def up(stack: Stack) -> subprocess.CompletedProcess[str]:
    return stack.compose("up", "--detach", "--wait", "--wait-timeout", "120", "--pull", "never", check=False)


def documented(words: str) -> None:
    assert " ".join(words.split()) in " ".join(PAGE.split()), f"docs/compose.md does not show: {words}"


@pytest.fixture(autouse=True)
def healthy_afterwards(stack: Stack) -> Iterator[None]:
    """Every test leaves the stack as it was, or the next one says so."""
    yield
    assert up(stack).returncode == 0


def test_a_missing_image_is_named_nothing_is_pulled_and_load_mends_it(stack: Stack) -> None:
    reference = env_of(stack)["MOAT_IMAGE_VALKEY"]
    running = stack.inspect("valkey")["State"]["StartedAt"]
    run("docker", "image", "rm", "--force", reference)  # the name goes; the container keeps running
    try:
        started = time.monotonic()
        failed = up(stack)
        assert failed.returncode != 0
        assert f"no such image: {reference}".lower() in failed.stderr.lower()
        assert time.monotonic() - started < 30  # no attempt to reach a registry that is not there
        documented("no such image: moat/valkey:")
        assert stack.inspect("valkey")["State"]["StartedAt"] == running
        refused = stack.moat("prepare", *trust(stack), "--dir", str(stack.folder))
        assert refused.returncode == 22
        assert f"the engine does not have the image {reference}" in refused.stderr
        assert f"run `moat load {stack.bundle}` first" in refused.stderr
        documented("the engine does not have the image moat/valkey:")
    finally:
        loaded = stack.moat("load", *trust(stack))
    assert loaded.returncode == 0, loaded.stderr
    assert "1 images loaded" in loaded.stdout
    assert up(stack).returncode == 0


def test_a_port_in_use_is_named_by_doctor_and_by_the_engine(stack: Stack) -> None:
    port = int(env_of(stack)["MOAT_HTTPS_PORT"])
    stack.compose("stop", "nginx")
    with socket.create_server(("127.0.0.1", port)):
        doctor = stack.moat("doctor", "--https-port", str(port), "--dir", str(stack.folder))
        assert doctor.returncode == 20
        assert f"port {port}: held by another program" in doctor.stderr
        assert f"ss -ltnp 'sport = :{port}'" in doctor.stderr
        failed = up(stack)
        assert failed.returncode != 0
        assert re.search(rf"{port}: bind: address already in use|port is already allocated", failed.stderr)
        documented("port 8443: held by another program")
        documented("bind: address already in use")
    assert up(stack).returncode == 0
    with stack.client() as client:
        assert client.get("/v1/models").status_code == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB."""
    run("mount", "-t", "tmpfs", "-o", "size=96k", "moat-test", str(tmp_path))
    yield tmp_path
    run("umount", str(tmp_path))


def test_a_full_disk_is_told_as_such_and_leaves_no_half_files(stack: Stack, small_disk: Path) -> None:
    folder = small_disk / "moat"
    doctor = stack.moat("doctor", str(stack.bundle), "--key", stack.public_key, "--dir", str(folder))
    assert doctor.returncode == 20
    assert f"disk {folder}:" in doctor.stderr
    assert "make room there" in doctor.stderr
    refused = stack.moat("prepare", *trust(stack), "--dir", str(folder))
    assert refused.returncode == 22
    assert "found:    the disk is full" in refused.stderr
    assert "do:       make room on this file system" in refused.stderr
    documented("found: the disk is full")
    assert [p for p in folder.rglob("*") if p.name.endswith(".tmp")] == []
    assert not (folder / "state/prepared.json").exists()
    # With room, the same command goes on from there.
    run("mount", "-o", "remount,size=16m", str(small_disk))
    again = stack.moat("prepare", *trust(stack), "--dir", str(folder), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["changed"] is True
    third = stack.moat("prepare", *trust(stack), "--dir", str(folder), "--json")
    assert json.loads(third.stdout)["changed"] is False


WRONG_CLOCK = """
import runpy, sys, time
real, off = time.time, float(sys.argv[1])
time.time = lambda: real() + off
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("years", "code"), [(-7, 20), (+30, 20), (0, 0)])
def test_a_wrong_clock_is_found_by_doctor(stack: Stack, years: int, code: int) -> None:
    ports = ["--https-port", env_of(stack)["MOAT_HTTPS_PORT"], "--http-port", env_of(stack)["MOAT_HTTP_PORT"]]
    pyz = str(stack.folder / "moat.pyz")
    argv = [sys.executable, "-c", WRONG_CLOCK, str(years * 365 * 86400), pyz, "doctor", str(stack.bundle)]
    done = run(*argv, "--key", stack.public_key, "--dir", str(stack.folder), *ports, check=False)
    assert done.returncode == code, done.stderr
    assert ("error: clock: " in done.stderr) == (code == 20)
    if code:
        assert "date -u -s" in done.stderr
        documented("do: set it: date -u -s")


def test_a_client_with_a_wrong_clock_reads_that_the_certificate_does_not_count_yet(stack: Stack) -> None:
    at = str(int(time.time()) - 7 * 365 * 86400)
    cert = str(stack.folder / "tls/cert.pem")
    wrong = run("openssl", "verify", "-attime", at, "-CAfile", str(stack.ca_file), cert, check=False)
    assert wrong.returncode != 0
    assert "not yet valid" in wrong.stderr
    assert run("openssl", "verify", "-CAfile", str(stack.ca_file), cert).returncode == 0  # control
    documented("certificate is not yet valid")


def test_a_secret_that_the_gateway_cannot_read_is_named_and_prepare_mends_its_owner(stack: Stack) -> None:
    path = stack.folder / "secrets/gateway/master_key"
    os.chown(path, 0, 0)
    try:
        refused = stack.compose("run", "--rm", "--no-deps", "-T", "admin", "check", check=False)
        assert refused.returncode == 5
        assert "refused (unreadable-secret): /run/secrets/master_key: the secret cannot be read" in refused.stderr
        documented("refused (unreadable-secret): /run/secrets/master_key")
    finally:
        mended = stack.moat("prepare", *trust(stack), "--dir", str(stack.folder), "--json")
    assert json.loads(mended.stdout)["changes"] == [
        "set owner and mode secrets/gateway/master_key (secret, mode 0600, owner 10102)"
    ]
    assert stack.compose("run", "--rm", "--no-deps", "-T", "admin", "check").returncode == 0


def test_a_configuration_that_names_an_outside_endpoint_is_refused_before_it_serves(
    stack: Stack, tmp_path: Path
) -> None:
    text = (stack.config_dir / "config.yaml").read_text("utf-8")
    trial = tmp_path / "config.yaml"
    trial.write_text(text.replace("//model:8081", "//198.51.100.7:443"), "utf-8")
    refused = stack.gateway("check", "--config", str(trial), check=False)
    assert refused.returncode == 8
    assert "refused (endpoint-refused)" in refused.stderr
    assert "198.51.100.7:443" in refused.stderr
    documented("refused (endpoint-refused)")


def test_a_site_without_a_model_says_so(stack: Stack, tmp_path: Path) -> None:
    """What the profile `site` looks like right after `prepare`."""
    folder = tmp_path / "site"
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)  # pytest's folders are for root alone; the container's user comes through them
    done = stack.moat("prepare", *trust(stack), "--dir", str(folder), "--profile", "site")
    assert done.returncode == 0, done.stderr
    argv = ["docker", "compose", "--project-directory", str(folder), "--project-name", "moat-acceptance-site"]
    refused = run(*argv, "run", "--rm", "--no-deps", "-T", "admin", "check", check=False)
    assert refused.returncode == 9, refused.stderr
    assert "refused (no-models)" in refused.stderr
    documented("refused (no-models)")


def test_a_flushed_firewall_is_noticed_and_mended(stack: Stack) -> None:
    run("iptables", "-F", "MOAT-INPUT")
    try:
        open_ = stack.moat("firewall", "status")
        assert open_.returncode == 23
        assert "missing: the rules of MOAT-INPUT" in open_.stdout
        assert "firewall: OPEN; run `moat firewall apply`" in open_.stdout
        documented("firewall: OPEN; run `moat firewall apply`")
    finally:
        assert stack.moat("firewall", "apply").returncode == 0
    assert stack.moat("firewall", "status").returncode == 0


def test_without_any_gateway_clients_read_why_and_when_to_try_again(stack: Stack) -> None:
    stack.compose("stop", "gateway-1", "gateway-2")
    with stack.client() as client:
        answer = client.get("/v1/models")
    assert answer.status_code in (502, 504)
    assert answer.json()["error"]["code"] in ("gateway_unreachable", "gateway_timeout")
    assert answer.headers["retry-after"] == "1"
    documented("No gateway could be reached")
