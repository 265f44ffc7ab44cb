# SPDX-License-Identifier: Apache-2.0
"""The stores that the same tests run against: MinIO, SeaweedFS and a folder; drivers of them, and an evil relay."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.harness import PACKAGE, PATIENCE, START_TIMEOUT
from tests.integration.hotreload.programs import Program, listening, port, until

from moat.build.cache import Cache
from moat_gateway import sitekey

HERE = Path(__file__).resolve().parent
MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # bytes


def data_folder(folder: Path) -> Path:
    """Return a new folder for a store's data: in memory if there is room, as a busy disk stalls a store for seconds."""
    # What runs that were killed have left would take memory for good.
    for left in MEMORY.glob("moat-store-*"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    return Path(tempfile.mkdtemp(prefix=f"moat-store-{os.getpid()}-", dir=MEMORY if roomy else folder))


class Backend:
    """A store that a test may fill, stop and start.

    Attributes:
        kind: ``minio``, ``seaweedfs`` or ``directory``.
        port: of its S3 interface; 0 for a folder.
        program: its process, or ``None``.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.port = 0
        self.program: Program | None = None
        self.access, self.secret = secrets.token_hex(8), secrets.token_hex(20)
        if kind != "directory":
            self.data = data_folder(folder)
            weakref.finalize(self, shutil.rmtree, self.data, ignore_errors=True)
        if kind == "minio":
            self.program = self._minio()
        elif kind == "seaweedfs":
            self.program = self._seaweedfs()

    def _minio(self) -> Program:
        built = sorted(Cache().root.glob("built/program-minio-*/minio"), key=lambda p: p.stat().st_mtime)
        if not built:
            pytest.skip("no MinIO is built yet; `make demo` builds it")
        self.port = port()
        argv = [str(built[-1]), "server", "--quiet", "--address", f"127.0.0.1:{self.port}", str(self.data)]
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "MINIO_ROOT_USER": self.access,
            "MINIO_ROOT_PASSWORD": self.secret, "MINIO_UPDATE": "off", "MINIO_CALLHOME_ENABLE": "off",
            "MINIO_BROWSER": "off",
        }  # fmt: skip
        return Program("minio", argv, environment, self.folder)

    def _seaweedfs(self) -> Program:
        weed = Path(sys.executable).parent / "weed"
        self.port = port()
        identity = {
            "name": "root",
            "credentials": [{"accessKey": self.access, "secretKey": self.secret}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        argv = [str(weed), "server", f"-dir={self.data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        # It would open further ports on every address, and call home.
        argv += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-filer", "-s3"]
        argv += [f"-s3.port={self.port}", f"-s3.config={self.folder}/s3.json"]
        # Each bucket takes several volumes of its own.
        argv += ["-master.volumeSizeLimitMB=64", "-volume.max=1000"]
        self._master = port()
        argv += [f"-master.port={self._master}"]
        names = ("master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port.grpc")
        argv += [f"-{name}={port()}" for name in names]
        # Its own log files and sockets go there, too.
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "TMPDIR": str(self.folder)}
        return Program("weed", argv, environment, self.folder)

    def start(self) -> None:
        if self.program is not None:
            self.program.start()
            until(f"{self.kind} serves", PATIENCE, self._serves, 0.1)

    def _serves(self) -> bool:
        """Say whether it can store something: both listen before that."""
        try:
            if self.kind == "minio":
                # It answers 503 until its drives are open; `live` and `ready` say 200 all the time.
                return self._get(self.port, "/minio/health/cluster")[0] == 200
            return b'"fid"' in self._get(self._master, "/dir/assign")[1] and listening(self.port)
        except (OSError, http.client.HTTPException):
            return False

    def _get(self, number: int, path: str) -> tuple[int, bytes]:
        assert self.program is not None
        if "--certs-dir" in self.program.argv:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            call: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", number, timeout=5, context=context
            )
        else:
            call = http.client.HTTPConnection("127.0.0.1", number, timeout=5)
        try:
            call.request("GET", path)
            answer = call.getresponse()
            return answer.status, answer.read()
        finally:
            call.close()

    def stop(self) -> None:
        if self.program is not None:
            self.program.kill()


class Place:
    """One empty place of a backend: buckets or a folder of its own, and a site key.

    Args:
        backend: runs already.
        folder: an empty one.
        python: interpreter with the gateway's wheels.
    """

    def __init__(self, backend: Backend, folder: Path, python: Path) -> None:
        self.backend, self.folder, self.python = backend, folder, python
        self.bucket = f"config-{secrets.token_hex(6)}"
        for name in ("secrets", "site-keys", "tmp", "source"):
            (folder / name).mkdir(parents=True)
        self.key = sitekey.SigningKey.generate()
        self.key.write(folder / "secrets/site_key", folder / "site-keys/site.pub")
        self.write("store_access_key", backend.access)
        self.write("store_secret_key", backend.secret)
        self.write("master_key", "sk-" + secrets.token_hex(32))
        self.drivers: list[Driver] = []

    def write(self, name: str, value: str) -> Path:
        path = self.folder / "secrets" / name
        path.write_text(value + "\n")
        return path

    def prepare(self) -> Place:
        if self.backend.port:
            self.driver().ask("init")
        return self

    def environment(self, **more: str) -> dict[str, str]:
        f = self.folder
        settings = f / "gateway.yaml"
        settings.touch()
        source = {"MOAT_SOURCE_DIR": str(f / "source")}
        if self.backend.port:
            source = {
                "MOAT_STORE_ENDPOINT": f"127.0.0.1:{self.backend.port}",
                "MOAT_STORE_BUCKET": self.bucket,
                "MOAT_STORE_STATUS_BUCKET": f"{self.bucket}-status",
                "MOAT_STORE_ACCESS_KEY_FILE": str(f / "secrets/store_access_key"),
                "MOAT_STORE_SECRET_KEY_FILE": str(f / "secrets/store_secret_key"),
                "MOAT_STORE_TIMEOUT": "60",
            }
        return {
            "PATH": os.environ["PATH"], "HOME": str(f), "TMPDIR": str(f / "tmp"), "PYTHONPATH": str(PACKAGE),
            "PYTHONDONTWRITEBYTECODE": "1", "MOAT_SETTINGS_FILE": str(settings),
            "MOAT_SECRETS_DIR": str(f / "secrets"), "MOAT_MASTER_KEY_FILE": str(f / "secrets/master_key"),
            "MOAT_SITE_KEYS_DIR": str(f / "site-keys"), "MOAT_SITE_KEY_FILE": str(f / "secrets/site_key"),
            "MOAT_EGRESS_ALLOW": "model:8081", **source, **more,
        }  # fmt: skip

    def command(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run one command of ``moat-gateway`` to its end."""
        argv = [str(self.python), "-m", "moat_gateway", *words]
        environment = self.environment(**more)
        return subprocess.run(
            argv, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=START_TIMEOUT
        )

    def driver(self, **more: str) -> Driver:
        made = Driver(self.python, self.environment(**more), self.folder, own="PYTHONPATH" in more)
        self.drivers.append(made)
        return made

    def close(self) -> None:
        for driver in self.drivers:
            driver.close()


class Refused(Exception):
    """An operation of a driver was refused."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["text"])
        self.error: str = answer["error"]
        self.exit: int = answer["exit"]
        self.text: str = answer["text"]


class DriverHost:
    """A process that has imported what drivers need, and forks one on request; see ``storedriver.py``."""

    def __init__(self, python: Path, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [str(python), str(HERE / "storedriver.py"), str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def fork(self, environment: Mapping[str, str], folder: Path) -> socket.socket:
        """Return a socket to a new driver."""
        ours, theirs = socket.socketpair()
        with theirs:
            message = json.dumps({"environment": dict(environment), "folder": str(folder)})
            socket.send_fds(self._control, [message.encode()], [theirs.fileno()])
        return ours

    def close(self) -> None:
        self._control.close()
        self._process.wait(PATIENCE)


@functools.cache
def driver_host(python: Path) -> DriverHost:
    """Return the one that lasts as long as the tests."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1"}
    made = DriverHost(python, environment)
    atexit.register(made.close)
    return made


