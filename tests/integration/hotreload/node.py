# SPDX-License-Identifier: Apache-2.0
"""One host of a site: a sidecar and its gateways, real processes with a folder of their own."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.integration.gateway.environment import gateway_python
from tests.integration.gateway.harness import START_TIMEOUT, Answer, request
from tests.integration.hotreload import content
from tests.integration.hotreload.programs import Program, port

if TYPE_CHECKING:
    from tests.integration.hotreload.site import Site


class Gateway(Program):
    """A gateway process of a node."""

    def __init__(self, node: Node, name: str, more: Mapping[str, str]) -> None:
        self.node, self.port = node, port()
        self.socket = node.folder / f"{name}.sock"
        environment = {
            **node.environment, "MOAT_INSTANCE": name, "MOAT_PORT": str(self.port),
            "MOAT_ADMIN_SOCKET": str(self.socket), "MOAT_SHUTDOWN_DELAY": "1", "MOAT_SHUTDOWN_TIMEOUT": "20", **more,
        }  # fmt: skip
        super().__init__(name, [str(gateway_python()), "-m", "moat_gateway", "serve"], environment, node.folder)
        self._keeper: threading.Thread | None = None
        self._kept = False
        self.restarts = 0

    def wait_ready(self) -> Gateway:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            assert self.running() or self._kept, f"{self.name} ended:\n{self.tail()}"
            try:
                if request(self.port, "GET", "/_moat/ready", timeout=5).status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"{self.name} is not ready after {START_TIMEOUT} s:\n{self.tail()}")

    def keep(self) -> None:
        """Start it again whenever it ends with 75, as systemd does by RestartForceExitStatus."""
        self._kept = True

        def watch() -> None:
            while self._kept:
                if self.process is not None and self.process.poll() == 75:
                    self.restarts += 1
                    self.start()
                time.sleep(0.1)

        self._keeper = threading.Thread(target=watch, daemon=True)
        self._keeper.start()

    def keep_no_more(self) -> None:
        self._kept = False
        if self._keeper is not None:
            self._keeper.join(5)

    def admin(self, path: str, method: str = "GET") -> str:
        """Ask on the admin socket; return the body."""
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        try:
            connection.sock.connect(str(self.socket))
            connection.request(method, path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        value = json.loads(self.admin("/status"))
        assert isinstance(value, dict)
        return value

    def revision(self) -> int:
        return int(self.status()["config"]["revision"])

    def metrics(self) -> dict[str, float]:
        pairs = (x.rsplit(" ", 1) for x in self.admin("/metrics").splitlines() if not x.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def ask(self, model: str, key: str, prompt: str = "hello there") -> Answer:
        """Ask this gateway for a completion."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        return request(self.port, "POST", "/v1/chat/completions", body, key)

    def marker(self, model: str, key: str) -> str:
        """Return whose answer a model of this gateway gives (see ``modelserver.py``)."""
        answer = self.ask(model, key)
        assert answer.status == 200, answer.body
        return str(answer.json["choices"][0]["message"]["content"]).split()[0].removeprefix("[")


class Node:
    """One host: a folder of revisions, a sidecar that fills it, gateways that serve from it."""

    def __init__(self, site: Site, name: str, gateways: int, store_port: int, more: Mapping[str, str]) -> None:
        self.site, self.name = site, name
        self.folder = site.folder / name
        self.sync_dir, self.reports_dir = self.folder / "sync", self.folder / "reports"
        for path in (self.sync_dir, self.reports_dir, self.folder / "tmp"):
            path.mkdir(parents=True)
        shutil.copytree(site.secrets, self.folder / "secrets")
        local = content.write(self.folder / "local", {"config.yaml": site.config("r0"), "keys.yaml": site.keys()})
        self.environment = {
            **site.environment(self.folder / "secrets", "reader", store_port),
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "MOAT_CONFIG": str(local / "config.yaml"),
            "MOAT_KEYS": str(local / "keys.yaml"),
            "MOAT_MASTER_KEY_FILE": str(self.folder / "secrets/master_key"),
            "MOAT_SYNC_DIR": str(self.sync_dir),
            "MOAT_REPORTS_DIR": str(self.reports_dir),
            "MOAT_NODE": name,
            **more,
        }
        argv = [str(gateway_python()), "-m", "moat_gateway", "sync"]
        self.sidecar = Program(f"{name}-sync", argv, self.environment, self.folder)
        self.gateways = [Gateway(self, f"{name}-gw{i + 1}", more) for i in range(gateways)]

    @property
    def programs(self) -> list[Program]:
        return [self.sidecar, *self.gateways]

    def sync_state(self) -> dict[str, Any]:
        """Return what the sidecar says of itself (empty before it says anything)."""
        try:
            value = json.loads((self.sync_dir / "sync.json").read_text())
        except FileNotFoundError:
            return {}
        assert isinstance(value, dict)
        return value

    def accepted(self) -> int:
        """Return the number in ``current.json``; 0 without one."""
        try:
            return int(json.loads((self.sync_dir / "current.json").read_text())["revision"])
        except FileNotFoundError:
            return 0

    def reported(self) -> dict[str, int]:
        """Return the revision that each gateway reports."""
        found = {}
        for g in self.gateways:
            try:
                found[g.name] = int(json.loads((self.reports_dir / f"{g.name}.json").read_text())["revision"])
            except (FileNotFoundError, KeyError, TypeError):
                continue
        return found

    def describe(self) -> str:
        """Return what there is to know of this node, for the message of a failed test."""
        lines = [f"{self.name}: accepted {self.accepted()}, reported {self.reported()}, {self.sync_state()}"]
        lines.append(self.sidecar.tail(1500))
        for gateway in self.gateways:
            quiet = [x for x in gateway.text().splitlines() if "request.finished" not in x]
            try:
                lines += [f"{gateway.name}: {gateway.status()}", *quiet[-6:]]
            except (OSError, ValueError) as e:
                ended = gateway.process.poll() if gateway.process is not None else "not started"
                # A crash of native code leaves the functions of all threads.
                lines += [f"{gateway.name}: {type(e).__name__}, exit code {ended}", *quiet[-80:]]
        return "\n".join(lines)
