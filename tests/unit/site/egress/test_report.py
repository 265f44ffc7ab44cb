# SPDX-License-Identifier: Apache-2.0
"""Proves that the egress report says what was found, to a program and to a reader, whatever a process calls itself."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moat.errors import EgressUnproven
from moat.site.egress import refuse_to_overwrite
from moat.site.egresscheck.model import (
    Attempt,
    Component,
    Endpoint,
    LayerResult,
    Probe,
    Report,
    RequestResult,
    Step,
)
from moat.site.egresscheck.page import MOST_ROWS, page
from moat.site.egresscheck.report import as_json, write_report
from moat.site.egresscheck.verdict import Word, by_component, verdict

WHEN = "2026-11-23T15:20:01.123Z"
PASS = Report(
    site="compose",
    started=WHEN,
    ended="2026-11-23T15:24:09.000Z",
    quiet_seconds=30,
    components=(Component("gateway-1", "moat-gateway-1-1", 10102, ("172.30.242.11",)), Component("minio", "m", 10103)),
    endpoints=(Endpoint("config.yaml api_base", "http://model:8081", True),),
    layers=(LayerResult("bridges", True, True, "udp 198.51.100.9:9"), LayerResult("dns", True, True, "name x")),
    requests=(RequestResult("chat", 200, True, "4 tokens"),),
    attempts=(),
    probes=(Probe("no way to the host", True, "refused", "refused"),),
    rules="*filter\n-A INPUT -j DROP\nCOMMIT",
    host={"command": "moat egress verify --quiet 30", "kernel": "6.12"},
    steps=(Step(WHEN, "Start to watch"),),
    allowed=("model:8081",),
    subject={"release": "0.1.0-abc"},
)
TRY = Attempt(WHEN, "bridges", "12/python3", "gateway-1", "tcp 203.0.113.7:443", "from 172.30.242.11")


class _Reader(html.parser.HTMLParser):
    """Collects tags, attributes and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.text.append(data)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, Word.PASS),
        ({"attempts": (TRY,)}, Word.FAIL),
        ({"endpoints": (Endpoint("callback", "https://vendor.example", False),)}, Word.FAIL),
        ({"probes": (Probe("no way to the host", False, "reached", "refused"),)}, Word.FAIL),
        ({"problems": ("something was lost",)}, Word.NOT_PROVEN),
        ({"layers": (LayerResult("bridges", True, False, "udp 198.51.100.9:9"),)}, Word.NOT_PROVEN),
        ({"layers": (LayerResult("syscalls", False, None, "no BPF"),)}, Word.NOT_PROVEN),
        ({"layers": (LayerResult("dns", True, True, "name x"),)}, Word.NOT_PROVEN),
        ({"attempts": (TRY,), "problems": ("something was lost",)}, Word.FAIL),
    ],
)
def test_the_word_is_the_verdict(changes: dict[str, Any], word: Word) -> None:
    report = replace(PASS, **changes)
    judged = verdict(report)
    assert judged.word is word
    assert (judged.word is Word.PASS) == report.ok
    assert judged.reasons, "a verdict without a reason convinces nobody"
    assert f'<p class="word">{word.value}</p>' in page(report)


def test_a_missing_layer_is_named_beside_a_pass() -> None:
    layers = (*PASS.layers, LayerResult("syscalls", False, None, "the kernel refuses BPF programs"))
    judged = verdict(replace(PASS, layers=layers))
    assert judged.word is Word.PASS
    assert judged.mind[0] == "The layer “syscalls” is not available on this host: the kernel refuses BPF programs"
    assert "the kernel refuses BPF programs" in page(replace(PASS, layers=layers))


def test_what_was_not_looked_at_stands_beside_a_pass() -> None:
    layers = (replace(PASS.layers[0], notes=("IPv6 is off on this host",)), PASS.layers[1])
    report = replace(PASS, layers=layers, requests=(), quiet_seconds=45)
    judged = verdict(report)
    assert judged.word is Word.PASS
    note, request, quiet = judged.mind
    assert note == "The layer “bridges”: IPv6 is off on this host."
    assert request.startswith("No request was sent")
    assert quiet.startswith("The watching ended 45 seconds after the first requests.")
    # A pass with nothing else to say about it still says how long it looked.
    assert [m.partition(" seconds")[0] for m in verdict(PASS).mind] == ["The watching ended 30"]
    text = page(report)
    for sentence in judged.mind:
        assert sentence in text
    assert "the requests below were sent" not in text
    assert "the requests below were sent" in page(PASS)


