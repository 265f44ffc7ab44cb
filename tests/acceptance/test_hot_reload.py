# SPDX-License-Identifier: Apache-2.0
"""Proves on the running demo that a site's configuration changes while requests run, and that a bad one never counts.

Everything is done as the operator does it: with the commands of `.moat/demo.json`, on folders of this host. What a
gateway serves is asked at its own address, past nginx; what clients notice is asked through nginx. Crashes in the
middle of an apply, many deployments and the like are proved in tests/integration/hotreload.
"""

from __future__ import annotations

import json
import re
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.acceptance.stack import Stack, run
from tests.integration.hotreload.traffic import Busy

from moat.site.deployment import GATEWAY, NGINX, write_file, write_pair

GATEWAYS = {"gateway-1": "http://172.30.242.11:4001", "gateway-2": "http://172.30.242.12:4002"}
INTERVAL = 1.0  # seconds, the default of reload_interval


def wait_for(what: str, test: Callable[[], Any], seconds: float = 120) -> Any:
    """Ask until the answer is true, and return it."""
    until = time.monotonic() + seconds
    while not (found := test()):
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return found


def wait_until_healthy(stack: Stack, service: str) -> None:
    wait_for(f"{service} healthy", lambda: stack.inspect(service)["State"]["Health"]["Status"] == "healthy", 400)


@pytest.fixture(scope="module", autouse=True)
def as_before(stack: Stack) -> Iterator[None]:
    """Afterwards the content of config/ is in force again, whatever a test left."""
    push(stack, stack.config_dir, "--message", "before the tests")
    yield
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "180", "--pull", "never")
    push(stack, stack.config_dir, "--message", "after the tests")


@pytest.fixture
def folder(stack: Stack, tmp_path: Path) -> Path:
    """A copy of config/ to change, readable by root alone as it may be on an operator's machine."""
    copy = tmp_path / "next"
    shutil.copytree(stack.config_dir, copy)
    copy.chmod(0o700)
    return copy


def push(stack: Stack, folder: Path, *more: str) -> dict[str, Any]:
    """Push a folder, wait for every gateway, and return what the command answers."""
    answer = stack.ask_gateway("config", "push", str(folder), "--wait", "180", *more)
    assert answer["ok"], answer
    assert answer["converged"], answer
    return answer


def in_force(stack: Stack) -> int:
    return int(stack.ask_gateway("config", "status")["store"]["revision"])


def revisions(stack: Stack) -> dict[str, int]:
    """Return the revision that each gateway serves, by its own word."""
    return {name: stack.ask_gateway("status", instance=name)["config"]["revision"] for name in GATEWAYS}


def processes(stack: Stack) -> dict[str, tuple[int, str, int]]:
    """Return PID, start and number of restarts of every service that serves."""
    found = {}
    for service in (*GATEWAYS, "nginx", "config-sync"):
        c = stack.inspect(service)
        found[service] = (c["State"]["Pid"], c["State"]["StartedAt"], c["RestartCount"])
    return found


def add_model(stack: Stack, folder: Path, name: str) -> None:
    """Give the demo's model one more name."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text("utf-8"))
    config["model_list"].append({**config["model_list"][0], "model_name": name})
    file.write_text(yaml.safe_dump(config), "utf-8")


def ask_at(stack: Stack, gateway: str, model: str, key: str | None = None) -> httpx.Response:
    """Ask one gateway for a completion."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    headers = {"authorization": f"Bearer {key or stack.key}"}
    url = GATEWAYS[gateway] + "/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)


