# SPDX-License-Identifier: Apache-2.0
"""Proves what clients see of a running gateway: keys, models, ids, unbuffered streams; and what operators see."""

from __future__ import annotations

import http.client
import json
import re
import threading
from typing import Any

import pytest
from tests.integration.gateway.harness import PATIENCE, Gateway, chat, until
from tests.integration.gateway.upstream import Upstream

TRACE = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


def ask(gateway: Gateway, key: str | None, prompt: str = "hello there", model: str = "small", **more: Any) -> Any:
    return gateway.request("POST", "/v1/chat/completions", chat(prompt, model, **more), key)


# --- keys and models ---


def test_a_good_key_gets_the_models_answer(shared: Gateway, key: str, upstream: Upstream) -> None:
    answer = ask(shared, key, "one two")
    assert answer.status == 200
    assert answer.json["choices"][0]["message"]["content"] == "You said: one two"
    assert answer.json["usage"]["total_tokens"] == answer.json["usage"]["prompt_tokens"] + 4
    seen = upstream.behaviour.seen[-1]
    assert seen.headers["authorization"] == "Bearer upstream-secret-canary-4711"
    assert key not in json.dumps(seen.headers)


@pytest.mark.parametrize("bad", [None, "", "sk-moat-wrong", "sk-1234"])
def test_without_a_good_key_nothing_reaches_the_model(shared: Gateway, upstream: Upstream, bad: str | None) -> None:
    answer = ask(shared, bad)
    assert answer.status == 401
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert upstream.behaviour.seen == []


@pytest.mark.parametrize("model", ["big", "nothing-like-this"])
def test_a_model_that_the_key_may_not_use_is_403_in_openais_shape(
    shared: Gateway, key: str, upstream: Upstream, model: str
) -> None:
    answer = ask(shared, key, model=model)
    assert answer.status == 403
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert upstream.behaviour.seen == []


def test_fallbacks_in_the_request_do_not_widen_a_key(shared: Gateway, key: str, upstream: Upstream) -> None:
    upstream.behaviour.fail_with = 500
    answer = ask(shared, key, fallbacks=["big"])
    assert answer.status in (400, 403)
    assert all(s.body["model"] != "up-big" for s in upstream.behaviour.seen)


def test_where_a_request_goes_cannot_be_chosen_by_the_client(shared: Gateway, key: str) -> None:
    before = shared.metrics()["moat_egress_denied_total"]
    for more in ({"api_base": "http://198.51.100.7/v1"}, {"base_url": "http://198.51.100.7/v1"}):
        assert 400 <= ask(shared, key, **more).status < 500
    assert shared.metrics()["moat_egress_denied_total"] == before


