# SPDX-License-Identifier: Apache-2.0
"""Proves, by name, each thing that Moat leans on in LiteLLM: when the pin moves, the failing names say what moved.

The looking is done by ``contract.py`` in the gateway's environment.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tests.integration.gateway.harness import PACKAGE, Gateway, Site, chat
from tests.integration.gateway.upstream import Upstream

HERE = Path(__file__).parent
NAMES = [
    n.name
    for n in ast.parse((HERE / "contract.py").read_text("utf-8")).body
    if isinstance(n, ast.FunctionDef) and isinstance(n.returns, ast.Name) and n.returns.id == "bool"
]


@pytest.fixture(scope="module")
def results(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), "HOME": str(tmp_path_factory.mktemp("home"))}
    done = subprocess.run(
        [str(python), str(HERE / "contract.py")], env=environment, capture_output=True, text=True, timeout=180
    )
    line = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert line, done.stderr[-3000:]
    value = json.loads(line[0].removeprefix("RESULT "))
    assert isinstance(value, dict)
    return value


def test_every_contract_is_run(results: dict[str, str]) -> None:
    assert set(results) == {*NAMES, "version"}
    assert len(NAMES) >= 15


def test_the_pin(results: dict[str, str]) -> None:
    source = (PACKAGE / "moat_gateway/litellm_port/start.py").read_text("utf-8")
    pin = re.search(r'^PIN = "(.+)"$', source, re.MULTILINE)
    assert pin is not None
    assert results["version"] == pin.group(1)


@pytest.mark.parametrize("name", NAMES)
def test_contract(results: dict[str, str], name: str) -> None:
    assert results[name] == "holds"


def test_a_contract_that_fails_is_named(site: Site) -> None:
    """The running check (`litellm_port.verify`) refuses a LiteLLM in which a hook is not in force."""
    # A start in which something turns one switch off after LiteLLM has loaded the configuration.
    site.write(
        "spoil.py",
        "import sys\n"
        "from moat_gateway import litellm_port\n"
        "verify = litellm_port.verify\n"
        "def spoiled():\n"
        "    import litellm\n"
        "    litellm.enable_post_custom_auth_checks = False\n"
        "    verify()\n"
        "litellm_port.verify = spoiled\n"
        "from moat_gateway.cli import main\n"
        "sys.exit(main(['serve']))\n",
    )
    done = subprocess.run(
        [str(site.python), str(site.folder / "spoil.py")],
        env=site.environment,
        cwd=site.folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 14
    assert "litellm.enable_post_custom_auth_checks" in done.stderr


def test_answers_are_those_of_litellms_own_command(
    shared: Gateway, tmp_path: Path, upstream: Upstream, python: Path
) -> None:
    """With the guard, the stages and the port around it, LiteLLM answers as it does alone."""
    import time

    from tests.integration.gateway.harness import START_TIMEOUT, Answer, free_port, request
    from tests.integration.gateway.isolated import stop_process

    port = free_port()
    (tmp_path / "config.yaml").write_text((shared.site.folder / "config.yaml").read_text())
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "UP_KEY": "upstream-secret-canary-4711",
        "LITELLM_MASTER_KEY": shared.site.master, "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True", "LITELLM_LOCAL_BLOG_POSTS": "True",
    }  # fmt: skip
    argv = [str(python), "-c", "from litellm.proxy.proxy_cli import run_server; run_server()"]
    argv += ["--config", str(tmp_path / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        stock = subprocess.Popen(argv, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            try:
                if request(port, "GET", "/health/liveliness", timeout=5).status == 200:
                    break
            except OSError:
                time.sleep(0.1)
        key = shared.site.master

        def both(method: str, path: str, body: object = None) -> tuple[Answer, Answer]:
            return request(shared.site.port, method, path, body, key), request(port, method, path, body, key)

        def same(raw: bytes) -> str:
            text = re.sub(r'"(id|model_id)": ?"[^"]*"', '"id":"-"', raw.decode())
            return re.sub(r'"created": ?\d+', '"created":0', text)

        cases: list[tuple[str, str, object]] = [
            ("POST", "/v1/chat/completions", chat("one two")),
            ("POST", "/v1/chat/completions", chat("one two", stream=True)),
            ("POST", "/v1/chat/completions", chat("one", stream=True, stream_options={"include_usage": True})),
            ("POST", "/v1/chat/completions", {"model": "small"}),
            ("POST", "/v1/chat/completions", chat(model="not-there")),
            ("GET", "/v1/models", None),
            ("GET", "/not/there", None),
            ("POST", "/utils/token_counter", {"model": "small", "prompt": "hello there"}),
        ]
        for method, path, body in cases:
            ours, theirs = both(method, path, body)
            assert ours.status == theirs.status, (path, body, ours.body, theirs.body)
            assert same(ours.body) == same(theirs.body), (path, body)
            assert ours.headers.get("content-type") == theirs.headers.get("content-type")
        upstream.behaviour.fail_with = 429
        ours, theirs = both("POST", "/v1/chat/completions", chat())
        assert (ours.status, same(ours.body)) == (theirs.status, same(theirs.body))
    finally:
        stop_process(stock)
