# SPDX-License-Identifier: Apache-2.0
"""Proves that docs/reference/exit-codes.md and errors.py list the same codes and words, and that no two share one."""

from __future__ import annotations

import re
from pathlib import Path

from moat.errors import MoatError, all_kinds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "exit-codes.md"
ROW = re.compile(r"^\| (\d+) \| (?:`([a-z-]+)`)? ?\| (.+) \| (.*)\|$")
#: What no refusal of ours stands for: done, a defect, usage, and what shells use for signals.
GENERAL = {0, 1, 2, 130, 141}


def rows() -> list[tuple[int, str, str, str]]:
    found = [ROW.match(line) for line in PAGE.read_text("utf-8").splitlines() if re.match(r"^\| \d", line)]
    assert all(found), "a row of the table is malformed"
    return [(int(m[1]), m[2] or "", m[3].strip(), m[4].strip()) for m in found if m]


def every_class(base: type[MoatError] = MoatError) -> set[type[MoatError]]:
    return {c for sub in base.__subclasses__() for c in {sub, *every_class(sub)} if c.__module__ == "moat.errors"}


def test_page_and_code_list_the_same() -> None:
    documented = {(code, kind) for code, kind, _, _ in rows() if code not in GENERAL}
    assert documented == {(c.exit_code, c.kind) for c in every_class()}
    assert every_class() == {c for c in all_kinds() if c.__module__ == "moat.errors"}


def test_the_general_codes_are_on_the_page() -> None:
    assert {code for code, kind, _, _ in rows() if not kind} == GENERAL


def test_no_two_refusals_share_a_code_or_a_word() -> None:
    classes = every_class()
    assert len({c.exit_code for c in classes}) == len({c.kind for c in classes}) == len(classes)
    assert not {c.exit_code for c in classes} & GENERAL


def test_every_refusal_says_what_to_do() -> None:
    for code, kind, what, do in rows():
        assert what, code
        if kind:
            assert do, kind


def test_rows_are_in_the_order_of_their_codes() -> None:
    codes = [code for code, _, _, _ in rows()]
    assert codes == sorted(codes)
