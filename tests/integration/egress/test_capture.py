# SPDX-License-Identifier: Apache-2.0
"""Proves that the capture catches and names every kind of leak, and only that, with real processes and packets.

Each test runs one whole verification (standin.py) in a network namespace of its own that has no way out. The
service at fault runs as a user of its own; what it tries must be in the report with the right component, the
process and the destination. A capture that was blinded in the middle must say so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
STANDIN = Path(__file__).with_name("standin.py")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sets packet filter rules and loads BPF programs: needs root")


def argv(*options: str) -> list[str]:
    return ["unshare", "--net", sys.executable, str(STANDIN), *options]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}


@cache
def capture(*options: str) -> dict[str, Any]:
    done = subprocess.run(argv(*options), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def seen(report: dict[str, Any], layer: str) -> set[tuple[str, str, str]]:
    """Return component, process name and destination of a layer's attempts."""
    return {
        (a["component"], a["process"].partition("/")[2], a["destination"])
        for a in report["attempts"]
        if a["layer"] == layer
    }


def test_a_quiet_site_passes_with_every_control_caught() -> None:
    report = capture()
    assert report["attempts"] == []
    assert report["problems"] == []
    assert {n["name"]: (n["available"], n["control_caught"]) for n in report["layers"]} == {
        "packets": (True, True),
        "dns": (True, True),
        "syscalls": (True, True),
    }
    assert (report["ok"], report["proven"], report["clean"]) == (True, True, True)


def test_nothing_stays_behind() -> None:
    report = capture()
    assert report["left"] == []
    assert report["same_rules"] is True


def test_the_report_shows_the_rules_that_were_in_force() -> None:
    assert "table inet moat_capture" in capture()["rules"]