def test_other_apis_hold_the_same_line(shared: Gateway, key: str, upstream: Upstream) -> None:
    message = {"model": "big", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
    for path, body in (
        ("/v1/messages", message),
        ("/v1/completions", {"model": "big", "prompt": "x"}),
        ("/v1/embeddings", {"model": "big", "input": "x"}),
        ("/v1/responses", {"model": "big", "input": "x"}),
        ("/openai/deployments/big/chat/completions", chat(model="big")),
        ("/engines/big/chat/completions", chat(model="big")),
        ("/utils/token_counter", {"model": "big", "prompt": "x"}),
    ):
        assert shared.request("POST", path, body, key).status in (401, 403), path
        assert shared.request("POST", path, body).status == 401, path
    assert upstream.behaviour.seen == []


def test_a_key_sees_its_own_models(shared: Gateway, key: str) -> None:
    every = shared.site.new_key("of-all", "all")
    assert shared.reload()[0]

    def names(secret: str) -> list[str]:
        return sorted(m["id"] for m in shared.request("GET", "/v1/models", key=secret).json["data"])

    assert names(key) == ["small"]
    assert names(every) == names(shared.site.master) == ["big", "small"]
    assert ask(shared, every, model="big").status == 200


def test_a_key_narrower_than_its_team(shared: Gateway) -> None:
    narrow = shared.site.new_key("narrow", "all", "--models", "big")
    assert shared.reload()[0]
    assert ask(shared, narrow, model="big").status == 200
    assert ask(shared, narrow, model="small").status == 403


def test_an_expired_key(shared: Gateway) -> None:
    old = shared.site.new_key("old", "t", "--not-after", "2020-01-01")
    assert shared.reload()[0]
    answer = ask(shared, old)
    assert answer.status == 401
    assert answer.json["error"]["code"] == "expired_api_key"


def test_requests_a_minute_of_a_team_are_enforced(shared: Gateway) -> None:
    path = shared.site.folder / "keys.yaml"
    path.write_text(path.read_text().replace("teams:\n", "teams:\n  - {id: slow, models: [small], rpm: 2}\n", 1))
    slow = shared.site.new_key("slow", "slow")
    other = shared.site.new_key("slow-too", "slow")
    assert shared.reload()[0]
    # A window ends with the minute: more than twice the limit shows a 429 even across its edge.
    codes = [ask(shared, secret).status for secret in (slow, other) * 4]
    assert codes[:2] == [200, 200]
    assert 429 in codes
    assert set(codes) == {200, 429}


def test_the_administrators_key(shared: Gateway, key: str) -> None:
    assert ask(shared, shared.site.master, model="big").status == 200
    assert shared.request("GET", "/config/yaml", key=key).status >= 400
    for path in ("/key/generate", "/model/new", "/config/update", "/team/new"):
        assert shared.request("POST", path, {}, key).status >= 400, path


def test_pages_without_a_key_are_closed(shared: Gateway) -> None:
    for path in (
        "/",
        "/ui",
        "/ui/",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/routes",
        "/metrics",
        "/health",
        "/login",
        "/sso/key/generate",
    ):
        assert shared.request("GET", path).status == 401, path
    assert shared.request("GET", "/health/liveliness").status == 200
    assert shared.request("GET", "/_moat/live").status == 200
    assert shared.request("GET", "/_moat/ready").json == {"status": "ready"}
    assert shared.request("GET", "/_moat/x").status == 404


# --- ids and traces ---


def test_ids_go_through_to_the_answer_and_id_and_trace_to_the_log(shared: Gateway, key: str) -> None:
    answer = shared.request("POST", "/v1/chat/completions", chat(), key, x_request_id="my-id-1", traceparent=TRACE)
    assert answer.headers["x-request-id"] == "my-id-1"
    line = shared.wait_events(event="request.finished", request_id="my-id-1")
    assert [(e["trace_id"], e["team"], e["key"], e["status"]) for e in line] == [("ab" * 16, "t", "of-t", 200)]


def test_every_answer_has_exactly_one_id(shared: Gateway, key: str, upstream: Upstream) -> None:
    upstream.behaviour.fail_with = 400
    answers = [
        ask(shared, key),
        ask(shared, None),
        ask(shared, key, model="big"),
        shared.request("GET", "/nowhere", key=key),
        shared.request("GET", "/_moat/live"),
        shared.request("POST", "/v1/chat/completions", None, key),
    ]
    ids = [a.headers["x-request-id"] for a in answers]
    assert len(set(ids)) == len(ids)
    assert [a.status for a in answers[:3]] == [400, 401, 403]


# --- streams ---


def test_a_stream_is_handed_on_as_it_comes(shared: Gateway, key: str, upstream: Upstream) -> None:
    # The model says a word only when the one before has arrived here: a buffer would keep both waiting.
    gate = upstream.behaviour.gate = threading.Semaphore(0)
    connection = http.client.HTTPConnection("127.0.0.1", shared.site.port, timeout=PATIENCE)
    body = json.dumps(chat("a b c d e f", stream=True, stream_options={"include_usage": True}))
    connection.request(
        "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {key}", "content-type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    pieces, text, usage, done = 0, "", None, False
    during = None
    while line := response.readline():
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            done = True
            break
        event = json.loads(data)
        usage = event.get("usage") or usage
        piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
        if piece:
            pieces += 1
            text += piece
            if during is None:
                during = shared.metrics()
            gate.release()
    connection.close()
    assert text == "You said: a b c d e f"
    assert done
    assert usage is not None
    assert pieces == 8
    assert during is not None
    assert during["moat_active_streams"] == 1
    assert during["moat_in_flight"] >= 1
    until("the stream is counted as ended", lambda: shared.metrics()["moat_active_streams"] == 0)


def test_a_client_that_goes_away_frees_its_stream(shared: Gateway, key: str, upstream: Upstream) -> None:
    upstream.behaviour.chunk_delay = 0.2
    connection = http.client.HTTPConnection("127.0.0.1", shared.site.port, timeout=PATIENCE)
    # By itself it would take twice as long as is waited for below.
    body = json.dumps(chat(" ".join("x" * int(2 * PATIENCE / 0.2)), stream=True))
    connection.request(
        "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {key}", "content-type": "application/json"}
    )
    response = connection.getresponse()
    response.readline()
    assert shared.metrics()["moat_active_streams"] == 1
    response.close()
    connection.close()
    until("the stream is given up", lambda: shared.metrics()["moat_active_streams"] == 0, PATIENCE)


# --- what operators see ---


def test_status_and_metrics(shared: Gateway, key: str) -> None:
    # A request is counted just after its client has the answer.
    until("earlier requests are counted", lambda: shared.metrics()["moat_in_flight"] == 0)
    before = shared.metrics()
    ask(shared, key)
    ask(shared, None)
    until("both are counted", lambda: shared.metrics()["moat_in_flight"] == 0)
    after = shared.metrics()
    assert after['moat_requests_total{code="2xx"}'] == before['moat_requests_total{code="2xx"}'] + 1
    assert after['moat_requests_total{code="4xx"}'] == before['moat_requests_total{code="4xx"}'] + 1
    assert after['moat_auth_refused_total{reason="missing"}'] == before['moat_auth_refused_total{reason="missing"}'] + 1
    assert after["moat_ready"] == 1
    assert after["moat_config_revision"] == 0
    status = shared.status()
    assert status["pid"] == shared.process.pid
    assert (status["name"], status["ready"], status["models"]) == ("under-test", True, ["big", "small"])
    assert status["litellm"] == "1.106.2"
    assert status["degraded"] == []
    assert re.fullmatch(r"[0-9a-f]{64}", status["config"]["sha256"])
    assert shared.site.command("status").stdout.startswith("under-test (pid ")
    done = shared.site.command("status", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == status.keys()


def test_the_admin_socket_is_for_owner_and_group(shared: Gateway) -> None:
    assert shared.site.admin_socket.stat().st_mode & 0o777 == 0o660
    assert shared.request("GET", "/status").status == 401
    assert shared.request("GET", "/metrics").status == 401


def test_ask_prints_tokens_usage_and_requires_the_end(shared: Gateway, key: str, upstream: Upstream) -> None:
    file = shared.site.write("client.key", key + "\n")
    base = ["ask", "--base-url", f"http://127.0.0.1:{shared.site.port}", "--key-file", str(file), "--model", "small"]
    done = shared.site.command(*base, "--stream", "good morning")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("You said: good morning\n--- first token after ")
    assert "tokens: 2 + 4 = 6" in done.stdout
    plain = json.loads(shared.site.command(*base, "--json", "good morning").stdout)
    assert (plain["ok"], plain["text"], plain["usage"]["total_tokens"]) == (True, "You said: good morning", 6)
    file.write_text("sk-moat-wrong\n")
    refused = shared.site.command(*base, "x")
    assert refused.returncode == 16
    assert "HTTP 401" in refused.stderr
    file.write_text(key + "\n")
    upstream.behaviour.fail_with = 503
    assert shared.site.command(*base, "x").returncode == 16


def test_logs_are_json_and_hold_no_prompt_no_answer_and_no_secret(
    shared: Gateway, key: str, upstream: Upstream
) -> None:
    prompt = "prompt-canary-2718"
    for stream in (False, True):
        ask(shared, key, f"{prompt} hello", stream=stream)
    upstream.behaviour.fail_with = 400
    upstream.behaviour.error_text = f"the upstream repeats {prompt} and upstream-secret-canary-4711"
    ask(shared, key, prompt)
    ask(shared, key, prompt, stream=True)
    upstream.behaviour.fail_with = 500
    ask(shared, key, prompt)
    shared.request("POST", "/v1/chat/completions", {"model": "small", "messages": prompt}, key)
    shared.request("POST", "/v1/chat/completions", chat(prompt), "sk-moat-presented-canary-1618")
    shared.request("GET", f"/v1/models?key={key}", key=key)
    raw = shared.stdout + shared.stderr
    for canary in (prompt, "upstream-secret-canary-4711", key, shared.site.master, "presented-canary-1618", "You said"):
        assert canary not in raw, canary
    events = shared.events  # every line parses
    assert {e["event"] for e in events} >= {
        "start.begin",
        "start.ready",
        "keys.loaded",
        "request.finished",
        "library.log",
    }
    for e in events:
        assert list(e)[:7] == ["ts", "level", "event", "trace_id", "span_id", "request_id", "team"]
    assert shared.stderr == ""


def test_no_secret_is_in_the_process_table_or_on_the_disk(shared: Gateway) -> None:
    from pathlib import Path

    pid = shared.process.pid
    for name in ("cmdline", "environ"):
        raw = Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace")
        assert shared.site.master not in raw
        assert "upstream-secret-canary" not in raw
    written = list((shared.site.folder / "tmp").rglob("*.yaml"))
    assert len(written) == 1
    assert written[0].stat().st_mode & 0o777 == 0o600
    assert "upstream-secret-canary" not in written[0].read_text()
    assert shared.site.master not in written[0].read_text()
