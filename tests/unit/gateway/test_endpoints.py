# SPDX-License-Identifier: Apache-2.0
"""Proves that `moat-gateway endpoints` lists every destination of the configuration, allowed or not, and no secret."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moat_gateway import endpoints
from moat_gateway.cli import main
from moat_gateway.settings import Settings

CONFIG = """
model_list:
  - model_name: small
    litellm_params: {model: openai/small, api_base: "http://user:s3cret@model:8081/v1?k=s3cret"}
  - model_name: other
    litellm_params: {model: openai/other, api_base: "https://203.0.113.20:8443/v1"}
  - model_name: public
    litellm_params: {model: openai/gpt}
litellm_settings:
  callbacks: [otel, langfuse]
  cache: true
  cache_params: {type: redis, host: os.environ/REDIS_PLACE, startup_nodes: [["redis.example", 6379]]}
environment_variables:
  OTEL_EXPORTER_OTLP_ENDPOINT: http://otel.example:4318
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "secrets").mkdir(mode=0o700)
    place = tmp_path / "secrets/REDIS_PLACE"
    place.write_text("hidden.example:6379\n")
    place.chmod(0o400)
    return Settings(
        config=tmp_path / "config.yaml", secrets_dir=tmp_path / "secrets", egress_allow=("model:8081", "redis.example"),
        store_endpoint="http://minio:9000",
    )  # fmt: skip


def test_every_destination_is_listed_with_the_verdict_of_the_allow_list(settings: Settings) -> None:
    found, problems = endpoints.collect(settings)
    listed = {(e.setting.removeprefix("config.yaml "), e.url): e.allowed for e in found}
    assert problems == []
    assert listed["model_list[0].litellm_params.api_base", "model:8081"] is True
    assert listed["model_list[1].litellm_params.api_base", "203.0.113.20:8443"] is False
    assert listed["environment_variables.OTEL_EXPORTER_OTLP_ENDPOINT", "otel.example:4318"] is False
    assert listed["litellm_settings.cache_params.startup_nodes[0]", "redis.example:6379"] is True
    assert listed["store_endpoint", "minio:9000"] is False


def test_a_node_that_has_a_revision_lists_that_one_unless_a_file_is_named(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sync/revisions/3"
    folder.mkdir(parents=True)
    line = 'model_list: [{model_name: m, litellm_params: {model: openai/m, api_base: "http://model:8081/v1"}}]'
    (folder / "config.yaml").write_text(line + "\n")
    node = replace(settings, sync_dir=str(tmp_path / "sync"), store_endpoint="")
    assert [(e.url, e.allowed) for e in endpoints.collect(node)[0]] == [("model:8081", True)]
    monkeypatch.setenv("MOAT_SYNC_DIR", str(tmp_path / "sync"))
    monkeypatch.setenv("MOAT_SECRETS_DIR", str(settings.secrets_dir))
    for more in ([], ["--config", str(settings.config)]):
        assert main(["endpoints", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)["endpoints"]
        assert (len(found) == 1) is (more == []), found


def test_what_would_call_a_public_service_by_itself_is_listed_too(settings: Settings) -> None:
    words = [e.url for e in endpoints.collect(settings)[0] if not e.allowed]
    assert any("model_list[2]" in w and "public servers" in w for w in words)
    assert any("langfuse" in w and "vendor's cloud" in w for w in words)


def test_no_secret_is_shown(settings: Settings) -> None:
    shown = json.dumps(endpoints.to_dict(settings))
    assert "s3cret" not in shown
    assert "hidden" not in shown
    assert "a destination in a secret" in shown


def test_other_problems_of_the_configuration_do_not_hide_the_list(settings: Settings) -> None:
    text = CONFIG.replace("callbacks: [otel, langfuse]", "aiohttp_trust_env: true")
    settings.config.write_text(text)
    raw = endpoints.to_dict(settings)
    assert (raw["ok"], len(raw["problems"])) == (False, 1)
    assert len(raw["endpoints"]) >= 5


def test_the_command_prints_one_object(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(settings.config), "--secrets-dir", str(settings.secrets_dir)]
    assert main(["endpoints", "--json", *options, "--egress-allow", "model:8081 redis.example"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert (raw["ok"], raw["allow"]) == (False, ["model:8081", "redis.example"])
    assert main(["endpoints", *options, "--egress-allow", "model:8081"]) == 0
    assert "REFUSED  203.0.113.20:8443" in capsys.readouterr().out
