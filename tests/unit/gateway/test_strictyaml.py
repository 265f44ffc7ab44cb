# SPDX-License-Identifier: Apache-2.0
"""Proves that YAML is data only: tags, duplicates, bombs, loops and depth are refused with their line."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway import strictyaml
from moat_gateway.errors import BadConfig


def parse(text: str) -> strictyaml.Document:
    return strictyaml.parse(text, name="f.yaml", error=BadConfig)


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' twice"),
        ("a:\n  x: 1\n  x: 2\n", 3, "the key 'x' twice"),
        ("a: 1\nb: !!python/object/apply:os.system ['id']\n", 2, "tag"),
        ("a: !custom 1\n", 1, "tag"),
        ("a: !!str 1\n", 1, "tag"),
        ("a: !!binary aGk=\n", 1, "tag"),
        ("a: [1\nb: 2\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("a: &x [*x]\n", 1, "alias to itself"),
        ("a: &x\n  b: *x\n", 1, "alias to itself"),
        ("a: *nowhere\n", 1, "not valid YAML"),
        ("? [1, 2]\n: x\n", 1, "not plain text"),
        ("a:\n  <<: [1]\n", 2, "merges something else"),
        ("a: 2026-13-45\n", 1, "cannot be read"),
        ("a: 1\nb: 8080:30\n", 2, "number with colons"),
        ("a: 1:30.5\n", 1, "number with colons"),
        ("1:30: x\n", 1, "number with colons"),
        ("a: 0x" + "f" * 4000, 1, "number that is too long"),
        ("a: " + "9" * 65, 1, "number that is too long"),
        ("a: 1." + "0" * 70, 1, "number that is too long"),
    ],
)
def test_refusals_have_a_line(text: str, line: int, part: str) -> None:
    with pytest.raises(BadConfig) as e:
        parse(text)
    assert part in e.value.message
    assert e.value.line == line
    assert e.value.path == "f.yaml"


def test_an_alias_bomb_is_refused_quickly() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 30):
        bomb += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n"
    begun = time.monotonic()
    with pytest.raises(BadConfig, match="too many values"):
        parse(bomb)
    assert time.monotonic() - begun < 10


def test_a_number_to_the_base_of_sixty_takes_no_time() -> None:
    begun = time.process_time()
    with pytest.raises(BadConfig, match="number with colons"):
        parse("a: 1" + ":1" * 200_000 + "\n")
    # Made, it would take some ten seconds.
    assert time.process_time() - begun < 5


def test_numbers_of_any_sensible_length_and_quoted_ones_pass() -> None:
    doc = parse("a: " + "9" * 64 + "\nb: '1:30'\nc: \"" + "9" * 65 + '"\nd: 0x1F\ne: 1_000\nf: vllm:8000\n')
    assert doc.data == {"a": 10**64 - 1, "b": "1:30", "c": "9" * 65, "d": 31, "e": 1000, "f": "vllm:8000"}


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 5000 + "x", "{a: " * 5000])
def test_depth_is_bounded_before_anything_recurses(text: str) -> None:
    with pytest.raises(BadConfig, match=r"nested too deeply|not valid YAML"):
        parse(text)


def test_plain_aliases_and_merges_work() -> None:
    doc = parse("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\nagain: *b\n")
    assert doc.data == {"base": {"x": 1, "y": 2}, "use": {"x": 1, "y": 3}, "again": {"x": 1, "y": 2}}


def test_lines_of_values() -> None:
    doc = parse("a:\n  - b: 1\n    c: 2\n  - d: 3\n")
    assert doc.line(("a", 0, "c")) == 3
    assert doc.line(("a", 1, "d")) == 4
    assert doc.line(("a", 1, "missing")) == 4
    assert strictyaml.dotted(("a", 1, "d")) == "a[1].d"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=15,
)


@given(plain)
def test_plain_data_reads_as_pyyaml_reads_it(data: Any) -> None:
    text = yaml.safe_dump(data, allow_unicode=True)
    assert parse(text).data == yaml.safe_load(text)


@given(st.text(max_size=80))
def test_any_text_is_data_or_a_clean_refusal(text: str) -> None:
    where: str | None = "f.yaml"
    try:
        parse(text)
    except BadConfig as e:
        where = e.path
    assert where == "f.yaml"