@contextmanager
def load(stack: Stack) -> Iterator[list[str]]:
    """Ask through nginx all the while, plain and streamed; yield what came of it."""
    outcomes: list[str] = []
    over = threading.Event()

    def ask(stream: bool) -> None:
        body = {"model": stack.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        with stack.client() as client:
            while not over.is_set():
                try:
                    answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
                    whole = "data: [DONE]" in answer.text if stream else "choices" in answer.text
                    good = answer.status_code == 200 and whole
                    outcomes.append("ok" if good else f"{answer.status_code} {answer.text[:200]}")
                except httpx.HTTPError as e:
                    outcomes.append(f"{type(e).__name__}: {e}")

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        over.set()
        for thread in threads:
            thread.join()


# --- a change ---


def test_the_demo_serves_a_signed_revision_and_not_its_local_files(stack: Stack) -> None:
    number = in_force(stack)
    assert number >= 1
    assert revisions(stack) == dict.fromkeys(GATEWAYS, number)
    state = stack.ask_gateway("config", "status")
    assert {g["name"]: g["degraded"] for g in state["gateways"]} == {"gateway-1": [], "gateway-2": []}
    history = stack.ask_gateway("config", "history")["revisions"]
    (pub,) = [p.name for p in (stack.folder / "site-keys").iterdir()]
    assert history[0]["current"] is True
    assert f"{history[0]['signed_by'].upper()}.pub" == pub


def test_a_new_model_is_served_by_both_gateways_while_requests_run(stack: Stack, folder: Path) -> None:
    before, number = processes(stack), in_force(stack)
    with load(stack) as outcomes:
        wait_for("requests", lambda: len(outcomes) > 4)
        for n in range(3):
            name = f"pushed-{n}"
            add_model(stack, folder, name)
            answer = push(stack, folder, "--message", f"one more name: {name}")
            number += 1
            assert answer["revision"] == number
            assert revisions(stack) == dict.fromkeys(GATEWAYS, number)
            for gateway in GATEWAYS:
                reply = ask_at(stack, gateway, name)
                assert reply.status_code == 200, reply.text
                assert reply.json()["usage"]["completion_tokens"] > 0
    assert [o for o in outcomes if o != "ok"] == []
    assert len(outcomes) > 10
    assert processes(stack) == before
    with stack.client() as client:
        names = {m["id"] for m in client.get("/v1/models").json()["data"]}
    assert names == {stack.model, "pushed-0", "pushed-1", "pushed-2"}


@pytest.mark.long
def test_the_same_content_makes_no_new_revision_and_a_rollback_makes_one(stack: Stack, folder: Path) -> None:
    first = push(stack, stack.config_dir)["revision"]
    again = stack.ask_gateway("config", "push", str(stack.config_dir))
    assert (again["revision"], again["changed"]) == (first, False)
    add_model(stack, folder, "soon-gone")
    second = push(stack, folder)["revision"]
    assert ask_at(stack, "gateway-1", "soon-gone").status_code == 200
    back = stack.ask_gateway("config", "rollback", str(first), "--wait", "180")
    assert back["revision"] == second + 1  # numbers never go backwards
    assert revisions(stack) == dict.fromkeys(GATEWAYS, second + 1)
    for gateway in GATEWAYS:
        assert ask_at(stack, gateway, "soon-gone").status_code in (400, 403, 404)
        assert ask_at(stack, gateway, stack.model).status_code == 200


def test_a_client_key_counts_after_the_push_and_not_after_its_revocation(stack: Stack, folder: Path) -> None:
    words = ["--keys", str(folder / "keys.yaml")]
    stack.gateway("keys", "new", "hot", "--team", "default", "--out", str(folder.parent / "hot.key"), *words)
    key = (folder.parent / "hot.key").read_text("ascii").strip()
    push(stack, folder)
    for gateway in GATEWAYS:
        assert ask_at(stack, gateway, stack.model, key).status_code == 200
    stack.gateway("keys", "revoke", "hot", *words)
    with Busy() as busy:
        begun = time.monotonic()
        answer = push(stack, folder)
        assert answer["seconds"] < (INTERVAL + 1) * busy.since(begun)
    for gateway in GATEWAYS:
        assert ask_at(stack, gateway, stack.model, key).status_code == 401
        assert ask_at(stack, gateway, stack.model).status_code == 200


# --- a bad change ---


#: File, what is done to its text, and a word of the refusal.
BAD: list[tuple[str, Callable[[str], str], str]] = [
    ("config.yaml", lambda t: t + "model_list: []\n", "twice|duplicate"),
    ("config.yaml", lambda t: t.replace("model_list:", "model_list: [", 1), ""),
    ("config.yaml", lambda t: t + "router_settings:\n  routing_strategy: as-you-like\n", "routing_strategy"),
    ("config.yaml", lambda t: t + "router_settings:\n  fallbacks: [{smollm2-135m-instruct: [nobody]}]\n", "nobody"),
    ("config.yaml", lambda t: t.replace("api_key: not-needed", "api_key: os.environ/NOT_THERE"), "NOT_THERE"),
    ("config.yaml", lambda t: t.replace("//model:8081", "//198.51.100.7:443"), "198.51.100.7:443"),
    ("keys.yaml", lambda t: t + "kyes: []\n", "kyes"),
]


#: Each costs a whole push, and all are refused in tests/integration, too: here a few go the way of the stack.
SHOWN = (0, 2, 6)


@pytest.mark.parametrize(
    "number", [n if n in SHOWN else pytest.param(n, marks=pytest.mark.long) for n in range(len(BAD))]
)
def test_a_bad_folder_is_refused_with_file_and_line_and_nothing_changes(
    stack: Stack, folder: Path, number: int
) -> None:
    name, spoil, word = BAD[number]
    before = (in_force(stack), revisions(stack))
    file = folder / name
    text = file.read_text("utf-8")
    file.write_text(spoil(text), "utf-8")
    assert file.read_text("utf-8") != text
    answer = stack.ask_gateway("config", "push", str(folder), "--wait")
    assert answer["ok"] is False
    assert answer["exit"] > 2
    problem = answer["problems"][0]
    assert problem["file"].endswith(name), problem
    assert problem["line"] >= 1, problem
    assert re.search(word, json.dumps(problem)), problem
    assert (in_force(stack), revisions(stack)) == before


WRONG_SIGNER = """
import dataclasses, os, sys
from moat_gateway import revision, revstore, settings, sitekey
values = settings.load(os.environ)[0]
store = revstore.open_store(values)
now = store.pointer(None)
limit = values.revision_max << 20
trusted = sitekey.read_trusted(values.site_keys_dir)
content = dict(revision.open_archive(store.fetch(now, limit), trusted, limit=limit).files)
content["keys.yaml"] = b"teams: []\\nkeys: []\\n"
number = now.revision + 1
raw = revision.build(content, number=number, previous=now.revision, author="a stranger", message="let me in",
                     created_at="2026-01-01T00:00:00Z", content_of=None, key=sitekey.SigningKey.generate())
store.upload(number, raw)
import hashlib
store.move(dataclasses.replace(now, revision=number, object=f"revisions/{number}", size=len(raw),
                               sha256=hashlib.sha256(raw).hexdigest()), now.etag)
print(number)
"""


def test_a_revision_of_a_stranger_in_the_store_is_refused_named_and_healed(stack: Stack, folder: Path) -> None:
    """Whoever gets hold of the right to write to the store gets nothing into the gateways."""
    good = push(stack, stack.config_dir)["revision"]
    done = stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "python3", "admin", "-c", WRONG_SIGNER)
    bad = int(done.stdout)
    assert bad == good + 1

    def refused() -> Any:
        nodes = stack.ask_gateway("config", "status")["nodes"]
        return [n["last_refused"] for n in nodes if (n["last_refused"] or {}).get("revision") == bad]

    (why,) = wait_for("the refusal in status", refused)
    assert why["kind"] == "bad-signature", why
    assert revisions(stack) == dict.fromkeys(GATEWAYS, good)
    for gateway in GATEWAYS:
        assert ask_at(stack, gateway, stack.model).status_code == 200  # with a key that the stranger had removed
    lines = [json.loads(x) for x in stack.logs("config-sync").splitlines() if x.startswith("{")]
    assert [x for x in lines if x.get("revision") == bad and "refused" in x["event"]]
    shown = stack.gateway("config", "status").stdout
    assert f"refused revision {bad}" in shown, shown
    # The next good push heals it, with a number above.
    add_model(stack, folder, "healed")
    healed = push(stack, folder)["revision"]
    assert healed == bad + 1
    assert ask_at(stack, "gateway-2", "healed").status_code == 200


