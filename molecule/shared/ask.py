# SPDX-License-Identifier: Apache-2.0
"""Runs inside a test host: one chat completion as a client sends it; the question comes as JSON on stdin.

The key is read from a file, so that no process list shows it. The answer is one JSON object on stdout.
"""

import http.client
import json
import ssl
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit


def main() -> int:
    """Ask until the gateways know the key (they look for new ones every second or two), then tell what came."""
    q = json.load(sys.stdin)
    url = urlsplit(q["url"])
    context = ssl.create_default_context(cafile="/etc/moat/tls/ca.pem")
    body = {
        "model": q["model"],
        "messages": [{"role": "user", "content": q["prompt"]}],
        "max_tokens": q["max_tokens"],
        "stream": q["stream"],
        # The likeliest token each time: the same answer on every run, so that a test may say how long it is.
        "temperature": 0,
    }
    headers = {
        "Authorization": f"Bearer {Path(q['key_file']).read_text('ascii').strip()}",
        "Content-Type": "application/json",
    }
    give_up = time.monotonic() + 10
    while True:
        connection = http.client.HTTPSConnection(url.hostname, url.port, timeout=240, context=context)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 401 or time.monotonic() > give_up:
            break
        connection.close()
        time.sleep(0.3)
    text, chunks, done = "", 0, False
    if response.status != 200:
        text = response.read(4000).decode("utf-8", "replace")
    elif not q["stream"]:
        text, chunks = json.loads(response.read())["choices"][0]["message"]["content"], 1
    else:
        while line := response.readline():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                break
            for choice in json.loads(data).get("choices", ()):
                if piece := choice["delta"].get("content"):
                    chunks += 1
                    text += piece
    answer = {"status": response.status, "text": text, "chunks": chunks, "done": done}
    print(json.dumps({**answer, "request_id": response.getheader("x-request-id") or ""}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
