# SPDX-License-Identifier: Apache-2.0
"""One chat completion over TLS, plain or streamed: what a client on the host sees. Standard library only."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from moat.errors import DemoFailed


@dataclass(frozen=True)
class Answer:
    """What came back. Times are seconds from the request; ``chunks`` counts content chunks (1 if plain)."""

    text: str
    chunks: int
    first: float
    total: float
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @property
    def usage(self) -> str:
        """One line for the operator."""
        chunks = f"{self.chunks} chunk" if self.chunks == 1 else f"{self.chunks} chunks"
        return (
            f"{self.prompt_tokens} + {self.completion_tokens} = {self.total_tokens} tokens, {chunks}, "
            f"first after {self.first:.2f} s, all after {self.total:.2f} s"
        )


def ask(*, port: int, ca_file: Path, key_file: Path, model: str, prompt: str, stream: bool, max_tokens: int) -> Answer:
    """Ask through the published port of this host.

    Raises:
        DemoFailed: no connection, another status than 200, a stream without ``[DONE]`` or without usage.
    """
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    context = ssl.create_default_context(cafile=str(ca_file))
    connection = http.client.HTTPSConnection("localhost", port, timeout=120, context=context)
    headers = {"Authorization": f"Bearer {key_file.read_text('ascii').strip()}", "Content-Type": "application/json"}
    started = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise DemoFailed(
                "the gateway refused the question",
                found=f"{response.status} {response.read(2000).decode('utf-8', 'replace')}",
                expected="200",
                hint="docker compose logs nginx gateway-1 gateway-2",
            )
        return _streamed(response, started) if stream else _plain(response, started)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as e:
        raise DemoFailed(
            "no complete answer through the published port",
            found=f"{type(e).__name__}: {e}",
            hint="docker compose ps; docker compose logs nginx",
        ) from e
    finally:
        connection.close()


def _plain(response: http.client.HTTPResponse, started: float) -> Answer:
    raw = json.loads(response.read())
    took = time.monotonic() - started
    u = raw["usage"]
    text = str(raw["choices"][0]["message"]["content"])
    return Answer(text, 1, took, took, u["prompt_tokens"], u["completion_tokens"], u["total_tokens"])


def _streamed(response: http.client.HTTPResponse, started: float) -> Answer:
    text, chunks, first, usage, ended = "", 0, 0.0, None, False
    while line := response.readline():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            ended = True
            break
        raw = json.loads(data)
        usage = raw.get("usage") or usage
        for choice in raw.get("choices", ()):
            if piece := choice["delta"].get("content"):
                first = first or time.monotonic() - started
                chunks += 1
                text += piece
    if not ended or usage is None:
        raise DemoFailed(
            "the stream ended early",
            found=f"{chunks} chunks, {'no ' if not ended else ''}[DONE], {'no usage' if usage is None else 'usage'}",
            expected="a usage chunk and [DONE]",
            hint="docker compose logs gateway-1 gateway-2 model",
        )
    total = time.monotonic() - started
    return Answer(text, chunks, first, total, usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
