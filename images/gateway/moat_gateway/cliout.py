# SPDX-License-Identifier: Apache-2.0
"""What the commands' output has in common: one JSON object on stdout, messages on stderr, counted words."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any


def print_json(value: Mapping[str, Any]) -> int:
    """Print one object and return the exit code 0."""
    print(json.dumps(value, sort_keys=True), flush=True)
    return 0


def say(text: str) -> None:
    """Say something that is not the result."""
    print(text, file=sys.stderr)


def count(number: int, what: str) -> str:
    """Return ``3 models``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def plain(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Return dataclasses as JSON has them."""
    return [asdict(i) for i in items]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns; the last one is as long as it is."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(r[i].ljust(w) for i, w in enumerate(widths)), r[-1]]).rstrip() for r in rows]
