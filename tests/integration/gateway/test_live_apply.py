# SPDX-License-Identifier: Apache-2.0
"""Proves that revisions and secrets take effect in a running gateway process, whole, and that no request notices.

The node's folder is written by config-sync's own functions; requests and streams run through the gateway all the while.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.harness import PATIENCE, Gateway, Site, chat, until
from tests.integration.gateway.revisions import Node
from tests.integration.gateway.traffic import Traffic
from tests.integration.gateway.upstream import Upstream

from moat_gateway.keys import hash_secret
from moat_gateway.sync.nodefolder import Turn
from moat_gateway.sync.reports import Report, read_report

# Of the event loop, by any change, whatever its size. By itself one takes 3.5 ms at most (docs/hot-reload.md); between
# requests, with cold caches, twice that was seen. What is not cut into slices takes 80 ms and more.
HELD_MS = 12.0
REFERENCE_SECONDS = 0.0008  # for the work of slowness() on that machine


def keys_text(*ids: str) -> str:
    rows = "".join(f"  - {{id: {i}, team: all, sha256: {hash_secret(secret_of(i))}}}\n" for i in ids)
    return "teams:\n  - {id: all, models: ['*']}\n" + ("keys:\n" + rows if rows else "keys: []\n")


def secret_of(key_id: str) -> str:
    return f"sk-moat-{key_id}-" + "k" * 40


def models(base: str, *names: str, more: str = "", **other: str) -> str:
    """Return a configuration; ``other`` leads a model elsewhere."""
    lines = ["model_list:"]
    for name in dict.fromkeys([*names, *other]):
        at = other.get(name, base)
        lines.append(
            f"  - model_name: {name}\n    litellm_params: "
            f'{{model: openai/up-{name}, api_base: "{at}", api_key: os.environ/UP_KEY}}'
        )
    return "\n".join(lines) + "\n" + more


def slowness() -> float:
    """Return how many times slower than the machine of docs/hot-reload.md's figures this one is; at least 1."""
    took = []
    for _ in range(50):
        begun = time.thread_time()
        sum(i * i for i in range(20_000))
        took.append(time.thread_time() - begun)
    return max(1.0, statistics.median(took) / REFERENCE_SECONDS)


class Live:
    """A gateway with a node's folder."""

    def __init__(self, folder: Path, python: Path, base: str, **extra: str) -> None:
        self.site = Site(folder / "site", python).prepare(base)
        self.node = Node(folder, self.site.folder / "secrets")
        self.site.extra |= {
            "MOAT_SYNC_DIR": str(self.node.sync_dir),
            "MOAT_REPORTS_DIR": str(self.node.reports_dir),
            "MOAT_SECRETS_POLL": "0.2",
            # Nobody runs config-sync here, and so nobody says that the source answers.
            "MOAT_STALE_AFTER": "86400",
            **extra,
        }
        self.base = base
        self.started: list[Gateway] = []

    def start(self) -> Gateway:
        self.gateway = self.site.start().wait_ready()
        self.started.append(self.gateway)
        return self.gateway

    def kill(self) -> None:
        """End what a test that failed has left."""
        for gateway in self.started:
            gateway.kill()

    def config(self) -> dict[str, Any]:
        value = self.gateway.status()["config"]
        assert isinstance(value, dict)
        return value

    def wait(self, revision: int) -> None:
        until(f"revision {revision} serves", lambda: self.config()["revision"] == revision)

    def put(self, config: str, *keys: str) -> int:
        number = self.node.put(config, keys_text("client", *keys))
        self.wait(number)
        return number

    def ask(self, model: str, key: str = "client") -> tuple[int, str]:
        answer = self.gateway.request("POST", "/v1/chat/completions", chat(model=model), secret_of(key))
        text = answer.json["choices"][0]["message"]["content"] if answer.status == 200 else answer.body.decode()
        return answer.status, text

    def swap(self, name: str, value: str) -> None:
        """Replace a secret file as one does: by rename."""
        beside = self.site.folder / "secrets" / f".{name}"
        beside.write_text(value + "\n")
        beside.replace(beside.with_name(name))

    def report(self) -> Report | None:
        return read_report(self.node.reports_dir / "under-test.json")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, python: Path, upstream: Upstream) -> Iterator[Live]:
    """A gateway that the tests of this module share; each begins with a revision of its own."""
    made = Live(tmp_path_factory.mktemp("live"), python, upstream.base)
    made.start()
    try:
        yield made
        assert made.gateway.stop() == 0
        # A gateway that ends for good is not waited for.
        assert made.report() is None
    finally:
        made.kill()


