# SPDX-License-Identifier: Apache-2.0
"""Proves the normal day: a gateway stops under a running stream and comes back; preparing again changes nothing."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from tests.acceptance.stack import Stack, run

PORTS = {"4001": "gateway-1", "4002": "gateway-2"}


def long_stream(stack: Stack, request_id: str) -> tuple[Any, Any, Any]:
    """Open a stream of several seconds and return it after its first chunk, with its line iterator and client."""
    client = stack.client()
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": "Write a long story about a river. Do not stop."}],
        "max_tokens": 400,
        "stream": True,
        "temperature": 0,  # the same 400 tokens each time; a sampled story may end early
        "stream_options": {"include_usage": True},
    }
    request = client.build_request("POST", "/v1/chat/completions", json=body, headers={"x-request-id": request_id})
    response = client.send(request, stream=True)
    assert response.status_code == 200
    lines = response.iter_lines()
    next(lines)
    return client, response, lines


def serving(stack: Stack) -> str:
    """Return the gateway that has a stream running now."""
    for service in ("gateway-1", "gateway-2"):
        if stack.ask_gateway("status", instance=service)["active_streams"]:
            return service
    raise AssertionError("no gateway has a stream")


def upstream_of(stack: Stack, request_id: str) -> list[str]:
    lines = [json.loads(x) for x in stack.logs("nginx").splitlines() if x.startswith("{")]
    return [PORTS[x["upstream"].rsplit(":", 1)[1]] for x in lines if x["request_id"] == request_id]


def test_a_stopped_gateway_finishes_its_stream_and_new_requests_go_to_the_other(stack: Stack) -> None:
    client, response, lines = long_stream(stack, "operation-stream-1")
    busy = serving(stack)
    other = "gateway-2" if busy == "gateway-1" else "gateway-1"
    assert stack.inspect(busy)["Config"]["StopTimeout"] == 75
    stop = subprocess.Popen(["docker", "stop", stack.container(busy)], stdout=subprocess.DEVNULL)
    began = time.monotonic()
    try:
        time.sleep(1.5)  # past the moment in which it still takes requests so that nginx can notice
        with stack.client() as second:
            for i in range(6):
                answer = second.get("/v1/models", headers={"x-request-id": f"operation-new-{i}"})
                assert answer.status_code == 200, answer.text
        rest = list(lines)
        finished = time.monotonic() - began
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
        usage = [json.loads(x[6:])["usage"] for x in rest if x.startswith("data: {") and '"usage"' in x]
        assert usage[-1]["completion_tokens"] > 20
        assert stop.wait(75) == 0
        state = stack.inspect(busy)["State"]
        # 0: it ended by itself. 137 would be docker's kill, a cut stream at the latest then.
        assert (state["Running"], state["ExitCode"], state["OOMKilled"]) == (False, 0, False)
        assert time.monotonic() - began < 70
        for i in range(6):
            assert upstream_of(stack, f"operation-new-{i}")[-1] == other, (i, finished)
        # With its address gone, requests still go through.
        with stack.client() as third:
            assert all(third.get("/v1/models").status_code == 200 for _ in range(4))
    finally:
        response.close()
        client.close()
        stop.wait(80)
        stack.compose("up", "--detach", "--wait", "--wait-timeout", "120", "--pull", "never")
    deadline = time.monotonic() + 30
    ids = iter(range(1000))
    while True:  # and it is used again
        name = f"operation-back-{next(ids)}"
        with stack.client() as again:
            assert again.get("/v1/models", headers={"x-request-id": name}).status_code == 200
        if upstream_of(stack, name) == [busy]:
            break
        assert time.monotonic() < deadline


def test_restarting_one_gateway_after_the_other_loses_no_request(stack: Stack) -> None:
    """What an upgrade does: nobody outside notices."""
    upstream = stack.folder / "nginx/upstream.conf"
    original = upstream.read_text("utf-8")
    outcomes: list[str] = []
    over = threading.Event()
    body = {"model": stack.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "stream": True}

    def ask() -> None:
        # A connection each: at a reload nginx closes the idle ones, and a client that is just writing into one must try
        # again by itself, as OpenAI's does.
        with stack.client(limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while not over.is_set():
                try:
                    answer = client.post("/v1/chat/completions", json=body)
                    ended = answer.status_code == 200 and "data: [DONE]" in answer.text
                    outcomes.append("ok" if ended else f"{answer.status_code} {answer.text[:200]}")
                except httpx.HTTPError as e:
                    outcomes.append(f"{type(e).__name__}: {e}")

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in askers:
        thread.start()
    try:
        for service, member in (("gateway-1", "172.30.242.11:4001"), ("gateway-2", "172.30.242.12:4002")):
            before = stack.inspect(service)["State"]["StartedAt"]
            upstream.write_text(original.replace(member, f"{member} down"))
            stack.compose("kill", "--signal", "HUP", "nginx")
            time.sleep(2)
            stack.compose("restart", service)
            stack.compose("up", "--detach", "--wait", "--wait-timeout", "120", "--pull", "never")
            upstream.write_text(original)
            stack.compose("kill", "--signal", "HUP", "nginx")
            time.sleep(2)
            assert stack.inspect(service)["State"]["StartedAt"] > before
    finally:
        upstream.write_text(original)
        over.set()
        for thread in askers:
            thread.join()
    assert len(outcomes) > 50
    assert [o for o in outcomes if o != "ok"] == []


def test_a_killed_gateway_does_not_make_a_stream_look_complete(stack: Stack) -> None:
    client, response, lines = long_stream(stack, "operation-stream-2")
    busy = serving(stack)
    seen: list[str] = []
    try:
        run("docker", "kill", "--signal", "KILL", stack.container(busy))
        try:
            seen = list(lines)
        except Exception as e:
            assert "incomplete" in str(e) or "peer closed" in str(e)  # noqa: PT017 - either way of telling is right
        assert "data: [DONE]" not in seen
        with stack.client() as second:
            assert second.get("/v1/models").status_code == 200
    finally:
        response.close()
        client.close()
        stack.compose("up", "--detach", "--wait", "--wait-timeout", "120", "--pull", "never")


def test_services_start_in_an_order_in_which_each_finds_what_it_needs(stack: Stack) -> None:
    def started(service: str) -> str:
        return str(stack.inspect(service)["State"]["StartedAt"])

    stack.compose("down")
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "180", "--pull", "never")
    init = stack.inspect("minio-init")["State"]
    assert (init["ExitCode"], init["Running"]) == (0, False)
    assert started("minio") < str(init["StartedAt"]) < str(init["FinishedAt"])
    # The accounts are made before they are used. The gateways wait for neither: they have their last revision.
    assert str(init["FinishedAt"]) < started("config-sync")
    for gateway in ("gateway-1", "gateway-2"):
        assert started(gateway) < started("nginx")
        assert stack.inspect(gateway)["RestartCount"] == 0


def test_a_path_of_this_host_means_the_same_to_the_gateways_command(stack: Stack, tmp_path: Path) -> None:
    """Below config_dir, and anywhere else: a folder that is root's alone, too."""
    copy = tmp_path / "config.yaml"
    shutil.copyfile(stack.config_dir / "config.yaml", copy)
    copy.chmod(0o600)
    for path in (stack.config_dir / "config.yaml", copy):
        assert stack.ask_gateway("check", "--config", str(path))["models"] == [stack.model]
    shutil.copyfile(stack.config_dir / "keys.yaml", tmp_path / "keys.yaml")
    words = ["keys", "new", "elsewhere", "--team", "default", "--keys", str(tmp_path / "keys.yaml")]
    stack.gateway(*words, "--out", str(tmp_path / "elsewhere.key"))
    assert (tmp_path / "elsewhere.key").read_text("ascii").startswith("sk-moat-")
    assert stat.S_IMODE((tmp_path / "elsewhere.key").stat().st_mode) == 0o600
    assert "elsewhere" in (tmp_path / "keys.yaml").read_text("utf-8")
    assert "elsewhere" not in (stack.config_dir / "keys.yaml").read_text("utf-8")


