# SPDX-License-Identifier: Apache-2.0
"""Proves that a configuration which would leave the site, need a database or weaken Moat is refused, with its line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moat_gateway import config, strictyaml
from moat_gateway.allowlist import AllowList
from moat_gateway.errors import (
    BadConfig,
    DatabaseSet,
    EndpointRefused,
    GatewayError,
    NoModels,
    SettingRefused,
    UnreadableSecret,
    UnsetSecret,
)

GOOD = """\
model_list:
  - model_name: small
    litellm_params:
      model: openai/up
      api_base: http://model:8081/v1
      api_key: os.environ/UP_KEY
"""
ALLOW = AllowList.parse(["model:8081", "valkey"])


@pytest.fixture
def secrets_dir(tmp_path: Path) -> Path:
    (tmp_path / "up_key").write_text("the-upstream-key\n")
    return tmp_path


def check(text: str, secrets_dir: Path, allow: AllowList = ALLOW) -> tuple[Any, list[GatewayError]]:
    document = strictyaml.parse(text, name="config.yaml", error=BadConfig)
    return config.check(document, "config.yaml", "0" * 64, secrets_dir, allow)


def test_a_good_file(secrets_dir: Path) -> None:
    checked, problems = check(GOOD, secrets_dir)
    assert problems == []
    assert checked.models == ("small",)
    assert checked.secrets == {"UP_KEY": "the-upstream-key"}
    assert "the-upstream-key" not in repr(checked)
    assert "the-upstream-key" not in yaml.safe_dump(dict(checked.effective))


def test_what_moat_always_sets(secrets_dir: Path) -> None:
    extra = "general_settings: {max_parallel_requests: 5}\nlitellm_settings: {drop_params: true}\n"
    effective = check(GOOD + extra, secrets_dir)[0].effective
    assert effective["general_settings"]["custom_auth"] == "moat_gateway.litellm_port.custom_auth"
    assert effective["general_settings"]["custom_auth_run_common_checks"] is True
    assert effective["general_settings"]["master_key"] == "os.environ/LITELLM_MASTER_KEY"
    assert effective["general_settings"]["max_parallel_requests"] == 5
    assert effective["litellm_settings"]["enable_post_custom_auth_checks"] is True
    assert effective["litellm_settings"]["disable_hf_tokenizer_download"] is True
    assert effective["litellm_settings"]["drop_params"] is True


REFUSED: list[tuple[str, type[GatewayError], int, str]] = [
    ("model_list: []\n", NoModels, 1, "names no model"),
    ("litellm_settings: {}\n", NoModels, 1, "names no model"),
    (GOOD.replace("model:8081", "api.openai.com"), EndpointRefused, 5, "points to api.openai.com:80"),
    (GOOD.replace("model:8081", "model:9999"), EndpointRefused, 5, "points to model:9999"),
    (GOOD.replace("      api_base: http://model:8081/v1\n", ""), EndpointRefused, 3, "has no api_base"),
    (
        GOOD.replace("http://model:8081/v1", "model.example.net:80"),
        EndpointRefused,
        5,
        "points to model.example.net:80",
    ),
    (GOOD.replace("UP_KEY", "OTHER_KEY"), UnsetSecret, 6, "the secret OTHER_KEY"),
    (GOOD.replace("UP_KEY", "PATH"), SettingRefused, 6, "cannot be a secret"),
    (GOOD.replace("UP_KEY", "../up_key"), SettingRefused, 6, "cannot be a secret"),
    (GOOD + "general_settings:\n  master_key: sk-1234\n", SettingRefused, 8, "the key comes from its file"),
    (GOOD + "general_settings:\n  database_url: postgres://db/x\n", DatabaseSet, 8, "asks for a database"),
    (GOOD + "general_settings:\n  store_model_in_db: true\n", DatabaseSet, 8, "asks for a database"),
    (GOOD + "general_settings:\n  custom_auth: my.hook\n", SettingRefused, 8, "keys come from keys.yaml"),
    (
        GOOD + "general_settings:\n  custom_auth_run_common_checks: false\n",
        SettingRefused,
        8,
        "models are not enforced",
    ),
    (GOOD + "litellm_settings:\n  enable_post_custom_auth_checks: 'yes'\n", SettingRefused, 8, "models are not"),
    (GOOD + "general_settings:\n  alerting: [slack]\n", SettingRefused, 8, "outside"),
    (GOOD + "general_settings: 5\n", BadConfig, 7, "not a mapping"),
    (GOOD + "litellm_settings:\n  callbacks: [langfuse]\n", EndpointRefused, 8, "its vendor's cloud"),
    (
        GOOD + "litellm_settings:\n  success_callback:\n    - prometheus\n    - s3_v2\n",
        EndpointRefused,
        10,
        "vendor's cloud",
    ),
    (GOOD + "litellm_settings:\n  cache: true\n  cache_params: {type: gcs}\n", EndpointRefused, 9, "public cloud"),
    (
        GOOD + "litellm_settings:\n  cache_params:\n    host: redis.example.net\n",
        EndpointRefused,
        9,
        "redis.example.net",
    ),
    (
        GOOD + 'litellm_settings:\n  cache_params:\n    sentinel_nodes: [["s.example.net", 26379]]\n',
        EndpointRefused,
        9,
        "s.example.net:26379",
    ),
    (
        GOOD + "environment_variables:\n  OTEL_EXPORTER_OTLP_ENDPOINT: collector.example.net:4317\n",
        EndpointRefused,
        8,
        "collector.example.net:4317",
    ),
    (GOOD + "environment_variables:\n  HTTPS_PROXY: http://model:8081\n", SettingRefused, 8, "steers the gateway"),
    (GOOD + "environment_variables:\n  LITELLM_LOCAL_BLOG_POSTS: 'False'\n", SettingRefused, 8, "steers the gateway"),
    (GOOD + "environment_variables:\n  LITELLM_RUST: 'True'\n", SettingRefused, 8, "steers the gateway"),
    (GOOD + "include: [other.yaml]\n", SettingRefused, 7, "one file"),
    (GOOD + "mcp_servers:\n  x: {command: npx}\n", SettingRefused, 8, "starts a program"),
    (GOOD + "mcp_servers:\n  x: {url: 'https://mcp.example.net/sse'}\n", EndpointRefused, 8, "mcp.example.net:443"),
    (GOOD + "guardrails:\n  - litellm_params: {guardrail: aporia}\n", EndpointRefused, 8, "public service"),
    (GOOD + "search_tools:\n  - litellm_params: {search_provider: tavily}\n", EndpointRefused, 8, "public service"),
    (
        GOOD.rstrip() + "\n    model_info: {custom_tokenizer: {identifier: x/y}}\n",
        EndpointRefused,
        7,
        "tokenizer from a public hub",
    ),
    (GOOD + "litellm_settings:\n  callbacks: [os.system]\n", SettingRefused, 8, "names Python code"),
    (GOOD + "router_settings:\n  plugins: [my.router]\n", SettingRefused, 8, "names Python code"),
    (GOOD + "guardrails:\n  - litellm_params: {guardrail: my.Guard}\n", SettingRefused, 8, "names Python code"),
    (GOOD + "  - model_name: x\n", BadConfig, 7, "not a deployment"),
]


@pytest.mark.parametrize(("text", "error", "line", "part"), REFUSED)
def test_refusals(text: str, error: type[GatewayError], line: int, part: str, secrets_dir: Path) -> None:
    checked, problems = check(text, secrets_dir)
    assert checked is None
    match = [p for p in problems if type(p) is error and part in p.message]
    assert match, [p.one_line() for p in problems]
    assert match[0].line == line
    assert match[0].hint


def test_all_problems_are_reported_in_the_order_of_the_file(secrets_dir: Path) -> None:
    text = GOOD.replace("model:8081", "a.example.net") + "general_settings: {custom_auth: x.y}\ninclude: [z]\n"
    problems = check(text, secrets_dir)[1]
    assert [p.line for p in problems] == [5, 7, 8]


def test_a_secret_that_holds_a_url_is_checked_and_not_shown(secrets_dir: Path) -> None:
    (secrets_dir / "base").write_text("https://user:hunter2@api.example.net/v1")
    text = GOOD.replace("http://model:8081/v1", "os.environ/BASE")
    problems = check(text, secrets_dir)[1]
    assert [type(p) for p in problems] == [EndpointRefused]
    assert "api.example.net:443" in problems[0].one_line()
    assert "hunter2" not in problems[0].one_line()


def test_a_secret_that_could_be_a_password_is_not_shown_as_a_host(secrets_dir: Path) -> None:
    (secrets_dir / "base").write_text("hunter2")
    problems = check(GOOD.replace("http://model:8081/v1", "os.environ/BASE"), secrets_dir)[1]
    assert [type(p) for p in problems] == [EndpointRefused]
    assert "hunter2" not in problems[0].one_line()


@pytest.mark.parametrize(
    ("base", "key", "found"),
    [
        ("http://model:8081/v1", "another-key", {}),
        ("http://api.example.com/v1", "another-key", {"BASE": "api_base points to api.example.com:80"}),
        ("api.example.com", "another-key", {"BASE": "api_base refers to a secret that holds a destination"}),
        ("model:8081", "https://api.example.com", {"UP_KEY": "api_key points to api.example.com:443"}),
    ],
)
def test_a_new_value_of_a_secret_is_judged_as_the_next_start_would(
    base: str, key: str, found: dict[str, str], secrets_dir: Path
) -> None:
    text = GOOD.replace("http://model:8081/v1", "os.environ/BASE")
    (secrets_dir / "base").write_text("http://model:8081")
    checked, _ = check(text, secrets_dir)
    values = {"BASE": base, "UP_KEY": key}
    now = config.outside(checked.effective, values, checked.references, ALLOW)
    assert {n: type(e) for n, e in now.items()} == dict.fromkeys(found, EndpointRefused)
    for name, part in found.items():
        assert part in now[name].message
        assert now[name].path == str(checked.references[name])
    for name, value in values.items():
        checked.references[name].write_text(value)
    at_start, problems = check(text, secrets_dir)
    assert [p.message for p in problems] == [e.message for e in now.values()]
    assert (at_start is None) == bool(found)


def test_an_unreadable_secret_names_the_file(secrets_dir: Path) -> None:
    (secrets_dir / "up_key").unlink()
    (secrets_dir / "up_key").mkdir()
    problems = check(GOOD, secrets_dir)[1]
    assert [type(p) for p in problems] == [UnreadableSecret]
    assert problems[0].path == str(secrets_dir / "up_key")


def test_the_exact_name_of_a_secret_wins_over_the_lower_case_one(secrets_dir: Path) -> None:
    (secrets_dir / "UP_KEY").write_text("exact")
    assert check(GOOD, secrets_dir)[0].secrets == {"UP_KEY": "exact"}


def test_credentials_may_say_where_a_deployment_goes(secrets_dir: Path) -> None:
    text = GOOD.replace("api_base: http://model:8081/v1", "litellm_credential_name: site")
    text += "credential_list:\n  - credential_name: site\n    credential_values: {api_base: 'http://model:8081'}\n"
    assert check(text, secrets_dir)[1] == []


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the trail of every string below ``value``."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in _places(v, (*at, k))]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in _places(v, (*at, i))]
    return [at] if isinstance(value, str) else []


RICH: dict[str, Any] = {
    **yaml.safe_load(GOOD),
    "litellm_settings": {
        "callbacks": ["prometheus"], "cache_params": {"type": "redis", "host": "valkey"}, "x": {"y": ["z"]},
    },
    "general_settings": {
        "pass_through_endpoints": [{"path": "/x", "target": "http://model:8081/x", "headers": {"a": "b"}}],
    },
    "mcp_servers": {"m": {"url": "http://model:8081/mcp"}},
    "router_settings": {"routing_strategy": "simple-shuffle", "redis_host": "valkey"},
    "environment_variables": {"SOME": "thing"},
}  # fmt: skip


def test_the_rich_file_is_good_by_itself(secrets_dir: Path) -> None:
    assert check(yaml.safe_dump(RICH), secrets_dir)[1] == []


@given(
    st.sampled_from(_places(RICH)),
    st.sampled_from(["http", "https", "grpc", "redis", "wss", "postgres", "unix+http"]),
    st.from_regex(r"[a-z]{3,10}\.(example|test)(:[1-9][0-9]{2,3})?", fullmatch=True),
    st.sampled_from(["", "x ", "a,", "user:pw@"]),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_a_url_anywhere_in_the_file_is_found(
    secrets_dir: Path, place: tuple[Any, ...], scheme: str, host: str, before: str
) -> None:
    data = copy.deepcopy(RICH)
    spot: Any = data
    for step in place[:-1]:
        spot = spot[step]
    spot[place[-1]] = f"{scheme}://{before}{host}/p" if before.endswith("@") else f"{before}{scheme}://{host}/p"
    checked, problems = check(yaml.safe_dump(data), secrets_dir)
    assert checked is None
    assert any(type(p) is EndpointRefused and host.partition(":")[0] in p.message for p in problems)


# --- file:/run/secrets/x ---


def with_file(text: str) -> str:
    return GOOD.replace("os.environ/UP_KEY", text)


def test_a_file_reference(secrets_dir: Path) -> None:
    checked, problems = check(with_file(f"file:{secrets_dir}/up_key"), secrets_dir)
    assert problems == []
    (name,) = checked.secrets
    assert name.startswith("MOAT_FILE_")
    assert checked.secrets[name] == "the-upstream-key"
    assert checked.references == {name: secrets_dir / "up_key"}
    assert checked.effective["model_list"][0]["litellm_params"]["api_key"] == f"os.environ/{name}"
    assert "file:" not in yaml.safe_dump(dict(checked.effective))


def test_one_file_has_one_name_however_it_is_written(secrets_dir: Path) -> None:
    plain = check(with_file(f"file:{secrets_dir}/up_key"), secrets_dir)[0]
    for other in (f"file://{secrets_dir}/up_key", f"file:{secrets_dir}/./x/../up_key"):
        assert check(with_file(other), secrets_dir)[0].references == plain.references


def test_a_reference_by_name_has_its_file_too(secrets_dir: Path) -> None:
    assert check(GOOD, secrets_dir)[0].references == {"UP_KEY": secrets_dir / "up_key"}


@pytest.mark.parametrize(
    ("reference", "kind", "words"),
    [
        ("file:{dir}/missing", UnsetSecret, "not there"),
        ("file:{dir}/../up_key", SettingRefused, "outside of the folder"),
        ("file:{dir}", SettingRefused, "outside of the folder"),
        ("file:/etc/passwd", SettingRefused, "outside of the folder"),
        ("file://host{dir}/up_key", SettingRefused, "outside of the folder"),
        ("file:{dir}/folder", UnreadableSecret, "cannot be read"),
    ],
)
def test_a_file_reference_that_is_refused(
    secrets_dir: Path, reference: str, kind: type[GatewayError], words: str
) -> None:
    (secrets_dir / "folder").mkdir()
    checked, problems = check(with_file(reference.format(dir=secrets_dir)), secrets_dir)
    assert checked is None
    assert [type(p) for p in problems] == [kind]
    assert words in problems[0].message


def test_a_file_reference_that_holds_an_outside_destination_is_refused_without_its_text(secrets_dir: Path) -> None:
    (secrets_dir / "base").write_text("outside.example.net")
    text = GOOD.replace("http://model:8081/v1", f"file:{secrets_dir}/base")
    checked, problems = check(text, secrets_dir)
    assert checked is None
    assert [type(p) for p in problems] == [EndpointRefused]
    assert "outside.example.net" not in problems[0].one_line()
