# SPDX-License-Identifier: Apache-2.0
"""Proves that the reference pages say what the code does: exit codes, metrics, log events, status fields."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from moat_gateway import events, metrics
from moat_gateway.errors import GatewayError, all_kinds
from moat_gateway.status import STATUS_FIELDS

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "images/gateway/moat_gateway"


def _events_in_code() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "event"
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(node.args[0].value)
    return found


def test_exit_codes() -> None:
    page = (ROOT / "docs/reference/gateway-exit-codes.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `([a-z-]+)` \| (.+) \|$", page, re.MULTILINE)
    code = [(str(k.exit_code), k.kind, (k.__doc__ or "").strip()) for k in all_kinds()]
    assert rows == code


def test_each_refusal_has_a_code_of_its_own_from_3_on() -> None:
    codes = [k.exit_code for k in all_kinds()]
    assert codes == list(range(3, 3 + len(codes)))
    assert len({k.kind for k in all_kinds()}) == len(codes)


def test_one_line_holds_everything_and_is_one_line() -> None:
    e = GatewayError("bad\nthing", found="a\n b", expected="c", hint="do it", path="f.yaml", line=3)
    assert e.one_line() == "f.yaml line 3: bad thing; found a b; expected c. Do: do it"


def test_metrics_page() -> None:
    assert (ROOT / "docs/reference/metrics.md").read_text("utf-8") == metrics.markdown()


def test_log_events_page() -> None:
    assert (ROOT / "docs/reference/log-events.md").read_text("utf-8") == events.markdown()


def test_every_event_of_the_code_is_in_the_table_and_the_other_way_round() -> None:
    assert _events_in_code() == set(events.EVENTS)


def test_status_fields_are_in_the_operators_page() -> None:
    page = (ROOT / "docs/gateway.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", page, re.MULTILINE))
    assert {k: rows.get(k) for k in STATUS_FIELDS} == STATUS_FIELDS


def test_rendering_has_help_type_and_a_value_for_each_metric() -> None:
    sources = {m.name: (lambda m=m: {"a": 1.0} if m.label else 2_000_000.0) for m in metrics.METRICS}
    text = metrics.render(sources)
    for m in metrics.METRICS:
        assert f"# TYPE {m.name} {m.type}\n" in text
        assert f"\n{m.name}" + (f'{{{m.label}="a"}} 1' if m.label else " 2000000") + "\n" in text