LEAKS = {
    # kind: layer -> destination
    "callback": {
        "dns": "name callback.example.com (A)",
        "packets": "tcp 203.0.113.1:80",
        "syscalls": "tcp 203.0.113.1:80",
    },
    "metrics": {"packets": "tcp 203.0.113.20:4318", "syscalls": "tcp 203.0.113.20:4318"},
    "update": {"dns": "name index.example.org (A)", "packets": "tcp 203.0.113.1:443"},
    "udp": {"packets": "udp 203.0.113.30:8125", "syscalls": "udp 203.0.113.30:8125"},
    "ipv6": {"packets": "tcp [2001:db8:1::9]:443", "syscalls": "tcp [2001:db8:1::9]:443"},
    "dns": {"dns": "name c2vjcmv0.exfil.example.net (A)"},
    "rawdns": {"dns": "name secret.example.net (TXT)"},
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_caught_and_named(leak: str) -> None:
    report = capture("--leak", leak)
    for layer, destination in LEAKS[leak].items():
        assert ("gateway-1", "python3", destination) in seen(report, layer)
    assert report["clean"] is False
    assert report["ok"] is False
    # Nobody else is blamed, and the finding is no reason to doubt the measurement.
    assert {a["component"] for a in report["attempts"]} == {"gateway-1"}
    assert report["proven"] is True


def test_a_name_is_told_with_the_address_that_stands_for_it() -> None:
    details = [a["detail"] for a in capture("--leak", "callback")["attempts"] if a["layer"] == "packets"]
    assert details
    assert all("callback.example.com" in d for d in details)


def test_a_leak_without_an_address_to_go_to_leaves_no_packet() -> None:
    assert seen(capture("--leak", "dns"), "packets") == set()


def test_a_leak_some_time_after_the_start_is_caught_in_the_quiet_time() -> None:
    late = capture("--leak", "metrics", "--delay", "3", "--quiet", "5", "--leaker", "minio")
    assert ("minio", "python3", "tcp 203.0.113.20:4318") in seen(late, "packets")
    quiet_is_over = max(s["when"] for s in late["steps"] if s["what"].startswith("Watch for"))
    assert min(a["when"] for a in late["attempts"]) > quiet_is_over


@pytest.mark.long
def test_a_leak_two_minutes_after_the_start_is_caught() -> None:
    late = capture("--leak", "metrics", "--delay", "120", "--quiet", "125")
    assert ("gateway-1", "python3", "tcp 203.0.113.20:4318") in seen(late, "packets")


def test_an_attempt_that_dies_before_there_is_a_packet_is_seen_as_a_call() -> None:
    report = capture("--leak", "nopacket", "--prohibit")
    assert seen(report, "packets") == set()
    assert {(c, p) for c, p, d in seen(report, "syscalls") if d.endswith(" 203.0.113.40:443")} == {
        ("gateway-1", "python3")
    }


def test_what_the_allow_list_permits_is_no_attempt() -> None:
    # What the kernel sends again after the process has gone has no process any more.
    assert {(c, d) for c, _, d in seen(capture("--leak", "allowed"), "packets")} == {
        ("gateway-1", "tcp 203.0.113.60:8000")
    }
    permitted = capture("--leak", "allowed", "--allow", "203.0.113.60:8000", "--allow", "llm.site.example:8000")
    assert permitted["attempts"] == []
    assert permitted["ok"] is True
    elsewhere = capture("--leak", "allowed", "--allow", "203.0.113.60:8001", "--allow", "llm.site.example:8000")
    assert ("gateway-1", "python3", "tcp 203.0.113.60:8000") in seen(elsewhere, "packets")


@pytest.mark.parametrize("somebody_answers", [True, False])
def test_a_name_looked_up_by_systemd_resolved_is_an_attempt_whatever_names_are_allowed(somebody_answers: bool) -> None:
    listen = (
        "mkdir -p /run/systemd/resolve; "
        '/usr/bin/python3 -I -c "import socket, time; s = socket.socket(socket.AF_UNIX); '
        "s.bind('/run/systemd/resolve/io.systemd.Resolve'); s.listen(); time.sleep(300)\" & "
        "until test -S /run/systemd/resolve/io.systemd.Resolve; do sleep 0.1; done; "
        "chmod 666 /run/systemd/resolve/io.systemd.Resolve; "
    )
    script = f'mount -t tmpfs tmpfs /run; {listen if somebody_answers else ""}"$@"'
    run = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*run, sys.executable, str(STANDIN), "--leak", "resolved", "--allow", "llm.site.example:8000"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    asked = {("gateway-1", "python3", "name lookup through systemd-resolved")}
    # Where nobody answers nothing is looked up: the program asks a name server next.
    assert seen(report, "syscalls") == (asked if somebody_answers else set())


@pytest.mark.parametrize(
    ("rights", "missing"), [("-sys_admin,-bpf,-perfmon", {"syscalls"}), ("-net_admin", {"packets", "dns"})]
)
def test_a_layer_that_the_host_does_not_offer_is_named_and_the_others_go_on(rights: str, missing: set[str]) -> None:
    run = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec setpriv --bounding-set="$0" "$@"', rights]
    done = subprocess.run(
        [*run, sys.executable, str(STANDIN), "--leak", "metrics"], env=ENVIRONMENT, capture_output=True, text=True
    )
    report = json.loads(done.stdout)
    assert {n["name"] for n in report["layers"] if not n["available"]} == missing
    assert all("not permitted" in n["why"] for n in report["layers"] if not n["available"])
    assert report["problems"] == []
    assert report["proven"] is True
    assert {a["component"] for a in report["attempts"]} == {"gateway-1"}


def test_a_storm_of_packets_is_counted_whole() -> None:
    report = capture("--leak", "flood", "--quiet", "3")
    assert report["problems"] == []
    assert report["proven"] is True
    # Two datagrams with the same ends are one attempt of two packets.
    details = [a["detail"] for a in report["attempts"] if a["layer"] == "packets"]
    assert sum(int(d.split()[0]) if d.split()[1] == "packets," else 1 for d in details) >= 6000
    assert sum(a["layer"] == "syscalls" for a in report["attempts"]) >= 6000


def test_a_process_of_root_is_known_by_its_control_group_and_other_root_processes_are_not_blamed() -> None:
    report = capture("--root", "--way-out")
    assert seen(report, "packets") == {("nginx", "python3", "tcp 203.0.113.70:443")}
    assert seen(report, "syscalls") == {("nginx", "python3", "tcp 203.0.113.70:443")}


def test_nothing_leaves_a_host_that_has_a_way_out_neither_leak_nor_control() -> None:
    report = capture("--way-out", "--leak", "callback")
    assert report["outside"] == ["udp 203.0.113.99:9"]  # the test's own: the listener hears what leaves
    assert report["proven"] is True
    assert {d for _, _, d in seen(report, "packets")} == {"tcp 203.0.113.1:80", "tcp [2001:db8:53::1]:80"}


@pytest.mark.parametrize("layer", ["packets", "dns", "syscalls"])
def test_a_layer_that_was_blinded_proves_nothing(layer: str) -> None:
    report = capture("--broken", layer, "--way-out")
    assert {n["name"]: n["control_caught"] for n in report["layers"]}[layer] is False
    assert report["proven"] is False
    assert report["ok"] is False
    assert report["left"] == []
    # Where the rule that would refuse it is gone, the control is not made: on this host it would leave.
    assert report["outside"] == ["udp 203.0.113.99:9"]


def test_a_run_that_is_killed_outright_leaves_nothing_behind() -> None:
    """The watcher cleans up; in the same namespace, so this runs in a shell that outlives the run."""
    script = (
        'ip link set lo up; "$@" & run=$!; '
        "until nft list table inet moat_capture >/dev/null 2>&1; do sleep 0.1; done; sleep 0.5; kill -9 $run; "
        "n=0; while nft list table inet moat_capture >/dev/null 2>&1 && [ $n -lt 50 ]; do n=$((n+1)); sleep 0.1; done; "
        "sleep 0.3; nft list ruleset; ip rule; ip -6 rule; ip route show table 52030 2>/dev/null"
    )
    run = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*run, sys.executable, str(STANDIN), "--quiet", "60"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "moat_capture" not in done.stdout
    assert "52030" not in done.stdout
    assert "from all lookup local" in done.stdout


@pytest.mark.parametrize("stopping", ["", "sleep 0.3;"], ids=["at once", "while it cleans up"])
def test_a_second_signal_does_not_break_off_the_cleaning_up(stopping: str) -> None:
    """As of an impatient Ctrl-C, or of a terminal that goes away: SIGHUP and SIGTERM."""
    script = (
        'ip link set lo up; "$@" & run=$!; '
        "until nft list table inet moat_capture >/dev/null 2>&1; do sleep 0.1; done; sleep 1; "
        f"kill -HUP $run; sleep 0.1; kill -HUP $run; {stopping} kill -TERM $run; wait $run; "
        "nft list ruleset; ip rule; ip -6 rule"
    )
    run = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*run, sys.executable, str(STANDIN), "--quiet", "60"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "KeyboardInterrupt: signal 1" in done.stderr
    assert "moat_capture" not in done.stdout
    assert "52030" not in done.stdout
    assert "from all lookup local" in done.stdout


def test_what_the_run_could_not_remove_is_left_to_the_watcher(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys; from pathlib import Path; from moat.console import Console\n"
        "from moat.site.egresscheck import leftovers\n"
        "with leftovers.only_one(Console(), Path(sys.argv[1])):\n"
        "    subprocess.run(['nft', 'add', 'table', 'inet', leftovers.PACKETS_TABLE], check=True)\n"
        "print(leftovers.present())\n"
    )
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", program, str(tmp_path / "lock")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_a_killed_run_did_inside_containers_is_undone(tmp_path: Path) -> None:
    """The containers run again, and the way that a probe made in one of them is gone."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    docker.chmod(0o755)
    container = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up; echo up; exec sleep 60"], stdout=-1
    )
    program = (
        "import os, signal, subprocess, sys; from pathlib import Path; from moat.console import Console\n"
        "from moat.site.egresscheck import leftovers\n"
        "with leftovers.only_one(Console(), Path(sys.argv[1])):\n"
        "    leftovers.note_stopped(Path('/opt/my site'))\n"
        "    leftovers.note_way(int(sys.argv[2]), '198.51.100.7')\n"
        "    ip = ['nsenter', '--target', sys.argv[2], '--net', 'ip', 'route']\n"
        "    subprocess.run([*ip, 'add', '198.51.100.7/32', 'dev', 'lo'], check=True)\n"
        "    subprocess.run(ip); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    lock = tmp_path / "lock"
    try:
        assert container.stdout is not None
        container.stdout.readline()
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", program, str(lock), str(container.pid)],
            env={**ENVIRONMENT, "PATH": f"{docker.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert "198.51.100.7 dev lo" in done.stdout
        deadline = time.monotonic() + 20
        while lock.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        ways = ["nsenter", "--target", str(container.pid), "--net", "ip", "route"]
        assert subprocess.run(ways, capture_output=True, text=True).stdout == ""
    finally:
        container.kill()
        container.communicate()
    assert (tmp_path / "asked").read_text().splitlines() == [
        "compose --project-directory /opt/my site stop",
        "compose --project-directory /opt/my site up --detach --no-recreate --pull never",
    ]
    assert lock.read_text() == ""


def test_a_terminated_run_cleans_up_and_a_second_one_is_refused_meanwhile(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from moat.console import Console\n"
        "from moat.site.egresscheck import leftovers\n"
        "with leftovers.only_one(Console(), Path(sys.argv[1])):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    first = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", program, str(tmp_path / "lock")],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == "in\n"
    second = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", program, str(tmp_path / "lock")],
        env=ENVIRONMENT,
        input="",
        capture_output=True,
        text=True,
    )
    assert second.returncode != 0
    assert "another verification is running" in second.stderr
    first.send_signal(signal.SIGINT)
    first.wait(timeout=20)
    first.stdin.close()
    first.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # the lock ends with the watcher
        third = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", program, str(tmp_path / "lock")],
            env=ENVIRONMENT,
            input="",
            capture_output=True,
            text=True,
        )
        if third.returncode == 0:
            return
        time.sleep(0.2)
    pytest.fail("the lock was not given back")
