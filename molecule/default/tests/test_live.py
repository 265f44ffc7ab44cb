# SPDX-License-Identifier: Apache-2.0
"""Proves that the configuration and a provider's key change under clients without a restart and a failed request.

What an operator types on a host without a network: ``moat-site config push``, ``status``, ``rollback``; one load client
runs through all of it, and no process of a gateway is another one at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CLIENT = Path(__file__).resolve().parents[3] / "tests" / "loadclient.py"
CONFIG = "/etc/moat/site/config/config.yaml"
SECRET = "/etc/moat/site/secrets/UPSTREAM_API_KEY"
GATEWAYS = ("moat-gateway@1.service", "moat-gateway@2.service")
LOAD = "/run/load.json"

#: A provider that tells in a file with which key it was asked; it stands for the site's.
PROVIDER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        with open("/run/provider/seen", "a") as f:
            f.write(self.headers.get("authorization", "").removeprefix("Bearer ") + "\\n")
        message = {"role": "assistant", "content": "from the provider"}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8099), Handler).serve_forever()
"""


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> None:
    """Poll until something is so."""
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, what
        time.sleep(0.3)


def pids(node) -> list[int]:
    return [node.pid(unit) for unit in GATEWAYS]


def edit(node, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the site's configuration as an editor does."""
    config = yaml.safe_load(node.ok("cat", CONFIG))
    change(config)
    node.ok("sh", "-c", f"umask 077; cat >{CONFIG}.new; mv {CONFIG}.new {CONFIG}", stdin=yaml.safe_dump(config))


def named(name: str, **more: Any) -> dict[str, Any]:
    """Return a deployment of the test's model under another name."""
    params = {"model": "openai/smollm2-135m-instruct", "api_base": "http:" + "//127.0.0.1:8081/v1", **more}
    return {"model_name": name, "litellm_params": {"api_key": "not-needed", "timeout": 600, **params}}


@pytest.fixture(scope="module", autouse=True)
def load(node, client_key: str) -> Iterator[None]:
    """A client of every kind that asks all the time; the last test reads what it counted."""
    node.chat(client_key)
    node.ok("sh", "-c", "cat >/run/loadclient.py", stdin=CLIENT.read_text("utf-8"))
    client = ["python3", "/run/loadclient.py", "--base-url", "https:" + "//localhost:8443", "--key-file", client_key]
    client += ["--ca-file", "/etc/moat/tls/ca.pem", "--model", "smollm2-135m-instruct", "--rate", "1", "--streams", "1"]
    client += ["--workers", "1", "--words", "8", "--max-tokens", "24", "--timeout", "240", "--out", LOAD]
    node.ok("systemd-run", "--quiet", "--unit=load", "-p", "StandardOutput=null", "-p", "TimeoutStopSec=300", *client)
    yield
    node.run("systemctl", "stop", "load", "provider")


@pytest.fixture(scope="module")
def before(node) -> list[int]:
    return pids(node)


def test_the_installation_made_revision_1_and_every_gateway_serves_what_is_in_force(node, before: list[int]) -> None:
    history = json.loads(node.ok("moat-site", "config", "history", "--json"))
    assert 1 in {int(r["revision"]) for r in history["revisions"]}
    status = json.loads(node.ok("moat-gateway", "config", "status", "--json"))
    assert status["converged"]
    assert {g["name"] for g in status["gateways"]} == {"gateway-1", "gateway-2"}
    assert {g["revision"] for g in status["gateways"]} == {status["store"]["revision"]}


def test_a_new_model_answers_after_a_push_and_no_process_is_another(node, client_key, before: list[int]) -> None:
    was = node.revision()
    edit(node, lambda c: c["model_list"].append(named("second")))
    said = node.ok("moat-site", "config", "push", "--wait=120", "--message", "a second model")
    assert f"revision {was + 1} is in force" in said
    assert node.revision() == was + 1
    assert node.chat(client_key, model="second").status == 200
    assert pids(node) == before


def test_what_only_litellm_refuses_changes_neither_the_store_nor_a_nodes_own_copy(node, before: list[int]) -> None:
    was, copy = node.revision(), node.ok("cat", "/etc/moat/config/config.yaml")
    right = node.ok("cat", CONFIG)
    edit(node, lambda c: c.update(router_settings={"routing_strategy": "fastest-first"}))
    try:
        done = node.run("moat-site", "config")
        assert done.returncode != 0
        assert "The configuration was refused; the one before it stays in force" in done.stdout
        assert f"{CONFIG} line " in done.stdout
        assert "fastest-first" in done.stdout
        assert node.ok("cat", "/etc/moat/config/config.yaml") == copy
        assert node.revision() == was
    finally:
        node.ok("sh", "-c", f"cat >{CONFIG}", stdin=right)
    assert pids(node) == before


@pytest.mark.long
def test_the_same_folder_again_makes_no_revision(node, before: list[int]) -> None:
    was = node.revision()
    assert "nothing was changed" in node.ok("moat-site", "config", "push", "--wait=120")
    # `push` changed the store; this brings the copy on the node, for a start without any revision, up to the same.
    for changed in ("changed=1 ", "changed=0 "):
        done = node.run("moat-site", "config", timeout=600)
        assert done.returncode == 0, done.stdout[-4000:]
        assert changed in done.stdout
    assert node.revision() == was
    assert pids(node) == before


def test_a_bad_configuration_is_refused_by_file_and_line_and_changes_nothing(node, client_key) -> None:
    was = node.revision()
    good = node.ok("cat", CONFIG)
    edit(node, lambda c: c.update(router_settings={"routing_strategy": "no-such-strategy"}))
    try:
        for command in (["moat-site", "config", "push"], ["moat-site", "config"]):
            done = node.run(*command, timeout=600)
            assert done.returncode != 0
            said = done.stdout + done.stderr
            assert "no-such-strategy" in said, said[-3000:]
            assert "config.yaml" in said
    finally:
        node.ok("sh", "-c", f"cat >{CONFIG}", stdin=good)
    assert node.revision() == was
    assert node.chat(client_key).status == 200


def test_a_rollback_takes_the_model_away_and_a_later_run_of_the_site_does_not_bring_it_back(
    node, client_key, before: list[int]
) -> None:
    was = node.revision()
    node.ok("moat-site", "config", "rollback", str(was - 1), "--wait=120")
    assert node.revision() == was + 1
    assert node.chat(client_key, model="second").status in (400, 403, 404)
    assert node.chat(client_key).status == 200
    noted = node.ok("cat", "/etc/moat/site/published.json")
    done = node.run("moat-site", "site", "--tags", "config_sync", timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    if (now := node.revision()) != was + 1:
        # What does the playbook take for a change that nobody made?
        differs = node.run("moat-site", "config", "diff", str(was), str(now)).stdout
        raise AssertionError(f"noted before: {noted}; {was} against {now}:\n{differs}")
    # On purpose it does.
    node.ok("moat-site", "config", "push", "--wait=120")
    assert node.chat(client_key, model="second").status == 200
    assert pids(node) == before


def test_a_providers_key_is_replaced_by_its_file(node, client_key, before: list[int]) -> None:
    node.ok("systemd-run", "--quiet", "--unit=provider", "-p", "RuntimeDirectory=provider", "python3", "-c", PROVIDER)

    def place(value: str) -> None:
        node.ok("sh", "-c", f"umask 077; cat >{SECRET}.new; mv {SECRET}.new {SECRET}", stdin=value + "\n")

    def seen() -> str:
        assert node.chat(client_key, model="provider", max_tokens=1).status == 200
        return node.ok("tail", "-n", "1", "/run/provider/seen").strip()

    keys = ["provider-key-" + letter * 24 for letter in "ab"]
    place(keys[0])
    edit(
        node,
        lambda c: c["model_list"].append(
            named("provider", api_base="http:" + "//127.0.0.1:8099/v1", api_key="os.environ/UPSTREAM_API_KEY")
        ),
    )
    done = node.run("moat-site", "config", timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert [seen() for _ in range(4)] == [keys[0]] * 4
    place(keys[1])
    node.ok("moat-site", "site", "--tags", "base", timeout=600)
    until(lambda: seen() == keys[1], "the provider is still asked with the old key")
    # Each of the two gateways, in turn.
    until(lambda: [seen() for _ in range(4)] == [keys[1]] * 4, "one gateway still asks with the old key")
    assert pids(node) == before
    journal = node.ok("journalctl", "--no-pager", "--output=cat")
    assert [k for k in keys if k in journal] == []
    status = node.ok("moat-gateway", "status", "--json") + node.ok("moat-gateway", "config", "status", "--json")
    assert [k for k in keys if k in status] == []


def test_config_sync_that_is_killed_comes_back_and_a_gateway_starts_without_the_store(node, client_key) -> None:
    was, old = node.revision(), node.pid("moat-config-sync.service")
    node.ok("systemctl", "kill", "--signal=KILL", "moat-config-sync")
    until(lambda: node.show("moat-config-sync", "MainPID")["MainPID"] not in ("0", str(old)), "it is not started again")
    node.ok("systemctl", "stop", "minio")
    try:
        node.ok("systemctl", "restart", "moat-gateway@2", timeout=300)
        status = json.loads(node.ok("moat-gateway", "@2", "status", "--json"))
        assert status["config"]["revision"] == was
        assert node.chat(client_key).status == 200
    finally:
        node.ok("systemctl", "start", "minio")

    def serves() -> bool:
        done = node.run("moat-gateway", "config", "status", "--json")
        return done.returncode == 0 and json.loads(done.stdout)["converged"]

    until(serves, "the store is back, and the site does not say that all is well", 120)
    node.run("systemctl", "reset-failed")


def test_no_request_of_the_client_failed(node) -> None:
    node.ok("systemctl", "stop", "load")
    counted = json.loads(node.ok("cat", LOAD))
    assert counted["failed"] == 0, json.dumps(counted, indent=1)[:4000]
    assert counted["requests"] >= 20