@pytest.fixture
def alone(tmp_path: Path, python: Path, upstream: Upstream) -> Iterator[Live]:
    """A gateway of the test's own, which it starts."""
    made = Live(tmp_path, python, upstream.base)
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture
def elsewhere() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


def test_without_a_revision_the_local_files_serve_and_the_first_one_takes_over(live: Live) -> None:
    assert live.config()["revision"] == 0
    assert live.gateway.status()["models"] == ["big", "small"]
    until("the report is there", lambda: live.report() is not None)
    number = live.put(models(live.base, "small"))
    assert live.gateway.status()["models"] == ["small"]
    assert live.ask("small") == (200, "You said: hello there")
    assert live.gateway.metrics()["moat_config_revision"] == number
    until("the report follows", lambda: (r := live.report()) is not None and r.revision == number)
    applied = live.gateway.wait_events(event="config.applied", revision=number)
    assert applied[0]["made"] == 1


def test_models_are_added_changed_and_removed_under_load(live: Live, elsewhere: Upstream, upstream: Upstream) -> None:
    upstream.behaviour.chunk_delay = 0.02  # a stream takes about half a second: it lives through changes
    live.put(models(live.base, "small", "goes"))
    pid = live.gateway.process.pid
    with Traffic(live.gateway, secret_of("client")) as traffic:
        traffic.wait_for(2)
        for _ in range(3):
            live.put(models(live.base, "small", "comes"))
            assert live.ask("comes")[0] == 200
            assert live.ask("goes")[0] in (400, 404)
            live.put(models(live.base, "goes", small=elsewhere.base))
            assert live.ask("goes")[0] == 200
            assert live.ask("comes")[0] in (400, 404)
            traffic.wait_for(2)
        elsewhere.behaviour.seen.clear()
        traffic.wait_for(2)
    assert traffic.failures == []
    assert any(s.body["model"] == "up-small" for s in elsewhere.behaviour.seen)
    assert live.gateway.status()["pid"] == pid
    events = live.gateway.events
    refused = {e["request_id"] for e in events if e["event"] == "request.finished" and e["status"] in (400, 404)}
    noise = [e for e in events if e["event"] == "library.log" and e["level"] == "error"]
    assert [e for e in noise if e["request_id"] not in refused] == []


def test_one_and_then_all_of_400_deployments_are_changed_under_load(live: Live, elsewhere: Upstream) -> None:
    many = [f"many{i}" for i in range(399)]
    live.put(models(live.base, "small", *many))
    with Traffic(live.gateway, secret_of("client"), unary=1, streams=1) as traffic:
        traffic.wait_for(1)
        one = live.put(models(live.base, "small", *many, many7=elsewhere.base))
        assert live.ask("many7")[0] == 200
        assert len(elsewhere.behaviour.seen) == 1
        everything = live.put(models(elsewhere.base, "small", *many))
        traffic.wait_for(2)
        assert live.ask("many398")[0] == 200
    assert traffic.failures == []
    for number, made in ((one, 1), (everything, 399)):
        (applied,) = live.gateway.wait_events(event="config.applied", revision=number)
        assert applied["made"] == made
        # By the processor's time, not the clock's: this machine may do anything else meanwhile.
        assert 0 < applied["loop_cpu_ms"] < HELD_MS * slowness(), applied
        assert applied["loop_ms"] <= 1000 * live.gateway.metrics()["moat_config_loop_blocked_seconds"] + 0.01
    assert {s.body["model"] for s in elsewhere.behaviour.seen} >= {"up-many7", "up-small", "up-many398"}


