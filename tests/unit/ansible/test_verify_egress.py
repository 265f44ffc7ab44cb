# SPDX-License-Identifier: Apache-2.0
"""Proves what verify.yml makes of an egress verification: word and reasons, one host at a time, the report fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible.plugins.loader import filter_loader
from tests.unit.ansible.test_expressions import engine, holds, load, task, trusted

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "/var/lib/moat/evidence/egress/20260101T000000Z"


def answer(word: str, *reasons: str) -> dict[str, Any]:
    words = {"word": word, "sentence": "What it means.", "reasons": list(reasons), "mind": []}
    return {"ok": word == "PASS", "verdict": words, "folder": FOLDER, "attempts": [], "problems": ["x"]}


REFUSAL = {
    "ok": False,
    "exit": 25,
    "problems": [{"message": "another verification is running", "found": "a lock", "hint": "wait"}],
}


def row(egress: dict[str, Any] | None) -> dict[str, Any]:
    """Return the row that the playbook's own expression makes."""
    filter_loader.add_directory(str(ROOT / "ansible/filter_plugins"))
    one = task(load("verify.yml"), "Make this host's rows of the table")
    variables = {
        **trusted(one["vars"]),
        "__verify_probe": {"rows": []},
        "__verify_evidence": {"stdout": "{}"},
        "__verify_egress": {"stdout": json.dumps(egress)} if egress is not None else {"stdout": ""},
        "verify_egress": True,
    }
    (found,) = engine(**variables).template(trusted(one["ansible.builtin.set_fact"]["verify_rows"]))
    return dict(found)


@pytest.mark.parametrize(
    ("egress", "ok", "found"),
    [
        (answer("PASS", "It was watched."), True, f"PASS: What it means. Report: {FOLDER}"),
        (answer("FAIL", "One.", "Two."), False, f"FAIL: What it means. One. Two. Report: {FOLDER}"),
        (answer("NOT PROVEN", *"abcdefg"), False, f"NOT PROVEN: What it means. a b c d e And 2 more. Report: {FOLDER}"),
        (REFUSAL, False, "another verification is running; found: a lock; do: wait."),
        (None, False, "it gave no answer; run `moat egress verify` on the host"),
    ],
    ids=["pass", "fail", "not proven", "refusal", "silence"],
)
def test_the_row_shows_the_word_and_why(egress: dict[str, Any] | None, ok: bool, found: str) -> None:
    assert row(egress) == {"what": "nothing leaves", "ok": ok, "found": found}


def test_hosts_restart_one_after_the_other() -> None:
    assert task(load("verify.yml"), "Prove that nothing leaves (restarts the services)")["throttle"] == 1


@pytest.mark.parametrize(
    ("code", "stdout", "failed"),
    [(0, "{}", False), (24, "{}", False), (25, "{}", False), (25, "", True), (1, "", True)],
)
def test_what_is_no_answer_fails_the_host(code: int, stdout: str, failed: bool) -> None:
    prove = task(load("verify.yml"), "Prove that nothing leaves (restarts the services)")
    assert holds(prove["failed_when"], __verify_egress={"rc": code, "stdout": stdout}) is failed


def test_both_files_of_a_report_are_fetched_and_a_refusal_has_none() -> None:
    fetch = task(load("verify.yml"), "Bring the egress report to the control host")
    assert fetch["loop"] == ["egress-report.html", "egress-report.json"]
    variables = {**trusted(fetch["vars"]), "inventory_hostname": "node2", "item": "egress-report.json"}
    report = {**variables, "__verify_egress": {"stdout": json.dumps(answer("PASS"))}}
    words = {k: engine(**report).template(trusted(fetch["ansible.builtin.fetch"][k])) for k in ("src", "dest")}
    assert words == {
        "src": f"{FOLDER}/egress-report.json",
        "dest": "/var/lib/moat/evidence/hosts/node2/egress/20260101T000000Z/",
    }
    assert holds(fetch["when"], **report, ansible_connection="ssh")
    assert not holds(fetch["when"], **report, ansible_connection="local")
    for stdout in ("", json.dumps(REFUSAL)):
        assert not holds(fetch["when"], **{**variables, "__verify_egress": {"stdout": stdout}})
    assert not holds(fetch["when"], **variables, __verify_egress={"skipped": True})