def snapshot(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    return {
        str(p): (p.lstat().st_mode, p.lstat().st_uid, p.lstat().st_mtime_ns, p.lstat().st_size)
        for p in folder.rglob("*")
    }


def test_preparing_again_changes_nothing(stack: Stack) -> None:
    before = snapshot(stack.folder)
    trust = ["--key", stack.public_key, "--state-dir", str(stack.folder / "state")]
    done = stack.moat("prepare", str(stack.bundle), *trust, "--dir", str(stack.folder), "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["changed"], answer["changes"]) == (0, False, [])
    assert snapshot(stack.folder) == before


def test_a_deployment_of_the_other_profile_or_in_a_foreign_folder_is_refused(stack: Stack, tmp_path: Path) -> None:
    trust = ["--key", stack.public_key, "--state-dir", str(stack.folder / "state")]
    (tmp_path / "somebodys.txt").write_text("precious")
    for options, words in (
        (["--dir", str(stack.folder), "--profile", "site"], "profile of a deployment folder cannot be changed"),
        (["--dir", str(tmp_path)], "holds files that `moat prepare` did not make"),
        (["--dir", str(stack.bundle / "x")], "lies inside the bundle"),
        (["--dir", str(tmp_path / "new"), "--https-port", "9000", "--http-port", "9000"], "two ports are the same"),
    ):
        done = stack.moat("prepare", str(stack.bundle), *trust, *options)
        assert done.returncode == 22, done.stderr
        assert words in done.stderr
        assert "do:" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["somebodys.txt"]
