# SPDX-License-Identifier: Apache-2.0
"""A first request of every kind: what a program does on its first use is often not what it does at its start.

The requests go through the public port as a client's would, then once to each gateway (behind the public
port a request reaches only one of them), and to each gateway's admin socket. Without a client key they are
made with a wrong one: the refusal is a first request too, but the way to the models is not used then, and
the report says so.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moat.errors import EgressUnproven
from moat.site.egresscheck.model import RequestResult

_WRONG_KEY: Final = "sk-moat-this-is-no-key"
NO_KEY: Final = "no client key was given (--key-file): refused as it must be, but the way to the models was not used"
_SECONDS: Final = 120
_MOST_BYTES: Final = 4 << 20
#: For one kind of request to all models: each may have a server of its own, and they may all be away.
_MODELS_SECONDS: Final = 900
_QUESTION: Final = "Say one word."


@dataclass(frozen=True)
class Gateway:
    """One gateway: its name, where it listens, its admin socket as this process sees it."""

    name: str
    address: str
    port: int
    admin_socket: Path


@dataclass(frozen=True)
class Target:
    """Where the requests go.

    Attributes:
        address: of the public port, on this host.
        https_port: the public port; 0 where the entrance is on another host: the first gateway is asked instead.
        ca_file: authority of its certificate; ``None`` for the system's.
        key_file: file with a client key, or ``None``.
        gateways: the site's gateways, or those of this host.
        every_model: the key may use every model: if it is shown none, none is configured.
    """

    address: str
    https_port: int
    ca_file: Path | None
    key_file: Path | None
    gateways: tuple[Gateway, ...]
    every_model: bool = False


@dataclass(frozen=True)
class Answer:
    """Status 0 is none; ``why`` then says it."""

    status: int
    body: bytes
    headers: dict[str, str]
    why: str = ""

    def json(self) -> Any:
        """Return the body, or ``None`` if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def note(self) -> str:
        """What went wrong, in the server's words."""
        if self.why:
            return self.why
        raw = self.json()
        error = raw.get("error") if isinstance(raw, dict) else None
        text = str(error.get("message", "")) if isinstance(error, dict) else self.body[:200].decode("utf-8", "replace")
        return " ".join(text.split())[:120]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


Connect = Callable[[], http.client.HTTPConnection]


def read_key(path: Path | None) -> str | None:
    """Return the client key of a file; it is never shown.

    Raises:
        EgressUnproven: the file cannot be read, or holds no key.
    """
    if path is None:
        return None
    try:
        key = path.read_text("ascii").strip()
    except (OSError, ValueError) as e:
        raise _bad_key(path, e.strerror if isinstance(e, OSError) and e.strerror else "no plain text") from e
    if not key or not key.isprintable() or " " in key:
        raise _bad_key(path, "something else")
    return key


def _bad_key(path: Path, found: str) -> EgressUnproven:
    return EgressUnproven(
        f"the client key in {path} cannot be used",
        found=found,
        expected="one line with a key of this site",
        hint="make one with `moat-gateway keys new ID --team TEAM --out FILE` and name the file with --key-file",
        path=str(path),
    )


def first_requests(target: Target) -> list[RequestResult]:
    """Send a first request of every kind and return what came back.

    Raises:
        EgressUnproven: the key's file cannot be used.
    """
    key = read_key(target.key_file)
    if not target.https_port and not target.gateways:
        return []  # a host of the store or the counters: requests come from elsewhere
    return _Client(target, key).all()


