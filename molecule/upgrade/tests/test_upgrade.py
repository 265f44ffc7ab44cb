# SPDX-License-Identifier: Apache-2.0
"""Proves that a release can be replaced, returned to and refused while clients go on, without one failed request.

One client runs through all of it: completions on new and on kept connections, lists, and open streams of a real
model. What it counted is looked at last. The times go to .moat/molecule/upgrade-times.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TIMES = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"]) / ".moat" / "molecule" / "upgrade-times.json"
LOAD = "/run/load.json"


@pytest.fixture(scope="module", autouse=True)
def load(node) -> Iterator[None]:
    """Clients that start before the first test; the last test stops them and reads what they counted."""
    key = node.new_key("load")
    node.chat(key)  # the gateways know the key from here on: a 401 later is a failure
    client = [
        "python3",
        "/test/loadclient.py",
        "--base-url",
        "https://localhost:8443",
        "--ca-file",
        "/etc/moat/tls/ca.pem",
    ]
    client += [
        "--key-file",
        key,
        "--model",
        "smollm2-135m-instruct",
        "--rate",
        "1",
        "--streams",
        "2",
        "--max-tokens",
        "60",
        "--timeout",
        "240",
        "--out",
        LOAD,
    ]
    unit = ["--quiet", "--unit=load", "-p", "StandardOutput=null", "-p", "TimeoutStopSec=300"]
    node.ok("systemd-run", *unit, *client)
    yield
    node.run("systemctl", "stop", "load")


def _version(node, link: str) -> str:
    return node.ok("readlink", link).strip().rpartition("/")[2].partition("-")[0]


def _runs(node) -> str:
    return _version(node, "/opt/moat/current")


def _note(what: str, seconds: float) -> None:
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    times = json.loads(TIMES.read_text("utf-8")) if TIMES.exists() else {}
    TIMES.write_text(json.dumps({**times, what: round(seconds, 1)}, indent=1) + "\n", "utf-8")


def _instances(node) -> set[str]:
    """Return the versions that the gateways themselves say they are."""
    documents = [json.loads(node.ok("moat-gateway", f"@{n}", "status", "--json")) for n in ("1", "2")]
    return {str(d.get("version") or d.get("moat_version")) for d in documents}


def test_to_the_next_release(node) -> None:
    before = _runs(node)
    started = time.monotonic()
    node.ok("sh", "/medium-next/install.sh", "--yes", timeout=900)
    _note("upgrade", time.monotonic() - started)
    assert before != "0.9.1"
    assert _runs(node) == "0.9.1"
    assert _instances(node) == {"0.9.1"}


def test_and_back(node) -> None:
    before = _version(node, "/opt/moat/previous")
    started = time.monotonic()
    node.ok("moat-site", "rollback", timeout=900)
    seconds = time.monotonic() - started
    _note("rollback", seconds)
    assert _runs(node) == before != "0.9.1"
    assert _instances(node) == {before}
    # The playbooks of moat-site and the record too, so that its next run does not bring the newer one back.
    assert _version(node, "/opt/moat/site") == before
    assert json.loads(node.ok("cat", "/var/lib/moat/installed.json"))["version"] == before
    assert node.run("test", "-e", "/etc/moat/site/rollback.begun").returncode != 0


def test_the_store_stays_at_the_newer_release(node) -> None:
    """What it has written there is not for an older one; a later run of the site does not bring it back either."""
    assert _version(node, "/opt/moat/minio") == "0.9.1"
    pid = node.pid("minio.service")
    said = node.ok("moat-site", "site", "--tags", "minio")
    assert "The store goes on with 0.9.1-" in said
    assert _version(node, "/opt/moat/minio") == "0.9.1"
    assert node.pid("minio.service") == pid


@pytest.mark.long
def test_an_upgrade_is_killed_in_the_middle(node) -> None:
    """At the worst moment: one gateway is moved to a release that does not start. The next test goes on from here."""
    before = _runs(node)
    command = "exec sh /medium-broken/install.sh --yes >/run/broken.log 2>&1"
    node.ok("systemd-run", "--quiet", "--collect", "--unit=broken", "--service-type=exec", "sh", "-c", command)
    give_up = time.monotonic() + 600
    while _version(node, "/opt/moat/instances/1") != "0.9.2":
        assert time.monotonic() < give_up, node.ok("cat", "/run/broken.log")[-4000:]
        assert node.run("systemctl", "is-active", "broken").returncode == 0, node.ok("cat", "/run/broken.log")[-4000:]
        time.sleep(0.1)
    node.ok("systemctl", "kill", "--signal=KILL", "broken")
    while node.show("broken", "LoadState")["LoadState"] != "not-found":
        assert time.monotonic() < give_up, "the killed unit stays"
        time.sleep(0.1)
    assert _version(node, "/opt/moat/instances/1") == "0.9.2"
    assert _version(node, "/opt/moat/instances/2") == _runs(node) == before


def test_a_release_that_does_not_start_is_left_again_by_itself(node) -> None:
    before = _runs(node)
    started = time.monotonic()
    done = node.run("sh", "/medium-broken/install.sh", "--yes", timeout=900)
    _note("refused upgrade", time.monotonic() - started)
    said = done.stdout + done.stderr
    assert done.returncode == 28, said[-4000:]
    assert "planted by tests/releases.py" in said, "the reason is not shown"
    assert _runs(node) == before
    # Whatever it was that moved them: this run, or the one that was killed.
    assert _instances(node) == {before}
    for n in ("1", "2"):
        assert _version(node, f"/opt/moat/instances/{n}") == before
        assert node.host.service(f"moat-gateway@{n}").is_running


def test_no_request_of_the_clients_failed(node) -> None:
    node.ok("systemctl", "stop", "load")
    counted = json.loads(node.ok("cat", LOAD))
    _note("requests", counted["requests"])
    _note("failed requests", counted["failed"])
    assert counted["failed"] == 0, json.dumps(counted, indent=1)
    assert counted["ok"], json.dumps(counted, indent=1)
    assert counted["requests"] >= 100
    assert counted["done"]["stream"] >= 5
