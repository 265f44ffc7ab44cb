# SPDX-License-Identifier: Apache-2.0
"""Proves that a client gets real answers through TLS, nginx, a gateway and the model server, plain and streamed."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import httpx
import openai
import pytest
from tests.acceptance.stack import Stack


def question(stack: Stack, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": stack.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 32, **more}


def streamed(stack: Stack, prompt: str, **more: Any) -> tuple[str, dict[str, int], list[float], bool]:
    """Return text, usage, arrival times of the content chunks (seconds), and whether [DONE] came."""
    body = question(stack, prompt, stream=True, stream_options={"include_usage": True}, **more)
    text, usage, times, done = "", {}, [], False
    with stack.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        started = time.monotonic()
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    if piece := choice["delta"].get("content"):
                        text += piece
                        times.append(time.monotonic() - started)
    return text, usage, times, done


def test_a_plain_answer_with_usage_that_adds_up(stack: Stack) -> None:
    with stack.client() as client:
        answer = client.post("/v1/chat/completions", json=question(stack, "What is a castle moat for?"))
    assert answer.status_code == 200, answer.text
    raw = answer.json()
    assert raw["choices"][0]["message"]["content"].strip()
    usage = raw["usage"]
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_comes_in_pieces_with_usage_and_an_end(stack: Stack) -> None:
    text, usage, times, done = streamed(stack, "Write a long story about a river.", max_tokens=64, temperature=0)
    assert done
    assert text.strip()
    assert len(times) >= 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    # The model takes 10 ms and more a token; a buffer on the way would make all chunks arrive at once.
    spread = times[-1] - times[0]
    assert spread > 0.1
    largest_burst = max(len(list(g)) for _, g in itertools.groupby(times, key=lambda t: round(t, 2)))
    assert largest_burst < 0.9 * len(times)


def test_answers_and_tokens_depend_on_the_prompt(stack: Stack) -> None:
    short = streamed(stack, "Hi!", temperature=0)
    longer = streamed(stack, "Tell me, in as many words as you can, about rivers, lakes and the sea.", temperature=0)
    assert short[0] != longer[0]
    assert longer[1]["prompt_tokens"] > short[1]["prompt_tokens"] + 5
    # The same prompt without randomness: the text is computed, not chosen from a list by chance.
    # Its beginning: further on two tokens may be equally likely, and which one it is depends on how sums were rounded.
    assert streamed(stack, "Hi!", temperature=0)[0][:20] == short[0][:20]


def test_openais_own_client_works_unchanged(stack: Stack) -> None:
    http = httpx.Client(verify=stack.tls, trust_env=False, timeout=120)
    client = openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.key, http_client=http, max_retries=0)
    assert stack.model in [m.id for m in client.models.list()]
    plain = client.chat.completions.create(
        model=stack.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=16
    )
    assert plain.choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model=stack.model, messages=[{"role": "user", "content": "Hello"}], max_tokens=16, stream=True
        )
        if chunk.choices
    ]
    assert "".join(pieces).strip()
    http.close()


@pytest.mark.parametrize("key", ["", "sk-1234", "sk-moat-" + "x" * 43, "not even a key"])
def test_a_wrong_key_is_401_in_openai_shape(stack: Stack, key: str) -> None:
    with stack.client(key) as client:
        answer = client.post("/v1/chat/completions", json=question(stack, "Hi"))
    assert answer.status_code == 401, answer.text
    assert answer.json()["error"]["message"]
    assert key == "" or key not in answer.text


def test_a_model_that_is_not_there_is_refused(stack: Stack) -> None:
    with stack.client() as client:
        answer = client.post("/v1/chat/completions", json={**question(stack, "Hi"), "model": "gpt-4o"})
    assert answer.status_code in (400, 401, 403, 404), answer.text
    assert answer.json()["error"]["message"]


def test_both_gateways_take_their_share(stack: Stack) -> None:
    def served(service: str) -> int:
        port = {"gateway-1": "4001", "gateway-2": "4002"}[service]
        return sum(1 for line in stack.logs("nginx").splitlines() if line.startswith("{") and f":{port}" in line)

    before = served("gateway-1"), served("gateway-2")
    with stack.client() as client:
        for _ in range(12):
            assert client.get("/v1/models").status_code == 200
    assert served("gateway-1") > before[0]
    assert served("gateway-2") > before[1]
