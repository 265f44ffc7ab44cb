# SPDX-License-Identifier: Apache-2.0
"""Proves that the demo neither starts over nor takes down a deployment of Moat that belongs to another folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moat.console import Console
from moat.demo.down import check_ours, down, remove_lost
from moat.demo.steps import Steps
from moat.demo.up import up
from moat.errors import DemoFailed


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def other_deployment() -> Iterator[str]:
    """A container (never started) that says it belongs to the project `moat` in another folder."""
    made = of_folder("/opt/moat-of-somebody")
    yield made
    docker("rm", made)


def of_folder(folder: str, *more: str) -> str:
    images = docker("image", "ls", "--quiet", "moat/valkey").split()
    if not images:
        pytest.skip("the engine has no image moat/valkey: run `make demo` first")
    labels = {"project": "moat", "project.working_dir": folder, "oneoff": "True", "service": "valkey"}
    argv = [w for k, v in labels.items() for w in ("--label", f"com.docker.compose.{k}={v}")]
    return docker("create", "--network", "none", *more, *argv, images[0])


def test_the_demo_leaves_another_deployment_alone(other_deployment: str) -> None:
    with pytest.raises(DemoFailed) as refused:
        check_ours()
    # A demo of another checkout may run on this machine as well, and is named then, too.
    assert "/opt/moat-of-somebody" in refused.value.found.split(", ")
    with pytest.raises(DemoFailed, match="another deployment"):
        up(Console(quiet=True), https_port=8443, http_port=8080)
    with pytest.raises(DemoFailed, match="another deployment"):
        down(Console(quiet=True))
    assert docker("inspect", "--format", "{{.Id}}", other_deployment) == other_deployment


def test_a_demo_that_nobody_can_take_down_any_more_is_removed(other_deployment: str, tmp_path: Path) -> None:
    """A checkout that was deleted, or a test run that was killed, must not stand in the way for ever."""
    (tmp_path / "there" / ".moat" / "deploy").mkdir(parents=True)
    ours = docker("ps", "--quiet", "--no-trunc", "--filter", "label=com.docker.compose.project=moat").split()
    its, kept = (docker("volume", "create", "--label", "com.docker.compose.project=moat") for _ in range(2))
    lost = of_folder(f"{tmp_path}/gone/.moat/deploy", "--volume", f"{its}:/data")
    there = of_folder(f"{tmp_path}/there/.moat/deploy")
    try:
        remove_lost(Steps(Console(quiet=True)))
        left = docker("ps", "--all", "--quiet", "--no-trunc").split()
        assert lost not in left
        assert {there, other_deployment, *ours} <= set(left)
        volumes = docker("volume", "ls", "--quiet").split()
        assert its not in volumes
        assert kept in volumes  # a site's, stopped, without a container
    finally:
        docker("rm", "--force", lost, there)
        docker("volume", "rm", "--force", its, kept)
