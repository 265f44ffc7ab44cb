# SPDX-License-Identifier: Apache-2.0
"""Proves that one variable is set in the operator's vars.yml without harm to the rest of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tests.unit.ansible.modules import module

site_vars = module("moat_site_vars")
INSTALL = Path(__file__).resolve().parents[3] / "ansible/install.sh"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "n: 3\n"),
        ("# only\n# comments\n", "# only\n# comments\nn: 3\n"),
        ("---\n", "---\nn: 3\n"),
        # What an older install.sh wrote: no line can be added behind it.
        ("# how\n---\n{}\n", "# how\n---\nn: 3\n"),
        ("---\n{}\n# mine\n", "---\nn: 3\n# mine\n"),
        ("{a: 1, b: [2]}\n", "{n: 3, a: 1, b: [2]}\n"),
        ("{a: 1, n: 2}\n", "{a: 1, n: 3}\n"),
        ("a: 1 # one\n", "a: 1 # one\nn: 3\n"),
        ("a: 1", "a: 1\nn: 3\n"),
        ("n: 2 # why\na:\n  n: 7\n", "n: 3 # why\na:\n  n: 7\n"),
        ('n: "2"\n', "n: 3\n"),
        ("n:   2\n", "n:   3\n"),
        ('"n": 2\n', '"n": 3\n'),
        ("n: 1\nn: 2\n", "n: 1\nn: 3\n"),
        ("n: 3 # it is\n", "n: 3 # it is\n"),
        ("text: |\n  n: 1\n", "text: |\n  n: 1\nn: 3\n"),
        ("s: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3132\nb: 1\n",
         "s: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3132\nb: 1\nn: 3\n"),
    ],
)  # fmt: skip
def test_it_is_set_where_it_stands_or_must_stand(before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "vars.yml"
    path.write_text(before)
    p = {"path": str(path), "name": "n", "value": 3}
    assert site_vars.keep(p, check=True)[0] is (before != after)
    assert path.read_text() == before
    site_vars.keep(p, check=False)
    assert path.read_text() == after
    assert site_vars.keep(p, check=False) == (False, 3)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\n...\n",  # a line behind the end would be another document
        "$ANSIBLE_VAULT;1.1;AES256\n3132\n",
        "- a\n",
        "a: [1\n",
        "n: !vault |\n  3132\nb: 1\n",
    ],
)
def test_what_is_not_understood_is_refused_and_stays_as_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "vars.yml"
    path.write_text(text)
    with pytest.raises(site_vars.Refused, match=r"Found: .*expected: .*Do: write the line `n: 3`"):
        site_vars.keep({"path": str(path), "name": "n", "value": 3}, check=False)
    assert path.read_text() == text


def test_a_file_that_is_missing_is_made_for_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "vars.yml"
    assert site_vars.keep({"path": str(path), "name": "n", "value": 3}, check=False) == (True, None)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("n: 3\n", 0o600)


def test_a_line_can_be_added_to_what_install_sh_writes() -> None:
    """By the operator, too, as docs/install.md says."""
    (text,) = re.findall(r'put "\$saved_vars" 600 <<\'END\'\n(.*?)^END$', INSTALL.read_text("utf-8"), re.M | re.S)
    assert text.startswith("# The variables of this site")
    assert yaml.safe_load(f"{text}gateway_count: 3\n") == {"gateway_count": 3}
