# SPDX-License-Identifier: Apache-2.0
"""A small real OpenAI-compatible model server on loopback: plain and streamed chat completions, errors, records.

It stands where vLLM or llama.cpp stand. Words of the prompt come back as tokens, so that answers differ by prompt.
Run as a program (``upstream.py PORT``) it serves from inside a network namespace.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GATE_TIMEOUT = 600.0  # seconds; a stream whose gate nobody opens ends then, cut


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Behaviour:
    """How the server answers; tests change it while it runs."""

    chunk_delay: float = 0.0  # seconds between two chunks of a stream
    gate: threading.Semaphore | None = None  # each chunk of a stream but the first waits until it is released once
    fail_with: int = 0  # HTTP status to answer with
    error_text: str = "boom"
    cut_after: int = 0  # chunks after which the connection is cut; 0 for never
    without_done: bool = False
    without_usage: bool = False
    seen: list[Seen] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, *args: object) -> None:
        pass

    def _json(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "up", "object": "model"}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(raw or b"{}")
        b = self.behaviour
        b.seen.append(Seen(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        if b.fail_with:
            self._json(b.fail_with, {"error": {"message": b.error_text, "type": "x", "code": None}})
            return
        prompt = str(body["messages"][-1]["content"])
        words = ["You", " said:", *(" " + w for w in prompt.split())]
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        base = {"id": "chatcmpl-up", "created": int(time.time()), "model": body["model"]}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            told = {} if b.without_usage else {"usage": usage}
            self._json(200, {**base, "object": "chat.completion", "choices": [choice], **told})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        base["object"] = "chat.completion.chunk"
        gate = b.gate
        for i, word in enumerate(words):
            if i:
                time.sleep(b.chunk_delay)
                if gate is not None and not gate.acquire(timeout=GATE_TIMEOUT):
                    return
            delta = {"role": "assistant", "content": word}
            self._event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            if b.cut_after == i + 1:
                self.close_connection = True
                return
        self._event({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (body.get("stream_options") or {}).get("include_usage") and not b.without_usage:
            self._event({**base, "choices": [], "usage": usage})
        if not b.without_done:
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nothing to print about."""


class Upstream:
    """The server in a thread, for ``with``."""

    def __init__(self, port: int = 0) -> None:
        self.behaviour = Behaviour()
        handler = type("Handler", (_Handler,), {"behaviour": self.behaviour})
        self._server = _Server(("127.0.0.1", port), handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Upstream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


if __name__ == "__main__":
    with Upstream(int(sys.argv[1])):
        threading.Event().wait()