class _Client:
    def __init__(self, target: Target, key: str | None) -> None:
        self._target = target
        self._known = key is not None
        #: A new site has no model yet: requests are refused, and that is the whole of what a request sets off.
        self._empty = False
        self._headers = {"Authorization": f"Bearer {key or _WRONG_KEY}", "Content-Type": "application/json"}

    def all(self) -> list[RequestResult]:
        """Send them, in the order in which a client would."""
        models, listed = self._models()
        chat, answering = self._every_model("chat", models, self._chat)
        results = [listed, chat]
        results.append(self._one("stream", answering, self._stream))
        results.append(self._embeddings(models))
        results += [self._at(gateway, answering) for gateway in self._target.gateways]
        if self._target.https_port:
            results.append(self._page())
        results += [self._metrics(gateway) for gateway in self._target.gateways]
        return results

    # --- how ---

    def _public(self) -> http.client.HTTPConnection:
        if not self._target.https_port:
            first = self._target.gateways[0]
            return http.client.HTTPConnection(first.address, first.port, timeout=_SECONDS)
        ca = self._target.ca_file
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        # The certificate names the site; we are on its host and come by an address.
        context.check_hostname = False
        return http.client.HTTPSConnection(
            self._target.address, self._target.https_port, timeout=_SECONDS, context=context
        )

    def _send(self, connect: Connect, method: str, path: str, body: object = None) -> Answer:
        try:
            connection = connect()
            try:
                connection.request(method, path, json.dumps(body) if body is not None else None, self._headers)
                response = connection.getresponse()
                return Answer(
                    response.status, response.read(_MOST_BYTES), {k.lower(): v for k, v in response.getheaders()}
                )
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as e:
            return Answer(0, b"", {}, f"no answer: {e}" if str(e) else f"no answer: {type(e).__name__}")

    # --- what ---

    def _models(self) -> tuple[list[str], RequestResult]:
        answer = self._send(self._public, "GET", "/v1/models")
        raw = answer.json()
        entries = raw.get("data") if isinstance(raw, dict) else None
        names = (
            [str(m["id"]) for m in entries if isinstance(m, dict) and "id" in m] if isinstance(entries, list) else []
        )
        if not self._known:
            return ["any"], self._refused("models", answer)
        if not names and answer.status == 200 and self._target.every_model:
            self._empty = True
            return [], RequestResult("models", 200, True, "no model is configured yet")
        if not names:
            return [], RequestResult("models", answer.status, False, answer.note or "the key may use no model")
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return names, RequestResult("models", answer.status, answer.status == 200, shown)

    def _refused(self, kind: str, answer: Answer) -> RequestResult:
        """A wrong key: 401 is what it must get, but no proof of what a right one sets off."""
        return RequestResult(kind, answer.status, False, NO_KEY if answer.status == 401 else answer.note)

    def _chat(self, connect: Connect, model: str) -> tuple[Answer, str]:
        answer = self._send(connect, "POST", "/v1/chat/completions", _question(model))
        raw = answer.json()
        usage = raw.get("usage") if isinstance(raw, dict) else None
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return answer, f"{tokens} tokens of answer" if answer.status == 200 else answer.note

    def _stream(self, connect: Connect, model: str) -> tuple[Answer, str]:
        answer = self._send(connect, "POST", "/v1/chat/completions", {**_question(model), "stream": True})
        if answer.status != 200:
            return answer, answer.note
        lines = [line for line in answer.body.splitlines() if line.startswith(b"data:")]
        if not lines or lines[-1].split(b":", 1)[1].strip() != b"[DONE]":
            return Answer(0, b"", {}, f"the stream ended early, after {len(lines)} events"), "the stream ended early"
        return answer, f"{len(lines)} events, the last one [DONE]"

    def _every_model(
        self, kind: str, models: Sequence[str], send: Callable[[Connect, str], tuple[Answer, str]]
    ) -> tuple[RequestResult, str | None]:
        """Ask every model once: each may have a server of its own. One of them has to answer."""
        if not self._known:
            return self._refused(kind, send(self._public, "any")[0]), None
        if self._empty:
            return self._without_models(kind, send(self._public, "any")[0]), None
        notes, answering, status = [], None, 0
        deadline = time.monotonic() + _MODELS_SECONDS
        for i, model in enumerate(models):
            if time.monotonic() > deadline:
                return self._out_of_time(kind, status, models[i:]), answering
            answer, note = send(self._public, model)
            notes.append(f"{model}: {answer.status or 'none'}, {note}")
            if answer.status == 200 and answering is None:
                answering, status = model, 200
            status = status or answer.status
        return RequestResult(kind, status, answering is not None, "; ".join(notes) or "there is no model"), answering

    def _out_of_time(self, kind: str, status: int, left: Sequence[str]) -> RequestResult:
        why = f"not asked because the others took {_MODELS_SECONDS // 60} minutes"
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        return RequestResult(kind, status, False, f"{len(left)} models ({shown}) were {why}")

    def _one(
        self,
        kind: str,
        model: str | None,
        send: Callable[[Connect, str], tuple[Answer, str]],
        connect: Connect | None = None,
    ) -> RequestResult:
        answer, note = send(connect or self._public, model or "any")
        if not self._known:
            return self._refused(kind, answer)
        if self._empty:
            return self._without_models(kind, answer)
        return RequestResult(kind, answer.status, answer.status == 200, f"{model}: {note}" if model else note)

    def _without_models(self, kind: str, answer: Answer) -> RequestResult:
        """A model that does not exist is refused by the gateway itself; nobody else is asked."""
        refused = answer.status in (400, 404, 422)
        note = "no model is configured yet: refused as it must be" if refused else answer.note
        return RequestResult(kind, answer.status, refused, note)

    def _embeddings(self, models: Sequence[str]) -> RequestResult:
        """What a model without embeddings answers is its own affair: only no answer at all is a failure."""
        if self._empty:
            body = {"model": "any", "input": _QUESTION}
            return self._without_models("embeddings", self._send(self._public, "POST", "/v1/embeddings", body))
        notes, status, answered = [], 0, bool(models)
        deadline = time.monotonic() + _MODELS_SECONDS
        for i, model in enumerate(models):
            if time.monotonic() > deadline:
                return self._out_of_time("embeddings", status, models[i:])
            answer = self._send(self._public, "POST", "/v1/embeddings", {"model": model, "input": _QUESTION})
            if not self._known:
                return self._refused("embeddings", answer)
            status = status or answer.status
            answered = answered and answer.status not in (0, 401, 403)
            notes.append(f"{model}: {answer.status or 'none'}" + ("" if answer.status == 200 else f", {answer.note}"))
        return RequestResult("embeddings", status, answered, "; ".join(notes) or "there is no model")

    def _at(self, gateway: Gateway, model: str | None) -> RequestResult:
        def connect() -> http.client.HTTPConnection:
            return http.client.HTTPConnection(gateway.address, gateway.port, timeout=_SECONDS)

        return self._one(f"chat at {gateway.name}", model, self._chat, connect)

    def _page(self) -> RequestResult:
        answer = self._send(self._public, "GET", "/ui/")
        policy = answer.headers.get("content-security-policy", "")
        if not answer.status:
            return RequestResult("ui", 0, False, answer.note)
        served = "no page is served" if answer.status == 404 else "a page is served"
        held = "default-src 'none'" in policy or "default-src 'self'" in policy
        note = f"{served}; " + (
            "a browser is told to load nothing from elsewhere" if held else "NO policy for browsers"
        )
        return RequestResult("ui", answer.status, held and answer.status in (200, 404), note)

    def _metrics(self, gateway: Gateway) -> RequestResult:
        answer = self._send(lambda: _UnixConnection(gateway.admin_socket), "GET", "/metrics")
        right = answer.status == 200 and b"moat_" in answer.body
        note = "from the admin socket" if right else answer.note
        return RequestResult(f"metrics of {gateway.name}", answer.status, right, note)


def _question(model: str) -> dict[str, object]:
    return {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": _QUESTION}]}
