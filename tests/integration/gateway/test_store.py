# SPDX-License-Identifier: Apache-2.0
"""Proves `moat-gateway store` against a real MinIO, the program of the bundle: made, versioned, idempotent."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.gateway.harness import Site, free_port
from tests.integration.gateway.isolated import stop_process
from tests.integration.hotreload.traffic import Busy

from moat.build.cache import Cache


@dataclass
class Store:
    """A MinIO process of our own on the loopback."""

    folder: Path
    port: int
    access: str
    secret: str
    program: Path

    def start(self) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "MINIO_ROOT_USER": self.access,
            "MINIO_ROOT_PASSWORD": self.secret, "MINIO_UPDATE": "off", "MINIO_CALLHOME_ENABLE": "off",
            "MINIO_BROWSER": "off",
        }  # fmt: skip
        argv = [
            str(self.program),
            "server",
            "--quiet",
            "--address",
            f"127.0.0.1:{self.port}",
            str(self.folder / "data"),
        ]
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(argv, env=environment, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    built = sorted(Cache().root.glob("built/program-minio-*/minio"), key=lambda p: p.stat().st_mtime)
    if not built:
        pytest.skip("no MinIO is built yet; `make demo` builds it")
    return Store(tmp_path_factory.mktemp("minio"), free_port(), secrets.token_hex(8), secrets.token_hex(20), built[-1])


@pytest.fixture
def configured(site: Site, store: Store) -> Site:
    access = site.write("secrets/store_access_key", store.access + "\n")
    secret = site.write("secrets/store_secret_key", store.secret + "\n")
    site.extra |= {
        "MOAT_STORE_ENDPOINT": f"http://127.0.0.1:{store.port}",
        "MOAT_STORE_ACCESS_KEY_FILE": str(access),
        "MOAT_STORE_SECRET_KEY_FILE": str(secret),
        "MOAT_STORE_TIMEOUT": "60",
    }
    return site


@pytest.fixture(scope="module")
def running(store: Store) -> Iterator[subprocess.Popen[bytes]]:
    process = store.start()
    try:
        yield process
    finally:
        stop_process(process)


def test_a_store_that_does_not_answer_is_said_in_time(configured: Site) -> None:
    # Nobody listens there, whether the store of the others runs already or not.
    configured.extra |= {"MOAT_STORE_TIMEOUT": "2", "MOAT_STORE_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with Busy() as busy:
        begun = time.monotonic()
        done = configured.command("store", "init")
        assert time.monotonic() - begun < 20 * busy.since(begun)
    assert done.returncode == 17
    assert "cannot reach the store" in done.stderr


def test_init_waits_makes_turns_versioning_on_and_can_be_repeated(
    configured: Site, running: subprocess.Popen[bytes], store: Store
) -> None:
    first = configured.command("store", "init", "--json")
    assert first.returncode == 0, first.stderr
    value = json.loads(first.stdout)
    assert (value["ok"], value["created"], value["versioning_enabled"]) == (True, True, True)
    again = configured.command("store", "init")
    assert again.returncode == 0
    assert "was there, versioning on" in again.stdout
    assert configured.command("store", "check").returncode == 0
    assert configured.command("store", "check", "--bucket", "another-one").returncode == 17
    assert store.secret not in first.stdout + first.stderr + again.stdout


def test_wrong_credentials_are_said_at_once_and_not_shown(
    configured: Site, running: subprocess.Popen[bytes], store: Store
) -> None:
    configured.write("secrets/store_secret_key", "wrong-secret-canary-0123456789")
    with Busy() as busy:
        begun = time.monotonic()
        done = configured.command("store", "init")
        assert time.monotonic() - begun < 15 * busy.since(begun)
    assert done.returncode == 17
    assert "check the two key files" in done.stderr
    assert "canary" not in done.stdout + done.stderr
    assert store.access not in done.stdout + done.stderr
