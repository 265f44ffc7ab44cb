# SPDX-License-Identifier: Apache-2.0
"""Proves that Compose itself accepts what `moat prepare` writes, for both profiles, with exactly the services meant."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.site.test_deployment import OPTIONS, prepare


@pytest.mark.parametrize(
    ("profile", "services"),
    [
        ("demo", {"nginx", "gateway-1", "gateway-2", "minio", "minio-init", "config-sync", "valkey", "model"}),
        ("site", {"nginx", "gateway-1", "gateway-2", "minio", "minio-init", "config-sync", "valkey"}),
    ],
)
def test_compose_reads_the_prepared_folder(tmp_path: Path, profile: str, services: set[str]) -> None:
    options = replace(OPTIONS, profile=profile, https_port=9443, bind="192.0.2.1")
    prepare(tmp_path / "moat", options)
    done = subprocess.run(
        ["docker", "compose", "--project-directory", str(tmp_path / "moat"), "config", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not set" not in done.stderr  # a variable that nobody writes
    document = json.loads(done.stdout)
    assert set(document["services"]) == services
    assert document["name"] == "moat"
    published = {(p["host_ip"], p["published"], p["target"]) for p in document["services"]["nginx"]["ports"]}
    assert published == {("192.0.2.1", "9443", 8443), ("192.0.2.1", "8080", 8080)}
    for name, service in document["services"].items():
        assert ":0.1.0-" in service["image"], name
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), volume