def test_settings_that_can_be_taken_live_are_and_removed_ones_go_back(live: Live, upstream: Upstream) -> None:
    alias = "router_settings: {num_retries: 0, model_group_alias: {other-name: small}}\n"
    live.put(models(live.base, "small", more=alias))
    assert live.ask("other-name") == (200, "You said: hello there")
    upstream.behaviour.fail_with = 500
    upstream.behaviour.seen.clear()
    assert live.ask("small")[0] == 500
    assert len(upstream.behaviour.seen) == 1
    live.put(
        models(live.base, "small", more="litellm_settings: {num_retries: 2}\nrouter_settings: {cooldown_time: 1}\n")
    )
    upstream.behaviour.seen.clear()
    assert live.ask("small")[0] == 500
    assert len(upstream.behaviour.seen) == 3
    upstream.behaviour.fail_with = 0
    until("the deployment is out of its cool-down", lambda: live.ask("small")[0] == 200)
    assert live.ask("other-name")[0] in (400, 404)
    for strategy in ("least-busy", "latency-based-routing", "usage-based-routing-v2", "simple-shuffle"):
        live.put(models(live.base, "small", more=f"router_settings: {{routing_strategy: {strategy}}}\n"))
        assert live.ask("small")[0] == 200
    assert live.config()["needs_restart"] == []


def test_limits_and_keys_of_a_revision_count_from_its_moment(live: Live) -> None:
    live.put(models(live.base, "small"), "second")
    assert live.ask("small", "second")[0] == 200
    live.put(models(live.base, "small"))
    assert live.ask("small", "second")[0] == 401
    # A key that is younger than the last look is found by the first request with it.
    live.node.put(models(live.base, "small"), keys_text("client", "third"))
    assert live.ask("small", "third")[0] == 200


@pytest.mark.parametrize("bad", [b"", b"{", b'{"format": 1}', b"[]", b'{"format":2}', b"\xff\xfe", b"null"])
def test_a_bad_prepared_file_changes_nothing_and_is_healed(live: Live, bad: bytes) -> None:
    good = live.put(models(live.base, "small"))
    refused = live.node.put_prepared(models(live.base, "other"), keys_text("client"), bad)
    until("it is refused", lambda: (live.config()["last_refused"] or {}).get("revision") == refused)
    status = live.gateway.status()
    assert status["config"]["revision"] == good
    assert status["config"]["last_refused"]["kind"] == "bad-revision"
    assert any(f"revision {refused} is refused" in line for line in status["degraded"])
    assert live.ask("small")[0] == 200
    assert live.gateway.wait_events(event="config.refused", revision=refused)
    assert live.gateway.metrics()['moat_config_reload_total{result="refused"}'] >= 1
    ok, answer = live.gateway.reload()
    assert not ok
    assert answer["config"]["last_refused"]["revision"] == refused
    if bad == b"{":
        done = live.site.command("reload")
        assert done.returncode == 19
        assert f"revision {refused} is refused" in done.stderr
    live.put(models(live.base, "small"))
    assert live.config()["last_refused"] is None
    assert live.gateway.status()["degraded"] == []


