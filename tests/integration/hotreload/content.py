# SPDX-License-Identifier: Apache-2.0
"""The content of revisions: folders whose models all say which revision they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

MODELS = ("m0", "m1", "m2", "m3")
#: A part of config.yaml that LiteLLM cannot take live.
NEEDS_RESTART = "litellm_settings: {success_callback: [prometheus]}\n"


def model(name: str, base: str, key: str = "os.environ/UP_KEY") -> str:
    """Return one entry of ``model_list``, as a line of YAML."""
    return f'  - {{model_name: {name}, litellm_params: {{model: openai/{name}, api_base: "{base}", api_key: {key}}}}}\n'


def config(models: Mapping[str, str], more: str = "", key: str = "os.environ/UP_KEY") -> str:
    """Return ``config.yaml`` with these models (name: base)."""
    return "model_list:\n" + "".join(model(n, b, key) for n, b in models.items()) + more


def keys(entries: Mapping[str, str], more: Sequence[str] = ()) -> str:
    """Return ``keys.yaml`` with one team and these keys (id: secret); ``more`` are further lines of the list."""
    lines = "".join(
        f"  - {{id: {i}, team: all, sha256: {hashlib.sha256(s.encode()).hexdigest()}}}\n" for i, s in entries.items()
    )
    tail = lines + "".join(f"  - {x}\n" for x in more)
    return "teams:\n  - {id: all, models: ['*']}\n" + (f"keys:\n{tail}" if tail else "keys: []\n")


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write a folder of configuration; what is there and not named stays."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder
