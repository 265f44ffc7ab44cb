# SPDX-License-Identifier: Apache-2.0
"""The programs around the gateways: MinIO, nginx, a model server, a relay that can be cut, and processes in general."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from moat.build.cache import Cache

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
NGINX_UID = 10101
_taken: set[int] = set()


def port() -> int:
    """Return a port that nobody uses, outside of the range of outgoing connections, so that it stays free."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        number = random.randrange(20000 + 2000 * (worker % 6), 22000 + 2000 * (worker % 6))
        if number in _taken:
            continue
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", number))
            _taken.add(number)
            return number


def until(what: str | Callable[[], str], seconds: float, check: Callable[[], Any], pause: float = 0.02) -> Any:
    """Return the first true value of ``check``; it is asked until the deadline. ``what`` is for the message."""
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what if isinstance(what, str) else what()}"
        time.sleep(pause)


def listening(number: int) -> bool:
    """Say whether something takes connections on this port of the loopback."""
    try:
        socket.create_connection(("127.0.0.1", number), 1).close()
    except OSError:
        return False
    return True


class Program:
    """A process that can be started again; what it writes is kept of all its lives.

    Args:
        name: for messages.
        argv: its command.
        environment: all of it.
        folder: where it runs, and where ``NAME.log`` is kept.
    """

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name, self.argv, self.environment, self.folder = name, list(argv), dict(environment), folder
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / f"{name}.log"

    def start(self) -> None:
        assert self.process is None or self.process.poll() is not None, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill -9."""
        if self.running():
            self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(60)

    def stop(self, seconds: float = 120) -> int:
        """SIGTERM; return the exit code."""
        if self.process is None:
            return 0
        if self.running():
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end within {seconds:g} s:\n{self.tail()}") from None

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def tail(self, characters: int = 3000) -> str:
        return self.text()[-characters:]

    def events(self) -> list[dict[str, Any]]:
        """Return the JSON lines that it wrote."""
        found = []
        for line in self.text().splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n"):  # a line that is being written has no end yet
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found


def model_server(folder: Path) -> tuple[Program, int]:
    """Start the model server; return it and its port."""
    number = port()
    argv = [sys.executable, str(HERE / "modelserver.py"), str(number)]
    program = Program("model", argv, {"PATH": os.environ["PATH"]}, folder)
    program.start()
    try:
        until("the model server listens", 120, lambda: listening(number))
    except BaseException:
        program.kill()
        raise
    return program, number


class Minio(Program):
    """A MinIO of our own on the loopback."""

    def __init__(self, folder: Path, name: str = "minio") -> None:
        built = sorted(Cache().root.glob("built/program-minio-*/minio"), key=lambda p: p.stat().st_mtime)
        if not built:
            pytest.skip("no MinIO is built yet; `make demo` builds it")
        self.port = port()
        self.access, self.secret = secrets.token_hex(8), secrets.token_hex(20)
        argv = [str(built[-1]), "server", "--quiet", "--address", f"127.0.0.1:{self.port}", str(folder / name)]
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "MINIO_ROOT_USER": self.access,
            "MINIO_ROOT_PASSWORD": self.secret, "MINIO_UPDATE": "off", "MINIO_CALLHOME_ENABLE": "off",
            "MINIO_BROWSER": "off",
        }  # fmt: skip
        super().__init__(name, argv, environment, folder)

    def start(self) -> None:
        super().start()
        # It listens before it can serve, and answers 503 in between; `live` and `ready` say 200 all the time.
        until("MinIO serves", 120, self.serves)

    def serves(self) -> bool:
        """Say whether it is past its start: this path answers 503 until its drives are open."""
        call = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            call.request("GET", "/minio/health/cluster")
            return call.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            call.close()


class Nginx:
    """The shipped nginx with the shipped configuration, in a container on the host's network, in front of gateways."""

    def __init__(self, folder: Path, gateways: Sequence[int]) -> None:
        self.port = port()
        self.folder = folder
        shutil.copytree(ROOT / "compose/nginx", folder / "nginx")
        self._edit("nginx.conf", ("listen 8443 ssl", f"listen 127.0.0.1:{self.port} ssl"))
        self._edit("nginx.conf", ("listen 8080", f"listen 127.0.0.1:{port()}"))
        upstream = folder / "nginx/upstream.conf"
        lines = upstream.read_text().splitlines()
        members = [i for i, x in enumerate(lines) if x.strip().startswith("server ")]
        words = lines[members[0]].split()
        assert len(members) == 2
        lines[members[0] : members[-1] + 1] = [" ".join(["server", f"127.0.0.1:{g}", *words[2:]]) for g in gateways]
        upstream.write_text("\n".join(lines) + "\n")
        self.ca = self._certificate()
        self._id = ""

    def _edit(self, name: str, change: tuple[str, str]) -> None:
        path = self.folder / "nginx" / name
        text = path.read_text()
        assert text.count(change[0]) == 1, change
        path.write_text(text.replace(*change))

    def _certificate(self) -> Path:
        tls = self.folder / "tls"
        tls.mkdir()
        argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        argv += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        argv += ["-keyout", str(tls / "key.pem"), "-out", str(tls / "cert.pem")]
        subprocess.run(argv, check=True, capture_output=True)
        for path in tls.iterdir():
            os.chown(path, NGINX_UID, NGINX_UID)
        return tls / "cert.pem"

    def start(self) -> None:
        found = _docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}", "moat/nginx").split()
        if not found:
            pytest.skip("the engine has no image moat/nginx: run `make demo` first")
        argv = ["run", "--detach", "--rm", "--network", "host", "--read-only", "--cap-drop", "ALL"]
        argv += ["--user", f"{NGINX_UID}:{NGINX_UID}", "--security-opt", "no-new-privileges:true", "--tmpfs", "/tmp"]
        argv += ["--tmpfs", f"/var/cache/nginx:uid={NGINX_UID}", "-v", f"{self.folder}/nginx:/etc/nginx/moat:ro"]
        argv += ["-v", f"{self.folder}/tls:/run/secrets:ro", found[0]]
        argv += ["-c", "/etc/nginx/moat/nginx.conf", "-e", "/dev/stderr", "-g", "daemon off;"]
        self._id = _docker(*argv).strip()
        until("nginx listens", 120, lambda: listening(self.port))

    def log(self) -> str:
        return _docker("logs", self._id)

    def stop(self) -> None:
        if self._id:
            _docker("rm", "--force", self._id)
        self._id = ""


