# SPDX-License-Identifier: Apache-2.0
"""Proves that every problem of a revision's content is found together, each with its file and line, in words that help.

The dry run with the real LiteLLM is in ``tests/integration/gateway/test_dry_run.py``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moat_gateway import checks, keys
from moat_gateway.errors import BadRevision, DryRunFailed, GatewayError
from moat_gateway.prepared import Prepared
from moat_gateway.settings import Settings

BASE = 'api_base: "http://model:8081/v1"'
CONFIG = f"""\
model_list:
  - model_name: small
    litellm_params: {{model: openai/up, {BASE}, api_key: os.environ/UP_KEY}}
  - model_name: vendor/*
    litellm_params: {{model: "openai/*", {BASE}}}
    model_info: {{id: wild, access_groups: [cheap]}}
"""
SHA = hashlib.sha256(b"sk-moat-x").hexdigest()
KEYS = f"teams:\n  - {{id: t, models: [small]}}\nkeys:\n  - {{id: k, team: t, sha256: {SHA}, not_after: 2099-01-31}}\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "up_key").write_text("the-upstream-key\n")
    return replace(Settings(), secrets_dir=tmp_path, egress_allow=("model:8081",))


def check(
    settings: Settings, config: str = CONFIG, keys_: str = KEYS, **more: bytes
) -> tuple[Prepared | None, list[GatewayError]]:
    return checks.check({"config.yaml": config.encode(), "keys.yaml": keys_.encode(), **more}, settings, dry_run=None)


def only(found: tuple[Prepared | None, list[GatewayError]]) -> GatewayError:
    ready, problems = found
    assert ready is None
    assert len(problems) == 1, [p.one_line() for p in problems]
    assert problems[0].hint
    return problems[0]


def test_a_secret_that_stands_in_the_file_is_refused_and_not_shown(settings: Settings) -> None:
    secret = "sk-proj-REALkey0123456789abcdefghij"
    e = only(check(settings, CONFIG.replace("os.environ/UP_KEY", secret)))
    assert (e.kind, e.path, e.line) == ("bad-config", "config.yaml", 3)
    assert e.message.startswith("model_list[0].litellm_params.api_key looks like a secret")
    assert "os.environ/NAME" in (e.hint or "")
    assert secret not in e.one_line()
    ready, problems = check(settings, CONFIG.replace("os.environ/UP_KEY", "not-needed"))
    assert (ready is not None, problems) == (True, [])


def test_a_good_content(settings: Settings) -> None:
    ready, problems = check(settings)
    assert problems == []
    assert ready is not None
    assert ready.models == ("small", "vendor/*")
    assert "the-upstream-key" not in ready.to_json().decode()


ROUTER = "router_settings:\n"


@pytest.mark.parametrize(
    ("extra", "line", "message", "found", "expected"),
    [
        (
            f"{ROUTER}  routing_strategy: simple-shufle\n",
            8,
            "unknown routing strategy",
            "'simple-shufle'",
            "least-busy",
        ),
        (f"{ROUTER}  routing_strategy: [1]\n", 8, "unknown routing strategy", "[1]", "least-busy"),
        (
            f"{ROUTER}  routing_groups:\n    - {{group_name: g, models: [small], routing_strategy: best}}\n",
            9,
            "unknown routing strategy",
            "'best'",
            "priority",
        ),
        (f"{ROUTER}  routing_stategy: least-busy\n", 8, "no setting of the router", None, "routing_strategy"),
        (f"{ROUTER}  fallbacks:\n    - small: [big]\n", 9, "unknown model", "'big'", "small"),
        (f"{ROUTER}  fallbacks:\n    - big: [small]\n", 9, "unknown model", "'big'", "small"),
        (f"{ROUTER}  fallbacks: [small]\n", 8, "not a fallback", None, "one model"),
        (f"{ROUTER}  fallbacks:\n    - {{small: [small], big: [small]}}\n", 9, "not a fallback", None, "one model"),
        (f"{ROUTER}  fallbacks:\n    - small: [{{model: big}}]\n", 9, "unknown model", "'big'", "small"),
        (f"{ROUTER}  context_window_fallbacks:\n    - small:\n        - big\n", 10, "unknown model", "'big'", "small"),
        (f"{ROUTER}  content_policy_fallbacks:\n    - small: [big]\n", 9, "unknown model", "'big'", "small"),
        (f"{ROUTER}  default_fallbacks: [big]\n", 8, "unknown model", "'big'", "small"),
        ("litellm_settings:\n  default_fallbacks:\n    - big\n", 9, "unknown model", "'big'", "small"),
        ("litellm_settings:\n  fallbacks: [{small: [big]}]\n", 8, "unknown model", "'big'", "small"),
        (f"{ROUTER}  model_group_alias:\n    a: big\n", 9, "unknown model", "'big'", "small"),
        (f"{ROUTER}  model_group_alias: {{a: {{model: big, hidden: true}}}}\n", 8, "unknown model", "'big'", "small"),
        (f"{ROUTER}  model_group_alias: {{a: 5}}\n", 8, "unknown model", "5", "small"),
        (f"{ROUTER}  model_group_retry_policy: {{big: {{}}}}\n", 8, "unknown model", "'big'", "small"),
        (
            f"{ROUTER}  routing_groups:\n    - {{group_name: g, routing_strategy: least-busy,\n      models: [big]}}\n",
            10,
            "unknown model",
            "'big'",
            "small",
        ),
        ("litellm_settings:\n  api_version: 2024-02-01\n", 8, "YAML reads as date", None, "text"),
        ("litellm_settings:\n  x: .nan\n", 8, "not finite", None, "text"),
        ("litellm_settings:\n  on: 1\n", 8, "key that YAML reads as bool", None, "text"),
        ("litellm_settings:\n  5: 1\n", 8, "key that YAML reads as int", None, "text"),
    ],
)
def test_a_problem_of_the_router_has_its_line(
    settings: Settings, extra: str, line: int, message: str, found: str | None, expected: str
) -> None:
    problem = only(check(settings, CONFIG + extra))
    assert (problem.path, problem.line) == ("config.yaml", line)
    assert message in problem.message
    assert problem.found == found
    assert expected in str(problem.expected)


@pytest.mark.parametrize(
    "extra",
    [
        f"{ROUTER}  routing_strategy: latency-based-routing\n",
        f"{ROUTER}  fallbacks: [{{small: [vendor/x]}}, {{'*': [small]}}, {{vendor/x: [small]}}, {{x: [small]}}]\n"
        "  model_group_alias: {x: small}\n",
        f"{ROUTER}  model_group_alias: {{a: vendor/anything, b: {{model: small, hidden: true}}}}\n"
        "  default_fallbacks: [a]\n",
        f"{ROUTER}  routing_groups: [{{group_name: g, models: [small], routing_strategy: priority}}]\n"
        "  fallbacks: [{small: [g]}]\n",
        "litellm_settings: {context_window_fallbacks: [{small: [vendor/big]}]}\n",
    ],
)
def test_what_a_router_takes_is_no_problem(settings: Settings, extra: str) -> None:
    assert check(settings, CONFIG + extra)[1] == []


@pytest.mark.parametrize(
    ("keys_", "line"),
    [
        ("teams:\n  - {id: t, models: [big]}\nkeys: []\n", 2),
        ("teams:\n  - id: t\n    models:\n      - small\n      - big\nkeys: []\n", 5),
        (f"teams:\n  - {{id: t, models: ['*']}}\nkeys:\n  - {{id: k, team: t, sha256: {SHA}, models: [big]}}\n", 4),
        ("teams:\n  - {id: t, models: ['other/*']}\nkeys: []\n", 2),
    ],
)
def test_an_unknown_model_of_a_key_or_team(settings: Settings, keys_: str, line: int) -> None:
    problem = only(check(settings, keys_=keys_))
    assert (problem.kind, problem.path, problem.line) == ("bad-keys", "keys.yaml", line)
    assert "unknown model" in problem.message
    assert "small" in str(problem.expected)


@pytest.mark.parametrize(
    "models", ["['*']", "[vendor/x]", "['vendor/*']", "['ven*']", "['sm*']", "[cheap]", "[wild]", "[a]"]
)
def test_known_models_of_a_team(settings: Settings, models: str) -> None:
    config = CONFIG + "router_settings: {model_group_alias: {a: small}}\n"
    assert check(settings, config, f"teams:\n  - {{id: t, models: {models}}}\nkeys: []\n")[1] == []


def test_two_deployments_of_one_id(settings: Settings) -> None:
    problem = only(check(settings, CONFIG.replace("UP_KEY}", "UP_KEY}\n    model_info: {id: wild}")))
    assert (problem.line, "id of another deployment" in problem.message) == (7, True)


BILLION = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


@pytest.mark.parametrize(
    ("config", "kind", "line", "words"),
    [
        ("model_list: [\n", "bad-config", 2, "not valid YAML"),
        (CONFIG + "model_list: []\n", "bad-config", 7, "twice"),
        ("model_list: !!python/object:os.system x\n", "bad-config", 1, "YAML tag"),
        (BILLION, "bad-config", None, "expands"),
        (f"x: &x {'y' * 1_000_000}\nz: [{', '.join(['*x'] * 20)}]\n", "bad-config", 1, "too much text"),
        ("- a\n", "bad-config", 1, "not a mapping"),
        (CONFIG.replace("UP_KEY", "MISSING"), "unset-secret", 3, "MISSING"),
        (CONFIG.replace("os.environ/UP_KEY", "file:/etc/shadow"), "setting-refused", 3, "outside of the folder"),
        (CONFIG.replace("model:8081", "outside.example.net", 1), "endpoint-refused", 3, "outside.example.net"),
        ("model_list: []\n", "no-models", 1, "no model"),
    ],
)
def test_a_problem_of_the_file(settings: Settings, config: str, kind: str, line: int | None, words: str) -> None:
    ready, problems = check(settings, config, "teams: []\nkeys: []\n")
    assert ready is None
    assert (problems[0].kind, problems[0].path) == (kind, "config.yaml")
    assert words in problems[0].message
    assert line is None or problems[0].line == line


def test_every_problem_of_every_file_is_reported_in_order(settings: Settings) -> None:
    config = (
        CONFIG.replace("UP_KEY", "MISSING") + f"{ROUTER}  routing_strategy: best\n  fallbacks: [{{small: [big]}}]\n"
    )
    keys_ = "teams:\n  - {id: t, models: [big]}\nkeys: []\n"
    _, problems = check(settings, config, keys_, **{"routers/x.pkl": b""})
    assert [(p.path, p.line) for p in problems] == [
        ("config.yaml", 3),
        ("config.yaml", 8),
        ("config.yaml", 9),
        ("keys.yaml", 2),
        ("routers/index.yaml", None),
        ("routers/x.pkl", None),
    ]


def test_missing_files(settings: Settings) -> None:
    assert only(checks.check({"keys.yaml": KEYS.encode()}, settings, dry_run=None)).path == "config.yaml"
    _, problems = checks.check({"config.yaml": CONFIG.encode()}, settings, dry_run=None)
    assert [p.path for p in problems] == ["keys.yaml"]


def test_a_broken_keys_file(settings: Settings) -> None:
    problem = only(check(settings, keys_="teams: []\nkeys:\n  - {id: k}\n"))
    assert (problem.kind, problem.path, problem.line) == ("bad-keys", "keys.yaml", 3)


def test_a_problem_as_json(settings: Settings) -> None:
    problem = checks.problem(only(check(settings, CONFIG + f"{ROUTER}  routing_strategy: best\n")))
    assert set(problem) == {"file", "line", "message", "hint", "kind", "found", "expected"}
    assert (problem["file"], problem["line"], problem["kind"]) == ("config.yaml", 8, "bad-config")
    json.dumps(problem)


# --- the dry run ---


class Refusing:
    """A dry run that refuses; the real one is proven with the real LiteLLM."""

    def __init__(self, found: str) -> None:
        self.found = found
        self.seen: list[bytes] = []

    def run(self, prepared_json: bytes) -> None:
        self.seen.append(prepared_json)
        raise DryRunFailed("no", found=self.found, hint="do", path="config.yaml")


def test_what_the_dry_run_refuses_gets_the_deployments_line(settings: Settings) -> None:
    dry_run = Refusing("model_list[1] (vendor/*): ValueError: no")
    files = {"config.yaml": CONFIG.encode(), "keys.yaml": KEYS.encode()}
    ready, problems = checks.check(files, settings, dry_run=dry_run, number=9)
    assert (ready, [(p.kind, p.line) for p in problems]) == (None, [("dry-run-failed", 4)])
    assert json.loads(dry_run.seen[0])["revision"] == 9


def test_there_is_no_dry_run_of_what_is_refused_already(settings: Settings) -> None:
    dry_run = Refusing("")
    checks.check({"config.yaml": b"x: 1\n", "keys.yaml": KEYS.encode()}, settings, dry_run=dry_run)
    assert dry_run.seen == []


# --- prepared.json ---


def prepared(settings: Settings, config: str = CONFIG, keys_: str = KEYS) -> Prepared:
    ready, problems = check(settings, config, keys_)
    assert ready is not None, [p.one_line() for p in problems]
    return ready


def test_prepared_json_comes_back(settings: Settings) -> None:
    ready = prepared(settings)
    raw = ready.to_json()
    assert Prepared.from_json(raw) == ready
    assert Prepared.from_json(raw).to_json() == raw
    assert ready.references == {"UP_KEY": str(settings.secrets_dir / "up_key")}
    assert ready.effective["general_settings"]["custom_auth"] == "moat_gateway.litellm_port.custom_auth"
    assert ready.config_sha256 == hashlib.sha256(CONFIG.encode()).hexdigest()


def test_prepared_keys_are_those_of_the_file(settings: Settings) -> None:
    assert prepared(settings).key_set() == keys.parse(KEYS.encode(), "keys.yaml")


def test_deployments_have_ids_and_digests(settings: Settings) -> None:
    ready = prepared(settings)
    first, second = ready.deployments
    assert second.id == "wild"
    assert first.id == first.digest[:32]
    assert first.references == ("UP_KEY",)
    assert [e["model_info"]["id"] for e in ready.effective["model_list"]] == [first.id, "wild"]


def test_only_a_changed_deployment_has_another_digest(settings: Settings) -> None:
    before = prepared(settings).deployments
    after = prepared(settings, CONFIG.replace("openai/up,", "openai/up2,")).deployments
    assert before[0].digest != after[0].digest
    assert before[1] == after[1]
    # Neither the order nor the spelling of the file counts.
    lines = CONFIG.splitlines(keepends=True)
    swapped = "".join([lines[0], *lines[3:], *lines[1:3]]).replace("{model: openai/up, ", "{ model : 'openai/up', ")
    assert {d.digest for d in prepared(settings, swapped).deployments} == {d.digest for d in before}


def test_equal_deployments_have_different_ids(settings: Settings) -> None:
    entry = "".join(CONFIG.splitlines(keepends=True)[1:3])
    ids = [d.id for d in prepared(settings, CONFIG + entry * 2).deployments]
    assert len(set(ids)) == 4


def test_a_changed_credential_changes_its_deployments(settings: Settings) -> None:
    (settings.secrets_dir / "other").write_text("x")
    text = CONFIG.replace("api_key: os.environ/UP_KEY", "litellm_credential_name: c") + (
        "credential_list:\n  - {credential_name: c, credential_values: {api_key: os.environ/UP_KEY}}\n"
    )
    before, after = prepared(settings, text), prepared(settings, text.replace("UP_KEY", "OTHER"))
    assert before.deployments[0].digest != after.deployments[0].digest
    assert before.deployments[0].references == ("UP_KEY",)
    assert before.deployments[1] == after.deployments[1]
    assert before.sections["credential_list"] == ("UP_KEY",)


def test_a_secret_changes_nothing(settings: Settings) -> None:
    before = prepared(settings).to_json()
    (settings.secrets_dir / "up_key").write_text("another")
    assert prepared(settings).to_json() == before


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_spoiled_prepared_json_is_refused(settings: Settings, data: st.DataObject) -> None:
    value = json.loads(prepared(settings).to_json())
    name = data.draw(st.sampled_from(sorted(value)))
    spoiled = data.draw(st.sampled_from([None, 5, "x", [], [5], {"x": 5}, True, 1.5]))
    if spoiled == value[name] or (name, spoiled) in (("revision", 5), ("config_sha256", "x"), ("keys_sha256", "x")):
        return
    try:
        ready = Prepared.from_json(json.dumps({**value, name: spoiled}).encode())
        ready.key_set()
    except BadRevision:
        return
    # What is left are shapes that are right: lists of text, mappings.
    assert name in ("models", "effective", "sections", "references")


def test_no_prepared_json(settings: Settings) -> None:
    for raw in (b"", b"{}", b"[]", b"\xff", b"[" * 100_000, prepared(settings).to_json()[:-5]):
        with pytest.raises(BadRevision):
            Prepared.from_json(raw)


# --- hostile shapes ---

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 99999), st.text(max_size=8),
    st.sampled_from(["small", "openai/up", "http://model:8081/v1", "os.environ/UP_KEY", "file:/x", "*", "s3", "a.b"]),
)  # fmt: skip
words = st.sampled_from(
    [
        "model_list", "litellm_params", "model_name", "model", "model_info", "api_base", "id", "access_groups",
        "router_settings", "litellm_settings", "general_settings", "environment_variables", "fallbacks", "callbacks",
        "routing_groups", "models", "group_name", "routing_strategy", "model_group_alias", "default_fallbacks",
        "credential_list", "credential_name", "credential_values", "litellm_credential_name", "guardrails", "guardrail",
        "mcp_servers", "command", "cache_params", "type", "search_tools", "vector_store_registry", "success_callback",
        "model_group_retry_policy", "mcp_tools", "plugins", "master_key", "s3_callback_params", "host",
    ]
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=4)),
    max_leaves=20,
)


@hypothesis_settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(section=words, tree=trees)
def test_no_shape_raises_anything_else(settings: Settings, section: str, tree: Any) -> None:
    base = yaml.safe_load(CONFIG)
    entry = base["model_list"][0]
    within = {**entry, "litellm_params": {**entry["litellm_params"], section: tree}}
    for data in (
        {**base, section: tree},
        {**base, "model_list": [{**entry, section: tree}, within]},
        {**base, "router_settings": {section: tree}},
        {**base, "litellm_settings": {section: tree}, "general_settings": {section: tree}},
        {**base, "credential_list": [{"credential_values": {}, section: tree}]},
        {**base, "guardrails": [{"litellm_params": {section: tree}}], "search_tools": [{section: tree}]},
    ):
        ready, problems = check(settings, yaml.safe_dump(data))
        assert (ready is None) == bool(problems)