def test_what_litellm_does_not_accept_leaves_everything_as_it_was(live: Live) -> None:
    """The last of several deployments cannot be made, or a setting is wrong: the first ones are not there either."""
    good = live.put(models(live.base, "small"))
    parts = {
        "deployment": (models(live.base, "new", "small", "broken"), "openai/up-broken", "no-such-provider/x"),
        "setting": (
            models(live.base, "new", "small", more='router_settings: {num_retries: 7, fallbacks: "FB"}\n'),
            "",
            "",
        ),
    }
    for config, here, there in parts.values():
        made, prepared = live.node.make(
            {"config.yaml": config.replace('"FB"', "[]"), "keys.yaml": keys_text("client", "more")}
        )
        value = json.loads(prepared)
        text = json.dumps(value).replace(here, there) if here else json.dumps(value)
        if not here:
            value["effective"]["router_settings"]["fallbacks"] = [{"small": "not a list"}, "wrong"]
            text = json.dumps(value)
        live.node.keeper.keep(made, text.encode())
        live.node.keeper.commit(made)
        until("it is refused", partial(_refused_here, live, made.number))
        assert live.config()["last_refused"]["kind"] == "litellm-refused"
        assert live.config()["revision"] == good
        assert live.gateway.status()["models"] == ["small"]
        assert live.ask("new")[0] in (400, 404)
        assert live.ask("small", "more")[0] == 401
        assert live.ask("small")[0] == 200
    live.put(models(live.base, "small", "new"), "more")
    assert live.ask("new", "more")[0] == 200


def _refused_here(live: Live, number: int) -> bool:
    return (live.config()["last_refused"] or {}).get("revision") == number


def test_a_provider_key_is_swapped_under_load(live: Live, upstream: Upstream) -> None:
    live.put(models(live.base, "small", "twin"))
    new = "upstream-secret-canary-0815"
    with Traffic(live.gateway, secret_of("client")) as traffic:
        traffic.wait_for(2)
        live.swap("up_key", new)
        assert live.gateway.wait_events(event="secrets.changed", names=["UP_KEY"])[0]["made"] == 2
        # Requests that had chosen their deployment before may still be on their way.
        traffic.wait_for(3)
        upstream.behaviour.seen.clear()
        traffic.wait_for(3)
        assert {s.headers["authorization"] for s in upstream.behaviour.seen} == {f"Bearer {new}"}
    assert traffic.failures == []
    _nothing_of(live, new, "upstream-secret-canary-4711")
    live.swap("up_key", "upstream-secret-canary-4711")
    until("the first one is back", lambda: live.ask("small")[0] == 200 and _last_key(upstream).endswith("4711"))


def _last_key(upstream: Upstream) -> str:
    return upstream.behaviour.seen[-1].headers["authorization"]


def _nothing_of(live: Live, *secrets: str) -> None:
    shown = live.gateway.stdout + live.gateway.stderr + json.dumps(live.gateway.status())
    shown += json.dumps(live.gateway.metrics()) + (live.node.reports_dir / "under-test.json").read_text()
    shown += "".join(p.read_text() for p in (live.site.folder / "tmp").rglob("*") if p.is_file())
    shown += Path(f"/proc/{live.gateway.process.pid}/cmdline").read_text()
    assert [s for s in secrets if s in shown] == []


@pytest.mark.parametrize("bad", ["", "two\nlines\x00", None])
def test_a_secret_file_that_goes_bad_leaves_the_value_before(live: Live, upstream: Upstream, bad: str | None) -> None:
    live.put(models(live.base, "small"))
    path = live.site.folder / "secrets/up_key"
    before = path.read_text()
    if bad is None:
        path.unlink()
    else:
        path.write_text(bad)
    until("it is said", lambda: any("UP_KEY" in line for line in live.gateway.status()["degraded"]))
    assert live.gateway.metrics()["moat_secrets_degraded"] == 1
    assert live.ask("small")[0] == 200
    assert _last_key(upstream) == f"Bearer {before.strip()}"
    path.write_text(before)
    until("it is well again", lambda: live.gateway.status()["degraded"] == [])


