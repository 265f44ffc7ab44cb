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
from tests.integration.gateway.harness import Answer, Gateway, Site, chat
from tests.integration.gateway.upstream import Upstream


@pytest.fixture
def gateway(site: Site) -> Iterator[Gateway]:
    site.extra["MOAT_SHUTDOWN_TIMEOUT"] = "20"
    running = site.start().wait_ready()
    yield running
    if running.process.poll() is None:
        running.stop()


def ask(gateway: Gateway, key: str) -> Answer:
    return gateway.request("POST", "/v1/chat/completions", chat(), key)


def seconds_until(gateway: Gateway, key: str, status: int) -> float:
    begun = time.monotonic()
    while time.monotonic() - begun < 10:
        if gateway.request("GET", "/v1/models", key=key).status == status:
            return time.monotonic() - begun
        time.sleep(0.02)
    raise AssertionError(f"no {status} within 10 s")


def test_keys_while_running_and_the_end(gateway: Gateway, upstream: Upstream) -> None:
    """One process, one story: it takes ten seconds to start."""
    site = gateway.site
    path = site.folder / "keys.yaml"

    # A new key counts from its first request, a revoked one no longer within a second.
    secret = site.new_key("new", "t")
    assert ask(gateway, secret).status == 200
    other = site.new_key("other", "t")
    assert ask(gateway, other).status == 200
    assert site.command("keys", "revoke", "other").returncode == 0
    assert seconds_until(gateway, other, 401) < 1.0

    # A bad file leaves the old one serving, and says so.
    good = path.read_text()
    for bad in ("teams: [", "", good.replace("team: t", "team: nobody", 1)):
        path.write_text(bad)
        deadline = time.monotonic() + 5
        while not gateway.status()["degraded"] and time.monotonic() < deadline:
            time.sleep(0.1)
        status = gateway.status()
        assert len(status["degraded"]) == 1
        assert "an older file serves" in status["degraded"][0]
        assert status["ready"] is True
        assert gateway.metrics()["moat_keys_degraded"] == 1
        assert ask(gateway, secret).status == 200
        reload = site.command("reload")
        assert reload.returncode == 12
        assert "still serves" in reload.stderr
        path.write_text(good)
        reload = site.command("reload")
        assert reload.returncode == 0, reload.stderr
        assert gateway.status()["degraded"] == []
    refused = [e for e in gateway.events if e["event"] == "keys.refused"]
    assert len(refused) >= 3
    path.unlink()
    time.sleep(1.0)
    assert ask(gateway, secret).status == 200
    path.write_text(good)

    # SIGTERM: readiness says 503 at once, a running stream ends whole, then exit code 0.
    upstream.behaviour.chunk_delay = 0.3
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    body = json.dumps(chat("a b c d e f g h i j", stream=True))
    headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    read: list[bytes] = [response.readline()]
    reader = threading.Thread(target=lambda: read.extend(iter(response.readline, b"")))
    reader.start()
    time.sleep(0.3)
    gateway.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    ready = gateway.request("GET", "/_moat/ready")
    assert ready.status == 503
    assert ready.json["reasons"] == ["the gateway is shutting down"]
    assert gateway.status()["draining"] is True
    reader.join(30)
    whole = b"".join(read)
    assert whole.count(b'"content"') >= 12
    assert b"[DONE]" in whole
    connection.close()
    assert gateway.process.wait(20) == 0
    assert [e["event"] for e in gateway.events if e["event"].startswith("shutdown")] == [
        "shutdown.begin",
        "shutdown.end",
    ]
    assert not (site.folder / "admin.sock").exists()
    assert list((site.folder / "tmp").iterdir()) == []


def test_a_stream_longer_than_the_shutdown_time_is_cut_and_said(site: Site, upstream: Upstream) -> None:
    site.extra |= {"MOAT_SHUTDOWN_TIMEOUT": "2", "MOAT_SHUTDOWN_DELAY": "0"}
    gateway = site.start().wait_ready()
    secret = site.new_key("new", "t")
    seconds_until(gateway, secret, 200)
    upstream.behaviour.chunk_delay = 1.0
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    body = json.dumps(chat(" ".join("x" * 30), stream=True))
    headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    response.readline()
    begun = time.monotonic()
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(20) == 0
    assert 1.5 < time.monotonic() - begun < 10
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
    gateway = site.start()
    deadline = time.monotonic() + 30
    while not list((site.folder / "tmp").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(30) in (0, 143)
    assert list((site.folder / "tmp").iterdir()) == []
    assert not (site.folder / "admin.sock").exists()
