# SPDX-License-Identifier: Apache-2.0
"""Proves the order and the guarantees of a verification: everything started is stopped, whatever happens in between.

Layers and site here are small and deterministic; the real ones are in tests/integration/egress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moat.console import Console
from moat.errors import EgressFound, EgressUnproven
from moat.site.egress import refusals_of
from moat.site.egresscheck import leftovers, run
from moat.site.egresscheck.model import (
    Attempt,
    Component,
    Endpoint,
    Layer,
    NotAvailable,
    Probe,
    Report,
    RequestResult,
)

ONE = Component("gateway-1", "moat-gateway@1.service", 64801)


class OneLayer:
    def __init__(self, name: str, log: list[str], *, offered: bool = True, catches: bool = True) -> None:
        self.name, self._log, self._offered, self._catches = name, log, offered, catches
        self._controls = 0
        self.problems: list[str] = []
        self.notes: list[str] = []

    def start(self, components: Sequence[Component]) -> None:
        self._log.append(f"start {self.name}")
        if not self._offered:
            raise NotAvailable("the kernel is too old")

    def control(self) -> str:
        self._controls += self._catches
        return "198.51.100.1"

    def stop(self) -> list[Attempt]:
        self._log.append(f"stop {self.name}")
        control = Attempt("2026-01-01T00:00:00.000Z", self.name, "1/x", "control", "udp 198.51.100.1:9")
        return [control] * self._controls


class OneSite:
    kind = "systemd"

    def __init__(self, layers: Sequence[Layer], log: list[str]) -> None:
        self._layers, self._log = list(layers), log
        self.fails: BaseException | None = None
        self.runs = [ONE]
        self.changed: list[str] = []

    def components(self) -> list[Component]:
        return self.runs

    def endpoints(self) -> list[Endpoint]:
        return []

    def layers(self, allowed: Sequence[str]) -> list[Layer]:
        return self._layers

    def restart(self, components: Sequence[Component]) -> None:
        self._log.append("restart")
        if self.fails is not None:
            raise self.fails

    def subject(self) -> dict[str, str]:
        return {"release": "0.1.0-abc"}

    def changes(self) -> list[str]:
        return self.changed

    def requests(self) -> list[RequestResult]:
        self._log.append("requests")
        return [RequestResult("chat", 200, True, "")]

    def probes(self) -> list[Probe]:
        return []

    def rules(self) -> str:
        self._log.append("rules")
        return "table"


@pytest.fixture(autouse=True)
def nothing_on_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's packet filter is not these tests' subject, and other tests use it at the same time."""
    monkeypatch.setattr(leftovers, "present", list)
    monkeypatch.setattr(leftovers, "remove", lambda console: [])


def verify(site: OneSite, tmp_path: Path, quiet: float = 25) -> tuple[Report, list[float]]:
    slept: list[float] = []
    report = run.verify(site, run.Options(quiet), Console(quiet=True), sleep=slept.append, lock=tmp_path / "lock")
    return report, slept


def test_the_order(tmp_path: Path) -> None:
    log: list[str] = []
    report, slept = verify(OneSite([OneLayer("packets", log), OneLayer("syscalls", log)], log), tmp_path)
    assert log == ["start packets", "start syscalls", "restart", "requests", "rules", "stop syscalls", "stop packets"]
    assert sum(slept) == 25 + 1.0
    assert report.ok
    assert report.attempts == ()


def test_a_layer_that_is_not_offered_is_named_and_what_it_set_is_removed(tmp_path: Path) -> None:
    log: list[str] = []
    report, _ = verify(OneSite([OneLayer("packets", log), OneLayer("dns", log, offered=False)], log), tmp_path)
    assert log[:3] == ["start packets", "start dns", "stop dns"]
    assert (report.layers[1].available, report.layers[1].why) == (False, "the kernel is too old")
    assert report.ok


def test_what_a_layer_left_alone_is_told_beside_its_control(tmp_path: Path) -> None:
    log: list[str] = []
    layer = OneLayer("packets", log)
    layer.notes = ["3 packets of users outside the site were left alone"]
    report, _ = verify(OneSite([layer], log), tmp_path)
    assert report.layers[0].notes == ("3 packets of users outside the site were left alone",)
    assert report.layers[0].why == "control: 198.51.100.1"


def test_without_a_layer_for_packets_or_calls_nothing_is_proven(tmp_path: Path) -> None:
    log: list[str] = []
    report, _ = verify(OneSite([OneLayer("packets", log, offered=False), OneLayer("dns", log)], log), tmp_path)
    assert not report.proven
    assert [type(r) for r in refusals_of(report, tmp_path)] == [EgressUnproven]


def test_a_control_that_is_not_caught_proves_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    report, _ = verify(OneSite([OneLayer("packets", log), OneLayer("dns", log, catches=False)], log), tmp_path)
    assert not report.ok
    (refusal,) = refusals_of(report, tmp_path)
    assert refusal.exit_code == 25
    assert "dns" in (refusal.found or "")


def test_a_site_that_does_not_start_again_is_reported_with_what_it_tried(tmp_path: Path) -> None:
    log: list[str] = []
    site = OneSite([OneLayer("packets", log)], log)
    site.fails = EgressUnproven("minio.service does not run after its restart", found="Result=exit-code")
    report, _ = verify(site, tmp_path)
    assert log == ["start packets", "restart", "rules", "stop packets"]
    assert not report.proven
    assert "minio.service" in report.problems[0]


