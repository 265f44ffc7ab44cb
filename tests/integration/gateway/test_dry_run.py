# SPDX-License-Identifier: Apache-2.0
"""Proves the dry run with the real LiteLLM: what loads, what does not, and that its limits hold whatever it is given.

Time, memory, the network, the secrets, and the deaths of every process that takes part.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.harness import PACKAGE, START_TIMEOUT
from tests.integration.hotreload.traffic import Busy

from moat_gateway import checks, dryrun
from moat_gateway.dryrun import DryRun, DryRunUnavailable
from moat_gateway.errors import DryRunFailed, GatewayError
from moat_gateway.prepared import Prepared
from moat_gateway.settings import Settings

SECRET = "sk-provider-0123456789-canary"
KEYS = b"teams: []\nkeys: []\n"


def config(count: int = 2, more: str = "", base: str = "http://model:8081/v1") -> str:
    params = f'api_base: "{base}", api_key: os.environ/UP_KEY'
    entries = "".join(
        f"  - model_name: m{i}\n    litellm_params: {{model: openai/up{i}, {params}}}\n" for i in range(count)
    )
    return f"model_list:\n{entries}{more}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "up_key").write_text(SECRET)
    return replace(Settings(), secrets_dir=folder, egress_allow=("model:8081",), dry_run_timeout=60.0)


@pytest.fixture(scope="module")
def warm(settings: Settings, python: Path) -> Iterator[DryRun]:
    child = DryRun(settings, python=str(python))
    child.start()
    yield child
    child.close()


def prepared(settings: Settings, text: str) -> Prepared:
    ready, problems = checks.check({"config.yaml": text.encode(), "keys.yaml": KEYS}, settings, dry_run=None)
    assert ready is not None, [p.one_line() for p in problems]
    return ready


def run(dry_run: DryRun, settings: Settings, text: str) -> None:
    dry_run.run(prepared(settings, text).to_json())


def refused(dry_run: DryRun, settings: Settings, text: str) -> GatewayError:
    """Check and run as config-sync does; return the one problem."""
    ready, problems = checks.check({"config.yaml": text.encode(), "keys.yaml": KEYS}, settings, dry_run=dry_run)
    assert ready is None
    (problem,) = problems
    assert isinstance(problem, DryRunFailed)
    assert SECRET not in problem.one_line()
    return problem


def eventually(holds: Callable[[], bool], seconds: float = START_TIMEOUT) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    try:
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


# --- what builds, and what does not ---


def test_good_configurations_build_in_one_warm_child(warm: DryRun, settings: Settings) -> None:
    run(warm, settings, config())
    pid = warm.pid
    assert warm.resident_bytes > 50 << 20  # LiteLLM is in it
    run(warm, settings, config(400))
    run(warm, settings, config().replace("os.environ/UP_KEY", f"file:{settings.secrets_dir}/up_key"))
    run(
        warm,
        settings,
        config(
            2,
            '  - {model_name: "v/*", litellm_params: {model: "openai/*", api_base: "http://model:8081/v1"}}\n'
            "router_settings:\n  routing_strategy: latency-based-routing\n  fallbacks: [{m0: [m1]}]\n"
            "  model_group_alias: {a: m0}\n  num_retries: 2\n"
            "litellm_settings: {context_window_fallbacks: [{m1: [m0]}]}\n",
        ),
    )
    assert warm.pid == pid


@pytest.mark.parametrize("strategy", ["simple-shuffle", "least-busy", "cost-based-routing", "usage-based-routing-v2"])
def test_each_strategy_builds(warm: DryRun, settings: Settings, strategy: str) -> None:
    run(warm, settings, config(2, f"router_settings: {{routing_strategy: {strategy}}}\n"))


@pytest.mark.parametrize(
    ("more", "line", "words"),
    [
        (
            '  - model_name: bad\n    litellm_params: {model: nonsense/x, api_base: "http://model:8081/v1"}\n',
            6,
            "BadRequestError",
        ),
        (
            '  - model_name: bad\n    litellm_params: {model: openai/x, api_base: "http://model:8081/v1", rpm: many}\n',
            6,
            "rpm: ",
        ),
        (
            "router_settings:\n  routing_groups: [{group_name: default, models: [m0], routing_strategy: least-busy}]\n",
            None,
            "'default' is reserved",
        ),
        (
            "router_settings: {routing_strategy_args: {ttl: soon}, routing_strategy: latency-based-routing}\n",
            None,
            "ttl",
        ),
    ],
)
def test_what_litellm_refuses_is_named(
    warm: DryRun, settings: Settings, more: str, line: int | None, words: str
) -> None:
    problem = refused(warm, settings, config(2, more))
    assert (problem.path, problem.line) == ("config.yaml", line)
    assert words in str(problem.found)


def test_one_run_leaves_nothing_for_the_next(warm: DryRun, settings: Settings) -> None:
    """LiteLLM keeps fallbacks in globals; a run with them must not make the next one fail or differ."""
    run(warm, settings, config(3, "litellm_settings: {default_fallbacks: [m2], num_retries: 7}\n"))
    plain = json.loads(prepared(settings, config(1)).to_json())
    plain["references"] = {}  # the environment of the run before would answer
    plain["effective"]["model_list"][0]["litellm_params"]["rpm"] = "os.environ/UP_KEY"
    warm.run(json.dumps(plain).encode())  # no value: no rpm, where the secret would be no number


@pytest.mark.parametrize(
    "more",
    [
        "litellm_settings: {callbacks: [prometheus]}\n",
        "litellm_settings: {callbacks: [otel]}\n",
        "litellm_settings: {cache: true, cache_params: {type: redis, host: 127.0.0.1, port: 9}}\n",
        "mcp_servers: {tools: {url: 'http://127.0.0.1:9/mcp'}}\n",
        "litellm_settings:\n  success_callback: [s3_v2]\n  s3_callback_params: {s3_endpoint_url: 'http://127.0.0.1:9', "
        "s3_bucket_name: b, s3_aws_access_key_id: os.environ/UP_KEY, s3_aws_secret_access_key: os.environ/UP_KEY}\n",
    ],
    ids=["prometheus", "otel", "redis", "mcp", "s3"],
)
def test_what_connects_at_a_start_loads_without_the_network(warm: DryRun, settings: Settings, more: str) -> None:
    run(warm, settings, config(2, more))


# --- limits ---


# The child is given the limits anew for each run: the warm one serves here, too, without another import.


def test_a_router_that_takes_for_ever_is_ended(
    warm: DryRun, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(warm, settings, config(1))
    pid = warm.pid
    assert pid is not None
    with monkeypatch.context() as short:
        short.setattr(warm, "_timeout", 0.5)
        problem = refused(warm, settings, config(4000))
    assert "too long" in problem.message
    assert "MOAT_DRY_RUN_TIMEOUT" in str(problem.hint)
    assert eventually(lambda: children(pid) == [])
    run(warm, settings, config(1))
    assert warm.pid == pid


def test_a_router_that_eats_memory_is_ended(warm: DryRun, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is within every limit of the file; the router's copies of it are not."""
    monkeypatch.setattr(warm, "_memory", 64 << 20)
    many = f"    model_info: {{x: [{'{a: 1},' * 95_000}]}}\n"
    run(warm, settings, config(1))
    pid = warm.pid
    problem = refused(warm, settings, config(1) + many)
    assert "too much memory" in problem.message
    assert "MOAT_DRY_RUN_MEMORY" in str(problem.hint)
    run(warm, settings, config(1))
    assert warm.pid == pid