def _docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Relay:
    """A TCP relay on the loopback that can be cut (nothing passes, nobody is told), refuse, be slow, and heal."""

    def __init__(self, target: int) -> None:
        self.port = port()
        self.target = target
        self.mode = "open"  # open, cut, refuse
        self.delay = 0.0  # seconds a block is held
        self.passed = 0  # bytes
        self._loop = asyncio.new_event_loop()
        self._pipes: set[asyncio.StreamWriter] = set()
        self._healed = asyncio.Event()
        self._healed.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._connection, "127.0.0.1", self.port))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "refuse":
            writer.transport.abort()
            return
        await self._healed.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._pipes |= {writer, back}
        await asyncio.gather(self._pipe(reader, back), self._pipe(there, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay)
                await self._healed.wait()
                self.passed += len(data)
                writer.write(data)
                await writer.drain()
        self._pipes.discard(writer)
        with contextlib.suppress(OSError, RuntimeError):
            writer.close()

    async def _set(self, mode: str) -> None:
        self.mode = mode
        if mode == "cut":
            self._healed.clear()
        else:
            # What hung in the cut is lost, as after a real one.
            for writer in list(self._pipes):
                writer.transport.abort()
            self._healed.set()

    def cut(self) -> None:
        """From now on nothing passes: connections hang."""
        self._run(self._set("cut"))

    def refuse(self) -> None:
        """From now on connections are broken off at once."""
        self._run(self._set("refuse"))

    def heal(self) -> None:
        """Pass everything again."""
        self._run(self._set("open"))

    async def _end(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for writer in list(self._pipes):
            writer.transport.abort()
        await asyncio.sleep(0)

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
