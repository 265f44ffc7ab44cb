# SPDX-License-Identifier: Apache-2.0
"""A steady load of unary requests and streams against one gateway, which checks every answer."""

from __future__ import annotations

import http.client
import json
import threading
import time

from tests.integration.gateway.harness import Gateway, chat


class Traffic:
    """Asks for a model until it is stopped, for ``with``; bounded in rate and time.

    Args:
        gateway: the gateway.
        key: a client key.
        model: what to ask for.
        unary: how many threads ask for whole answers.
        streams: how many threads ask for streams.
    """

    def __init__(self, gateway: Gateway, key: str, model: str = "small", unary: int = 2, streams: int = 2) -> None:
        self._gateway = gateway
        self._key = key
        self._model = model
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.whole = 0
        self.streamed = 0
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(i < streams,), daemon=True) for i in range(unary + streams)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, stream: bool) -> None:
        deadline = time.monotonic() + 300
        while not self._stop.is_set() and time.monotonic() < deadline:
            try:
                problem = self._stream() if stream else self._unary()
            except (OSError, ValueError, http.client.HTTPException) as e:
                problem = f"{type(e).__name__}: {e}"
            with self._lock:
                if problem:
                    self.failures.append(problem)
                elif stream:
                    self.streamed += 1
                else:
                    self.whole += 1
            self._stop.wait(0.02)

    def _unary(self) -> str:
        answer = self._gateway.request("POST", "/v1/chat/completions", chat(model=self._model), self._key)
        if answer.status != 200:
            return f"{answer.status}: {answer.body[:200]!r}"
        text = answer.json["choices"][0]["message"]["content"]
        return "" if text == "You said: hello there" else f"wrong answer {text!r}"

    def _stream(self) -> str:
        words = " ".join(f"w{i}" for i in range(20))
        body = chat(words, model=self._model, stream=True)
        answer = self._gateway.request("POST", "/v1/chat/completions", body, self._key)
        if answer.status != 200:
            return f"stream {answer.status}: {answer.body[:200]!r}"
        lines = [x.removeprefix("data: ") for x in answer.body.decode().splitlines() if x.startswith("data: ")]
        if lines[-1:] != ["[DONE]"]:
            return "a stream without its end"
        said = "".join(c["delta"].get("content") or "" for x in lines[:-1] for c in json.loads(x)["choices"])
        return "" if said == f"You said: {words}" else f"wrong stream {said!r}"

    def wait_for(self, more: int) -> None:
        """Wait until so many more answers of each kind were checked."""
        whole, streamed = self.whole + more, self.streamed + more
        deadline = time.monotonic() + 120
        while (self.whole < whole or self.streamed < streamed) and not self.failures:
            assert time.monotonic() < deadline, (self.whole, self.streamed)
            time.sleep(0.02)