def test_with_enough_memory_the_same_router_builds(warm: DryRun, settings: Settings) -> None:
    run(warm, settings, config(1) + f"    model_info: {{x: [{'{a: 1},' * 95_000}]}}\n")


def test_nothing_is_connected_to(warm: DryRun, settings: Settings) -> None:
    """Redis is asked for its version while a router is built; in a dry run not even one of this host hears of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        server.accept()[0].close()  # it would be seen
        server.setblocking(False)
        extra = f"router_settings: {{redis_host: 127.0.0.1, redis_port: {port}, redis_password: os.environ/UP_KEY}}\n"
        run(warm, settings, config(2, extra, base=f"http://127.0.0.1:{port}/v1"))
        with pytest.raises(BlockingIOError):
            server.accept()


# --- secrets ---


@pytest.mark.parametrize("where", ["rpm: os.environ/UP_KEY", "max_retries: os.environ/UP_KEY"])
def test_a_secret_where_none_belongs_is_not_repeated(warm: DryRun, settings: Settings, where: str) -> None:
    problem = refused(warm, settings, config(1).replace("api_key: os.environ/UP_KEY", where))
    assert SECRET[:8] not in problem.one_line()
    assert SECRET[-8:] not in problem.one_line()


def test_words_that_repeat_a_secret_are_left_out(warm: DryRun, settings: Settings) -> None:
    text = config(1).replace("model: openai/up0", "model: os.environ/UP_KEY")
    problem = refused(warm, settings, text)
    assert "not shown" in str(problem.found)
    assert SECRET[:8] not in problem.one_line()


def test_the_child_holds_no_secret_and_writes_nowhere(
    warm: DryRun, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    run(warm, settings, config(2, "router_settings: {set_verbose: true, debug_level: DEBUG}\n"))
    pid = warm.pid
    assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert {str(Path(f"/proc/{pid}/fd/{n}").readlink()) for n in (0, 1, 2)} == {"/dev/null"}
    assert capfd.readouterr() == ("", "")


def test_a_secret_that_vanished_can_be_tried_again(warm: DryRun, settings: Settings) -> None:
    ready = prepared(settings, config())
    gone = replace(ready, references={"UP_KEY": str(settings.secrets_dir / "gone")})
    with pytest.raises(DryRunUnavailable, match="could not be carried out") as caught:
        warm.run(gone.to_json())
    assert "gone" in str(caught.value.found)
    warm.run(ready.to_json())


# --- deaths ---


def test_a_killed_child_is_replaced(warm: DryRun, settings: Settings) -> None:
    run(warm, settings, config(1))
    before = warm.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    run(warm, settings, config(1))
    assert warm.pid not in (None, before)


def test_a_stuck_child_is_replaced(warm: DryRun, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run(warm, settings, config(1))
    before = warm.pid
    assert before is not None
    os.kill(before, signal.SIGSTOP)
    # It is waited for that long; the run in the new one has to fit in, too.
    monkeypatch.setattr(warm, "_timeout", 10.0)
    monkeypatch.setattr(dryrun, "_ANSWER_MARGIN", 0.5)
    run(warm, settings, config(1))
    assert warm.pid not in (None, before)
    assert not alive(before)


def slow(settings: Settings) -> bytes:
    return prepared(settings, config(6000)).to_json()


def test_the_end_does_not_wait_for_a_run(settings: Settings, python: Path) -> None:
    child = DryRun(settings, python=str(python))
    run(child, settings, config(1))
    pid = child.pid
    assert pid is not None
    raised: list[BaseException] = []

    def work() -> None:
        try:
            child.run(raw)
        except GatewayError as e:
            raised.append(e)

    raw = slow(settings)
    thread = threading.Thread(target=work)
    thread.start()
    assert eventually(lambda: bool(children(pid)))
    (fork,) = children(pid)
    child.close()
    # Shorter than the run may take; one that was waited for would have raised something else besides.
    thread.join(45)
    assert not thread.is_alive()
    assert [type(e) for e in raised] == [DryRunUnavailable]
    assert child.pid is None
    assert eventually(lambda: not alive(pid) and not alive(fork))
    with pytest.raises(DryRunUnavailable):
        child.run(raw)
    assert child.pid is None


@pytest.mark.parametrize("when", ["at once", "while it imports", "in a run"])
def test_nothing_is_left_when_the_parent_is_killed(settings: Settings, python: Path, tmp_path: Path, when: str) -> None:
    (tmp_path / "slow.json").write_bytes(slow(settings))
    code = (
        "import sys\nfrom pathlib import Path\nfrom moat_gateway.dryrun import DryRun\n"
        "from moat_gateway.settings import Settings\nd = DryRun(Settings(dry_run_timeout=60.0))\nd.start()\n"
        "print(d.pid, flush=True)\nd.run(Path(sys.argv[1]).read_bytes())\n"
    )
    parent = subprocess.Popen(
        [str(python), "-c", code, str(tmp_path / "slow.json")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE)},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        if when == "while it imports":
            assert eventually(lambda: "pydantic_core" in Path(f"/proc/{pid}/maps").read_text())
        elif when == "in a run":
            assert eventually(lambda: bool(children(pid)))
        forks = children(pid) if when == "in a run" else []
        with Busy() as busy:
            begun = time.monotonic()
            parent.kill()
            parent.wait()
            assert eventually(lambda: not any(map(alive, [pid, *forks])))
            # The import alone takes longer: it does not come to its end first.
            assert time.monotonic() - begun < 3 * busy.since(begun)


def test_a_cold_run_leaves_no_child(settings: Settings, python: Path) -> None:
    cold = DryRun(settings, cold=True, python=str(python))
    run(cold, settings, config())
    assert cold.pid is None
    problem = refused(cold, settings, config(1).replace("openai/up0", "nonsense/up0"))
    assert problem.line == 2
    assert cold.pid is None


def test_without_litellm_it_says_so(settings: Settings) -> None:
    """The interpreter of the tests has the package's other needs, but no LiteLLM."""
    child = DryRun(settings)
    try:
        with pytest.raises(DryRunUnavailable, match="cannot be imported") as caught:
            run(child, settings, config())
        assert "litellm" in str(caught.value.found)
    finally:
        child.close()


def test_an_answer_of_a_child_that_is_none_of_ours_is_no_answer(settings: Settings, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    child: Any = DryRun(settings, python=str(fake))
    with pytest.raises(DryRunUnavailable, match="died or does not answer"):
        run(child, settings, config())
