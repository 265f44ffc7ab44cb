# SPDX-License-Identifier: Apache-2.0
"""``python3 -m moat_model``: serve the weights of this image on port 8081 until SIGTERM.

The server is llama.cpp's, with real tokens and no canned text. What is set differently from its
defaults, and why:

- one thread: two OpenMP threads on a busy two-core machine fell from 60 to 2.4 tokens a second;
- four slots of 2048 tokens each, so that four streams run side by side;
- ``/slots`` (which shows the prompts of others), changes by ``/props``, the web page and metrics are off;
- its log carries warnings and errors only, never a prompt;
- the prompt cache in memory is bounded (upstream's default is 8 GiB).
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

MODEL = Path("/opt/moat/models/SmolLM2-135M-Instruct.Q4_1.gguf")
ALIAS = "smollm2-135m-instruct"
KEY_FILE = Path("/run/secrets/model_api_key")
PORT = 8081
SLOTS = 4
CONTEXT_PER_SLOT = 2048  # tokens
PROMPT_CACHE_MIB = 64
#: llama.cpp's levels: 1 errors, 2 warnings, 3 information (a few lines a request), 4 debug (prompts).
VERBOSITY = 2


def read_key(path: Path) -> str | None:
    """Return the API key that callers must present, or ``None`` where no secret is mounted.

    Raises:
        SystemExit: the secret is there but empty or unreadable: serving without a key would not be what was meant.
    """
    try:
        key = path.read_text("utf-8").strip()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise SystemExit(f"moat-model: cannot read the secret {path}: {e.strerror}") from e
    if not key:
        raise SystemExit(f"moat-model: the secret {path} is empty")
    return key


def configure(params: Any, *, model: Path, key: str | None, host: str, port: int) -> None:
    """Set llama.cpp's parameters (an ``xllamacpp.CommonParams``)."""
    params.model.path = str(model)
    params.model_alias = {ALIAS}
    params.hostnames = [host]
    params.port = port
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * CONTEXT_PER_SLOT
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.endpoint_slots = False
    params.endpoint_props = False
    params.endpoint_metrics = False
    params.ui = False
    params.verbosity = VERBOSITY
    if key is not None:
        params.api_keys = [key]


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    # As process 1 a container ignores every signal that has no handler.
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    key = read_key(KEY_FILE)
    import xllamacpp  # after the secret is checked: it takes half a second

    params = xllamacpp.CommonParams()
    configure(params, model=MODEL, key=key, host="0.0.0.0", port=PORT)  # noqa: S104 - a container's own network
    try:
        server = xllamacpp.Server(params)
    except Exception as e:
        print(f"moat-model: the model server did not start: {e}", file=sys.stderr, flush=True)
        return 1
    guarded = "with" if key else "without"
    print(
        f"moat-model: {ALIAS} on port {PORT}, {SLOTS} slots of {CONTEXT_PER_SLOT} tokens, {guarded} a key", flush=True
    )
    stop.wait()
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main())
