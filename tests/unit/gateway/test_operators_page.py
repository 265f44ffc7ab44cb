# SPDX-License-Identifier: Apache-2.0
"""Proves that the refusals which docs/gateway.md shows are what `moat-gateway check` really prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from moat_gateway.cli import main

PAGE = Path(__file__).resolve().parents[3] / "docs/gateway.md"
CONFIG = """\
model_list:
  - model_name: chat-small
    litellm_params:
      model: openai/llama-3.1-8b
      api_base: http://vllm:8000/v1
      api_key: os.environ/VLLM_API_KEY
"""
KEYS = "teams:\n  - id: physics\n    models: [chat-small]\nkeys: []\n"
#: What is changed against a good deployment, and the exit code; the printed lines must be in the page.
CASES: dict[str, tuple[dict[str, str | None], int]] = {
    "well-known master key": ({"secrets/master_key": "sk-1234\n"}, 4),
    "no master key": ({"secrets/master_key": None}, 4),
    "empty secret": ({"secrets/vllm_api_key": ""}, 5),
    "unset secret": ({"secrets/vllm_api_key": None}, 6),
    "bad yaml": ({"config.yaml": CONFIG.replace("model_name:", "model_name: :", 1)}, 7),
    "key twice": ({"config.yaml": CONFIG + "model_list: []\n"}, 7),
    "outside endpoint": ({"config.yaml": CONFIG.replace("vllm:8000", "api.example.com")}, 8),
    "no api_base": ({"config.yaml": CONFIG.replace("      api_base: http://vllm:8000/v1\n", "")}, 8),
    "no models": ({"config.yaml": "model_list: []\n"}, 9),
    "database": ({"config.yaml": CONFIG + "general_settings:\n  database_url: postgres://127.0.0.1/x\n"}, 10),
    "weaker": ({"config.yaml": CONFIG + "general_settings:\n  custom_auth_run_common_checks: false\n"}, 11),
    "bad keys": ({"keys.yaml": KEYS.replace("[chat-small]", "[]")}, 12),
    "bad setting": ({"gateway.yaml": "egress_allow: [vllm:8000]\nport: http\n"}, 3),
}


@pytest.mark.parametrize(("changes", "code"), CASES.values(), ids=CASES.keys())
def test_the_page_shows_what_is_printed(
    changes: dict[str, str | None],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "secrets").mkdir()
    files: dict[str, str | None] = {
        "config.yaml": CONFIG,
        "keys.yaml": KEYS,
        "gateway.yaml": 'egress_allow: ["vllm:8000"]\n',
        "secrets/master_key": "0123456789abcdef" * 4,
        "secrets/vllm_api_key": "x",
        **changes,
    }
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    for name in ("DATABASE_URL", "DIRECT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOAT_SETTINGS_FILE", str(tmp_path / "gateway.yaml"))
    monkeypatch.setenv("MOAT_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("MOAT_KEYS", str(tmp_path / "keys.yaml"))
    monkeypatch.setenv("MOAT_SECRETS_DIR", str(tmp_path / "secrets"))
    monkeypatch.setenv("MOAT_MASTER_KEY_FILE", str(tmp_path / "secrets/master_key"))
    assert main(["check"]) == code
    printed = capsys.readouterr().err
    as_installed = printed.replace(str(tmp_path / "secrets"), "/run/secrets").replace(str(tmp_path), "/etc/moat")
    page = PAGE.read_text("utf-8")
    for line in as_installed.splitlines():
        assert line in page.splitlines(), line
