# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway ask``: one chat completion over HTTP(S) with the standard library, as a client sees the site.

It checks what a client relies on: a plain answer has text and usage; a stream has tokens, a usage chunk, and ends
with ``[DONE]``. Anything less is a failure, not a short answer.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moat_gateway import secretfiles
from moat_gateway.errors import RequestFailed

_MAX_BODY = 16 << 20  # bytes of one plain answer
_MAX_LINE = 1 << 20  # bytes of one line of a stream


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: of the answer.
        stream: whether it was streamed.
        seconds: from the request to its end.
        first_token_seconds: from the request to the first text of a stream; ``None`` for a plain answer.
        chunks: pieces of text in a stream; 1 for a plain answer.
        usage: as the server counted.
        request_id: ``x-request-id`` of the answer.
    """

    text: str
    stream: bool
    seconds: float
    first_token_seconds: float | None
    chunks: int
    usage: Mapping[str, int]
    request_id: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of ``--json``."""
        return {"ok": True, **asdict(self)}


def ask(
    *,
    base_url: str,
    model: str,
    prompt: str,
    key_file: Path,
    ca_file: Path | None = None,
    stream: bool = False,
    max_tokens: int = 64,
    timeout: float = 120.0,
    on_text: Callable[[str], None] = lambda _text: None,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Make one chat completion.

    Args:
        base_url: scheme, host and port of the site, e.g. of nginx.
        model: name of a model in ``config.yaml``.
        prompt: the user's message.
        key_file: file with the client key.
        ca_file: certificate authority of the site; the system's if ``None``.
        stream: ask for a stream.
        max_tokens: most tokens of the answer.
        timeout: seconds without a byte after which it is given up.
        on_text: called with each piece of text as it comes.
        clock: monotonic seconds.

    Raises:
        RequestFailed: no complete answer; the message says what was missing.
        UnreadableSecret: the key file cannot be read.
    """
    key = secretfiles.read_value(key_file)
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection, path = _connect(base_url, ca_file, timeout)
    begun = clock()
    try:
        connection.request(
            "POST",
            path + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {key}", "accept": "*/*"},
        )
        response = connection.getresponse()
        if response.status != 200:
            raise _refused(response)
        read = _read_stream if stream else _read_plain
        return read(response, on_text, clock, begun)
    except (OSError, http.client.HTTPException) as e:
        raise RequestFailed(
            f"no answer from {base_url}",
            found=f"{type(e).__name__}: {e}",
            hint="check the URL, the certificate authority and that the site is ready (/_moat/ready)",
        ) from e
    finally:
        connection.close()


def _connect(base_url: str, ca_file: Path | None, timeout: float) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(base_url)
    try:
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not a URL")
        path = parts.path.rstrip("/").removesuffix("/v1")
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout), path
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        return http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=timeout, context=context), path
    except ValueError as e:
        raise RequestFailed("the URL cannot be used", found=base_url, expected="scheme, host and port") from e
    except (OSError, ssl.SSLError) as e:
        raise RequestFailed("the certificate authority cannot be read", found=str(e), path=str(ca_file)) from e


def _refused(response: http.client.HTTPResponse) -> RequestFailed:
    raw = response.read(_MAX_LINE)
    try:
        message = json.loads(raw)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = raw[:300].decode("utf-8", "replace")
    hints = {401: "give a key that counts (moat-gateway keys new)", 403: "choose a model that the key may use"}
    return RequestFailed(
        f"the answer is HTTP {response.status} (request id {response.headers.get('x-request-id')})",
        found=" ".join(str(message).split())[:300],
        expected="HTTP 200",
        hint=hints.get(response.status, "see the gateway's log for that request id"),
    )


def _usage(raw: Any) -> dict[str, int]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = {n: raw[n] for n in names if isinstance(raw.get(n), int)} if isinstance(raw, dict) else {}
    if len(usage) != len(names):
        raise RequestFailed("the answer says no usage", expected=", ".join(names))
    return usage


def _read_plain(
    response: http.client.HTTPResponse, on_text: Callable[[str], None], clock: Callable[[], float], begun: float
) -> Answer:
    raw = response.read(_MAX_BODY)
    try:
        body = json.loads(raw)
        text = body["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise RequestFailed("the answer is no chat completion", found=raw[:200].decode("utf-8", "replace")) from e
    if not isinstance(text, str) or not text:
        raise RequestFailed("the answer has no text", expected="at least one token")
    on_text(text)
    return Answer(
        text, False, round(clock() - begun, 3), None, 1, _usage(body.get("usage")), response.headers.get("x-request-id")
    )


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline(_MAX_LINE):
        text = line.decode("utf-8", "replace").strip()
        if text.startswith("data:"):
            yield text.removeprefix("data:").strip()


def _read_stream(
    response: http.client.HTTPResponse, on_text: Callable[[str], None], clock: Callable[[], float], begun: float
) -> Answer:
    pieces: list[str] = []
    first: float | None = None
    usage: Any = None
    done = False
    for data in _events(response):
        if data == "[DONE]":
            done = True
            break
        try:
            event = json.loads(data)
            choices = event.get("choices") or []
        except (ValueError, AttributeError) as e:
            raise RequestFailed("the stream holds something that is no event", found=data[:200]) from e
        if event.get("error"):
            raise RequestFailed("the stream ended with an error", found=str(event["error"])[:300])
        usage = event.get("usage") or usage
        piece = (choices[0].get("delta") or {}).get("content") if choices else None
        if piece:
            first = first if first is not None else round(clock() - begun, 3)
            pieces.append(piece)
            on_text(piece)
    if not done:
        raise RequestFailed("the stream broke off", found=f"{len(pieces)} pieces of text", expected="[DONE] at its end")
    if not pieces:
        raise RequestFailed("the stream has no text", expected="at least one token")
    return Answer(
        "".join(pieces),
        True,
        round(clock() - begun, 3),
        first,
        len(pieces),
        _usage(usage),
        response.headers.get("x-request-id"),
    )
