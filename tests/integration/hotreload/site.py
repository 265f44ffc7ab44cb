# SPDX-License-Identifier: Apache-2.0
"""A site of real processes: a store, nodes (a sidecar and its gateways each), nginx, a load, an administrator."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.gateway.environment import gateway_python
from tests.integration.gateway.harness import PACKAGE, request
from tests.integration.hotreload import content
from tests.integration.hotreload.craft import Bucket, Hand
from tests.integration.hotreload.node import Gateway, Node
from tests.integration.hotreload.programs import HERE, Minio, Nginx, Program, Relay, model_server, until
from tests.integration.hotreload.traffic import Traffic

INTERVAL = 1.0  # seconds; the default of reload_interval


def in_memory() -> str | None:
    """Return the host's shared memory if it has room for a site.

    The sidecar gives a pointer two seconds, and MinIO answers a PUT when it is on its disk: one that is busy with what
    others write would make both late.
    """
    place = Path("/dev/shm")
    return str(place) if place.is_dir() and shutil.disk_usage(place).free > 1 << 30 else None


def end(program: Program) -> None:
    """Stop a program; one that must be killed is only named, since no test is about that."""
    try:
        program.stop(60)
    except AssertionError as e:
        print(e)


class Site:
    """A store, nodes and nginx; the folder and the processes end with :meth:`close`."""

    def __init__(
        self,
        *,
        relay: bool = False,
        marker_models: Sequence[str] = content.MODELS,
        copy_of: Site | None = None,
        on_disk: bool = False,
    ) -> None:
        # Not pytest's own folder: a Unix socket's path has room for 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="moat-hr-", dir=None if on_disk else in_memory()))
        self.folder.chmod(0o755)  # nginx's user reads below
        self.secrets, self.site_keys = self.folder / "secrets", self.folder / "site-keys"
        self.secrets.mkdir()
        self.site_keys.mkdir()
        self.models = tuple(marker_models)
        self.master = "sk-" + secrets.token_hex(32)
        self.key: str = copy_of.key if copy_of else "sk-" + secrets.token_hex(24)
        self.secret("master_key", self.master)
        self.secret("up_key", "upstream-secret-canary-4711")
        self.client_key_file = self.secret("client_key", self.key)
        for role in ("writer", "reader"):
            self.secret(f"store_{role}_access_key", f"moat-{role}-{secrets.token_hex(4)}")
            self.secret(f"store_{role}_secret_key", secrets.token_hex(20))
        self.nodes: list[Node] = []
        self.nginx: Nginx | None = None
        self.extra: list[Program] = []
        self.relays: list[Relay] = []
        self.loads = 0
        self.programs: list[Program] = []
        try:
            self.set_up(relay, copy_of)
        except BaseException:
            self.close()
            raise

    def set_up(self, relay: bool, copy_of: Site | None) -> None:
        """Start the model server and the store, and fill it."""
        self.model, self.model_port = model_server(self.folder)
        self.programs.append(self.model)
        self.minio = Minio(self.folder)
        self.programs.append(self.minio)
        self.secret("store_root_user", self.minio.access)
        self.secret("store_root_password", self.minio.secret)
        self.minio.start()
        self.relay = self.new_relay(self.minio.port) if relay else None
        self.admin = Admin(self)
        self.prepare(copy_of)

    def prepare(self, copy_of: Site | None) -> None:
        """Make the buckets with their accounts and the site key, with the product's own commands."""
        if copy_of is None:
            self.admin.right("store", "accounts", "--secrets", str(self.secrets))
            self.admin.right("config", "init", str(self.admin.content), "--key-out", str(self.secrets / "site_key"))
        else:
            # A site that receives: it trusts the same key, and its store takes the other one's revisions.
            self.admin.right("store", "accounts", "--secrets", str(self.secrets), "--replica-of", "main-site")
            for path in copy_of.secrets.glob("site_key*"):
                shutil.copy(path, self.secrets / path.name)
            for path in self.secrets.glob("store_replicator_*"):
                shutil.copy(path, copy_of.secrets / path.name)
        for path in self.secrets.glob("site_key*.pub"):
            shutil.copy(path, self.site_keys / path.name)
        self.hand = Hand(Bucket(self.minio.port, self.minio.access, self.minio.secret), self.secrets / "site_key")

    def secret(self, name: str, value: str) -> Path:
        path = self.secrets / name
        path.write_text(value + "\n")
        path.chmod(0o600)
        return path

    def new_relay(self, target: int) -> Relay:
        made = Relay(target)
        self.relays.append(made)
        return made

    def base(self, marker: str) -> str:
        return f"http://127.0.0.1:{self.model_port}/{marker}/v1"

    def config(self, marker: str, more: str = "", **bases: str) -> str:
        """Return a ``config.yaml`` whose models all answer with this marker."""
        return content.config({**{m: self.base(marker) for m in self.models}, **bases}, more)

    def keys(self, **more: str) -> str:
        return content.keys({"load": self.key, **more})

    def environment(self, secrets_dir: Path, role: str, store_port: int) -> dict[str, str]:
        settings = self.folder / "gateway.yaml"
        settings.touch()
        return {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(PACKAGE),
            "PYTHONDONTWRITEBYTECODE": "1", "MOAT_SETTINGS_FILE": str(settings), "MOAT_SECRETS_DIR": str(secrets_dir),
            "MOAT_MASTER_KEY_FILE": str(secrets_dir / "master_key"), "MOAT_SITE_KEYS_DIR": str(self.site_keys),
            "MOAT_STORE_ENDPOINT": f"127.0.0.1:{store_port}", "MOAT_STORE_TIMEOUT": "20", "MOAT_DRY_RUN_TIMEOUT": "120",
            "MOAT_STORE_ACCESS_KEY_FILE": str(secrets_dir / f"store_{role}_access_key"),
            "MOAT_STORE_SECRET_KEY_FILE": str(secrets_dir / f"store_{role}_secret_key"),
        }  # fmt: skip

    def node(self, name: str = "n1", gateways: int = 3, store_port: int | None = None, **more: str) -> Node:
        via = store_port or (self.relay.port if self.relay else self.minio.port)
        made = Node(self, name, gateways, via, more)
        self.nodes.append(made)
        return made

    @property
    def gateways(self) -> list[Gateway]:
        return [g for n in self.nodes for g in n.gateways]

    def start(self, *, nginx: bool = True) -> Site:
        """Start all nodes side by side, then nginx, and wait until each gateway is ready."""
        for node in self.nodes:
            for program in node.programs:
                program.start()
        for gateway in self.gateways:
            gateway.wait_ready()
        if nginx:
            self.nginx = Nginx(self.folder, [g.port for g in self.gateways])
            self.nginx.start()
        return self

    def load(self, *, models: Sequence[str] = (), probes: Sequence[Gateway] | None = None, **more: object) -> Traffic:
        """Start a steady load through nginx, with probes of the gateways; see ``load.py`` for the options."""
        assert self.nginx is not None
        self.loads += 1
        out = self.folder / f"load-{self.loads}.json"
        argv = [sys.executable, str(HERE / "load.py"), "--port", str(self.nginx.port), "--ca-file", str(self.nginx.ca)]
        argv += ["--key-file", str(self.client_key_file), "--models", ",".join(models or self.models)]
        for g in self.gateways if probes is None else probes:
            argv += ["--probe", f"{g.name}={g.port}"]
        for name, value in more.items():
            argv += [f"--{name.replace('_', '-')}", str(value)]
        program = Program(f"load-{self.loads}", [*argv, "--out", str(out)], {"PATH": os.environ["PATH"]}, self.folder)
        program.start()
        self.extra.append(program)
        traffic = Traffic(program, out)
        until("the load runs", 120, traffic.progress)
        return traffic

    def seen(self) -> list[list[Any]]:
        """Return what came to the model server: moment, marker, model, key."""
        found = request(self.model_port, "GET", "/seen").json
        assert isinstance(found, list)
        return found

    def wait_serving(self, number: int, seconds: float = 180, gateways: Sequence[Gateway] | None = None) -> None:
        """Wait until the gateways (all by default) report this revision."""
        wanted = {g.name for g in (self.gateways if gateways is None else gateways)}

        def all_serve() -> bool:
            return all(v == number for n in self.nodes for k, v in n.reported().items() if k in wanted) and all(
                g.name in g.node.reported() for g in self.gateways if g.name in wanted
            )

        deadline = time.monotonic() + seconds
        while not all_serve():
            assert time.monotonic() < deadline, "\n".join(
                [f"not all serve {number} within {seconds:g} s", *(n.describe() for n in self.nodes)]
            )
            time.sleep(0.02)

    def close(self) -> None:
        """End everything and remove the folder, each even where another one cannot be ended."""
        with ExitStack() as last_first:
            if not os.environ.get("MOAT_TEST_KEEP"):
                last_first.callback(shutil.rmtree, self.folder, ignore_errors=True)
            for relay in self.relays:
                last_first.callback(relay.close)
            programs = [p for n in self.nodes for p in n.programs] + self.extra
            for program in [*self.programs, *programs]:
                last_first.callback(end, program)
            if self.nginx is not None:
                last_first.callback(self.nginx.stop)
            for gateway in self.gateways:
                gateway.keep_no_more()
            for program in programs:
                if program.running():
                    program.signal(signal.SIGTERM)