def test_a_secret_that_cannot_be_applied_is_said_and_tried_again_until_it_is(live: Live, upstream: Upstream) -> None:
    live.put(models(live.base, "small"))
    path = live.site.folder / "secrets/up_key"
    before = path.read_text().strip()
    # What LiteLLM reads cannot be written, as with a full temporary folder.
    (folder,) = (live.site.folder / "tmp").glob("moat-gateway-*")
    (folder / "next").mkdir()
    try:
        refused = len(live.gateway.said(event="secrets.refused", secret="UP_KEY"))
        live.swap("up_key", "upstream-secret-canary-0816")
        until("it is said", lambda: any("UP_KEY" in line for line in live.gateway.status()["degraded"]))
        assert live.gateway.metrics()["moat_secrets_degraded"] == 1
        done = live.site.command("reload")
        assert done.returncode == 14
        assert "cannot be written" in done.stderr
        assert live.ask("small")[0] == 200
        assert _last_key(upstream) == f"Bearer {before}"
        # Said once, however often it is tried.
        assert len(live.gateway.wait_events(event="secrets.refused", secret="UP_KEY")) == refused + 1
    finally:
        (folder / "next").rmdir()
    until("it is tried again", lambda: live.gateway.status()["degraded"] == [])
    assert live.ask("small")[0] == 200
    assert _last_key(upstream).endswith("0816")
    live.swap("up_key", before)
    until("the first one is back", lambda: live.ask("small")[0] == 200 and _last_key(upstream).endswith(before))


def test_a_secret_that_leads_outside_is_refused_and_the_value_before_counts(live: Live, elsewhere: Upstream) -> None:
    """Taken live, it would let no gateway of the node start again."""
    live.site.write("secrets/up_base", live.base)
    live.put(models("os.environ/UP_BASE", "small"))
    live.swap("up_base", "http://api.example.com/v1")
    until("it is said", lambda: any("UP_BASE" in line for line in live.gateway.status()["degraded"]))
    (line,) = live.gateway.status()["degraded"]
    assert "api_base points to api.example.com:80, which is not in the allow-list" in line
    assert live.gateway.metrics()["moat_secrets_degraded"] == 1
    assert len(live.gateway.wait_events(event="secrets.refused", secret="UP_BASE")) == 1
    assert live.ask("small")[0] == 200
    assert live.site.command("reload").returncode == 8
    live.swap("up_base", elsewhere.base)
    until("the next one is taken", lambda: live.gateway.status()["degraded"] == [])
    elsewhere.behaviour.seen.clear()
    assert live.ask("small")[0] == 200
    assert len(elsewhere.behaviour.seen) == 1


def test_the_master_key_is_swapped(live: Live) -> None:
    old, new = live.site.master, "sk-" + "0123456789abcdef" * 4
    assert live.gateway.request("GET", "/v1/models", key=old).status == 200
    live.swap("master_key", new)
    until("the new one counts", lambda: live.gateway.request("GET", "/v1/models", key=new).status == 200)
    assert live.gateway.request("GET", "/v1/models", key=old).status == 401
    live.swap("master_key", "1234")  # too simple: the one before goes on
    until("it is said", lambda: any("master key" in line for line in live.gateway.status()["degraded"]))
    assert live.gateway.request("GET", "/v1/models", key=new).status == 200
    live.swap("master_key", old)
    until("the first one is back", lambda: live.gateway.request("GET", "/v1/models", key=old).status == 200)
    _nothing_of(live, old, new)


def test_sighup_and_reload_ask_config_sync_to_look(live: Live) -> None:
    live.put(models(live.base, "small"))
    asked = live.node.reports_dir / "check-now"
    asked.unlink(missing_ok=True)
    live.gateway.process.send_signal(signal.SIGHUP)
    until("config-sync is asked", asked.exists)
    # Nobody answers in this test: the answer says so, and what was accepted is in force anyway.
    done = live.site.command("reload")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"revision {live.config()['revision']} in force, 1 keys\n"
    assert "config-sync did not answer" in done.stderr
    until("both are logged", lambda: len(live.gateway.said(event="admin.reload", ok=True)) >= 2)


