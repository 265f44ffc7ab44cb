# SPDX-License-Identifier: Apache-2.0
"""A deployment folder and a running gateway process, as tests need them."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.hotreload.programs import port as free_port

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "images/gateway"
START_TIMEOUT = 400.0  # seconds; LiteLLM's imports take ten, on a busy machine many times that
PATIENCE = 120.0  # seconds; a wait that is no claim ends then at the latest

CONFIG = """\
model_list:
  - model_name: small
    litellm_params: {{model: openai/up-small, api_base: "{base}", api_key: os.environ/UP_KEY}}
  - model_name: big
    litellm_params: {{model: openai/up-big, api_base: "{base}", api_key: os.environ/UP_KEY}}
"""
KEYS = "teams:\n  - {id: t, models: [small]}\n  - {id: all, models: ['*']}\nkeys: []\n"


def until(what: str, look: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Return the first true value of ``look``; it is asked until the deadline."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    key: str | None = None,
    timeout: float = PATIENCE,
    **headers: str,
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        sent = {k.replace("_", "-"): v for k, v in headers.items()}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        raw = None
        if body is not None:
            raw = json.dumps(body).encode()
            sent["content-type"] = "application/json"
        connection.request(method, path, raw, sent)
        r = connection.getresponse()
        return Answer(r.status, {k.lower(): v for k, v in r.getheaders()}, r.read())
    finally:
        connection.close()


def chat(prompt: str = "hello there", model: str = "small", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **more}


@dataclass
class Site:
    """A deployment folder."""

    folder: Path
    python: Path
    port: int = field(default_factory=free_port)
    extra: dict[str, str] = field(default_factory=dict)
    master: str = field(default_factory=lambda: "sk-" + secrets.token_hex(32))

    def prepare(self, base: str) -> Site:
        (self.folder / "secrets").mkdir(parents=True)
        (self.folder / "tmp").mkdir()
        self.write("secrets/master_key", self.master)
        self.write("secrets/up_key", "upstream-secret-canary-4711")
        self.write("config.yaml", CONFIG.format(base=base))
        self.write("keys.yaml", KEYS)
        return self

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    @property
    def environment(self) -> dict[str, str]:
        f = self.folder
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(f),
            "TMPDIR": str(f / "tmp"),
            "PYTHONPATH": str(PACKAGE),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MOAT_SETTINGS_FILE": str(self.write("gateway.yaml", "")),
            "MOAT_CONFIG": str(f / "config.yaml"),
            "MOAT_KEYS": str(f / "keys.yaml"),
            "MOAT_SECRETS_DIR": str(f / "secrets"),
            "MOAT_MASTER_KEY_FILE": str(f / "secrets/master_key"),
            "MOAT_ADMIN_SOCKET": str(self.admin_socket),
            "MOAT_PORT": str(self.port),
            "MOAT_INSTANCE": "under-test",
            **self.extra,
        }

    @property
    def admin_socket(self) -> Path:
        return Path(self.extra.get("MOAT_ADMIN_SOCKET", self.folder / "admin.sock"))

    def argv(self, *args: str) -> list[str]:
        return [str(self.python), "-m", "moat_gateway", *args]

    def command(self, *args: str, timeout: float = START_TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Run one command of ``moat-gateway`` to its end."""
        return subprocess.run(
            self.argv(*args), env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )

    def new_key(self, key_id: str, team: str, *more: str) -> str:
        done = self.command("keys", "new", key_id, "--team", team, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, *prefix: str) -> Gateway:
        out, err = (self.folder / "stdout").open("wb"), (self.folder / "stderr").open("wb")
        with out, err:
            process = subprocess.Popen(
                [*prefix, *self.argv("serve")], env=self.environment, cwd=self.folder, stdout=out, stderr=err
            )
        return Gateway(self, process)


@dataclass
class Gateway:
    """A gateway process."""

    site: Site
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it, if it still runs: the last resort of a test that failed."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait_ready(self) -> Gateway:
        """Wait until it serves; one that does not is ended."""
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"ended with {self.process.returncode}:\n{self.stderr[-2000:]}\n{self.stdout[-3000:]}"
                )
            try:
                if request(self.site.port, "GET", "/_moat/ready", timeout=5).status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"not ready after {START_TIMEOUT} s:\n{self.stdout[-3000:]}")

    def request(self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str) -> Answer:
        return request(self.site.port, method, path, body, key, **headers)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def stdout(self) -> str:
        return (self.site.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.site.folder / "stderr").read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        # A line that is being written has no end yet.
        return [json.loads(line) for line in self.stdout.splitlines(keepends=True) if line.endswith("\n")]

    def said(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the events with these fields that are there by now."""
        return [e for e in self.events if all(e.get(k) == v for k, v in wanted.items())]

    def wait_events(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the events with these fields once there is one; a request's log line comes just after its answer."""
        found: list[dict[str, Any]] = until(f"an event with {wanted}", lambda: self.said(**wanted))
        return found

    def admin(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Ask on the admin socket; return status and body."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        try:
            connection.sock.connect(str(self.site.admin_socket))
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def reload(self) -> tuple[bool, dict[str, Any]]:
        """Do what `moat-gateway reload` does; return whether all was accepted, and what was answered."""
        code, body = self.admin("/reload", "POST")
        assert code in (200, 409), body
        return code == 200, json.loads(body)

    def status(self) -> dict[str, Any]:
        """Return what `moat-gateway status --json` shows, without starting a Python for it."""
        code, body = self.admin("/status")
        assert code == 200, body
        value = json.loads(body)
        assert isinstance(value, dict)
        return value

    def metrics(self) -> dict[str, float]:
        code, text = self.admin("/metrics")
        assert code == 200, text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}