# --- without the store ---


def test_without_the_store_gateways_restart_with_the_last_good_revision_and_say_so(stack: Stack, folder: Path) -> None:
    add_model(stack, folder, "kept")
    number = push(stack, folder)["revision"]
    stack.compose("stop", "minio", "config-sync")
    try:
        for gateway in GATEWAYS:
            with stack.client() as client:
                assert client.get("/v1/models").status_code == 200
            stack.compose("restart", gateway)
            wait_until_healthy(stack, gateway)
        assert revisions(stack) == dict.fromkeys(GATEWAYS, number)
        for gateway in GATEWAYS:
            assert ask_at(stack, gateway, "kept").status_code == 200

        def degraded() -> bool:
            states = [stack.ask_gateway("status", instance=g) for g in GATEWAYS]
            return all(s["degraded"] and s["ready"] for s in states)

        wait_for("degraded in both gateways' status", degraded)  # stale_after is 30 s
        state = stack.ask_gateway("status")
        assert state["config"]["staleness_seconds"] > 0
        shown = stack.gateway("config", "status").stdout
        assert "NOT REACHED" in shown, shown
        refused = stack.ask_gateway("config", "push", str(stack.config_dir))
        assert (refused["ok"], refused["problems"][0]["kind"]) == (False, "store-failed")
    finally:
        stack.compose("up", "--detach", "--wait", "--wait-timeout", "180", "--pull", "never")

    def healed() -> bool:
        return not any(stack.ask_gateway("status", instance=g)["degraded"] for g in GATEWAYS)

    wait_for("nothing degraded any more", healed)
    assert push(stack, stack.config_dir)["revision"] == number + 1


