# SPDX-License-Identifier: Apache-2.0
"""Proves the sidecar on a real MinIO: it follows, outlives the store, takes new credentials, waits for an archive."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.hotreload.craft import Bucket, archive, pointer
from tests.integration.hotreload.programs import Minio
from tests.integration.sync.drive import Drive, content
from tests.integration.sync.sidecar import Node, Sidecar


@dataclass
class Site:
    """A MinIO, its bucket, and a config-sync that reads it."""

    minio: Minio
    bucket: Bucket
    sidecar: Sidecar

    @property
    def node(self) -> Node:
        return self.sidecar.node

    def push(self, *, archive_too: bool = True) -> tuple[int, bytes]:
        drive = self.node.drive
        drive.last += 1
        raw = archive(content(f"m{drive.last}"), drive.last, drive.key)
        if archive_too:
            self.bucket.put(f"revisions/{drive.last}", raw)
        self.bucket.put("current", pointer(drive.last, raw))
        return drive.last, raw

    def wait_lost(self) -> None:
        self.sidecar.wait("the loss is told", lambda: self.sidecar.state().source.reachable is False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("s3")
    minio = Minio(folder)
    minio.start()
    node = Node(folder / "node", python, Drive(folder / "unused"))
    for name, value in (("store_access_key", minio.access), ("store_secret_key", minio.secret)):
        (node.folder / "secrets" / name).write_text(value)
    node.extra = {
        "MOAT_SOURCE_DIR": "",
        "MOAT_STORE_ENDPOINT": f"127.0.0.1:{minio.port}",
        "MOAT_STORE_ACCESS_KEY_FILE": str(node.folder / "secrets" / "store_access_key"),
        "MOAT_STORE_SECRET_KEY_FILE": str(node.folder / "secrets" / "store_secret_key"),
    }
    try:
        argv = [str(python), "-m", "moat_gateway", "store", "init"]
        subprocess.run(argv, env=node.environment, check=True, capture_output=True, timeout=60)
        with node.start() as sidecar:
            yield Site(minio, Bucket(minio.port, minio.access, minio.secret), sidecar)
            assert sidecar.stop() == 0
            assert sidecar.said("defect") == []
    finally:
        minio.kill()


def test_it_follows_and_its_report_is_in_the_status_bucket(site: Site) -> None:
    for _ in range(2):
        number, _ = site.push()
        site.sidecar.wait_current(number)
    status = Bucket(site.minio.port, site.minio.access, site.minio.secret, "moat-status")
    text = f'"revision": {number}'.encode()
    site.sidecar.wait("the report", lambda: (a := status.call("GET", "nodes/node-1.json"))[0] == 200 and text in a[1])


def test_it_outlives_the_store_and_is_back_by_itself(site: Site) -> None:
    number, _ = site.push()
    site.sidecar.wait_current(number)
    site.minio.kill()
    site.wait_lost()
    before = site.sidecar.state().staleness()
    time.sleep(1.5)
    assert site.sidecar.state().staleness() > before
    assert site.node.current() == number
    site.minio.start()
    number, _ = site.push()
    site.sidecar.wait_current(number)
    assert site.sidecar.said("sync.source_back")


def test_credentials_are_read_again(site: Site) -> None:
    path = site.node.folder / "secrets" / "store_secret_key"
    path.write_text("of-another-store-canary-815")
    site.wait_lost()
    number, _ = site.push()
    path.write_text(site.minio.secret)
    site.sidecar.wait_current(number)
    assert "canary-815" not in site.sidecar.output
    assert site.minio.secret not in site.sidecar.output


def test_an_archive_may_come_after_its_pointer(site: Site) -> None:
    serving = site.node.current()
    number, raw = site.push(archive_too=False)
    site.sidecar.wait_refused(number, "bad-revision")
    assert site.node.current() == serving
    site.bucket.put(f"revisions/{number}", raw)
    site.sidecar.wait_current(number)
