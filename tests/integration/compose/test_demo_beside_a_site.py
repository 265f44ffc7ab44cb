# SPDX-License-Identifier: Apache-2.0
"""Proves that the demo neither starts over nor takes down a deployment of Moat that belongs to another folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from moat.console import Console
from moat.demo.down import check_ours, down
from moat.demo.up import up
from moat.errors import DemoFailed


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def other_deployment() -> Iterator[str]:
    """A container (never started) that says it belongs to the project `moat` in another folder."""
    images = docker("image", "ls", "--quiet", "moat/valkey").split()
    if not images:
        pytest.skip("the engine has no image moat/valkey: run `make demo` first")
    labels = {"project": "moat", "project.working_dir": "/opt/moat-of-somebody", "oneoff": "True", "service": "valkey"}
    argv = [w for k, v in labels.items() for w in ("--label", f"com.docker.compose.{k}={v}")]
    made = docker("create", "--network", "none", *argv, images[0])
    yield made
    docker("rm", made)


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
