# SPDX-License-Identifier: Apache-2.0
"""Proves each way in which the gateway refuses to start: one readable line, the documented exit code, no secret."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.gateway.harness import CONFIG, PACKAGE, Site

MARK = "canary-value-that-must-not-be-shown-0815"


def _config(old: str, new: str) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        path = site.folder / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def _append(text: str) -> Callable[[Site], None]:
    return _config("model_list:", text + "model_list:")


def _file(name: str, text: str) -> Callable[[Site], None]:
    return lambda site: site.write(name, text) and None


def _env(name: str, value: str) -> Callable[[Site], None]:
    return lambda site: site.extra.update({name: value})


def _unreadable(site: Site) -> None:
    path = site.folder / "secrets/up_key"
    path.unlink()
    # A loop of links is unreadable for everybody, root included.
    path.symlink_to(path)


def _gone(name: str) -> Callable[[Site], None]:
    return lambda site: (site.folder / name).unlink()


CASES: list[tuple[str, Callable[[Site], None], int, str, str]] = [
    ("well-known master key", _file("secrets/master_key", "sk-1234"), 4, "bad-master-key", "well-known"),
    ("short master key", _file("secrets/master_key", "sk-short-0815"), 4, "bad-master-key", "too short"),
    ("no master key", _gone("secrets/master_key"), 4, "bad-master-key", "there is no master key"),
    ("unreadable secret", _unreadable, 5, "unreadable-secret", "secrets/up_key"),
    ("empty secret", _file("secrets/up_key", ""), 5, "unreadable-secret", "secrets/up_key"),
    ("unset secret", _gone("secrets/up_key"), 6, "unset-secret", "config.yaml line 3"),
    ("syntax", _config("model_list:", "model_list: ["), 7, "bad-config", "config.yaml line"),
    ("duplicate key", _append("a: 1\na: 2\n"), 7, "bad-config", "config.yaml line 2: holds the key 'a' twice"),
    ("tag", _append("a: !!python/name:os.system x\n"), 7, "bad-config", "config.yaml line 1: holds a YAML tag"),
    ("no configuration", _gone("config.yaml"), 7, "bad-config", "cannot be read"),
    ("outside endpoint", _config("127.0.0.1", "203.0.113.9"), 8, "endpoint-refused", "points to 203.0.113.9"),
    ("public provider", _config('api_base: "', 'other: "'), 8, "endpoint-refused", "has no api_base"),
    ("no models", _file("config.yaml", "litellm_settings: {}\n"), 9, "no-models", "names no model"),
    ("database", _append("general_settings: {database_url: 'postgres://127.0.0.1/x'}\n"), 10, "database-set", "line 1"),
    ("database in environment", _env("DATABASE_URL", f"postgres://u:{MARK}@h/x"), 10, "database-set", "DATABASE_URL"),
    ("weaker checks", _append("general_settings: {custom_auth: a.b}\n"), 11, "setting-refused", "keys.yaml"),
    ("literal master key", _append(f"general_settings: {{master_key: {MARK}}}\n"), 11, "setting-refused", "its file"),
    ("no keys file", _gone("keys.yaml"), 12, "bad-keys", "keys.yaml: cannot be read"),
    ("bad keys file", _file("keys.yaml", "teams: []\nkeys: [{id: x}]\n"), 12, "bad-keys", "keys.yaml line 2"),
    ("bad setting", _env("MOAT_PORT", "http"), 3, "bad-setting", "MOAT_PORT"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "kind", "part"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refusal(site: Site, change: Callable[[Site], None], code: int, kind: str, part: str) -> None:
    change(site)
    imported = watch_the_import(site)
    done = site.command("serve")
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"moat-gateway: refused ({kind}): ")
    assert part in lines[0]
    assert "Do: " in lines[0]
    assert MARK not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not imported.exists(), "a refusal must not wait for LiteLLM's import"
    for line in done.stdout.splitlines():
        assert json.loads(line)["event"] == "start.refused"
    checked = site.command("check", "--json")
    assert checked.returncode == code
    assert json.loads(checked.stdout)["problems"][0]["kind"] == kind


def watch_the_import(site: Site) -> Path:
    """Put a stand-in before LiteLLM; return the file that there is once it was imported."""
    folder = site.folder / "stand-in"
    folder.mkdir()
    code = "import pathlib\n\npathlib.Path(__file__).with_name('imported').touch()\nraise ImportError('a stand-in')\n"
    (folder / "litellm.py").write_text(code)
    site.extra["PYTHONPATH"] = f"{folder}:{PACKAGE}"
    return folder / "imported"


def test_check_says_that_the_good_case_is_good(site: Site) -> None:
    done = site.command("check")
    assert done.returncode == 0, done.stderr
    assert "2 models" in done.stdout
    # The control of the refusals: with this one LiteLLM is imported.
    imported = watch_the_import(site)
    assert site.command("serve").returncode == 14
    assert imported.exists()


def test_a_port_in_use(site: Site) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", site.port))
        s.listen()
        done = site.command("serve")
    assert done.returncode == 13
    assert f"port {site.port}" in done.stderr
    assert not (site.folder / "admin.sock").exists()


def test_an_admin_socket_that_cannot_be_made(site: Site) -> None:
    site.extra["MOAT_ADMIN_SOCKET"] = str(site.folder / "nowhere/admin.sock")
    done = site.command("serve")
    assert done.returncode == 13
    assert "admin socket" in done.stderr


def test_an_environment_without_litellm_is_said(site: Site) -> None:
    # The tools' environment runs these tests and has PyYAML, but no LiteLLM.
    import sys

    site.extra["PYTHONNOUSERSITE"] = "1"
    other = Site(site.folder, site.python.__class__(sys.executable), site.port, dict(site.extra))
    done = other.command("serve")
    assert done.returncode == 14, done.stderr
    assert "LiteLLM cannot be imported" in done.stderr
    assert list((site.folder / "tmp").iterdir()) == []


def test_what_litellm_does_not_accept_has_a_line_of_its_own(site: Site) -> None:
    site.write(
        "config.yaml",
        CONFIG.format(base="http://127.0.0.1:9/v1") + "router_settings: {health_check_interval: 5}\n",
    )
    done = site.command("serve", timeout=180)
    assert done.returncode == 14, done.stderr
    last = [line for line in done.stderr.splitlines() if line.startswith("moat-gateway: refused")]
    assert len(last) == 1
    assert "health_check_interval" in last[0]
    assert list((site.folder / "tmp").iterdir()) == []
