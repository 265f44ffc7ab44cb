# SPDX-License-Identifier: Apache-2.0
"""A folder as source of revisions, filled past every check of `config push`: with right ones and with wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.hotreload.craft import archive, pointer

from moat_gateway.sitekey import SigningKey

KEYS = "teams:\n  - {id: t, models: ['*']}\nkeys: []\n"


def config(name: str = "small", more: str = "", reference: str = "UP_KEY") -> str:
    """Return a `config.yaml` with one model of that name."""
    return (
        "model_list:\n"
        f"  - {{model_name: {name}, litellm_params: {{model: openai/{name}, "
        f'api_base: "http://127.0.0.1:9/v1", api_key: os.environ/{reference}}}}}\n{more}'
    )


def content(name: str = "small", more: str = "", **other: str | bytes) -> dict[str, bytes]:
    """Return the files of a good revision; `other` adds or replaces files (`/` is written `__`)."""
    files: dict[str, str | bytes] = {"config.yaml": config(name, more), "keys.yaml": KEYS}
    files.update({k.replace("__", "/"): v for k, v in other.items()})
    return {p: d.encode() if isinstance(d, str) else d for p, d in files.items()}


@dataclass
class Drive:
    """The folder and the key that signs.

    Attributes:
        folder: holds `current` and `revisions/`.
        key: the site key.
        last: the number that was used last.
    """

    folder: Path
    key: SigningKey = field(default_factory=SigningKey.generate)
    last: int = 0

    def __post_init__(self) -> None:
        (self.folder / "revisions").mkdir(parents=True, exist_ok=True)

    def trust(self, site_keys: Path) -> None:
        """Have a node trust the key."""
        site_keys.mkdir(exist_ok=True)
        (site_keys / "site.pub").write_bytes(self.key.public.to_bytes())

    def push(self, files: Mapping[str, bytes] | None = None, *, number: int | None = None, **how: Any) -> int:
        """Publish a revision; return its number."""
        number = number if number is not None else self.last + 1
        files = content(f"model-{number}") if files is None else files
        self.publish(number, archive(files, number, how.pop("key", self.key), **how))
        return number

    def publish(self, number: int, raw: bytes, stored: bytes | None = None, **other: Any) -> None:
        """Put an archive (or other bytes in its place) and move the pointer to it."""
        self.put(number, raw if stored is None else stored)
        self.move(pointer(number, raw, **other))
        self.last = max(self.last, number)

    def publish_archive(self, change: Callable[[bytes], bytes]) -> int:
        """Publish a good archive that was changed before the pointer was made of it; return its number."""
        number = self.last + 1
        self.publish(number, change(archive(content(), number, self.key)))
        return number

    def put(self, number: int, raw: bytes) -> None:
        """Put the bytes of an archive."""
        self._replace(self.folder / "revisions" / str(number), raw)

    def move(self, raw: bytes) -> None:
        """Put the bytes of the pointer."""
        self._replace(self.folder / "current", raw)

    def pointed(self) -> int:
        """Return the number that the pointer names."""
        return int(json.loads((self.folder / "current").read_bytes())["revision"])

    @staticmethod
    def _replace(path: Path, raw: bytes) -> None:
        beside = path.with_name(".beside")
        beside.write_bytes(raw)
        beside.replace(path)
