# SPDX-License-Identifier: Apache-2.0
"""A client that loads a site at a bounded rate and counts what failed, and how; standard library only.

Four kinds of traffic run side by side, because each is lost in its own way when a gateway or nginx is restarted:

``new``     a completion on a connection of its own
``kept``    a completion on a connection that is kept open between requests, as OpenAI's client does
``models``  a GET on a kept connection
``stream``  a streamed completion, which must end with ``data: [DONE]``

It runs for ``--seconds``, or until SIGTERM or SIGINT; then running requests finish and one JSON object is printed. It
ends with 0 only if there was traffic of each kind and nothing failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import ssl
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KINDS = ("new", "kept", "models", "stream")


class Failed(Exception):
    """One request failed; the text is the kind of failure."""


@dataclass
class Connection:
    """One connection, with TLS where the site has it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def closed_by_the_other_side(self) -> bool:
        """Say whether the end has been seen; then a client opens another one before it asks."""
        return self.reader.at_eof()

    async def close(self) -> None:
        """Close it and wait for it."""
        self.writer.close()
        with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
            await asyncio.wait_for(self.writer.wait_closed(), 2)


@dataclass
class Load:
    """What is run, and what came of it."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    key: str
    model: str
    words: int
    max_tokens: int
    timeout: float
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    done: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    reopened: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in KINDS})
    begun: float = field(default_factory=time.monotonic)

    async def connect(self) -> Connection:
        try:
            return Connection(*await asyncio.open_connection(self.host, self.port, ssl=self.tls))
        except OSError as e:
            raise Failed(f"connect: {type(e).__name__}") from e

    def request(self, kind: str, number: int, *, keep: bool) -> bytes:
        lines = [f"Host: {self.host}", f"Authorization: Bearer {self.key}", f"x-request-id: load-{kind}-{number:08d}"]
        lines.append(f"Connection: {'keep-alive' if keep else 'close'}")
        if kind == "models":
            return ("\r\n".join(["GET /v1/models HTTP/1.1", *lines]) + "\r\n\r\n").encode()
        text = " ".join(f"word{i}" for i in range(self.words if kind == "stream" else 3))
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": f"Say {number}: {text}"}]}
        body["max_tokens"] = self.max_tokens if kind == "stream" else 4
        if kind == "stream":
            body["stream"] = True
        raw = json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(raw)}"]
        return ("\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines]) + "\r\n\r\n").encode() + raw

    async def ask(self, connection: Connection, kind: str, number: int, *, keep: bool) -> bool:
        """Send one request and read its answer whole; return whether the connection may be used again."""
        first = True
        try:
            connection.writer.write(self.request(kind, number, keep=keep))
            await connection.writer.drain()
            head = await connection.reader.readuntil(b"\r\n\r\n")
            first = False
            lines = head.decode("latin-1").split("\r\n")
            status = int(lines[0].split()[1])
            headers = {n.strip().lower(): v.strip() for n, _, v in (x.partition(":") for x in lines[1:] if x)}
            body = await self.body(connection, headers)
        except asyncio.IncompleteReadError as e:
            # Not one byte: the connection was closed under the request. Some bytes: the answer was cut.
            what = "closed before the answer" if first and not e.partial else "answer cut"
            raise Failed(what) from e
        except (OSError, ssl.SSLError) as e:
            raise Failed(f"{'closed before the answer' if first else 'answer cut'}: {type(e).__name__}") from e
        if status != 200:
            raise Failed(f"status {status}: {body[:200].decode('utf-8', 'replace')}")
        if kind == "stream" and not body.rstrip().endswith(b"data: [DONE]"):
            raise Failed("stream without [DONE]")
        if kind in ("new", "kept") and b'"chat.completion"' not in body.replace(b" ", b""):
            raise Failed("not a completion")
        return keep and headers.get("connection", "").lower() != "close"

    async def body(self, connection: Connection, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            pieces = []
            while size := int((await connection.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                pieces.append(await connection.reader.readexactly(size))
                await connection.reader.readexactly(2)
            await connection.reader.readuntil(b"\r\n")
            return b"".join(pieces)
        return await connection.reader.readexactly(int(headers.get("content-length", 0)))

    async def worker(self, kind: str, worker: int, pause: float) -> None:
        """Ask again and again, with a pause between, until it is time to stop."""
        keep = kind in ("kept", "models")
        connection: Connection | None = None
        number = worker * 1_000_000
        await asyncio.sleep(pause * (worker % 7) / 7)
        while not self.stop.is_set():
            number += 1
            begun = time.monotonic()
            try:
                async with asyncio.timeout(self.timeout):
                    if connection is not None and connection.closed_by_the_other_side():
                        await connection.close()
                        connection = None
                        self.reopened += 1
                    connection = connection or await self.connect()
                    again = await self.ask(connection, kind, number, keep=keep)
                self.done[kind] += 1
                self.seconds[kind].append(time.monotonic() - begun)
            except (Failed, TimeoutError) as e:
                again = False
                what = str(e) if isinstance(e, Failed) else f"no whole answer in {self.timeout:g} s"
                self.failures.append({"at": round(begun - self.begun, 2), "kind": kind, "what": what, "id": number})
            if not again and connection is not None:
                await connection.close()
                connection = None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), pause)
        if connection is not None:
            await connection.close()

    def result(self) -> dict[str, Any]:
        """Return what came of it."""

        def times(values: list[float]) -> dict[str, float]:
            ordered = sorted(values)
            return {
                "median": round(statistics.median(ordered), 3),
                "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
                "longest": round(ordered[-1], 3),
            }

        by_kind = Counter(f"{f['kind']}: {f['what']}" for f in self.failures)
        return {
            "ok": not self.failures and all(self.done[k] for k in KINDS),
            "seconds": round(time.monotonic() - self.begun, 1),
            "requests": sum(self.done.values()) + len(self.failures),
            "failed": len(self.failures),
            "done": {k: self.done[k] for k in KINDS},
            "reopened": self.reopened,
            "answer_seconds": {k: times(v) for k, v in self.seconds.items() if v},
            "failures": dict(by_kind),
            "first_failures": self.failures[:20],
        }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the load and return its result."""
    url = urlsplit(args.base_url)
    tls = ssl.create_default_context(cafile=args.ca_file) if url.scheme == "https" else None
    port = url.port or (443 if tls else 80)
    key = args.key_file.read_text("ascii").strip()
    load = Load(url.hostname or "", port, tls, key, args.model, args.words, args.max_tokens, args.timeout)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, load.stop.set)
    if args.seconds:
        loop.call_later(args.seconds, load.stop.set)
    pace = {"new": args.workers / args.rate, "kept": args.workers / args.rate, "models": args.workers / args.rate}
    count = {"new": args.workers, "kept": args.workers, "models": args.workers, "stream": args.streams}
    async with asyncio.TaskGroup() as group:
        for kind in KINDS:
            for i in range(count[kind]):
                group.create_task(load.worker(kind, 100 * KINDS.index(kind) + i, pace.get(kind, 0.05)))
    return load.result()


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Load a site at a bounded rate and count what fails.")
    parser.add_argument("--base-url", required=True, help="scheme, host and port of the site")
    parser.add_argument("--ca-file", help="certificate authority of the site")
    parser.add_argument("--key-file", type=Path, required=True, help="file with a client key")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rate", type=float, default=5, help="requests a second of each kind but streams (default 5)")
    parser.add_argument("--workers", type=int, default=3, help="connections of each kind but streams (default 3)")
    parser.add_argument("--streams", type=int, default=4, help="streams at a time (default 4)")
    parser.add_argument("--words", type=int, default=60, help="words in the prompt of a stream (default 60)")
    parser.add_argument("--max-tokens", type=int, default=150, help="tokens of a stream (default 150)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one answer (default 60)")
    parser.add_argument("--seconds", type=float, default=0, help="how long; 0 (the default) until SIGTERM or SIGINT")
    parser.add_argument("--out", type=Path, help="write the result there too")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")
    print(text)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
