# SPDX-License-Identifier: Apache-2.0
"""Proves that `moat-gateway ask` calls an incomplete answer a failure, and checks the certificate over TLS."""

from __future__ import annotations

import http.server
import ssl
import threading
from pathlib import Path

import pytest
from tests.integration.gateway.upstream import Upstream

from moat_gateway import tls
from moat_gateway.ask import Answer, ask
from moat_gateway.errors import RequestFailed, UnreadableSecret


def run(
    upstream: Upstream, key_file: Path, *, stream: bool = True, base: str | None = None, ca: Path | None = None
) -> Answer:
    url = base or upstream.base
    return ask(base_url=url, model="m", prompt="a b", key_file=key_file, ca_file=ca, stream=stream, timeout=20)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("sk-moat-x\n")
    return path


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer(upstream: Upstream, key_file: Path, stream: bool) -> None:
    answer = run(upstream, key_file, stream=stream)
    assert answer.text == "You said: a b"
    assert dict(answer.usage) == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert (answer.first_token_seconds is not None) is stream
    assert upstream.behaviour.seen[-1].headers["authorization"] == "Bearer sk-moat-x"


def test_a_stream_that_is_cut(upstream: Upstream, key_file: Path) -> None:
    upstream.behaviour.cut_after = 2
    with pytest.raises(RequestFailed, match=r"broke off|no answer"):
        run(upstream, key_file)


def test_a_stream_without_its_end(upstream: Upstream, key_file: Path) -> None:
    upstream.behaviour.without_done = True
    with pytest.raises(RequestFailed, match="broke off") as e:
        run(upstream, key_file)
    assert e.value.expected == "[DONE] at its end"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_usage(upstream: Upstream, key_file: Path, stream: bool) -> None:
    upstream.behaviour.without_usage = True
    with pytest.raises(RequestFailed, match="no usage"):
        run(upstream, key_file, stream=stream)


def test_an_error_of_the_server(upstream: Upstream, key_file: Path) -> None:
    upstream.behaviour.fail_with = 403
    with pytest.raises(RequestFailed, match="HTTP 403") as e:
        run(upstream, key_file)
    assert e.value.found == "boom"


def test_nobody_there_and_no_key(upstream: Upstream, key_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestFailed, match="no answer"):
        run(upstream, key_file, base="http://127.0.0.1:9")
    with pytest.raises(RequestFailed, match="cannot be used"):
        run(upstream, key_file, base="nonsense")
    with pytest.raises(UnreadableSecret):
        run(upstream, tmp_path / "none")


def test_over_tls_with_a_certificate_of_ours_and_of_somebody_else(
    upstream: Upstream, key_file: Path, tmp_path: Path
) -> None:
    from tests.integration.gateway.upstream import _Handler, _Server

    made = tls.self_signed(tmp_path / "tls", ["localhost", "127.0.0.1"])
    other = tls.self_signed(tmp_path / "other", ["localhost", "127.0.0.1"])
    handler: type[http.server.BaseHTTPRequestHandler] = type("H", (_Handler,), {"behaviour": upstream.behaviour})
    server = _Server(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.folder / "cert.pem", made.folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        base = f"https://127.0.0.1:{server.server_address[1]}"
        assert run(upstream, key_file, base=base, ca=made.folder / "ca.pem").text == "You said: a b"
        with pytest.raises(RequestFailed, match="no answer") as e:
            run(upstream, key_file, base=base, ca=other.folder / "ca.pem")
        assert "CERTIFICATE_VERIFY_FAILED" in str(e.value.found)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