# --- the certificate ---


def shown_certificate(stack: Stack, ca: Path) -> str:
    host, _, port = stack.base_url.removeprefix("https://").partition(":")
    return ssl.get_server_certificate((host, int(port)), ca_certs=str(ca), timeout=10)


def test_a_replaced_certificate_is_shown_at_once_and_no_connection_is_cut(stack: Stack, tmp_path: Path) -> None:
    tls = stack.folder / "tls"
    old = [
        (tls / n, (tls / n).read_bytes(), (tls / n).stat().st_mode & 0o777, o)
        for n, o in (("cert.pem", 0), ("key.pem", NGINX))
    ]
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert),
    )  # fmt: skip
    before, first = processes(stack), shown_certificate(stack, stack.ca_file)
    new = [(tls / "cert.pem", cert.read_bytes(), 0o644, 0), (tls / "key.pem", key.read_bytes(), 0o600, NGINX)]
    try:
        with load(stack) as outcomes:
            # Clients keep their connections. New ones trust the new certificate, which these do not.
            wait_for("requests", lambda: len(outcomes) > 4)
            write_pair(stack.folder, new)
            asked = len(outcomes)
            second = shown_certificate(stack, cert)
            wait_for("more requests", lambda: len(outcomes) > asked + 4)
    finally:
        write_pair(stack.folder, old)
    assert second.split() == cert.read_text("ascii").split()
    assert second != first
    assert set(outcomes) == {"ok"}
    assert shown_certificate(stack, stack.ca_file) == first
    assert processes(stack) == before


# --- secrets of the deployment itself ---


