# SPDX-License-Identifier: Apache-2.0
"""Proves that a kill -9 between any two changes of the folder leaves it whole, and that the next start converges.

``strace`` kills the real process as it enters its first, second, ... call of each kind that changes something on the
disk, until a run survives: nothing in the product helps. Each restarted process is the next one's victim.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.integration.sync.drive import Drive, content
from tests.integration.sync.sidecar import WAIT, Node, Sidecar, until

from moat_gateway import revision
from moat_gateway.sitekey import read_trusted
from moat_gateway.sync import nodefolder

STRACE = shutil.which("strace")
pytestmark = pytest.mark.skipif(STRACE is None, reason="strace is not installed; scripts/host-setup.sh installs it")
#: Calls that change the folder when a revision is taken and an old one removed, and how many of each there are.
CALLS = {"mkdir": 2, "fchmod": 7, "fsync": 11, "rename": 4, "unlinkat": 7, "rmdir": 1}


def inject(call: str, number: int, out: Path) -> list[str]:
    return ["-qq", "-o", str(out), "-e", f"trace={call},openat", "-e", f"inject={call}:signal=SIGKILL:when={number}"]


@contextmanager
def killed_at(sidecar: Sidecar, call: str, number: int) -> Iterator[None]:
    """Have each thread of a running process killed at its so-many-th call from now on."""
    out = sidecar.node.folder / "trace"
    out.unlink(missing_ok=True)
    # The dry run's process is there already (see below), and stays out of it.
    argv = [str(STRACE), "-f", *inject(call, number, out), "-p", str(sidecar.process.pid)]
    tracer = subprocess.Popen(argv, stderr=subprocess.PIPE)
    try:
        # Attached is not traced yet: both busy threads must have been seen opening a file.
        until(
            "the tracer sees both threads (or has killed already)",
            lambda: sidecar.process.poll() is not None or (out.exists() and len(threads(out)) >= 2),
        )
        yield
    finally:
        # Of a process that was killed it reaps each thread and ends by itself; told to end meanwhile, it was once seen
        # to wait for the process while the process waited for a thread to be reaped.
        if sidecar.process.poll() is None:
            tracer.send_signal(signal.SIGTERM)
        tracer.communicate(timeout=WAIT)


def threads(out: Path) -> set[str]:
    return {line.split()[0] for line in out.read_text().splitlines() if "openat(" in line}


def check_every_kept(node: Node) -> None:
    """Also what is above the current one is whole."""
    trusted = read_trusted(node.folder / "site-keys")
    for number in nodefolder.kept(node.sync_dir):
        assert revision.read_folder(nodefolder.revision_folder(node.sync_dir, number), trusted).number == number
        assert nodefolder.read_prepared(node.sync_dir, number)


def files(name: str) -> dict[str, bytes]:
    return {**content(name), "routers/index.yaml": b"models: []\n"}


#: What decides: a file counts from a rename on, and not before. The calls between these take some minutes more (each
#: victim loads LiteLLM first). The first seconds of a process are swept whole, below.
DECIDE = ("rename",)


@pytest.mark.parametrize("call", [c if c in DECIDE else pytest.param(c, marks=pytest.mark.long) for c in CALLS])
def test_a_kill_at_any_step_of_taking_a_revision(tmp_path: Path, python: Path, call: str) -> None:
    # With two kept, each revision that is taken removes one, too.
    node = Node(tmp_path / "node", python, Drive(tmp_path / "drive"), {"MOAT_SYNC_KEEP": "2"})
    for kills in range(CALLS[call] + 10):
        with node.start() as sidecar:
            # One more is taken first (two to begin with): then the dry run's process is there and has imported LiteLLM.
            # While one still imports, the calls would be counted that tell the state meanwhile.
            while True:
                newest = node.drive.push(files(f"m{node.drive.last}"))
                sidecar.wait_current(newest)
                if len(nodefolder.kept(node.sync_dir)) == 2:
                    break
            with killed_at(sidecar, call, kills + 1):
                node.drive.push(files(f"m{newest}"))
                until(
                    f"revision {newest + 1} is taken, or a kill at {call} {kills + 1}:\n{sidecar.output[-2000:]}",
                    partial(ended_or, sidecar, partial(taken, node, newest + 1)),
                )
            ended = sidecar.process.poll()
        assert node.check_whole() in (newest, newest + 1)
        check_every_kept(node)
        if ended is None:
            break
        assert ended == -signal.SIGKILL
    assert kills >= CALLS[call]
    assert node.current() == node.drive.last


def ended_or(sidecar: Sidecar, look: Callable[[], bool]) -> bool:
    return sidecar.process.poll() is not None or look()


def taken(node: Node, number: int) -> bool:
    """Say whether a revision is in force and what was too old is gone."""
    waste = list((node.sync_dir / "tmp").iterdir())
    return node.current() == number and nodefolder.kept(node.sync_dir) == (number, number - 1) and not waste


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Node:
    """A folder that gives a start something to do: waste, a lost prepared form, a revision that was never in force."""
    folder = tmp_path_factory.mktemp("template")
    node = Node(folder / "node", python, Drive(folder / "drive"))
    with node.start() as sidecar:
        for _ in range(2):
            sidecar.wait_current(node.drive.push(files("m")))
        assert sidecar.stop() == 0
    revisions = node.sync_dir / "revisions"
    shutil.copytree(revisions / "2", revisions / "3")
    shutil.copytree(revisions / "2" / "routers", node.sync_dir / "tmp" / "new-9" / "routers")
    (revisions / "2" / "prepared.json").unlink()
    return node


#: Calls that a start on it makes at least before it tells for the first time.
START_CALLS = {"fchmod": 2, "fsync": 4, "rename": 3, "unlinkat": 8, "rmdir": 2}


@pytest.mark.parametrize("call", START_CALLS)
def test_a_kill_at_any_step_of_a_start(tmp_path: Path, template: Node, call: str) -> None:
    node = Node(tmp_path / "node", template.python, template.drive)
    for kills in range(30):
        shutil.rmtree(node.sync_dir, ignore_errors=True)
        shutil.copytree(template.sync_dir, node.sync_dir)
        with node.start(str(STRACE), "-D", "-f", *inject(call, kills + 1, Path(os.devnull))) as sidecar:
            until(
                f"a start, or a kill at {call} {kills + 1}",
                partial(ended_or, sidecar, partial(clean, sidecar)),
            )
            ended = sidecar.process.poll()
        current = nodefolder.read_current(node.sync_dir)
        assert current is not None
        assert current.revision == 2
        with node.start() as sidecar:
            sidecar.wait("a clean start", partial(clean, sidecar))
            assert node.check_whole() == 2
        if ended is None:
            break
        assert ended == -signal.SIGKILL
    assert kills >= START_CALLS[call]


def clean(sidecar: Sidecar) -> bool:
    """Say whether a start has done all that there was to do, and this process has told so."""
    sync_dir = sidecar.node.sync_dir
    waste = list((sync_dir / "tmp").iterdir())
    prepared = nodefolder.revision_folder(sync_dir, 2) / "prepared.json"
    told = nodefolder.read_sync(sync_dir)
    return (
        not waste
        and nodefolder.kept(sync_dir) == (2, 1)
        and prepared.exists()
        and told is not None
        and told.pid == sidecar.process.pid
    )