def test_what_needs_a_restart_is_named_and_the_old_revision_serves(live: Live) -> None:
    good = live.put(models(live.base, "small"))
    before = live.gateway.metrics()['moat_config_reload_total{result="restart"}']
    more = "litellm_settings: {callbacks: [prometheus], drop_params: true}\nrouter_settings: {client_ttl: 60}\n"
    live.node.put(models(live.base, "small", "new", more=more), keys_text("client", "fourth"))
    until("it is named", lambda: live.config()["needs_restart"] != [])
    assert live.config()["needs_restart"] == ["litellm_settings.callbacks", "router_settings.client_ttl"]
    assert live.config()["revision"] == good
    assert live.gateway.status()["models"] == ["small"]
    assert live.ask("small", "fourth")[0] == 401
    assert live.ask("small")[0] == 200
    assert live.gateway.metrics()['moat_config_reload_total{result="restart"}'] == before + 1
    assert any(line.startswith("config: needs restart: ") for line in live.gateway.status()["degraded"])
    live.put(models(live.base, "small"))
    assert live.config()["needs_restart"] == []


def test_a_changed_secret_of_a_section_is_named_until_a_restart(
    tmp_path: Path, python: Path, upstream: Upstream
) -> None:
    made = Live(tmp_path, python, upstream.base, MOAT_SECRETS_POLL="60")  # seconds: a push sees the file first
    section = "environment_variables: {SITE_TOKEN: os.environ/SITE_TOKEN}\n"
    made.site.write("secrets/site_token", "first")
    made.node.put(models(upstream.base, "small", more=section), keys_text("client"))
    made.start()
    named = ["secrets in environment_variables"]
    try:
        assert made.config()["needs_restart"] == []
        made.swap("site_token", "second")
        # The change is found by a push, ...
        made.put(models(upstream.base, "small", "new", more=section))
        assert made.config()["needs_restart"] == named
        assert made.gateway.metrics()['moat_config_reload_total{result="restart"}'] == 1
        # ... and no later one makes LiteLLM read it.
        made.put(models(upstream.base, "small", more=section))
        assert made.config()["needs_restart"] == named
        until("the report has it", lambda: (r := made.report()) is not None and list(r.needs_restart) == named)
        assert len(made.gateway.wait_events(event="config.needs_restart", names=named)) == 1
        # With the value that the process has, nothing waits for a restart.
        made.swap("site_token", "first")
        assert made.site.command("reload").returncode == 0
        assert made.config()["needs_restart"] == []
        made.swap("site_token", "third")
        assert made.site.command("reload").returncode == 0
        assert made.config()["needs_restart"] == named
    finally:
        assert made.gateway.stop() == 0
    made.start()
    try:
        assert made.config()["needs_restart"] == []
    finally:
        assert made.gateway.stop() == 0


@pytest.mark.long
def test_memory_and_callbacks_do_not_grow_with_changes(live: Live) -> None:
    def resident() -> int:
        lines = Path(f"/proc/{live.gateway.process.pid}/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS"))

    many = [f"m{i}" for i in range(60)]
    for i in range(10):
        live.put(models(f"{live.base}/{i}", *many))
    before = resident()
    for i in range(40):
        live.put(models(f"{live.base}/x{i}", *many))
    # 2400 deployments were made; kept, they would be more than 10 MB. Garbage may wait for a while to be collected.
    until("the memory is free again", lambda: live.config() and resident() - before < 8 * 1024)


def test_staleness_is_seen_and_degrades(tmp_path: Path, python: Path, upstream: Upstream) -> None:
    made = Live(tmp_path, python, upstream.base, MOAT_STALE_AFTER="1")
    made.node.put(models(upstream.base, "small"), keys_text("client"))
    made.start()
    try:
        until(
            "it is stale",
            lambda: any("has not answered for" in line for line in made.gateway.status()["degraded"]),
        )
        assert made.config()["staleness_seconds"] > 1
        assert made.gateway.metrics()["moat_config_staleness_seconds"] > 1
        # Without a note of config-sync nobody knows how stale it is: not "not at all".
        (made.node.sync_dir / "sync.json").unlink()
        until("it is said", lambda: any("never run" in line for line in made.gateway.status()["degraded"]))
        assert made.gateway.metrics()["moat_config_staleness_seconds"] > 1
        assert made.ask("small")[0] == 200
        assert made.gateway.status()["ready"]
    finally:
        assert made.gateway.stop() == 0


