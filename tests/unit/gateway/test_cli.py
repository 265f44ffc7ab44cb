# SPDX-License-Identifier: Apache-2.0
"""Proves the commands that need no LiteLLM, as an operator calls them: output, exit codes, one JSON object."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moat_gateway import adminclient
from moat_gateway.cli import main
from moat_gateway.errors import NoAnswer

MASTER = "sk-" + "0123456789abcdef" * 4
CONFIG = """\
model_list:
  - model_name: small
    litellm_params: {model: openai/up, api_base: 'http://127.0.0.1:9/v1', api_key: os.environ/UP_KEY}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "master_key").write_text(MASTER)
    (secrets / "up_key").write_text("upstream-canary")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "keys.yaml").write_text("teams: [{id: t, models: ['*']}]\nkeys: []\n")
    for name in ("DATABASE_URL", "DIRECT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOAT_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("MOAT_KEYS", str(tmp_path / "keys.yaml"))
    monkeypatch.setenv("MOAT_SECRETS_DIR", str(secrets))
    monkeypatch.setenv("MOAT_MASTER_KEY_FILE", str(secrets / "master_key"))
    monkeypatch.setenv("MOAT_ADMIN_SOCKET", str(tmp_path / "admin.sock"))
    return tmp_path


def test_check_says_what_runs_and_no_secret(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert main(["check", "--json"]) == 0
    captured = capsys.readouterr()
    assert "canary" not in captured.out + captured.err
    value = json.loads(captured.out.splitlines()[-1])
    assert (value["ok"], value["models"], value["secrets"]) == (True, ["small"], ["UP_KEY"])


def test_check_reports_every_problem_and_ends_with_the_first_code(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "secrets/master_key").write_text("sk-1234")
    monkeypatch.setenv("DATABASE_URL", "postgres://x")
    (site / "keys.yaml").write_text("")
    assert main(["check", "--json"]) == 10
    captured = capsys.readouterr()
    assert [p["kind"] for p in json.loads(captured.out)["problems"]] == ["database-set", "bad-master-key", "bad-keys"]
    assert len(captured.err.splitlines()) == 3
    assert "sk-1234" not in captured.out + captured.err


def test_keys_new_prints_the_secret_alone(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "one", "--team", "t"]) == 0
    secret = capsys.readouterr().out
    assert secret.startswith("sk-moat-")
    assert secret.count("\n") == 1
    assert secret.strip() not in (site / "keys.yaml").read_text()
    assert main(["keys", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [k["id"] for k in listed["keys"]] == ["one"]
    assert main(["keys", "rotate", "one"]) == 0
    capsys.readouterr()
    assert main(["keys", "revoke", "one"]) == 0
    assert f"one is revoked in {site / 'keys.yaml'}, together with one.old: " in capsys.readouterr().err
    assert main(["keys", "revoke", "one"]) == 12


def test_keys_new_into_a_file(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = site / "secret"
    argv = ["keys", "new", "--keys", str(site / "keys.yaml"), "--id", "two", "--team", "t", "--out", str(out)]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert out.stat().st_mode & 0o777 == 0o600
    assert out.read_text().startswith("sk-moat-")
    assert main([*argv[:5], "three", *argv[6:]]) == 12  # the file is there: no key is made
    assert main(["keys", "new", "x", "--team", "none", "--out", str(site / "other")]) == 12
    assert not (site / "other").exists()


def test_keys_rotate_prints_the_secret_alone(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "one", "--team", "t"]) == 0
    first = capsys.readouterr().out
    assert main(["keys", "rotate", "one", "--overlap", "1h"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("sk-moat-")
    assert captured.out.count("\n") == 1
    assert captured.out != first
    assert "as one.old" in captured.err
    assert main(["keys", "rotate", "one", "--out", str(site / "secret")]) == 0
    assert capsys.readouterr().out == ""
    assert (site / "secret").stat().st_mode & 0o777 == 0o600
    assert main(["keys", "rotate", "two"]) == 12
    assert main(["keys", "rotate", "one", "--overlap", "soon"]) == 12


def test_status_without_a_gateway(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 15
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"][0]["kind"] == "not-running"
    assert "no gateway answers" in captured.err


@contextmanager
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()
        yield server


def test_a_socket_where_nobody_listens_any_more_is_that_of_a_gateway_that_has_ended(site: Path) -> None:
    with listener(site / "admin.sock"):
        pass
    assert (site / "admin.sock").exists()
    assert main(["status", "--json"]) == 15


def test_a_gateway_that_is_slow_is_not_one_that_does_not_run(site: Path) -> None:
    """Whoever waits until it is idle goes on at 15."""
    with listener(site / "admin.sock"), pytest.raises(NoAnswer, match="no answer") as e:
        adminclient.request(site / "admin.sock", "GET", "/status", timeout=0.1)
    assert e.value.expected == "an answer within 0.1 s"


@pytest.mark.parametrize(
    "answer", ["", "HTTP/1.1 500 no\r\ncontent-length: 2\r\n\r\n{}", "HTTP/1.1 200 ok\r\n\r\nwhat"]
)
def test_an_answer_that_cannot_be_used_does_not_say_that_no_gateway_runs(
    site: Path, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer.encode())

    with listener(site / "admin.sock") as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        assert main(["status", "--json"]) == 28
        thread.join()
    assert json.loads(capsys.readouterr().out)["problems"][0]["kind"] == "no-answer"


def test_wrong_usage_is_2() -> None:
    with pytest.raises(SystemExit) as e:
        main(["keys"])
    assert e.value.code == 2


def test_settings_in_force(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == str(site / "config.yaml")


@pytest.mark.parametrize("endpoint", ["", "a b", "ftp://x:1", "minio:x"])
def test_a_store_endpoint_that_cannot_be_used(site: Path, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "check", "--endpoint", endpoint]) == 17
    assert "HOST:PORT" in capsys.readouterr().err
