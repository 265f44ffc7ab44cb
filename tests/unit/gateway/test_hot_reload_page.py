# SPDX-License-Identifier: Apache-2.0
"""Proves that docs/hot-reload.md's table of failures quotes what the code says; its commands are run elsewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from moat_gateway.errors import all_kinds

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/hot-reload.md").read_text("utf-8")
SOURCES = sorted((ROOT / "images/gateway/moat_gateway").rglob("*.py"))


def rows() -> list[str]:
    """Return the first column of the table."""
    table = PAGE.split("## The worst day")[1].split("## ")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][1:]


def texts(path: Path) -> list[str]:
    """Return the texts of a module as it would say them, with NUL for what is put in; not its docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    no_text = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in no_text:
            found.append(node.value)
    return found


TEXTS = [text for path in SOURCES for text in texts(path)]
QUOTED = sorted({q for row in rows() for q in re.findall(r"`([^`]+)`", row)})


def test_the_table_is_found() -> None:
    assert len(rows()) > 15
    assert "unset-secret" in QUOTED


@pytest.mark.parametrize("quoted", QUOTED)
def test_what_the_table_quotes_is_said_by_the_code(quoted: str) -> None:
    if quoted == "STATE":
        assert any(quoted in text for text in TEXTS)
        return
    pieces = [re.escape(p) for p in re.split(r"\bN\b|\bNODE\b|\.\.\.| \(KIND\)", quoted)]
    pattern = re.compile("\0?".join(pieces))
    assert any(pattern.search(text) for text in TEXTS), f"the code says nothing like {quoted!r}"


def test_the_exit_codes_of_the_table_are_those_of_the_code() -> None:
    known = {k.exit_code for k in all_kinds()}
    named = {int(n) for row in rows() for n in re.findall(r"exit code (\d+)", row)}
    assert {17, 22, 23, 27} <= named <= known
