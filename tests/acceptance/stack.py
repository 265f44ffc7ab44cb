# SPDX-License-Identifier: Apache-2.0
"""The running demo as the acceptance tests see it: ``.moat/demo.json`` and the engine, nothing of the code."""

from __future__ import annotations

import ctypes
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).resolve().parents[2]
DEMO_JSON = ROOT / ".moat" / "demo.json"
SERVICES = {
    "nginx": 10101, "gateway-1": 10102, "gateway-2": 10102, "config-sync": 10102, "minio": 10103,
    "minio-init": 10102, "valkey": 10104, "model": 10105,
}  # fmt: skip
RUNNING = tuple(name for name in SERVICES if name != "minio-init")
T = TypeVar("T")


def run(*argv: str, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program and return what it printed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    assert not check or done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
    return done


@dataclass(frozen=True)
class Stack:
    """What ``make demo`` left running."""

    base_url: str
    ca_file: Path
    key_file: Path
    bundle: Path
    public_key: str
    compose_project: str
    model: str
    gateway_cli: tuple[str, ...]
    config_dir: Path

    @property
    def folder(self) -> Path:
        """The deployment folder."""
        return self.config_dir.parent

    @property
    def key(self) -> str:
        """The client key."""
        return self.key_file.read_text("ascii").strip()

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """A context that trusts the site's authority alone."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        """Return an HTTP client; with the demo's key unless another (or an empty one) is given."""
        headers = {"authorization": f"Bearer {self.key if key is None else key}"} if key != "" else {}
        options.setdefault("timeout", 120)
        return httpx.Client(base_url=self.base_url, verify=self.tls, headers=headers, trust_env=False, **options)

    def compose(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a Compose command on the deployment."""
        return run("docker", "compose", "--project-directory", str(self.folder), *words, check=check)

    def container(self, service: str) -> str:
        """Return a service's container id (stopped ones too)."""
        project = f"label=com.docker.compose.project={self.compose_project}"
        found = run(
            "docker", "ps", "-aq", "--filter", project, "--filter", f"label=com.docker.compose.service={service}",
            "--filter", "label=com.docker.compose.oneoff=False",
        )  # fmt: skip
        ids = found.stdout.split()
        assert len(ids) == 1, f"{service}: {ids}"
        return ids[0]

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what the engine says of a service's container."""
        raw: list[dict[str, Any]] = json.loads(run("docker", "inspect", self.container(service)).stdout)
        return raw[0]

    def logs(self, service: str) -> str:
        """Return everything that a service has logged."""
        done = run("docker", "logs", self.container(service))
        return done.stdout + done.stderr

    def inside(self, service: str, make: Callable[[], T]) -> T:
        """Run ``make`` in a thread that is in a service's network namespace."""
        return in_namespace(int(self.inspect(service)["State"]["Pid"]), make)

    def gateway(self, *words: str, instance: str = "gateway-1", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of moat-gateway; ``instance`` is whom ``status`` asks."""
        return run(*(instance if w == "gateway-1" else w for w in self.gateway_cli), *words, check=check)

    def ask_gateway(self, *words: str, instance: str = "gateway-1") -> dict[str, Any]:
        """Return what a command of moat-gateway answers with ``--json``, refusals too."""
        done = self.gateway(*words, "--json", instance=instance, check=False)
        raw: dict[str, Any] = json.loads(done.stdout)
        return raw

    def moat(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the deployment's own moat.pyz on the system's Python."""
        return run("/usr/bin/python3", str(self.folder / "moat.pyz"), *words, check=False)

    def firewall(self) -> dict[tuple[str, str, str], int]:
        """Return the packets refused by family, chain and bridge."""
        answer = json.loads(self.moat("firewall", "status", "--json").stdout)
        return {
            (r["family"], r["chain"], r["text"].split()[1]): r["packets"]
            for f in answer["families"]
            for r in f["rules"]
        }

    def secrets(self) -> dict[str, str]:
        """Return every secret value of the deployment by its file."""
        files = [p for p in (self.folder / "secrets").rglob("*") if p.is_file() and p.suffix != ".acl"]
        # The last line of each: the first one of a site key is a comment.
        values = {p.relative_to(self.folder).as_posix(): p.read_text("ascii").split()[-1] for p in files}
        key = (self.folder / "tls/key.pem").read_text("ascii")
        return {**values, "tls/key.pem": key.splitlines()[1], "client key": self.key}


def in_namespace(pid: int, make: Callable[[], T]) -> T:
    """Run ``make`` in a thread in the network namespace of a process; sockets keep the namespace they are made in."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000) != 0:  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)
            results.append(make())
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def load() -> Stack:
    """Read what ``make demo`` wrote."""
    raw = json.loads(DEMO_JSON.read_text("utf-8"))
    return Stack(
        raw["base_url"], Path(raw["ca_file"]), Path(raw["key_file"]), Path(raw["bundle"]), raw["public_key"],
        raw["compose_project"], raw["model"], tuple(raw["gateway_cli"]), Path(raw["config_dir"]),
    )  # fmt: skip
