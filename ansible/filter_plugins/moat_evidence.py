# SPDX-License-Identifier: Apache-2.0
"""Filters for what verify.yml and the role evidence show to a person."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: Of a verdict, in one row of the table; the rest is in the report.
MOST_REASONS = 5


def line(finding: Mapping[str, Any]) -> str:
    """Return one contradiction, or one refusal of ``moat``, as one sentence."""
    what = str(finding.get("what") or finding.get("message") or "no reason was given")
    seen = ", ".join(f"{key}: {finding[key]}" for key in ("found", "expected") if finding.get(key))
    hint = f"do: {finding['hint']}" if finding.get("hint") else ""
    return "; ".join(part for part in (what, seen, hint) if part) + "."


def egress(answer: Mapping[str, Any]) -> str:
    """Return what ``moat egress verify --json`` says: the verdict's word with its reasons, or the refusal."""
    verdict = answer.get("verdict")
    if not verdict:
        refusals = [line(p) for p in answer.get("problems") or ()]
        return " ".join(refusals) or "it gave no answer; run `moat egress verify` on the host"
    reasons = list(verdict["reasons"])
    more = f" And {len(reasons) - MOST_REASONS} more." if len(reasons) > MOST_REASONS else ""
    why = "" if answer.get("ok") else " " + " ".join(reasons[:MOST_REASONS]) + more
    return f"{verdict['word']}: {verdict['sentence']}{why} Report: {answer.get('folder', '-')}"


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return rows (``host``, ``what``, ``ok``, ``found``) as lines of equal columns, the wrong ones marked and last.

    A site of one host needs no column that repeats its name.
    """
    ordered = sorted(rows, key=lambda r: not r["ok"])
    several = len({r["host"] for r in ordered}) > 1
    names = [f"{r['host']}  {r['what']}" if several else str(r["what"]) for r in ordered]
    width = max(map(len, names), default=0)
    return [
        f"{'ok   ' if r['ok'] else 'WRONG'}  {name.ljust(width)}  {r['found']}"
        for r, name in zip(ordered, names, strict=True)
    ]


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"moat_egress_line": egress, "moat_evidence_line": line, "moat_table": table}
