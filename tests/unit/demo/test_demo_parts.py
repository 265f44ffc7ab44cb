# SPDX-License-Identifier: Apache-2.0
"""Proves the parts of the demo's driver that its green path does not show: a broken stream, a refusal, a wrong package.

The client is asked against real TLS servers on the loopback, the package reader against real Debian packages.
"""

from __future__ import annotations

import http.server
import io
import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moat.console import Console
from moat.demo import chat, plugin
from moat.demo.steps import CUT, Steps
from moat.errors import BadSignature, DemoFailed

Serve = Callable[[int, str, bytes], int]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Return a function that serves one fixed answer by TLS and returns its port."""
    cert, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    argv += [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run(argv, check=True, capture_output=True)
    (tmp_path / "client.key").write_text("sk-moat-test\n")
    servers: list[http.server.HTTPServer] = []

    def start(status: int, kind: str, body: bytes) -> int:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers["authorization"] == "Bearer sk-moat-test"
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(port: int, folder: Path, *, stream: bool) -> chat.Answer:
    return chat.ask(
        port=port,
        ca_file=folder / "ca.pem",
        key_file=folder / "client.key",
        model="m",
        prompt="p",
        stream=stream,
        max_tokens=1,
    )


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def chunk(text: str | None = None, usage: dict[str, int] | None = None) -> bytes:
    choices = [{"delta": {"content": text}}] if text is not None else []
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def test_a_whole_stream_is_put_together(serve: Serve, tmp_path: Path) -> None:
    answer = ask(
        serve(200, "text/event-stream", chunk("a") + chunk("b") + chunk(usage=USAGE) + DONE), tmp_path, stream=True
    )
    assert (answer.text, answer.chunks, answer.total_tokens) == ("ab", 2, 5)


@pytest.mark.parametrize("body", [chunk("a") + chunk(usage=USAGE), chunk("a") + DONE, b""])
def test_a_stream_without_its_end_or_usage_is_a_failure(serve: Serve, tmp_path: Path, body: bytes) -> None:
    with pytest.raises(DemoFailed, match="ended early"):
        ask(serve(200, "text/event-stream", body), tmp_path, stream=True)


@pytest.mark.parametrize(("status", "body"), [(401, b'{"error":{}}'), (502, b"x"), (200, b"{}"), (200, b"not json")])
def test_a_refusal_or_half_an_answer_is_a_failure(serve: Serve, tmp_path: Path, status: int, body: bytes) -> None:
    with pytest.raises(DemoFailed):
        ask(serve(status, "application/json", body), tmp_path, stream=False)


def test_another_authority_is_not_trusted(serve: Serve, tmp_path: Path) -> None:
    port = serve(200, "text/event-stream", DONE)
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    argv += ["-subj", "/CN=localhost", "-keyout", str(tmp_path / "k"), "-out", str(tmp_path / "ca.pem")]
    subprocess.run(argv, check=True, capture_output=True)
    with pytest.raises(DemoFailed) as failed:
        ask(port, tmp_path, stream=True)
    assert "CERTIFICATE_VERIFY_FAILED" in (failed.value.found or "")


def package(folder: Path, path: str, *, link: bool = False) -> Path:
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.net>\nDescription: x\n"
    )
    target = root / path
    target.parent.mkdir(parents=True)
    if link:
        target.symlink_to("/etc/passwd")
    else:
        target.write_bytes(b"program")
    deb = folder / "x.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(root), str(deb)], check=True, capture_output=True)
    return deb


def test_the_plugin_is_read_from_the_package_and_nothing_else_is(tmp_path: Path) -> None:
    member = "usr/libexec/docker/cli-plugins/docker-compose"
    assert plugin.read_member(package(tmp_path / "good", member), f"./{member}") == b"program"
    with pytest.raises(DemoFailed, match="does not hold"):
        plugin.read_member(package(tmp_path / "other", "usr/bin/other"), f"./{member}")
    with pytest.raises(DemoFailed, match="does not hold"):
        plugin.read_member(package(tmp_path / "link", member, link=True), f"./{member}")
    (tmp_path / "noise.deb").write_bytes(b"noise")
    with pytest.raises(DemoFailed, match="does not hold"):
        plugin.read_member(tmp_path / "noise.deb", f"./{member}")


def steps() -> Steps:
    return Steps(Console(err=io.StringIO(), out=io.StringIO()))


def test_a_failing_step_keeps_the_refusals_own_class_and_shows_its_last_lines() -> None:
    with pytest.raises(BadSignature) as failed:
        steps().watch([sys.executable, "-c", "print('what happened'); raise SystemExit(3)"], what="verify")
    assert "what happened" in (failed.value.found or "")
    with pytest.raises(DemoFailed):
        steps().watch([sys.executable, "-c", "raise SystemExit(99)"], what="x")
    with pytest.raises(DemoFailed, match="cannot start"):
        steps().watch(["/nonexistent/program"], what="x")


def test_a_cut_step_has_no_network_and_an_open_one_has() -> None:
    look = [sys.executable, "-c", "import socket; print(sorted(n for _, n in socket.if_nameindex()))"]
    assert steps().ask([*CUT, *look], what="look").strip() == "['lo']"
    assert steps().ask(look, what="look").strip() != "['lo']"


def test_the_table_adds_the_times_up() -> None:
    s = steps()
    for title in ("one", "two"):
        with s.step(title, "cut"):
            pass
    lines = s.table().splitlines()
    assert [line.split()[0] for line in lines] == ["one", "two", "in"]
