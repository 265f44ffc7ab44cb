# SPDX-License-Identifier: Apache-2.0
"""Proves that docs/hot-reload.md shows what the commands print: they are run in its order, on a folder as store.

Masked are moments, lengths of time, the store, people and keys; the node and its gateways are played by a thread.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest
from tests.integration.gateway.stores import Backend, Place

from moat_gateway.dirstore import DirectoryStore
from moat_gateway.errors import GatewayError

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/hot-reload.md").read_text("utf-8")
MASKS = [
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), "MOMENT"),
    (re.compile(r" *\d+\.\d s"), " SECONDS"),
    (re.compile(r"bucket moat-config at http://minio:9000|folder \S+/source"), "STORE"),
    (re.compile(r"\b[0-9A-F]{16}\b"), "KEY"),
    (re.compile(r"root@\w+"), "PERSON"),
]


def shown(section: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a section of the page, each with the lines that it prints there."""
    found: list[tuple[str, list[str]]] = []
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ moat-gateway "):
                found.append((line.removeprefix("$ moat-gateway "), []))
            else:
                found[-1][1].append(line)
    return found


def masked(lines: list[str]) -> list[str]:
    """Return lines without what is another thing each time; of a wait only the order of its lines is chance."""
    out = []
    for printed in lines:
        line = printed
        for pattern, word in MASKS:
            line = pattern.sub(word, line)
        # How soon the reports come decides whether the state before is shown.
        if "still serves revision" not in line:
            out.append(re.sub(r"  +", "  ", line))
    waited = [line for line in out if line.startswith(" SECONDS")]
    return [line for line in out if line not in waited] + sorted(waited)


class Node:
    """A node `vm` with two gateways that serve at once what the pointer names.

    Args:
        folder: the store.
    """

    def __init__(self, folder: Path) -> None:
        self._store = DirectoryStore(folder, limit=1 << 20)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Node:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            try:
                pointer = self._store.pointer()
            except GatewayError:
                continue
            assert pointer is not None
            source = {"kind": "directory", "where": "w", "reachable": True, "why": None}
            sync = {"revision": pointer.revision, "pointer": pointer.revision, "source": source, "degraded": []}
            gateways = [
                {"name": f"gateway-{n}", "pid": n, "revision": pointer.revision, "sha256": None, "ready": True,
                 "applied_at": "2026-11-23T21:10:55.377Z", "draining": False, "degraded": [], "last_refused": None,
                 "needs_restart": [], "started_at": "x", "age": 0.1}
                for n in (1, 2)
            ]  # fmt: skip
            value = {"format": 1, "node": "vm", "sync": {**sync, "last_refused": None}, "gateways": gateways}
            self._store.report("vm", json.dumps(value).encode())


@pytest.fixture
def place(tmp_path: Path, python: Path) -> Iterator[Place]:
    made = Place(Backend("directory", tmp_path), tmp_path / "place", python).prepare()
    try:
        yield made
    finally:
        made.close()


def test_the_page_shows_what_is_printed(place: Place) -> None:
    site = place.folder / "site"
    site.mkdir()
    config = (ROOT / "compose/config/demo.yaml").read_text("utf-8")
    (site / "config.yaml").write_text(config)
    (site / "keys.yaml").write_text(
        f"teams:\n  - {{id: physics, models: ['*']}}\nkeys:\n  - {{id: a, team: physics, sha256: '{'0' * 64}'}}\n"
    )

    def run(command: str) -> subprocess.CompletedProcess[str]:
        words = shlex.split(command)
        return place.command(*words, *(["--author", "root@vm"] if words[1] in ("push", "rollback") else []))

    def check(command: str, expected: list[str], code: int = 0) -> None:
        done = run(command)
        assert done.returncode == code, (command, done.stdout, done.stderr)
        assert masked((done.stdout + done.stderr).splitlines()) == masked(expected), command

    begun = run("config push ./site --revision 42 --message 'after the tests'")
    assert begun.returncode == 0, begun.stderr
    day = iter(shown("A normal day"))
    changed = config.replace("timeout: 600\n", "timeout: 300\n", 1) + (
        "  - model_name: small\n"
        "    litellm_params: {model: openai/smollm2-135m-instruct, "
        'api_base: "http://model:8081/v1", api_key: not-needed}\n'
    )
    wrong = config.replace("model:8081", "api.example.com:443").replace("http:", "https:") + (
        "router_settings: {routing_strategy: fastest, fallbacks: [{smollm2-135m-instruct: [gone]}]}\n"
    )
    with Node(place.folder / "source"):
        for name, content, code in [
            ("config diff", changed, 0),
            ("config push", changed, 0),
            ("config status", changed, 0),
            ("config validate", wrong, 8),
            ("config rollback", changed, 0),
            ("config history", changed, 0),
        ]:
            (site / "config.yaml").write_text(content)
            command, expected = next(day)
            assert command.startswith(name)
            check(command, expected, code)
        assert list(day) == []
        for command, expected in shown("Keys of clients"):
            done = run(command)
            assert (done.returncode, expected) == (0, []), (command, done.stdout, done.stderr)
