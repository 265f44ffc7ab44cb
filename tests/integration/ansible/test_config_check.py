# SPDX-License-Identifier: Apache-2.0
"""Proves what a node's own program says to a configuration before it is placed: also what only LiteLLM itself refuses.

The module's functions, the real ``moat-gateway`` with the locked wheels, real files; no Ansible around them.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.environment import gateway_python
from tests.integration.gateway.harness import PACKAGE
from tests.unit.ansible.modules import module

config = module("moat_config")

SOURCE = "/etc/moat/site/config"
MODELS = """\
model_list:
  - model_name: m
    litellm_params: {model: openai/m, api_base: "http://127.0.0.1:8081/v1", api_key: not-needed}
router_settings: {%s}
"""
#: The words that the refusal has, by the router's settings; no words where there is nothing to refuse.
TRIALS = {
    "routing_strategy: least-busy": "",
    "routing_strategy: fastest-first": f"{SOURCE}/config.yaml line 4: router_settings.routing_strategy is an unknown",
    "routing_strategy: latency-based-routing, routing_strategy_args: {ttl: soon}": f"{SOURCE}/config.yaml: LiteLLM",
}


@pytest.fixture
def node(tmp_path: Path) -> dict[str, Any]:
    """The module's parameters on a node whose files are all in one folder."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "master_key").write_text(secrets.token_hex(32))
    (tmp_path / "secrets" / "master_key").chmod(0o400)
    (tmp_path / "common.env").write_text("MOAT_EGRESS_ALLOW='127.0.0.1:8081'\n")
    program = tmp_path / "moat-gateway"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={PACKAGE} exec {gateway_python()} -m moat_gateway "$@"\n')
    program.chmod(0o755)
    return {
        "program": str(program), "path": str(tmp_path / "live"), "source": SOURCE,
        "environment": str(tmp_path / "common.env"), "secrets": str(tmp_path / "secrets"),
        "dry_run_timeout": 60.0, "dry_run_memory": 512,
    }  # fmt: skip


@pytest.mark.parametrize("settings", TRIALS)
def test_what_has_changed_is_built_before_it_is_placed(node: dict[str, Any], settings: str) -> None:
    keys = 'teams:\n  - {id: a, models: ["*"]}\nkeys: []\n'
    p = {**node, "files": {"config.yaml": MODELS % settings, "keys.yaml": keys, "gateway.yaml": ""}}
    folder = config.staged(p)
    # The gateway's own start does not know these, so that an unchanged site is not kept waiting.
    assert config.check(p, folder, changed=False) == []
    problems = [config.say(x, p, folder) for x in config.check(p, folder, changed=True)]
    assert len(problems) == bool(TRIALS[settings])
    assert all(x.startswith(TRIALS[settings]) for x in problems), problems
