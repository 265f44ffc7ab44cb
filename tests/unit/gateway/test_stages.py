# SPDX-License-Identifier: Apache-2.0
"""Proves the ASGI stages against small applications: ids, traces, probes, counting, refusals, streams unheld."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway.context import current
from moat_gateway.keys import Identity as Person
from moat_gateway.keys import Team, Verdict
from moat_gateway.logs import Log
from moat_gateway.metrics import Counters
from moat_gateway.stages import ASGIApp, Message, Receive, Scope, Send
from moat_gateway.stages.correlation import Correlation, parse_traceparent
from moat_gateway.stages.identity import Identity
from moat_gateway.stages.meter import Meter
from moat_gateway.stages.probes import Probes

GOOD = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


def call(app: ASGIApp, path: str = "/x", method: str = "GET", **headers: str) -> list[Message]:
    scope: Scope = {
        "type": "http",
        "path": path,
        "method": method,
        "headers": [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()],
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def headers_of(sent: list[Message]) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in sent[0]["headers"]}


class Echo:
    """Answers with what it saw; optionally breaks."""

    def __init__(self, breaks: str = "", status: int = 200, content_type: bytes = b"text/plain") -> None:
        self.scope: Scope = {}
        self.context: Any = None
        self._breaks = breaks
        self._start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", content_type), (b"X-Request-Id", b"of-the-application")],
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.context = scope, current.get()
        if self._breaks == "early":
            raise RuntimeError("prompt canary")
        await send(dict(self._start))
        if self._breaks == "late":
            raise RuntimeError("prompt canary")
        await send({"type": "http.response.body", "body": b"ok"})


def make_log() -> tuple[Log, list[bytes]]:
    lines: list[bytes] = []
    return Log(lines.append), lines


# --- correlation ---


def test_a_sane_id_is_kept_in_the_request_the_context_and_the_answer() -> None:
    echo = Echo()
    sent = call(Correlation(echo, make_log()[0]), x_request_id="abc-1.2:3", traceparent=GOOD)
    assert headers_of(sent)["x-request-id"] == "abc-1.2:3"
    assert [k.lower() for k, _ in sent[0]["headers"]].count(b"x-request-id") == 1
    assert (b"x-request-id", b"abc-1.2:3") in echo.scope["headers"]
    assert (b"traceparent", GOOD.encode()) in echo.scope["headers"]
    assert echo.context.trace_id == "a" * 32
    assert echo.context.span_id != "b" * 16


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, 'a"b', "a\nb", "caf\xe9"])
def test_any_other_id_is_replaced(bad: str) -> None:
    got = headers_of(call(Correlation(Echo(), make_log()[0]), x_request_id=bad))["x-request-id"]
    assert got != bad
    assert len(got) == 32


def test_without_a_trace_one_begins() -> None:
    echo = Echo()
    call(Correlation(echo, make_log()[0]), traceparent="nonsense", tracestate="x=1")
    names = [k for k, _ in echo.scope["headers"]]
    assert names.count(b"traceparent") == 1
    assert b"tracestate" not in names
    value = dict(echo.scope["headers"])[b"traceparent"]
    assert parse_traceparent(value) == echo.context.trace_id


@pytest.mark.parametrize(
    ("value", "ok"),
    [
        (GOOD, True),
        (GOOD.replace("00-", "01-", 1) + "-more", True),
        (GOOD + "-more", False),
        (GOOD.replace("00-", "ff-", 1), False),
        (GOOD.upper(), False),
        (GOOD.replace("a" * 32, "0" * 32), False),
        (GOOD.replace("b" * 16, "0" * 16), False),
        ("", False),
    ],
)
def test_traceparent(value: str, ok: bool) -> None:
    assert (parse_traceparent(value.encode()) == "a" * 32) is ok


@given(st.binary(max_size=80))
def test_any_traceparent_is_read_or_refused(value: bytes) -> None:
    found = parse_traceparent(value)
    assert found is None or len(found) == 32


def test_a_broken_application_is_a_500_with_the_id_and_no_word_of_the_exception() -> None:
    log, lines = make_log()
    sent = call(Correlation(Echo("early"), log), x_request_id="abc")
    assert sent[0]["status"] == 500
    assert headers_of(sent)["x-request-id"] == "abc"
    assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
    assert b"canary" not in sent[1]["body"] + b"".join(lines)
    assert json.loads(lines[0])["error"] == "RuntimeError"


def test_a_break_after_the_first_byte_is_passed_on_so_that_the_connection_is_cut() -> None:
    with pytest.raises(RuntimeError):
        call(Correlation(Echo("late"), make_log()[0]))


# --- probes ---


def test_probes() -> None:
    reasons: list[str] = []
    app = Probes(Echo(status=418), lambda: tuple(reasons))
    assert call(app, "/_moat/live")[0]["status"] == 200
    assert call(app, "/_moat/ready")[0]["status"] == 200
    assert call(app, "/_moat/other")[0]["status"] == 404
    assert call(app, "/_moat/live", "POST")[0]["status"] == 405
    assert call(app, "/else")[0]["status"] == 418
    reasons.append("because")
    sent = call(app, "/_moat/ready")
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["reasons"] == ["because"]
    assert call(app, "/_moat/live")[0]["status"] == 200


# --- meter ---


def test_the_meter_counts_classes_and_streams_and_hands_chunks_on_at_once() -> None:
    counters, (log, lines) = Counters(), make_log()
    during: list[tuple[int, int, int]] = []

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream; x")]}
        )
        for i in range(3):
            await send({"type": "http.response.body", "body": b"%d" % i, "more_body": True})
            during.append((counters.in_flight, counters.active_streams, i))
        await send({"type": "http.response.body", "body": b""})

    sent = call(Meter(streaming, counters, log), path="/v1/x")
    assert [m.get("body") for m in sent[1:]] == [b"0", b"1", b"2", b""]
    assert during == [(1, 1, 0), (1, 1, 1), (1, 1, 2)]
    assert (counters.in_flight, counters.active_streams) == (0, 0)
    for status in (404, 503):
        call(Meter(Echo(status=status), counters, log))
    with pytest.raises(RuntimeError):
        call(Meter(Echo("early"), counters, log))
    assert counters.requests == {"1xx": 0, "2xx": 1, "3xx": 0, "4xx": 1, "5xx": 2}
    first = json.loads(lines[0])
    assert (first["event"], first["stream"], first["status"]) == ("request.finished", True, 200)


# --- identity ---


def people(secret: str) -> Person | Verdict:
    if secret == "good":
        return Person("t", "k", "0" * 64, Team("t", ("*",)), ("*",))
    return Verdict.EXPIRED if secret == "old" else Verdict.UNKNOWN


def guarded(app: ASGIApp, counters: Counters | None = None) -> ASGIApp:
    return Correlation(Identity(app, people, counters or Counters()), make_log()[0])


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer good"}, {"authorization": "bearer good"}, {"authorization": "good"},
        {"x_api_key": "good"}, {"api_key": "good"}, {"x_goog_api_key": "good"},
        {"x_litellm_api_key": "Bearer good", "authorization": "Bearer bad"},
    ],
)  # fmt: skip
def test_a_good_key_gets_through_and_is_known_behind(headers: dict[str, str]) -> None:
    echo = Echo()
    assert call(guarded(echo), **headers)[0]["status"] == 200
    assert echo.context.identity.key == "k"


@pytest.mark.parametrize(
    ("headers", "code", "counted"),
    [
        ({}, "missing_api_key", "missing"),
        ({"authorization": ""}, "missing_api_key", "missing"),
        ({"authorization": "Bearer "}, "invalid_api_key", "unknown"),
        ({"authorization": "Bearer bad"}, "invalid_api_key", "unknown"),
        ({"authorization": "Basic good"}, "invalid_api_key", "unknown"),
        ({"authorization": "Bearer old"}, "expired_api_key", "expired"),
        ({"x_litellm_api_key": "bad", "authorization": "Bearer good"}, "invalid_api_key", "unknown"),
    ],
)
def test_anything_else_is_a_401_in_openais_shape(headers: dict[str, str], code: str, counted: str) -> None:
    echo, counters = Echo(), Counters()
    sent = call(guarded(echo, counters), **headers)
    assert sent[0]["status"] == 401
    assert set(json.loads(sent[1]["body"])["error"]) == {"message", "type", "param", "code"}
    assert json.loads(sent[1]["body"])["error"]["code"] == code
    assert headers_of(sent)["www-authenticate"] == "Bearer"
    assert echo.scope == {}
    assert counters.refused[counted] == 1


def test_open_and_closed_paths() -> None:
    assert call(guarded(Echo()), "/health/liveliness")[0]["status"] == 200
    assert call(guarded(Echo()), "/health/liveliness", "POST")[0]["status"] == 401
    for path in ("/", "/ui", "/docs", "/openapi.json", "/login", "/sso/key/generate", "/health/liveliness/x"):
        assert call(guarded(Echo()), path)[0]["status"] == 401, path
    for path in ("/v1/ocr", "/ocr/"):
        assert call(guarded(Echo()), path, "POST", authorization="Bearer good")[0]["status"] == 404


def test_a_websocket_without_a_key_is_closed_before_it_opens() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    app = guarded(Echo())
    asyncio.run(app({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send))  # type: ignore[arg-type]
    assert [m["type"] for m in sent] == ["websocket.close"]