@dataclass(frozen=True)
class Pushed:
    """What ``config push`` said, and the moment (CLOCK_MONOTONIC) it returned."""

    at: float
    code: int
    said: dict[str, Any]

    @property
    def revision(self) -> int:
        assert self.code == 0, self.said
        return int(self.said["revision"])


class Admin:
    """An administrator's console: the writer's credentials, the site's secret key, a folder of configuration."""

    def __init__(self, site: Site, name: str = "admin") -> None:
        self.site, self.name = site, name
        self.folder = site.folder / name
        self.folder.mkdir()
        self.content = self.folder / "content"
        self.environment = {
            **site.environment(site.secrets, "writer", site.minio.port),
            "MOAT_SITE_KEY_FILE": str(site.secrets / "site_key"),
        }

    def command(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ``moat-gateway`` to its end."""
        argv = [str(gateway_python()), "-m", "moat_gateway", *words]
        return subprocess.run(
            argv, env={**self.environment, **more}, cwd=self.folder, capture_output=True, text=True, timeout=400
        )

    def right(self, *words: str, **more: str) -> str:
        done = self.command(*words, **more)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def write(self, marker: str, *, more: str = "", keys: str = "", **bases: str) -> Path:
        """Write a whole configuration whose models answer with this marker."""
        files = {"config.yaml": self.site.config(marker, more, **bases), "keys.yaml": keys or self.site.keys()}
        return content.write(self.content, files)

    def push(self, *words: str, folder: Path | None = None) -> Pushed:
        done = self.command("config", "push", str(folder or self.content), "--json", *words)
        at = time.monotonic()
        assert done.stdout.strip(), done.stderr
        return Pushed(at, done.returncode, json.loads(done.stdout))

    def status(self) -> dict[str, Any]:
        value = json.loads(self.right("config", "status", "--json"))
        assert isinstance(value, dict)
        return value
