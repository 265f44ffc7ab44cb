# SPDX-License-Identifier: Apache-2.0
"""Proves what the first requests make of a site's answers, against real servers: TLS, HTTP and a Unix socket.

The servers are ours and stand for a site that answers well, refuses, breaks off or is silent; the real site answers in
tests/acceptance/test_egress_verify.py.
"""

from __future__ import annotations

import json
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from moat.errors import EgressUnproven
from moat.site.egresscheck import requests
from moat.site.egresscheck.requests import NO_KEY, Gateway, Target, first_requests

KEY = "sk-moat-right"


class Site(BaseHTTPRequestHandler):
    """Answers as the class attributes say; collects what was asked, and with which key."""

    asked: list[tuple[str, str, str]]
    chat_status = 200
    done = True
    models: tuple[str, ...] = ("small",)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def address_string(self) -> str:
        return "local"

    def do_GET(self) -> None:
        self.note("")
        if self.path == "/metrics":
            self.answer(200, "moat_requests_total 1")
        elif self.path == "/v1/models" and self.known():
            self.answer(200, json.dumps({"data": [{"id": m} for m in self.models]}))
        elif self.path == "/v1/models":
            self.answer(401, '{"error": {"message": "wrong key"}}')
        else:
            self.answer(404, "{}", "default-src 'none'")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.note(body["model"])
        if not self.known():
            self.answer(401, '{"error": {"message": "wrong key"}}')
        elif self.path == "/v1/embeddings":
            self.answer(501, '{"error": {"message": "no embeddings here"}}')
        elif body.get("stream"):
            self.answer(200, "data: {}\n\n" + ("data: [DONE]\n\n" if self.done else ""))
        elif self.chat_status == 200 and body["model"] != "embedder":
            self.answer(200, '{"usage": {"completion_tokens": 4}}')
        else:
            self.answer(500, '{"error": {"message": "the model is away"}}')

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {KEY}"

    def note(self, model: str) -> None:
        self.asked.append((self.path, model, self.headers.get("Authorization", "")))

    def answer(self, status: int, text: str, policy: str = "") -> None:
        self.send_response(status)
        if policy:
            self.send_header("Content-Security-Policy", policy)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


class _UnixServer(socketserver.UnixStreamServer):
    def get_request(self) -> Any:
        request, _ = super().get_request()
        return request, ("local", 0)


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=gateway.site.example", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def handler() -> type[Site]:
    return type("Handler", (Site,), {"asked": []})


@pytest.fixture
def target(certificate: Path, handler: type[Site], tmp_path: Path) -> Iterator[Target]:
    (tmp_path / "client.key").write_text(KEY + "\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    public, inner = HTTPServer(("127.0.0.1", 0), handler), HTTPServer(("127.0.0.1", 0), handler)
    public.socket = context.wrap_socket(public.socket, server_side=True)
    admin = _UnixServer(str(tmp_path / "admin.sock"), handler)
    with serving(public), serving(inner), serving(admin):
        gateways = (Gateway("gateway-1", "127.0.0.1", inner.server_port, tmp_path / "admin.sock"),)
        yield Target("127.0.0.1", public.server_port, certificate / "cert.pem", tmp_path / "client.key", gateways)


def results(target: Target) -> dict[str, tuple[int, bool, str]]:
    return {r.kind: (r.status, r.ok, r.note) for r in first_requests(target)}


def test_a_site_that_answers(target: Target, handler: type[Site]) -> None:
    found = results(target)
    assert {kind: (status, ok) for kind, (status, ok, _) in found.items()} == {
        "models": (200, True),
        "chat": (200, True),
        "stream": (200, True),
        "embeddings": (501, True),  # recorded: what a model cannot do is no matter of egress
        "chat at gateway-1": (200, True),
        "ui": (404, True),
        "metrics of gateway-1": (200, True),
    }
    assert "no embeddings here" in found["embeddings"][2]
    assert KEY not in str(found)


def test_without_a_key_nothing_is_claimed(target: Target, handler: type[Site]) -> None:
    found = results(replace(target, key_file=None))
    for kind in ("models", "chat", "stream", "embeddings", "chat at gateway-1"):
        assert found[kind] == (401, False, NO_KEY)
    assert found["ui"][:2] == (404, True)
    assert not any(KEY in authorization for _, _, authorization in handler.asked)


def test_every_model_is_asked_once_and_one_has_to_answer(target: Target, handler: type[Site]) -> None:
    handler.models = ("embedder", "small")
    found = results(target)
    assert found["chat"] == (200, True, "embedder: 500, the model is away; small: 200, 4 tokens of answer")
    assert found["stream"][2].startswith("small: ")
    asked = [(path, model) for path, model, _ in handler.asked if path == "/v1/embeddings"]
    assert asked == [("/v1/embeddings", "embedder"), ("/v1/embeddings", "small")]


def test_all_of_many_models_are_asked(target: Target, handler: type[Site]) -> None:
    handler.models = tuple(f"model-{i}" for i in range(60))
    results(target)
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        assert {m for p, m, _ in handler.asked if p == path} == set(handler.models)


def test_models_for_which_there_was_no_time_are_counted(
    target: Target, handler: type[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_MODELS_SECONDS", -60)
    handler.models = ("small", "large")
    found = results(target)
    why = "2 models (small, large) were not asked because the others took -1 minutes"
    assert found["chat"] == found["embeddings"] == (0, False, why)


def test_a_site_whose_models_are_away_was_not_exercised(target: Target, handler: type[Site]) -> None:
    handler.chat_status = 500
    found = results(target)
    assert found["chat"][:2] == (500, False)
    assert found["chat at gateway-1"][:2] == (500, False)


def test_a_key_without_models(target: Target, handler: type[Site]) -> None:
    handler.models = ()
    found = results(target)
    assert found["models"][1] is False
    assert found["chat"] == (0, False, "there is no model")


def test_a_stream_that_breaks_off(target: Target, handler: type[Site]) -> None:
    handler.done = False
    status, ok, note = results(target)["stream"]
    assert (status, ok) == (0, False)
    assert "ended early" in note


def test_a_site_that_is_silent(target: Target, tmp_path: Path) -> None:
    nobody = Gateway("gateway-9", "127.0.0.1", 1, tmp_path / "nothing.sock")
    found = results(replace(target, https_port=1, gateways=(nobody,)))
    assert all(not ok for _, ok, _ in found.values())
    assert "no answer" in found["models"][2]
    assert "no answer" in found["metrics of gateway-9"][2]


def test_a_server_with_a_foreign_certificate_gets_no_key(target: Target, handler: type[Site], tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=other.example", "-keyout", tmp_path / "k.pem", "-out", tmp_path / "other.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    found = results(replace(target, ca_file=tmp_path / "other.pem", gateways=()))
    assert found["models"][:2] == (0, False)
    assert handler.asked == []


@pytest.mark.parametrize("content", [b"", b"two words\n", b"\xff\xfe", b"a\nb\n"])
def test_a_file_that_holds_no_key_is_refused(target: Target, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.key"
    file.write_bytes(content)
    with pytest.raises(EgressUnproven, match="cannot be used") as refused:
        first_requests(replace(target, key_file=file))
    assert content.decode("latin-1").strip() not in str(refused.value.to_dict()) or not content


def test_a_missing_key_file_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(EgressUnproven, match="cannot be used"):
        first_requests(replace(target, key_file=tmp_path / "none"))
