# SPDX-License-Identifier: Apache-2.0
"""A small real OpenAI-compatible model server as a program of its own, whose answers say how they were asked.

An answer's text is ``[MARKER MODEL KEY] `` and the words of the prompt: MARKER is the first part of the path below
which it was asked (``/r7/v1/chat/completions``: ``r7``), MODEL the name it was asked for, KEY the first eight digits of
the SHA-256 of the key that was sent. ``GET /seen`` gives what came: moment (CLOCK_MONOTONIC), marker, model, key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import sys
import time
from typing import Any

CHUNK_DELAY = 0.03  # seconds between two words of a stream


class Server:
    """What came, and how it is answered."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, str, str, str]] = []

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve requests until the other side closes."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path = lines[0].split()[:2]
                headers = {n.strip().lower(): v.strip() for n, _, v in (x.partition(":") for x in lines[1:] if x)}
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                if method == "GET":
                    await _whole(writer, self.seen if path == "/seen" else {"object": "list", "data": []})
                else:
                    await self.completion(writer, path, headers, json.loads(raw))
        writer.close()

    async def completion(
        self, writer: asyncio.StreamWriter, path: str, headers: dict[str, str], body: dict[str, Any]
    ) -> None:
        """Answer one chat completion, whole or as a stream."""
        marker = path.split("/")[1]
        key = hashlib.sha256(headers.get("authorization", "").removeprefix("Bearer ").encode()).hexdigest()[:8]
        self.seen.append((time.monotonic(), marker, body["model"], key))
        prompt = str(body["messages"][-1]["content"])
        words = [f"[{marker} {body['model']} {key}]", *(" " + w for w in prompt.split())]
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        base = {"id": "chatcmpl-up", "created": int(time.time()), "model": body["model"]}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
            await _whole(writer, {**base, "object": "chat.completion", "choices": [choice], "usage": usage})
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        base["object"] = "chat.completion.chunk"
        for word in words:
            delta = {"role": "assistant", "content": word}
            await _event(writer, {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await asyncio.sleep(CHUNK_DELAY)
        await _event(writer, {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            await _event(writer, {**base, "choices": [], "usage": usage})
        await _chunk(writer, b"data: [DONE]\n\n")
        await _chunk(writer, b"")


async def _whole(writer: asyncio.StreamWriter, value: Any) -> None:
    raw = json.dumps(value).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    await writer.drain()


async def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    await _chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def serve(port: int) -> None:
    """Serve on the loopback until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(Server().connection, "127.0.0.1", port)
    async with server:
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
