# SPDX-License-Identifier: Apache-2.0
"""Proves what changes while a gateway runs: keys within a second, a bad file never takes effect, SIGTERM."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from tests.integration.gateway.harness import PATIENCE, Answer, Gateway, Site, chat, until
from tests.integration.gateway.upstream import Upstream
from tests.integration.hotreload.programs import listening
from tests.integration.hotreload.traffic import Busy

DELAY = 10.0  # seconds in which readiness says 503: enough for a busy machine to ask


@pytest.fixture
def gateway(site: Site) -> Iterator[Gateway]:
    site.extra |= {"MOAT_SHUTDOWN_TIMEOUT": "60", "MOAT_SHUTDOWN_DELAY": f"{DELAY:g}"}
    with site.start().wait_ready() as running:
        yield running


def ask(gateway: Gateway, key: str) -> Answer:
    return gateway.request("POST", "/v1/chat/completions", chat(), key)


def seconds_until(gateway: Gateway, key: str, status: int) -> float:
    begun = time.monotonic()
    until(f"a {status}", lambda: gateway.request("GET", "/v1/models", key=key).status == status)
    return time.monotonic() - begun


def stream(gateway: Gateway, key: str, prompt: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Begin a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.site.port, timeout=PATIENCE)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(chat(prompt, stream=True)), headers)
    return connection, connection.getresponse()


def test_keys_while_running_and_the_end(gateway: Gateway, upstream: Upstream) -> None:
    """One process, one story: it takes ten seconds to start."""
    site = gateway.site
    path = site.folder / "keys.yaml"

    # A new key counts from its first request, a revoked one no longer within a second.
    secret = site.new_key("new", "t")
    assert ask(gateway, secret).status == 200
    other = site.new_key("other", "t")
    assert ask(gateway, other).status == 200
    with Busy() as busy:
        assert site.command("keys", "revoke", "other").returncode == 0
        begun = time.monotonic()
        assert seconds_until(gateway, other, 401) < 1.0 * busy.since(begun)

    # A bad file leaves the old one serving, and says so.
    good = path.read_text()
    for bad in ("teams: [", "", good.replace("team: t", "team: nobody", 1)):
        path.write_text(bad)
        until("it is said", lambda: gateway.status()["degraded"])
        status = gateway.status()
        assert len(status["degraded"]) == 1
        assert "an older file serves" in status["degraded"][0]
        assert status["ready"] is True
        assert gateway.metrics()["moat_keys_degraded"] == 1
        assert ask(gateway, secret).status == 200
        ok, answer = gateway.reload()
        assert not ok
        assert answer["problems"][0]["kind"] == "bad-keys"
        if bad == "":
            reload = site.command("reload")
            assert reload.returncode == 12
            assert "still serves" in reload.stderr
        path.write_text(good)
        ok, answer = gateway.reload()
        assert ok, answer
        assert gateway.status()["degraded"] == []
    refused = [e for e in gateway.events if e["event"] == "keys.refused"]
    assert len(refused) >= 3
    path.unlink()
    until("it is said", lambda: gateway.status()["degraded"])
    assert ask(gateway, secret).status == 200
    path.write_text(good)

    # SIGTERM: readiness says 503 while the port is open, a running stream outlives that and ends whole, exit code 0.
    gate = upstream.behaviour.gate = threading.Semaphore(0)
    connection, response = stream(gateway, secret, "a b c d e f g h i j")
    read: list[bytes] = [response.readline()]
    gateway.process.send_signal(signal.SIGTERM)
    until("readiness says 503", lambda: gateway.request("GET", "/_moat/ready").status == 503)
    assert gateway.request("GET", "/_moat/ready").json["reasons"] == ["the gateway is shutting down"]
    assert gateway.status()["draining"] is True
    until("the port is closed", lambda: not listening(site.port))
    assert gateway.process.poll() is None
    gate.release(100)
    read.extend(iter(response.readline, b""))
    whole = b"".join(read)
    assert whole.count(b'"content"') >= 12
    assert b"[DONE]" in whole
    connection.close()
    assert gateway.process.wait(PATIENCE) == 0
    assert [e["event"] for e in gateway.events if e["event"].startswith("shutdown")] == [
        "shutdown.begin",
        "shutdown.end",
    ]
    assert not (site.folder / "admin.sock").exists()
    assert list((site.folder / "tmp").iterdir()) == []


def test_a_stream_longer_than_the_shutdown_time_is_cut_and_said(site: Site, upstream: Upstream) -> None:
    site.extra |= {"MOAT_SHUTDOWN_TIMEOUT": "2", "MOAT_SHUTDOWN_DELAY": "0"}
    with site.start().wait_ready() as gateway, Busy() as busy:
        secret = site.new_key("new", "t")
        seconds_until(gateway, secret, 200)
        upstream.behaviour.gate = threading.Semaphore(0)  # by itself the stream does not end
        connection, response = stream(gateway, secret, "x x x")
        response.readline()
        begun = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(PATIENCE) == 0
        assert 1.5 < time.monotonic() - begun < 10 * busy.since(begun)
    rest = b""
    with pytest.raises((http.client.HTTPException, OSError)):  # noqa: PT012 - the break may come at any read
        while line := response.readline():
            rest += line
        raise http.client.IncompleteRead(rest)
    assert b"[DONE]" not in rest
    connection.close()
    assert "shutdown.cut" in [e["event"] for e in gateway.events]


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(site: Site, shared: Gateway) -> None:
    site.extra["MOAT_ADMIN_SOCKET"] = shared.site.environment["MOAT_ADMIN_SOCKET"]
    done = site.command("serve")
    assert done.returncode == 13
    assert "another gateway answers" in done.stderr
    assert shared.status()["ready"] is True


def test_sigterm_while_it_starts_leaves_nothing_behind(site: Site) -> None:
    with site.start() as gateway:
        until("it has begun", lambda: list((site.folder / "tmp").iterdir()))
        time.sleep(0.5)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(PATIENCE) in (0, 143)
    assert list((site.folder / "tmp").iterdir()) == []
    assert not (site.folder / "admin.sock").exists()
