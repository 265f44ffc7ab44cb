# SPDX-License-Identifier: Apache-2.0
"""What the tests of every scenario share: hosts by testinfra's docker back end, and the site as its clients see it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml

SHARED = Path(__file__).resolve().parent / "shared"
#: Seconds. The small model makes some 30 tokens a second on one busy core.
PATIENCE = 300


@dataclass(frozen=True)
class Answer:
    """What a client got: HTTP status, text, how many chunks it came in, whether ``[DONE]`` closed a stream."""

    status: int
    text: str
    chunks: int
    done: bool
    request_id: str


class Node:
    """One test host.

    Args:
        name: of the container.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.host = testinfra.get_host(f"docker://{name}")

    def run(self, *argv: str, stdin: str | None = None, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Run a program inside, whatever its exit code."""
        return subprocess.run(
            ["docker", "exec", "--interactive", self.name, *argv],
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )

    def ok(self, *argv: str, stdin: str | None = None, timeout: float = PATIENCE) -> str:
        """Run a program inside that must succeed, and return its stdout."""
        done = self.run(*argv, stdin=stdin, timeout=timeout)
        assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def install(self, *more: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run install.sh from the medium as converge.yml does, whatever its exit code."""
        return self.run("sh", "/medium/install.sh", "--yes", "--key", "/test/release.pub", *more, timeout=timeout)

    def restart(self, patience: float = 180) -> None:
        """Restart the whole host and wait until systemd has started what it starts."""
        subprocess.run(["docker", "restart", "--time", "90", self.name], check=True, capture_output=True)
        give_up = time.monotonic() + patience
        while self.run("systemctl", "is-system-running").stdout.strip() not in ("running", "degraded"):
            assert time.monotonic() < give_up, f"the host did not come up again within {patience:.0f} s"
            time.sleep(1)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return systemd's properties of a unit."""
        text = self.ok("systemctl", "show", unit, *(f"--property={p}" for p in properties))
        return dict(line.partition("=")[::2] for line in text.splitlines())

    def pid(self, unit: str) -> int:
        """Return the main process of a unit that runs."""
        pid = int(self.show(unit, "MainPID")["MainPID"])
        assert pid > 0, f"{unit} does not run"
        return pid

    def proc_status(self, pid: int) -> dict[str, str]:
        """Return /proc/PID/status as the kernel tells it."""
        lines = self.ok("cat", f"/proc/{pid}/status").splitlines()
        return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}

    def listeners(self) -> set[tuple[str, int, str]]:
        """Return (address, port, program) of every TCP listener."""
        found = set()
        for line in self.ok("ss", "-Hltnp").splitlines():
            parts = line.split()
            address, _, port = parts[3].rpartition(":")
            program = parts[5].split('"')[1] if len(parts) > 5 else "?"
            found.add((address.strip("[]"), int(port), program))
        return found

    def new_key(self, name: str, team: str = "default") -> str:
        """Make a client key as an operator does and leave it in a file; return the file's path inside.

        It is made in the site's own file, and every gateway takes it by a signed revision.

        Args:
            name: of the key.
            team: whose it is.
        """
        path = f"/run/{name}.key"
        self.run("rm", "-f", path)
        self.run("moat-gateway", "keys", "revoke", name)
        self.ok("moat-gateway", "keys", "new", name, "--team", team, "--out", path)
        self.ok("moat-site", "config", "push", "--wait=120")
        return path

    def revision(self) -> int:
        """Return the number of the revision that every gateway serves."""
        status = json.loads(self.ok("moat-gateway", "config", "status", "--json"))
        assert status["converged"], json.dumps(status, indent=1)[:4000]
        return int(status["store"]["revision"])

    def chat(
        self,
        key_file: str,
        *,
        url: str = "https://localhost:8443",
        stream: bool = False,
        prompt: str = "What is a castle moat for?",
        max_tokens: int = 24,
        model: str = "smollm2-135m-instruct",
    ) -> Answer:
        """Ask from inside the host, through nginx, with TLS checked against the site's authority."""
        question: dict[str, Any] = {"url": url, "key_file": key_file, "stream": stream, "prompt": prompt}
        question |= {"model": model, "max_tokens": max_tokens}
        program = (SHARED / "ask.py").read_text("utf-8")
        out = self.ok("python3", "-c", program, stdin=json.dumps(question))
        return Answer(**json.loads(out))


def scenario_hosts() -> list[str]:
    """Return the names of the platforms of the scenario under test."""
    file = Path(os.environ["MOLECULE_FILE"])
    return [p["name"] for p in yaml.safe_load(file.read_text("utf-8"))["platforms"]]


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known; pytest is given no file of settings here."""
    config.addinivalue_line("markers", "long: takes minutes; `make molecule` runs it, `make test` does not")


@pytest.fixture(scope="session")
def nodes() -> list[Node]:
    """Every host of the scenario, in the order of molecule.yml."""
    return [Node(name) for name in scenario_hosts()]


@pytest.fixture(scope="session")
def node(nodes: list[Node]) -> Node:
    """The first host: the one where install.sh runs."""
    return nodes[0]


@pytest.fixture(scope="session")
def client_key(node: Node) -> str:
    """A client key made on the site, as a file inside the host; the gateways see it within a second or two."""
    return node.new_key("molecule")


@pytest.fixture
def planted(node: Node) -> Iterator[Callable[..., Any]]:
    """Run commands whose undoing is named with them: ``planted([do...], [undo...])``."""
    undo: list[list[str]] = []

    def plant(do: list[str], back: list[str]) -> None:
        undo.append(back)
        node.ok(*do)

    yield plant
    for command in reversed(undo):
        node.ok(*command)