class Driver:
    """A process that uses the store on request; see ``storedriver.py``.

    Args:
        python: interpreter with the gateway's wheels.
        environment: its settings.
        folder: where it runs.
        own: whether its environment decides how Python itself starts, so that it cannot be a fork of the common host.
    """

    def __init__(self, python: Path, environment: dict[str, str], folder: Path, *, own: bool = False) -> None:
        host = DriverHost(python, environment) if own else driver_host(python)
        self._socket = host.fork(environment, folder)
        if own:
            host.close()  # the fork goes on
        self._lines = self._socket.makefile("r")
        assert self._read() == {"ready": True}

    def _read(self) -> Any:
        line = self._lines.readline()
        return json.loads(line) if line else None

    def send(self, op: str, **arguments: Any) -> None:
        """Begin an operation."""
        self.line(json.dumps({"op": op, **arguments}))

    def line(self, text: str = "") -> None:
        """Write a line: a request, or what a gate waits for."""
        self._socket.sendall(text.encode() + b"\n")

    def gate(self) -> None:
        """Return when the operation waits at its gate."""
        value = self._read()
        assert "at" in value, value

    def end(self) -> Any:
        """Return the value of the operation that was begun."""
        answer = self._read()
        assert answer is not None, "the driver ended"
        assert "ok" in answer, answer
        if not answer["ok"]:
            raise Refused(answer)
        return answer["value"]

    def ask(self, op: str, **arguments: Any) -> Any:
        """Carry out an operation."""
        self.send(op, **arguments)
        return self.end()

    def killed(self) -> bool:
        """Wait for the process's end; say whether it was killed."""
        return bool(self._read() == {"ended": -signal.SIGKILL})

    def close(self) -> None:
        """Have it end, and wait until it has."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        while self._lines.readline():
            pass
        self._lines.close()
        self._socket.close()


class Asker:
    """A process that makes requests of a store as any account; see ``storeasker.py``.

    Args:
        python: interpreter with the gateway's wheels.
        port: of the store.
    """

    def __init__(self, python: Path, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [str(python), str(HERE / "storeasker.py")],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, keys: tuple[str, str], call: str, **args: Any) -> dict[str, Any]:
        """Make a request of S3."""
        return self._answer({"call": call, "args": args}, keys)

    def admin(
        self, keys: tuple[str, str], method: str, path: str, query: dict[str, str], body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Make a request of MinIO's admin interface."""
        return self._answer({"method": method, "path": path, "query": query, "sealed": body}, keys)

    def _answer(self, question: dict[str, Any], keys: tuple[str, str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question |= {"url": self._url, "access": keys[0], "secret": keys[1]}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the asker ended"
        value: dict[str, Any] = json.loads(line)
        return value

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)


class Scissors:
    """A TCP relay that cuts a connection at a chosen point of a chosen HTTP request.

    Args:
        target: port of the store.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._rule: tuple[re.Pattern[bytes], str, int] | None = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, request: str, at: str, after: int = 0) -> None:
        """Cut the next request that matches.

        Args:
            request: pattern of its first line.
            at: ``request`` (it does not arrive), ``body`` (after so many bytes), or ``answer`` (that is lost).
            after: bytes that arrive.
        """
        self._rule = re.compile(request.encode()), at, after

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target), 10)
        except OSError:
            client.close()
            return
        dropping = threading.Event()
        threading.Thread(target=self._back, args=(server, client, dropping), daemon=True).start()
        budget: int | None = None
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                rule = self._rule
                if budget is None and rule is not None and rule[0].match(data):
                    self._rule = None
                    if rule[1] == "answer":
                        dropping.set()
                    else:
                        budget = 0 if rule[1] == "request" else rule[2]
                if budget is not None:
                    server.sendall(data[:budget])
                    budget -= len(data)
                    if budget <= 0:
                        break
                else:
                    server.sendall(data)
        if budget is not None:
            self.cuts += 1
        _abort(client)
        _abort(server)

    def _back(self, server: socket.socket, client: socket.socket, dropping: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                # "100 Continue" is no answer yet: the request's body comes after it.
                if dropping.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    self.cuts += 1
                    break
                client.sendall(data)
        _abort(client)
        _abort(server)

    def close(self) -> None:
        self._listener.close()


def _abort(s: socket.socket) -> None:
    with contextlib.suppress(OSError):
        s.shutdown(socket.SHUT_RDWR)
    s.close()


@contextlib.contextmanager
def running(kind: str, folder: Path) -> Iterator[Backend]:
    """Run a store for a block."""
    backend = Backend(kind, folder)
    try:
        backend.start()
        yield backend
    finally:
        backend.stop()
        shutil.rmtree(folder, ignore_errors=True)


def eventually(what: str, seconds: float, check: Callable[[], Any]) -> Any:
    """Return the first true value of ``check``, asked until the deadline; refusals count as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Refused):
            value = check()
            if value:
                return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
