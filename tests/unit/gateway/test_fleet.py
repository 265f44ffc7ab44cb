# SPDX-License-Identifier: Apache-2.0
"""Proves what `config status` and `push --wait` make of the nodes' reports: who serves what, who does not, and why."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway import fleet, fleetview
from moat_gateway.errors import GatewayError, StoreFailed
from moat_gateway.fleet import Fleet
from moat_gateway.revstore import NodeReport
from moat_gateway.settings import Settings
from moat_gateway.sync import files, nodefolder
from moat_gateway.sync import reports as node_reports

SHA = "a" * 64


def gateway(name: str = "gateway-1", revision: int = 7, **more: Any) -> dict[str, Any]:
    made = node_reports.Report(
        name=name, pid=11, boot_id="b", beat_boottime=1.0, revision=revision, sha256=SHA,
        applied_at="2027-01-31T12:00:00Z",
        ready=True, draining=False, started_at="x",
    )  # fmt: skip
    return {**made.to_dict(), "age": 0.5, **more}


def report(*gateways: dict[str, Any], age: float | None = 1.0, **more: Any) -> NodeReport:
    source = nodefolder.SourceState("s3", "bucket b at s", reachable=True)
    state = nodefolder.SyncState("n1", 5, "b", 1.0, "x", source, 1.0, pointer=7, revision=7)
    value = {"format": 1, "node": "n1", "sync": {**state.to_dict(), **more}, "gateways": list(gateways)}
    return NodeReport(json.dumps(value).encode(), age)


def lag(*gateways: dict[str, Any], age: float = 1.0, **more: Any) -> tuple[tuple[str, str], ...]:
    found = fleet.from_reports({"n1": report(*gateways, age=age, **more)})
    return tuple((x.kind, x.why) for x in fleet.lagging(found, 7, SHA))


def test_a_gateway_that_serves_the_revision_or_a_newer_one_is_served() -> None:
    assert lag(gateway(), gateway("gateway-2", 8, sha256="b" * 64)) == ()


@pytest.mark.parametrize(
    ("what", "node", "kind", "why"),
    [
        ({"revision": 6}, {}, "behind", "still serves revision 6"),
        ({"revision": 0}, {}, "behind", "still serves local files"),
        ({"revision": 6, "draining": True}, {}, "behind", "is ending"),
        ({"sha256": "b" * 64}, {}, "other-content", "another revision 7"),
        ({"age": 60.0}, {}, "silent", "has not reported for 6"),
        ({"age": None}, {}, "silent", "since its machine was started"),
        ({}, {"age": 7200.0}, "silent", "the node has not reported for 2 h"),
        ({"revision": 6, "last_refused": {"revision": 7, "reason": "bad"}}, {}, "refused", "refused: bad"),
        ({"revision": 6, "needs_restart": ["callbacks"]}, {}, "needs-restart", "callbacks"),
        (
            {"revision": 6},
            {"last_refused": {"revision": 7, "kind": "bad-signature", "reason": "not ours", "at": "x"}},
            "refused",
            "refused (bad-signature): not ours",
        ),
        (
            {"revision": 6},
            {"last_refused": {"revision": 5, "kind": "bad-signature", "reason": "long ago", "at": "x"}},
            "behind",
            "still serves",
        ),
        (
            {"revision": 6},
            {"source": {"kind": "s3", "where": "the store", "reachable": False, "why": "gone"}},
            "store-not-seen",
            "does not reach the store: gone",
        ),
    ],
)
def test_who_does_not_serve_it_is_named_with_the_reason(
    what: dict[str, Any], node: dict[str, Any], kind: str, why: str
) -> None:
    found = lag(gateway(**what), **node)
    assert [k for k, _ in found] == [kind]
    assert why in found[0][1]


def test_a_report_of_unknown_age_is_shown_and_said() -> None:
    found = fleet.from_reports({"n1": report(gateway(), gateway("g2", 6), age=None)})
    assert (found.nodes[0].age, found.nodes[0].alive) == (None, True)
    assert [x.kind for x in fleet.lagging(found, 7, SHA)] == ["behind"]
    [note] = fleetview.notes(found)
    assert note == "how old these reports are is not known, as their folder cannot be written: n1"


def test_a_node_without_gateways_lags_only_when_it_is_silent() -> None:
    assert lag() == ()
    assert [k for k, _ in lag(age=100.0)] == ["silent"]


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"null", b'{"sync": {}, "gateways": []}', b"[" * 5000])
def test_a_report_that_cannot_be_read_is_said_and_the_others_are_shown(raw: bytes) -> None:
    found = fleet.from_reports({"bad": NodeReport(raw, 1.0), "n1": report(gateway())})
    assert [n.name for n in found.nodes] == ["bad", "n1"]
    assert len(found.gateways) == 1
    lags = fleet.lagging(found, 7, SHA)
    assert [(x.name, x.why) for x in lags] == [("bad", "its report cannot be read")]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_no_report_breaks_the_others(value: Any) -> None:
    broken = json.loads(report(gateway()).raw)
    for part in (broken, broken["sync"], broken["gateways"][0]):
        for name in list(part):
            changed = json.loads(json.dumps(broken))
            (changed if part is broken else changed["sync"] if part is broken["sync"] else changed["gateways"][0])[
                name
            ] = value
            found = fleet.from_reports({"n1": NodeReport(json.dumps(changed).encode(), 1.0)})
            assert len(found.nodes) == 1
            fleet.lagging(found, 7, SHA)
            fleet.highest(found)
            text = "\n".join([*fleetview.table(found, 7), *fleetview.notes(found)])
            # Nothing from another machine reaches the terminal as a control character.
            assert all(c.isprintable() or c == "\n" for c in text)


def test_this_node_s_own_folders_are_read_without_the_store(tmp_path: Path) -> None:
    assert fleet.from_here(Settings()) == Fleet()
    sync, reports = tmp_path / "sync", tmp_path / "reports"
    sync.mkdir()
    reports.mkdir()
    settings = Settings(sync_dir=str(sync), reports_dir=str(reports))
    assert fleet.from_here(settings) == Fleet()
    source = nodefolder.SourceState("s3", "the store", reachable=False, why="gone")
    state = nodefolder.SyncState("pc1", 5, files.boot_id(), files.boottime(), "x", source, 1.0, revision=7)
    (sync / "sync.json").write_bytes(files.object_bytes(state.to_dict()))
    own = node_reports.Report("gateway-1", 11, files.boot_id(), files.boottime(), 7, SHA, None, True, False, "x")
    node_reports.write_report(reports, own)
    found = fleet.from_here(settings)
    assert [(n.name, n.reachable) for n in found.nodes] == [("pc1", False)]
    assert [(g.name, g.revision, g.alive) for g in found.gateways] == [("gateway-1", 7, True)]
    assert fleet.highest(found) == (7, ())
    assert fleetview.notes(found) == ["pc1: does not reach the store: gone"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7200, "2 h"), (200000, "2 d"), (None, "?")]
)
def test_lengths_of_time_are_said_as_people_do(seconds: float | None, text: str) -> None:
    assert fleet.duration(seconds) == text


# --- the table ---


class Terminal(io.StringIO):
    """A terminal that remembers what it was told."""

    def isatty(self) -> bool:
        return True


def follow(out: io.StringIO, *states: Fleet | GatewayError, seconds: float = 10.0) -> tuple[tuple[str, ...], float]:
    """Follow revision 7 through some states, a second each; return who lags at the end and how long it took."""
    left, now = list(states), [0.0]

    def look() -> Fleet:
        seen = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(seen, GatewayError):
            raise seen
        return seen

    def sleep(_: float) -> None:
        now[0] += 1.0

    _state, lags, took = fleetview.wait(look, 7, SHA, seconds, out, clock=lambda: now[0], sleep=sleep)
    return tuple(x.name for x in lags), took


def states() -> tuple[Fleet, ...]:
    def of(*numbers: int) -> Fleet:
        each = [gateway(f"gateway-{i}", n) for i, n in enumerate(numbers, 1)]
        return fleet.from_reports({"n1": report(*each)})

    return of(6, 6), of(7, 6), of(7, 7)


def test_without_a_terminal_each_change_is_one_line() -> None:
    out = io.StringIO()
    assert follow(out, *states()) == ((), 2.0)
    assert out.getvalue().splitlines() == [
        "   0.0 s  n1/gateway-1: still serves revision 6",
        "   0.0 s  n1/gateway-2: still serves revision 6",
        "   1.0 s  n1/gateway-1: serves revision 7",
        "   2.0 s  n1/gateway-2: serves revision 7",
    ]


def test_on_a_terminal_the_table_is_replaced_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    out = Terminal()
    assert follow(out, *states()) == ((), 2.0)
    frames = out.getvalue().split("\x1b[J")
    assert len(frames) == 3
    ups = re.findall(r"\x1b\[(\d+)F", out.getvalue())
    # As many lines up as the frame before had.
    assert [int(u) for u in ups] == [frame.count("\n") for frame in frames[:-1]]
    assert "revision 7: 2 of 2 gateways, 2.0 s" in frames[-1]
    assert all(len(line) < 80 for frame in frames for line in frame.splitlines())


def test_waiting_ends_with_its_time_and_names_who_lags() -> None:
    lags, took = follow(io.StringIO(), *states()[:2], seconds=5.0)
    assert (lags, took) == (("n1/gateway-2",), 5.0)


LOST = StoreFailed("cannot list nodes/ at store:9000", found="ReadTimeoutError")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_look_that_fails_is_not_yet_and_what_was_seen_before_it_counts(terminal: bool) -> None:
    out = Terminal() if terminal else io.StringIO()
    first, second, last = states()
    assert follow(out, LOST, first, LOST, LOST, second, last) == ((), 5.0)
    assert "the reports: cannot be read: cannot list nodes/ at store:9000; found" in out.getvalue()
    if not terminal:
        said = [line for line in out.getvalue().splitlines() if "the reports" in line]
        assert [line.split()[0] for line in said] == ["0.0", "1.0", "2.0", "4.0"], "once each time"
    lags, took = follow(io.StringIO(), second, LOST, seconds=3.0)
    assert (lags, took) == (("n1/gateway-2", "the reports"), 3.0)
    # The store was lost at the very end: that everybody served it before is not enough to say so now.
    assert follow(io.StringIO(), LOST, seconds=2.0) == (("the reports",), 2.0)


def test_waiting_for_nobody_is_no_success() -> None:
    state, lags, _took = fleetview.wait(Fleet, 7, None, 0.0, io.StringIO())
    assert (state.gateways, lags) == ((), ())


def test_a_table_says_what_each_serves_and_how_it_is() -> None:
    found = fleet.from_reports(
        {"n1": report(gateway(), gateway("gateway-2", ready=False, degraded=["no model"])), "n2": report(age=99.0)}
    )
    lines = fleetview.table(found, 7, SHA)
    assert lines[0].split() == ["NODE", "GATEWAY", "SERVES", "SINCE", "STATE"]
    assert re.fullmatch(r"n1    gateway-1  revision 7  2027-01-31T12:00:00Z  ok", lines[1])
    assert lines[2].endswith("not ready; no model")
    assert lines[3].split(None, 4)[4] == "the node has not reported for 99 s"
