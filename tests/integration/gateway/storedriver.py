# SPDX-License-Identifier: Apache-2.0
"""Processes that use ``moat_gateway.revstore`` and ``publish`` on request: one JSON object a line, in and out.

Run by the gateway's Python, which has boto3. Importing that takes a second, so this program does it once and forks for
each process that is asked for; nothing of one is shared with another. The settings come from the environment that is
given for it, as for a command. Faults are real: ``die_at`` ends the process with SIGKILL before or after a step,
``gate`` makes it wait for a line before a step.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import boto3  # noqa: F401 - so that no fork has to

from moat_gateway import publish, revstore, settings, sitekey, store
from moat_gateway.errors import GatewayError


def main(fd: int) -> None:
    """Fork a process for each message until the other end closes; with it comes the socket that one is to talk by."""
    with socket.socket(fileno=fd) as control:
        while True:
            message, fds, _flags, _address = socket.recv_fds(control, 1 << 16, 1)
            if not message:
                return
            if os.fork() == 0:
                control.close()
                watch(fds[0], **json.loads(message))
            os.close(fds[0])
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def watch(fd: int, environment: dict[str, str], folder: str) -> NoReturn:
    """Fork once more, and say at the end how the fork ended."""
    pid = os.fork()
    if pid == 0:
        os.dup2(fd, 0)
        os.dup2(fd, 1)
        os.close(fd)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        serve()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    with suppress(OSError):
        os.write(fd, json.dumps({"ended": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    os._exit(0)


def serve() -> None:
    """Answer requests until the input ends."""
    values = settings.load(os.environ)[0]
    store = revstore.open_store(values)
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer({"ok": True, "value": Operations(values, store).__getattribute__(request.pop("op"))(**request)})
        except GatewayError as e:
            answer({"ok": False, "error": type(e).__name__, "exit": e.exit_code, "text": e.one_line()})


def answer(value: Any) -> None:
    """Write one line."""
    print(json.dumps(value), flush=True)


class Operations:
    """What can be asked for."""

    def __init__(self, values: settings.Settings, store: revstore.Store) -> None:
        self.values, self.store = values, store

    begun: publish.Base | None = None

    def push(
        self,
        text: str,
        size: int = 0,
        number: int | None = None,
        die_at: str = "",
        gate: str = "",
        base: bool = False,
        author: str = "tester",
    ) -> Any:
        store: Any = self.store
        if die_at or gate:
            store = Faulty(self.store, die_at, gate)
        key = sitekey.SigningKey.read(self.values.site_key_file)
        files = {"config.yaml": text.encode(), "keys.yaml": b"keys: []\n"}
        if size:
            files["routers/large.txt"] = os.urandom(size // 2).hex().encode()
        done = publish.push(
            store,
            publish.Wanted(files, author, f"says {text}", number, base=self.begun if base else None),
            key=key,
            trusted=sitekey.read_trusted(self.values.site_keys_dir),
            limit=self.values.revision_max << 20,
        )
        return dataclasses.asdict(done)

    def begin(self) -> None:
        """See what is in force, as a command does before it checks its folder."""
        Operations.begun = publish.base(self.store)

    def carry(self, raw: str) -> Any:
        done = publish.carry(
            self.store,
            base64.b64decode(raw),
            trusted=sitekey.read_trusted(self.values.site_keys_dir),
            limit=self.values.revision_max << 20,
            author="carrier",
        )
        return dataclasses.asdict(done)

    def pointer(self, etag: str | None = None) -> Any:
        found = self.store.pointer(etag)
        return dataclasses.asdict(found) if found else None

    def content(self, limit: int = 1 << 30) -> str:
        """Return config.yaml of what is in force, verified."""
        _pointer, made = publish.current(self.store, sitekey.read_trusted(self.values.site_keys_dir), limit)
        return made.files["config.yaml"].decode()

    def get(self, number: int) -> str:
        return base64.b64encode(self.store.get(number)).decode()

    def upload(self, number: int, raw: str) -> None:
        self.store.upload(number, base64.b64decode(raw))

    def init(self) -> None:
        """Do what `moat-gateway store init` does."""
        store.init(self.values)
        store.init_status(self.values)

    def list(self) -> Any:
        return [s.number for s in self.store.list()]

    def probe(self) -> None:
        self.store.probe()

    def report(self, node: str, value: Any) -> None:
        self.store.report(node, json.dumps(value).encode())

    def reports(self) -> Any:
        return {n: {"value": json.loads(r.raw), "age": r.age} for n, r in self.store.reports().items()}

    def forget(self, node: str) -> bool:
        return self.store.forget(node)

    def replica_of(self) -> str | None:
        return self.store.replica_of()

    def plant(self, name: str, raw: str | None) -> None:
        """Write (or with ``None`` remove) an object as somebody who goes past the product."""
        if self.values.source_dir:
            path = Path(self.values.source_dir) / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            if raw is not None:
                path.write_bytes(base64.b64decode(raw))
            return
        client = store.connect(self.values)
        if raw is None:
            client.delete_object(Bucket=self.values.store_bucket, Key=name)
        else:
            client.put_object(Bucket=self.values.store_bucket, Key=name, Body=base64.b64decode(raw))


class Faulty:
    """A store whose steps can be the last ones of this process, or wait for somebody else."""

    def __init__(self, store: revstore.Store, die_at: str, gate: str) -> None:
        self._store, self._die_at, self._gate = store, die_at, gate

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def step(*arguments: Any) -> Any:
            if self._gate == name:
                answer({"at": name})
                sys.stdin.readline()
            if self._die_at == f"before {name}":
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(*arguments)
            if self._die_at == f"after {name}":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return step


if __name__ == "__main__":
    main(int(sys.argv[1]))