def prepare(stack: Stack) -> list[str]:
    """Prepare the folder again and return what was changed."""
    trust = ["--key", stack.public_key, "--state-dir", str(stack.folder / "state")]
    done = stack.moat("prepare", str(stack.bundle), *trust, "--dir", str(stack.folder), "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["changes"])


def test_a_replaced_administrators_key_counts_within_seconds(stack: Stack) -> None:
    """What holds for it holds for every file of secrets/gateway/, a provider's key among them."""
    before, file = processes(stack), stack.folder / "secrets/gateway/master_key"
    old, new = file.read_text("ascii").strip(), "sk-moat-admin-" + "Zq7" * 14

    def answers(key: str) -> set[int]:
        headers = {"authorization": f"Bearer {key}"}
        urls = [f"{url}/v1/models" for url in GATEWAYS.values()]
        return {httpx.get(url, headers=headers, timeout=20, trust_env=False).status_code for url in urls}

    assert (answers(old), answers(new)) == ({200}, {401})
    try:
        with load(stack) as outcomes, Busy() as busy:
            write_file(file, new.encode() + b"\n", 0o600, GATEWAY)
            written = time.monotonic()
            wait_for("the new key", lambda: (answers(old), answers(new)) == ({401}, {200}))
            assert time.monotonic() - written < 15 * busy.since(written)
    finally:
        write_file(file, old.encode() + b"\n", 0o600, GATEWAY)
    wait_for("the old key again", lambda: (answers(old), answers(new)) == ({200}, {401}))
    assert set(outcomes) == {"ok"}
    assert processes(stack) == before
    shown = "".join(stack.logs(s) for s in (*GATEWAYS, "config-sync")) + str(stack.ask_gateway("status"))
    assert new not in shown
    assert old not in shown


def test_new_accounts_of_the_store_count_without_a_restart(stack: Stack, folder: Path) -> None:
    before = processes(stack)
    secrets = stack.folder / "secrets"
    old = {
        p: p.read_text("ascii") for p in (*(secrets / "config-sync").iterdir(), *(secrets / "admin").glob("store_*"))
    }
    assert len(old) == 4
    for path in old:
        path.unlink()
    prepare(stack)
    assert all(p.read_text("ascii") != text for p, text in old.items())
    stack.compose("up", "--detach", "minio-init")
    wait_for("the new accounts", lambda: stack.ask_gateway("config", "status")["store"].get("reachable"))
    add_model(stack, folder, "with-new-accounts")
    push(stack, folder)
    assert ask_at(stack, "gateway-1", "with-new-accounts").status_code == 200
    node = stack.ask_gateway("config", "status")["nodes"][0]
    assert (node["reachable"], node["degraded"]) == (True, [])
    assert processes(stack) == before


def test_the_site_key_is_replaced_with_an_overlap(stack: Stack, folder: Path) -> None:
    before = processes(stack)
    keys, secret = stack.folder / "site-keys", stack.folder / "secrets/admin/site_key"
    (old,) = keys.iterdir()
    first = push(stack, stack.config_dir)["revision"]
    rows = stack.ask_gateway("config", "history")["revisions"]
    signers = {r["revision"]: r["signed_by"].upper() for r in rows if r["signed_by"]}
    secret.unlink()
    prepare(stack)
    (new,) = set(keys.iterdir()) - {old}  # both count now
    second = push(stack, stack.config_dir, "--force")["revision"]
    assert second == first + 1
    history = stack.ask_gateway("config", "history")["revisions"]
    assert f"{history[0]['signed_by'].upper()}.pub" == new.name
    assert f"{history[1]['signed_by'].upper()}.pub" == old.name == f"{signers[first]}.pub"
    old.unlink()
    add_model(stack, folder, "signed-anew")
    push(stack, folder)
    assert ask_at(stack, "gateway-2", "signed-anew").status_code == 200
    # What the old key signed counts no more: it can be neither followed nor made a revision again.
    refused = stack.ask_gateway("config", "rollback", str(first))
    assert (refused["ok"], refused["problems"][0]["kind"]) == (False, "bad-signature")
    assert processes(stack) == before
