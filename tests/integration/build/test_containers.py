# SPDX-License-Identifier: Apache-2.0
"""Proves that the engine loads the images under their computed IDs and that each starts without privileges or network.

Every container runs read-only, with no capability, no new privileges, no network, as its own user, and is removed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moat.build.recipe import read_recipes
from moat.manifest import parse_manifest

USERS = {r.name: r.user.split(":")[0] for r in read_recipes("demo")}
HARD = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none"]

pytestmark = pytest.mark.skipif(shutil.which("docker") is None, reason="no container engine")


def docker(*argv: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *argv], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(bundle: Path) -> Iterator[dict[str, str]]:
    """Load the bundle's images and return their references; those that were not there before are removed again."""
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    there = set(docker("images", "--format", "{{.Repository}}:{{.Tag}}", "moat/*").split())
    for i in manifest.images:
        docker("load", "--quiet", "--input", str(bundle / i.archive))
        assert docker("image", "inspect", "--format", "{{.Id}}", i.reference).strip() == i.id
    yield {i.name: i.reference for i in manifest.images}
    for i in manifest.images:
        if i.reference not in there:
            docker("rmi", i.reference, check=False)


@pytest.fixture
def start(images: dict[str, str]) -> Iterator[Callable[..., str]]:
    """Start a container in the background, and return its name."""
    names: list[str] = []

    def run(image: str, *options: str, command: tuple[str, ...] = ()) -> str:
        name = f"moat-test-{uuid.uuid4().hex[:12]}"
        names.append(name)
        docker("run", "--detach", "--name", name, *HARD, "--tmpfs", "/tmp", *options, images[image], *command)
        return name

    yield run
    for name in names:
        docker("rm", "--force", name, check=False)


def until(check: Callable[[], str], wanted: str, container: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while wanted not in (seen := check()):
        assert time.monotonic() < end, seen + docker("logs", container)
        time.sleep(0.2)


def ends_cleanly(container: str) -> None:
    docker("stop", "--time", "10", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}} {{.State.OOMKilled}}", container).strip() == "0 false"


def test_every_image_runs_as_its_own_user(images: dict[str, str]) -> None:
    for name, reference in images.items():
        config = json.loads(docker("image", "inspect", reference))[0]
        assert config["Config"]["User"] == f"{USERS[name]}:{USERS[name]}"
        assert config["RepoTags"] == [reference]


@pytest.mark.parametrize("shell", ["sh", "/bin/sh", "bash", "dash", "busybox"])
def test_the_gateway_image_has_no_shell(images: dict[str, str], shell: str) -> None:
    out = docker("run", "--rm", *HARD, "--entrypoint", shell, images["gateway"], "-c", "true", check=False)
    assert "no such file" in out or "not found" in out, out


def test_the_gateway_image_imports_litellm_from_compiled_files(images: dict[str, str]) -> None:
    program = (
        "import os, sys, litellm.proxy.proxy_server as p, moat_gateway;"
        "assert p.__cached__.endswith('.cpython-313.pyc') and os.path.exists(p.__cached__);"
        "import ssl; assert ssl.create_default_context().get_ca_certs(), 'no certificates';"
        "print(os.getuid(), os.path.dirname(moat_gateway.__file__))"
    )
    env = ["--env", "LITELLM_LOCAL_MODEL_COST_MAP=True", "--tmpfs", "/tmp"]
    out = docker("run", "--rm", *HARD, *env, "--entrypoint", "python3", images["gateway"], "-c", program)
    assert "10102 /opt/moat/app/moat_gateway" in out


