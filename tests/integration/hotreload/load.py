# SPDX-License-Identifier: Apache-2.0
"""Steady load on a site as a program of its own: every answer is checked whole and written down with who answered it.

Through nginx go the four kinds of traffic of ``tests/loadclient.py``. Beside them each gateway named by ``--probe`` is
asked directly, one request after the other on one connection: what such a sequence says of the revision can only go
forward. Each line of the output is one request (see :class:`Record`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import ssl
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tests.loadclient import Connection, Failed, Load

TEXT = re.compile(r"\[(\S+) (\S+) ([0-9a-f]{8})\] (.*)", re.DOTALL)


@dataclass(frozen=True)
class Record:
    """One request: its moments (CLOCK_MONOTONIC), what was asked of whom, and who answered (or ``failed``: why not)."""

    begun: float
    ended: float
    kind: str
    target: str
    model: str
    marker: str = ""
    key: str = ""
    failed: str = ""


@dataclass
class Checked(Load):
    """The load client, with an eye on the text of each answer."""

    target: str = "nginx"
    models: tuple[str, ...] = ()
    records: list[Record] = field(default_factory=list)
    bodies: dict[int, bytes] = field(default_factory=dict)

    def request(self, kind: str, number: int, *, keep: bool) -> bytes:
        self.model = self.models[number % len(self.models)]
        return super().request("kept" if kind == "probe" else kind, number, keep=keep)

    async def body(self, connection: Connection, headers: dict[str, str]) -> bytes:
        self.bodies[id(connection)] = whole = await super().body(connection, headers)
        return whole

    async def ask(self, connection: Connection, kind: str, number: int, *, keep: bool) -> bool:
        begun, model, said = time.monotonic(), self.models[number % len(self.models)], ("", "", "")
        try:
            again = await super().ask(connection, kind, number, keep=keep)
            if kind != "models":
                said = self.said(kind, number, self.bodies.pop(id(connection)))
                if said[1] != model:
                    raise Failed(f"the model {said[1]} answered instead of {model}")
        except BaseException as e:
            why = str(e) or type(e).__name__
            self.records.append(Record(begun, time.monotonic(), kind, self.target, model, failed=why))
            raise
        self.records.append(Record(begun, time.monotonic(), kind, self.target, model, said[0], said[2]))
        return again

    def said(self, kind: str, number: int, body: bytes) -> tuple[str, str, str]:
        """Return marker, model and key of a text that is whole."""
        if kind == "stream":
            events = [json.loads(x[6:]) for x in body.decode().splitlines() if x.startswith("data: {")]
            choices = [c for e in events for c in e.get("choices", [])]
            text = "".join(c["delta"].get("content") or "" for c in choices)
            if [c["finish_reason"] for c in choices if c.get("finish_reason")] != ["stop"]:
                raise Failed("stream without an end")
        else:
            text = json.loads(body)["choices"][0]["message"]["content"]
        words = " ".join(f"word{i}" for i in range(self.words if kind == "stream" else 3))
        found = TEXT.fullmatch(text)
        if found is None or found[4] != f"Say {number}: {words}":
            raise Failed(f"text is not whole: {text[-60:]!r}")
        return found[1], found[2], found[3]

    async def probe(self, pause: float) -> None:
        """Ask this gateway again and again; a gateway that is not there is asked until it is (a probe cannot fail)."""
        connection: Connection | None = None
        number = 0
        while not self.stop.is_set():
            number += 1
            try:
                async with asyncio.timeout(self.timeout):
                    connection = connection or await self.connect()
                    if not await self.ask(connection, "probe", number, keep=True):
                        await connection.close()
                        connection = None
            except (Failed, TimeoutError):
                if connection is not None:
                    await connection.close()
                connection = None
            await asyncio.sleep(pause)
        if connection is not None:
            await connection.close()


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the load; return its records, and the failures of what went through nginx."""
    tls = ssl.create_default_context(cafile=args.ca_file)
    key, models = args.key_file.read_text("ascii").strip(), tuple(args.models.split(","))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    def load(port: int, target: str, context: ssl.SSLContext | None) -> Checked:
        made = Checked("127.0.0.1", port, context, key, "", args.words, 4, args.timeout, target=target, models=models)
        made.stop = stop
        return made

    through = load(args.port, "nginx", tls)
    probes = [load(int(p), name, None) for name, _, p in (x.partition("=") for x in args.probe)]

    async def tell() -> None:
        """Write a line each quarter of a second: how many were answered, and which markers the probes have seen."""
        while not stop.is_set():
            probed = sorted({r.marker for p in probes for r in p.records if not r.failed})
            line = {"done": dict(through.done), "failed": len(through.failures), "probed": probed}
            print(json.dumps(line), flush=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.25)

    async with asyncio.TaskGroup() as group:
        group.create_task(tell())
        for i in range(args.streams):
            group.create_task(through.worker("stream", 100 + i, 0.05))
        for kind, first in (("new", 200), ("kept", 300), ("models", 400)):
            for i in range(2):
                group.create_task(through.worker(kind, first + i, 2 / args.rate))
        for p in probes:
            group.create_task(p.probe(1 / args.probe_rate))
    records = [asdict(r) for one in (through, *probes) for r in one.records]
    return {"records": records, "failures": through.failures, "reopened": through.reopened}


def main() -> None:
    """Run as a program until SIGTERM."""
    parser = argparse.ArgumentParser(description="Load a site and write down each answer.")
    parser.add_argument("--port", type=int, required=True, help="nginx's port with TLS")
    parser.add_argument("--ca-file", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--models", required=True, help="names, with commas")
    parser.add_argument("--probe", action="append", default=[], help="NAME=PORT of a gateway to ask directly")
    parser.add_argument("--rate", type=float, default=3, help="requests a second of each kind but streams")
    parser.add_argument("--probe-rate", type=float, default=4, help="requests a second of each gateway at most")
    parser.add_argument("--streams", type=int, default=3, help="streams at a time")
    parser.add_argument("--words", type=int, default=60, help="words of a stream")
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(asyncio.run(run(args))))


if __name__ == "__main__":
    main()