def test_the_turn_drains_and_ends_with_75_and_the_next_start_has_the_revision(alone: Live, upstream: Upstream) -> None:
    made = alone
    made.node.put(models(upstream.base, "small"), keys_text("client"))
    made.start()
    number = made.node.put(
        models(upstream.base, "small", more="router_settings: {client_ttl: 60}\n"), keys_text("client")
    )
    until("it waits", lambda: (r := made.report()) is not None and r.needs_restart == ("router_settings.client_ttl",))
    report = made.report()
    assert report is not None
    # The turn of a process that was started at another time is not meant.
    made.node.tell(turn=Turn("under-test", number, "2001-01-01T00:00:00.000Z"))
    time.sleep(3)
    assert made.gateway.process.poll() is None
    upstream.behaviour.chunk_delay = 0.1
    with Traffic(made.gateway, secret_of("client"), unary=0, streams=1) as traffic:
        until("a stream runs", lambda: made.gateway.metrics()["moat_active_streams"] == 1)
        traffic.streamed = 0
        made.node.tell(turn=Turn("under-test", number, report.started_at))
        # The stream that runs is finished; what is asked after the port is closed is nginx' business, not this test's.
        assert made.gateway.process.wait(PATIENCE) == 75
        traffic._stop.set()
    assert traffic.streamed >= 1
    closed = ("Refused", "Reset", "Disconnected", "BrokenPipe")
    assert all(any(word in f for word in closed) for f in traffic.failures), traffic.failures
    left = made.report()
    assert left is not None
    assert left.draining
    made.start()
    try:
        assert made.config()["revision"] == number
        assert made.config()["needs_restart"] == []
    finally:
        assert made.gateway.stop() == 0


@pytest.mark.long
def test_kill_9_in_the_middle_of_changes_comes_back_with_the_current_revision(alone: Live, upstream: Upstream) -> None:
    made = alone
    many = [f"many{i}" for i in range(100)]
    made.node.put(models(upstream.base, "small"), keys_text("client"))
    for round_ in range(2):
        made.start()
        number = made.node.put(models(f"{upstream.base}/{round_}", *many, small=upstream.base), keys_text("client"))
        # Somewhere within the change: at its beginning, or when half of the deployments are made.
        time.sleep(0.1 + 0.15 * round_)
        os.kill(made.gateway.process.pid, signal.SIGKILL)
        made.gateway.process.wait(PATIENCE)
        made.start()
        assert made.config()["revision"] == number
        assert len(made.gateway.status()["models"]) == 101
        assert made.ask("small")[0] == 200
        assert made.gateway.stop() == 0


def test_the_start_falls_back_to_an_older_revision_then_to_the_local_files(
    tmp_path: Path, python: Path, upstream: Upstream
) -> None:
    made = Live(tmp_path, python, upstream.base)
    old = made.node.put(models(upstream.base, "old"), keys_text("client"))
    new = made.node.put(models(upstream.base, "new"), keys_text("client"))
    spoiled = made.node.sync_dir / f"revisions/{new}/config.yaml"
    spoiled.write_text(spoiled.read_text() + "# a bit of rot\n")
    (made.node.sync_dir / f"revisions/{new}/prepared.json").unlink()
    made.start()
    try:
        assert made.config()["revision"] == old
        assert made.gateway.status()["models"] == ["old"]
        assert any(f"revision {new}" in line for line in made.gateway.status()["degraded"])
        assert made.gateway.wait_events(event="config.fallback", revision=old)
    finally:
        assert made.gateway.stop() == 0
    (made.node.sync_dir / f"revisions/{old}/keys.yaml").unlink()
    made.start()
    try:
        assert made.config()["revision"] == 0
        assert made.gateway.status()["models"] == ["big", "small"]
        made.put(models(upstream.base, "healed"))
        assert made.gateway.status()["models"] == ["healed"]
        assert made.gateway.status()["degraded"] == []
    finally:
        assert made.gateway.stop() == 0
