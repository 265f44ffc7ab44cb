# SPDX-License-Identifier: Apache-2.0
"""A node's folders and the real process ``python -m moat_gateway sync`` on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.integration.sync.drive import Drive

from moat_gateway import revision
from moat_gateway.sitekey import read_trusted
from moat_gateway.sync import nodefolder
from moat_gateway.sync.nodefolder import SyncState

PACKAGE = Path(__file__).resolve().parents[3] / "images/gateway"
T = TypeVar("T")
WAIT = 300.0  # seconds; LiteLLM's import for the dry run takes ten, on a busy machine many times that


def until(what: str, look: Callable[[], T | None], timeout: float = WAIT) -> T:
    """Poll until `look` returns something true, and return it."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.02)


@dataclass
class Node:
    """The folders of a node.

    Attributes:
        folder: of everything.
        python: the interpreter with the locked wheels.
        drive: the source of revisions.
        extra: more settings (`MOAT_*`).
    """

    folder: Path
    python: Path
    drive: Drive
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("secrets", "reports", "tmp"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "secrets" / "up_key").write_text("upstream-secret-canary-4711")
        (self.folder / "gateway.yaml").write_text("")
        self.drive.trust(self.folder / "site-keys")

    @property
    def sync_dir(self) -> Path:
        return self.folder / "sync"

    @property
    def reports_dir(self) -> Path:
        return self.folder / "reports"

    @property
    def environment(self) -> dict[str, str]:
        f = self.folder
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(f),
            "TMPDIR": str(f / "tmp"),
            "PYTHONPATH": str(PACKAGE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MOAT_SETTINGS_FILE": str(f / "gateway.yaml"),
            "MOAT_SYNC_DIR": str(self.sync_dir),
            "MOAT_REPORTS_DIR": str(self.reports_dir),
            "MOAT_SOURCE_DIR": str(self.drive.folder),
            "MOAT_SITE_KEYS_DIR": str(f / "site-keys"),
            "MOAT_SECRETS_DIR": str(f / "secrets"),
            "MOAT_NODE": "node-1",
            "MOAT_REVISION_MAX": "1",
            **self.extra,
        }

    def start(self, *prefix: str, **extra: str) -> Sidecar:
        """Start config-sync; its output goes to files that are written anew."""
        return Sidecar(self, [*prefix, str(self.python), "-m", "moat_gateway", "sync"], extra)

    def current(self) -> int | None:
        """Return the number in force, having verified its folder as a gateway would."""
        current = nodefolder.read_current(self.sync_dir)
        if current is None:
            return None
        folder = nodefolder.revision_folder(self.sync_dir, current.revision)
        kept = revision.read_folder(folder, read_trusted(self.folder / "site-keys"))
        assert (kept.number, kept.sha256) == (current.revision, current.sha256)
        assert json.loads(nodefolder.read_prepared(self.sync_dir, current.revision))["revision"] == kept.number
        return current.revision

    def check_whole(self) -> int | None:
        """Check every kept revision up to the current one, and return the current number."""
        trusted = read_trusted(self.folder / "site-keys")
        for number in nodefolder.usable_order(self.sync_dir):
            kept = revision.read_folder(nodefolder.revision_folder(self.sync_dir, number), trusted)
            assert kept.number == number
            assert json.loads(nodefolder.read_prepared(self.sync_dir, number))["revision"] == number
        return self.current()


class Sidecar:
    """A running config-sync.

    Args:
        node: its folders.
        argv: what to run.
        extra: more environment.
    """

    def __init__(self, node: Node, argv: Sequence[str], extra: Mapping[str, str]) -> None:
        self.node = node
        self._out, self._err = node.folder / "stdout", node.folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                argv, env={**node.environment, **extra}, cwd=node.folder, stdout=out, stderr=err
            )

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = self._out.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def said(self, name: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == name]

    @property
    def output(self) -> str:
        return self._out.read_text() + self._err.read_text()

    def alive(self) -> None:
        assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output[-4000:]}"

    def wait(self, what: str, look: Callable[[], T | None], timeout: float = WAIT) -> T:
        def looked() -> T | None:
            self.alive()
            return look()

        try:
            return until(what, looked, timeout)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.output[-4000:]}") from None

    def wait_current(self, number: int) -> None:
        self.wait(f"revision {number} in force", lambda: self.node.current() == number)

    def state(self) -> SyncState:
        """Return what this process (not one before it) says of itself."""

        def look() -> SyncState | None:
            found = nodefolder.read_sync(self.node.sync_dir)
            return found if found is not None and found.pid == self.process.pid else None

        return self.wait("sync.json", look)

    def wait_refused(self, number: int | None, kind: str) -> SyncState:
        def look() -> SyncState | None:
            state = self.state()
            last = state.last_refused
            return state if last is not None and (last.revision, last.kind) == (number, kind) else None

        return self.wait(f"refusal {kind} of revision {number}", look)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)
