# SPDX-License-Identifier: Apache-2.0
"""Proves what happens to the real sidecar when its folder is full, read-only or damaged: said, survived, mended."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.sync.drive import Drive, content
from tests.integration.sync.sidecar import Node, Sidecar

from moat_gateway.errors import BadRevision
from moat_gateway.sync import nodefolder

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system in a namespace: needs root")
DATA = os.urandom(300 << 10)
INDEX = f"models:\n  - {{file: x.txt, sha256: {hashlib.sha256(DATA).hexdigest()}}}\n"
LARGE = {**content("large"), "routers/x.txt": DATA, "routers/index.yaml": INDEX.encode()}


def on_a_small_disk(node: Node) -> Sidecar:
    """Start config-sync with its folder on a file system of 200 KiB that only it sees."""
    node.sync_dir.mkdir()
    script = 'mount -t tmpfs -o size=200k,mode=0750 none "$1" && shift && exec "$@"'
    return node.start("unshare", "-m", "sh", "-c", script, "sh", str(node.sync_dir))


def inside(sidecar: Sidecar) -> Path:
    """Return the folder as the process sees it."""
    return Path(f"/proc/{sidecar.process.pid}/root{sidecar.node.sync_dir}")


def mount_again(sidecar: Sidecar, options: str) -> None:
    argv = ["nsenter", "-t", str(sidecar.process.pid), "-m", "mount", "-o", f"remount,{options}", sidecar.node.sync_dir]
    subprocess.run([str(a) for a in argv], check=True, capture_output=True, timeout=20)


def in_force(sidecar: Sidecar) -> int | None:
    current = nodefolder.read_current(inside(sidecar))
    return current.revision if current is not None else None


@needs_root
def test_a_full_disk_is_said_the_old_one_stays_and_room_heals(node: Node) -> None:
    node.drive.push()
    with on_a_small_disk(node) as sidecar:
        sidecar.wait("the first revision", lambda: in_force(sidecar) == 1)
        number = node.drive.push(LARGE)
        [event] = sidecar.wait("the refusal", lambda: sidecar.said("sync.refused"))
        assert (event["revision"], event["kind"]) == (number, "sync-folder-failed")
        assert "No space left" in event["message"]
        assert "make room" in event["message"]
        assert in_force(sidecar) == 1
        assert nodefolder.kept(inside(sidecar)) == (1,)
        state = nodefolder.read_sync(inside(sidecar))
        assert state is not None
        assert state.revision == 1
        mount_again(sidecar, "size=4m")
        sidecar.wait("the revision, without another push", lambda: in_force(sidecar) == number)
        assert len(sidecar.said("sync.refused")) == 1, "said once"
        assert sidecar.stop() == 0


@needs_root
def test_a_folder_that_becomes_unwritable_is_said_and_heals(node: Node) -> None:
    node.drive.push()
    # Without this, root is kept out of folders like everybody else.
    with node.start("setpriv", "--bounding-set=-dac_override") as sidecar:
        sidecar.wait_current(1)
        folders = (node.sync_dir, node.sync_dir / "tmp", node.sync_dir / "revisions")
        for folder in folders:
            folder.chmod(0o550)
        number = node.drive.push()
        [event] = sidecar.wait("the refusal", lambda: sidecar.said("sync.refused"))
        assert (event["revision"], event["kind"]) == (number, "sync-folder-failed")
        assert "Permission denied" in event["message"]
        assert node.current() == 1
        for folder in folders:
            folder.chmod(0o750)
        sidecar.wait_current(number)
        assert sidecar.stop() == 0


def config_changed(node: Node) -> None:
    (nodefolder.revision_folder(node.sync_dir, 2) / "config.yaml").write_bytes(content("intruder")["config.yaml"])


def signature_gone(node: Node) -> None:
    (nodefolder.revision_folder(node.sync_dir, 2) / "revision.json.minisig").unlink()


def prepared_gone(node: Node) -> None:
    (nodefolder.revision_folder(node.sync_dir, 2) / "prepared.json").unlink()


def note_garbage(node: Node) -> None:
    (node.sync_dir / "current.json").write_bytes(os.urandom(100))


def note_gone(node: Node) -> None:
    (node.sync_dir / "current.json").unlink()


DAMAGE = [config_changed, signature_gone, prepared_gone, note_garbage, note_gone]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Node:
    """A folder with two revisions; nothing runs on it."""
    folder = tmp_path_factory.mktemp("ran")
    node = Node(folder / "node", python, Drive(folder / "drive"))
    with node.start() as sidecar:
        for _ in range(2):
            sidecar.wait_current(node.drive.push(content("same")))
        assert sidecar.stop() == 0
    return node


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_what_is_damaged_is_said_and_mended(ran: Node, damage: Callable[[Node], None]) -> None:
    assert ran.check_whole() == 2
    damage(ran)
    with ran.start() as sidecar:
        sidecar.wait("the mending", lambda: whole(ran))
        assert sidecar.said("sync.damaged") or damage is note_gone
        sidecar.wait("the state", lambda: (s := sidecar.state()).revision == 2 and not s.degraded)
        assert sidecar.stop() == 0
    assert ran.check_whole() == 2


def whole(node: Node) -> bool:
    try:
        return node.check_whole() == 2
    except BadRevision:
        return False
