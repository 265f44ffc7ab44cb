# SPDX-License-Identifier: Apache-2.0
"""Proves how a medium is read: right hashes for any size and number of threads, no byte too many, and it can stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.unit.site.bundles import entry, make_large_bundle

from moat.errors import ChangedFile, Unreadable, UnsafePath
from moat.manifest import FileEntry
from moat.site import scan
from moat.site.trust import EntryType


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_hashes_are_right_around_the_buffers_edges(root: Path, threads: int) -> None:
    wanted = []
    counted: list[int] = []
    for size in (0, 1, scan.CHUNK_BYTES - 1, scan.CHUNK_BYTES, scan.CHUNK_BYTES + 1, 3 * scan.CHUNK_BYTES + 17):
        content = os.urandom(size)
        (root / f"f{size}").write_bytes(content)
        wanted.append(entry(f"f{size}", content))
    with scan.open_root(root) as fd:
        found = scan.hash_files(fd, wanted, count=counted.append, threads=threads)
    assert {p: d.sha256 for p, d in found.items()} == {w.path: w.sha256 for w in wanted}
    assert sum(counted) == sum(w.size for w in wanted)


def test_no_files_are_no_work(root: Path) -> None:
    with scan.open_root(root) as fd:
        assert scan.hash_files(fd, []) == {}


def test_a_file_that_grows_while_it_is_read_is_changed_and_not_read_for_ever(root: Path) -> None:
    """The listed size bounds what is read: a device that answers without end cannot hold the verification."""
    with (root / "f").open("wb") as f:
        f.truncate(1024**4)
    wanted = FileEntry("f", 10, "0" * 64, "x", "x", "1", "x", "x")
    with scan.open_root(root) as fd:
        found = scan.hash_files(fd, [wanted])["f"]
    assert isinstance(found.error, ChangedFile)


def test_a_file_that_was_replaced_after_the_walk_is_refused(root: Path) -> None:
    wanted = [entry(n, b"x") for n in ("link", "pipe", "folder", "below/f", "gone", "twice")]
    (root / "link").symlink_to("/etc/hostname")
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "f").write_bytes(b"x")
    (root / "below").symlink_to("elsewhere")
    (root / "twice").write_bytes(b"x")
    os.link(root / "twice", root / "second")
    with scan.open_root(root) as fd:
        found = scan.hash_files(fd, wanted)
    kinds = {path: type(d.error) for path, d in found.items()}
    assert kinds == {
        "link": UnsafePath,
        "pipe": UnsafePath,
        "folder": UnsafePath,
        "below/f": UnsafePath,
        "gone": Unreadable,
        "twice": UnsafePath,
    }


def test_the_walk_follows_nothing_and_is_in_a_fixed_order(root: Path) -> None:
    for name in ("b/x", "a/y", "a/b/c"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "up").symlink_to("..")
    with scan.open_root(root) as fd:
        first, second = scan.walk(fd), scan.walk(fd)
    assert first == second
    assert {(e.path, e.type) for e in first} == {
        ("a", EntryType.FOLDER),
        ("a/b", EntryType.FOLDER),
        ("a/b/c", EntryType.FILE),
        ("a/y", EntryType.FILE),
        ("b", EntryType.FOLDER),
        ("b/x", EntryType.FILE),
        ("up", EntryType.LINK),
    }


def test_a_folder_of_endless_depth_ends(root: Path) -> None:
    fd = os.open(root, os.O_RDONLY)
    for _ in range(400):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with scan.open_root(root) as fd:
        entries = scan.walk(fd)
    assert entries[-1].type is EntryType.TOO_DEEP
    assert len(entries) < 250
    subprocess.run(["rm", "-rf", str(root / "deep")], check=True)


def test_no_descriptor_is_left_open(root: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "f").write_bytes(b"x")
    (root / "link").symlink_to("a")
    wanted = [entry("a/f", b"x"), entry("link/f", b"x"), entry("a/none", b"x")]
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        with scan.open_root(root) as fd:
            scan.walk(fd)
            scan.hash_files(fd, wanted)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # noqa: PTH208 (the listing's own)
    assert threading.active_count() == 1


def test_a_defect_in_a_thread_is_not_swallowed(root: Path) -> None:
    (root / "f").write_bytes(b"x")

    def broken(n: int) -> None:
        raise RuntimeError("a defect")

    with scan.open_root(root) as fd, pytest.raises(RuntimeError, match="a defect"):
        scan.hash_files(fd, [entry("f", b"x")], count=broken)


def test_ctrl_c_ends_a_verification_at_once(tmp_path: Path) -> None:
    """A sparse file of 64 GiB takes a minute to hash; after SIGINT the process must be gone at once."""
    made = make_large_bundle(tmp_path / "bundle", tmp_path / "keys", 1024 * 1024)
    script = (
        "import sys; from moat.site import scan; from moat.manifest import FileEntry\n"
        "with scan.open_root(__import__('pathlib').Path(sys.argv[1])) as fd:\n"
        "    print('go', flush=True)\n"
        "    scan.hash_files(fd, [FileEntry('big', 2**36, '0'*64, 'x', 'x', '1', 'x', 'x')])\n"
    )
    with (made.path / "big").open("wb") as f:
        f.truncate(2**36)
    env = {**os.environ, "PYTHONPATH": str(Path(scan.__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(made.path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"go\n"
    time.sleep(0.3)
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert b"KeyboardInterrupt" in err
    (made.path / "big").unlink()


def test_a_known_hash(root: Path) -> None:
    (root / "f").write_bytes(b"abc")
    with scan.open_root(root) as fd:
        found = scan.hash_files(fd, [entry("f", b"abc")])["f"].sha256
    assert found == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