@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError("no"), ValueError("a defect")])
def test_whatever_happens_every_layer_is_stopped(tmp_path: Path, what: BaseException) -> None:
    log: list[str] = []
    site = OneSite([OneLayer("packets", log), OneLayer("syscalls", log)], log)
    site.fails = what
    with pytest.raises(type(what)):
        verify(site, tmp_path)
    assert log[-2:] == ["stop syscalls", "stop packets"]
    # The lock is given back: the next run begins.
    site.fails = None
    assert verify(site, tmp_path)[0].site == "systemd"


def test_a_layer_that_breaks_when_it_is_stopped_does_not_keep_the_others(tmp_path: Path) -> None:
    log: list[str] = []

    class Broken(OneLayer):
        def stop(self) -> list[Attempt]:
            raise OSError("the table is gone")

    report, _ = verify(OneSite([OneLayer("packets", log), Broken("syscalls", log)], log), tmp_path)
    assert log[-1] == "stop packets"
    assert "the table is gone" in report.problems[0]
    assert not report.proven


def test_an_interruption_while_a_layer_is_stopped_does_not_keep_the_others(tmp_path: Path) -> None:
    log: list[str] = []

    class Interrupted(OneLayer):
        def stop(self) -> list[Attempt]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(OneSite([OneLayer("packets", log), Interrupted("syscalls", log)], log), tmp_path)
    assert log[-1] == "stop packets"


def test_what_cannot_be_removed_is_a_problem_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "remove", lambda console: ["the table inet moat_capture"])
    log: list[str] = []
    report, _ = verify(OneSite([OneLayer("packets", log)], log), tmp_path)
    assert report.problems == ("what was done for the capture could not be undone: the table inet moat_capture",)
    assert not report.ok


def test_a_request_that_is_not_answered_proves_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    site = OneSite([OneLayer("packets", log)], log)
    site.requests = lambda: [RequestResult("chat", 503, False, "no gateway")]  # type: ignore[method-assign]
    report, _ = verify(site, tmp_path)
    assert not report.proven
    assert "503" in report.problems[0]


def test_a_service_that_did_not_run_all_the_time_proves_nothing(tmp_path: Path) -> None:
    site = OneSite([OneLayer("packets", [])], [])
    site.changed = ["minio.service ended during the capture"]
    report, _ = verify(site, tmp_path)
    assert report.problems == ("minio.service ended during the capture",)
    assert not report.proven


def test_what_took_force_with_the_restart_is_reported_and_proves_nothing(tmp_path: Path) -> None:
    log: list[str] = []

    class Reconfigured(OneSite):
        def endpoints(self) -> list[Endpoint]:
            return [Endpoint("api_base", "new:1" if "restart" in log else "old:1", "restart" not in log)]

        def allowed(self) -> tuple[str, ...]:
            return ("10.0.0.1:1",) if "restart" in log else ("10.0.0.0/8", "10.0.0.1:1")

        def components(self) -> list[Component]:
            return [ONE, replace(ONE, uid=0), replace(ONE, uid=64899)] if "restart" in log else [ONE]

    report, _ = verify(Reconfigured([OneLayer("packets", log)], log), tmp_path)
    assert report.endpoints == (Endpoint("api_base", "new:1", False),)
    assert report.allowed == ("10.0.0.1:1",)
    listed, user = report.problems
    assert "10.0.0.0/8 is no more on it, nothing is new" in listed
    assert user.startswith("gateway-1 runs as user 64899 since its restart")


def test_the_report_says_what_it_is_about_and_a_change_in_the_middle_proves_nothing(tmp_path: Path) -> None:
    site = OneSite([OneLayer("packets", [])], [])
    assert verify(site, tmp_path)[0].to_dict()["subject"] == {"release": "0.1.0-abc"}
    states = iter([{"configuration of gateway-1": "revision 7"}, {"configuration of gateway-1": "revision 8"}])
    site.subject = lambda: next(states)  # type: ignore[method-assign]
    report, _ = verify(site, tmp_path)
    assert report.subject == {"configuration of gateway-1": "revision 7"}
    assert report.problems == (
        "configuration of gateway-1 changed during the capture (revision 7, then revision 8): run it again",
    )


def test_nothing_runs(tmp_path: Path) -> None:
    site = OneSite([], [])
    site.runs = []
    with pytest.raises(EgressUnproven, match="no service"):
        verify(site, tmp_path)


def test_what_was_found_comes_before_what_is_not_proven(tmp_path: Path) -> None:
    leak = Attempt("2026-01-01T00:00:01.000Z", "packets", "7/python3", "gateway-1", "tcp 203.0.113.5:443")
    report = Report(
        site="systemd",
        started="",
        ended="",
        quiet_seconds=0,
        components=(ONE,),
        endpoints=(Endpoint("gateway-1: telemetry", "203.0.113.5:443", False),),
        layers=(),
        requests=(),
        attempts=(leak,),
    )
    found, unproven = refusals_of(report, tmp_path)
    assert (type(found), type(unproven)) == (EgressFound, EgressUnproven)
    assert "7/python3" in (found.found or "")
    assert "telemetry" in (found.found or "")