def test_a_report_is_never_written_over(tmp_path: Path) -> None:
    refuse_to_overwrite(tmp_path)
    write_report(PASS, tmp_path)
    with pytest.raises(EgressUnproven, match="there is a report in this folder already"):
        refuse_to_overwrite(tmp_path)


def test_the_page_loads_and_runs_nothing() -> None:
    reader = _Reader(page(replace(PASS, attempts=(TRY,))))
    assert {"script", "img", "link", "iframe", "object", "base", "form", "a"} & set(reader.tags) == set()
    assert not [a for a in reader.attributes if a[1] in ("src", "href", "style") or a[1].startswith("on")]
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    style = re.search(r"<style>(.*?)</style>", page(PASS), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


@pytest.mark.parametrize(
    "hostile",
    [
        "</title><script>alert(1)</script>",
        "' onmouseover='x' \"",
        "\x1b[2J\x1b[H everything is fine",
        "\u202etxt.exe",
        "\udc80\udcff",
        "a" * 100_000,
        "<!--",
        "]]>",
        "\0",
    ],
)
def test_hostile_values_stay_text_everywhere(tmp_path: Path, hostile: str) -> None:
    report = replace(
        PASS,
        components=(Component(hostile, hostile, 1, (hostile,)),),
        endpoints=(Endpoint(hostile, hostile, False),),
        layers=(LayerResult(hostile, True, False, hostile), LayerResult("dns", False, None, hostile)),
        requests=(RequestResult(hostile, 0, False, hostile),),
        attempts=(Attempt(hostile, hostile, hostile, hostile, hostile, hostile), replace(TRY, component="other")),
        probes=(Probe(hostile, False, hostile, hostile),),
        rules=hostile,
        problems=(hostile,),
        host={hostile: hostile, "command": hostile, "host": hostile},
        steps=(Step(hostile, hostile),),
        allowed=(hostile,),
        subject={hostile: hostile},
        site=hostile,
        started=hostile,
    )
    write_report(report, tmp_path)
    text = (tmp_path / "egress-report.html").read_text("utf-8")
    good = _Reader(page(replace(PASS, attempts=(TRY,), layers=(PASS.layers[0], LayerResult("x", False, None, "y")))))
    assert set(_Reader(text).tags) <= set(good.tags) | {"em"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert len(text) < 400_000
    assert json.loads((tmp_path / "egress-report.json").read_text("utf-8"))["problems"] == [hostile]


def test_thousands_of_attempts_become_few_lines() -> None:
    times = [f"2026-11-23T15:2{i % 3}:{i % 60:02d}.000Z" for i in range(50_000)]
    attempts = tuple(
        Attempt(when, "syscalls", f"{1000 + i}/python3", "minio", "tcp 203.0.113.7:443") for i, when in enumerate(times)
    )
    groups = by_component(attempts)["minio"]
    assert [(g.sightings, len(g.pids), g.processes) for g in groups] == [(50_000, 50_000, {"python3": 50_000})]
    assert (groups[0].first, groups[0].last) == ("2026-11-23T15:20:00.000Z", "2026-11-23T15:22:59.000Z")
    text = page(replace(PASS, attempts=attempts))
    assert len(text) < 40_000
    assert "seen 50000 times" in text


def test_many_destinations_are_cut_with_their_number() -> None:
    attempts = tuple(replace(TRY, destination=f"tcp 203.0.113.7:{i}") for i in range(1, 5001))
    text = page(replace(PASS, attempts=attempts))
    assert f"And {5000 - MOST_ROWS} more destinations, seen {5000 - MOST_ROWS} times" in text
    assert len(text) < 400_000


def test_every_table_has_a_caption_and_headings_follow_each_other() -> None:
    text = page(replace(PASS, attempts=(TRY,)))
    reader = _Reader(text)
    assert reader.tags.count("table") == reader.tags.count("caption") >= 6
    levels = [int(t[1]) for t in reader.tags if re.fullmatch(r"h[1-6]", t)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert ("html", "lang", "en") in reader.attributes


def test_both_files_are_whole_and_not_for_everyone(tmp_path: Path) -> None:
    folder = tmp_path / "evidence/run"
    write_report(PASS, folder)
    write_report(PASS, folder)  # again, over the first
    assert sorted(p.name for p in folder.iterdir()) == ["egress-report.html", "egress-report.json"]
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0
    raw = json.loads((folder / "egress-report.json").read_text("utf-8"))
    assert raw == json.loads(as_json(PASS))
    assert (raw["ok"], raw["steps"], raw["allowed"]) == (
        True,
        [{"when": WHEN, "what": "Start to watch"}],
        ["model:8081"],
    )


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        write_report(PASS, tmp_path / "file")