def test_nginx_serves_and_its_health_check_tells_the_reason(start: Callable[..., str], tmp_path: Path) -> None:
    temp = "".join(f"{x}_temp_path /var/cache/nginx/{x};" for x in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    conf = tmp_path / "nginx.conf"
    conf.write_text(
        "pid /tmp/nginx.pid; error_log stderr; events {} http { access_log off; " + temp + " server { listen 8080; "
        "location = /live { return 200; } location = /down { return 503; } } }",
        "utf-8",
    )
    tmp_path.chmod(0o755)
    name = start(
        "nginx", "--volume", f"{conf}:/etc/nginx/nginx.conf:ro", "--tmpfs", f"/var/cache/nginx:uid={USERS['nginx']}"
    )

    def ask(port: str, path: str) -> str:
        return docker("exec", name, "moat-health", "127.0.0.1", port, path, check=False)

    until(lambda: ask("8080", "/live"), "healthy: 127.0.0.1:8080/live answered 200", name)
    assert "unhealthy: 127.0.0.1:8080/down answered 503" in ask("8080", "/down")
    assert "connection refused" in ask("8081", "/live")
    assert "usage:" in ask("8080", "no-slash")
    ends_cleanly(name)


def test_minio_serves(start: Callable[..., str]) -> None:
    data = f"/data:uid={USERS['minio']},gid={USERS['minio']}"
    env = ["--env", "MINIO_ROOT_USER=testuser", "--env", "MINIO_ROOT_PASSWORD=test-password-1"]
    name = start("minio", "--tmpfs", data, *env)
    until(
        lambda: docker("exec", name, "moat-health", "127.0.0.1", "9000", "/minio/health/ready", check=False),
        "healthy: 127.0.0.1:9000/minio/health/ready answered 200",
        name,
    )
    ends_cleanly(name)


def test_valkey_answers(start: Callable[..., str]) -> None:
    name = start("valkey", "--tmpfs", f"/data:uid={USERS['valkey']}")
    until(lambda: docker("exec", name, "valkey-cli", "ping", check=False), "PONG", name)
    ends_cleanly(name)


_CHAT = """
import json, sys, urllib.error, urllib.request
def ask(key, prompt, **more):
    body = {"model": "smollm2-135m-instruct", "max_tokens": 12, "temperature": 0}
    body["messages"] = [{"role": "user", "content": prompt}]
    request = urllib.request.Request("http://127.0.0.1:8081/v1/chat/completions", json.dumps({**body, **more}).encode(),
                                     {"Content-Type": "application/json", "Authorization": "Bearer " + key})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
plain = [json.loads(ask("right-key", p)[1]) for p in ("Name a colour.", "Count to five.")]
streamed = ask("right-key", "Name a colour.", stream=True, stream_options={"include_usage": True})[1]
long = ask("right-key", "word " * 2500)[0]
def status(path):
    try:
        headers = {"Authorization": "Bearer right-key"}
        return urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8081" + path, headers=headers)).status
    except urllib.error.HTTPError as e:
        return e.code
print(json.dumps({"plain": plain, "streamed": streamed, "wrong": ask("wrong-key", "x")[0], "long": long,
                  "slots": status("/slots"), "ui": status("/"), "health": status("/health")}))
"""


def test_the_model_serves_real_tokens_with_a_key(start: Callable[..., str], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("right-key\n", "utf-8")
    key.chmod(0o444)
    tmp_path.chmod(0o755)
    name = start("model", "--volume", f"{key}:/run/secrets/model_api_key:ro", "--memory", "1g")
    until(lambda: docker("logs", name), "with a key", name)
    seen = json.loads(docker("exec", name, "python3", "-c", _CHAT))
    texts = [p["choices"][0]["message"]["content"] for p in seen["plain"]]
    assert texts[0] != texts[1], "canned text"
    for p in seen["plain"]:
        usage = p["usage"]
        assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
        assert 0 < usage["completion_tokens"] <= 12
    assert seen["streamed"].rstrip().endswith("data: [DONE]")
    assert '"usage"' in seen["streamed"]
    assert (seen["wrong"], seen["long"], seen["health"]) == (401, 400, 200)
    assert seen["slots"] != 200, "the prompts of others"
    assert seen["ui"] == 404
    logs = docker("logs", name)
    assert "Name a colour" not in logs
    assert "right-key" not in logs
    ends_cleanly(name)


def test_the_model_refuses_an_empty_key(images: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n", "utf-8")
    tmp_path.chmod(0o755)
    mount = ["--volume", f"{tmp_path / 'key'}:/run/secrets/model_api_key:ro", "--tmpfs", "/tmp"]
    out = docker("run", "--rm", *HARD, *mount, images["model"], check=False)
    assert "the secret /run/secrets/model_api_key is empty" in out
