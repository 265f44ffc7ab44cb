# SPDX-License-Identifier: Apache-2.0
"""Proves that what looks like a real secret is found in a configuration, and that placeholders and names are not."""

from __future__ import annotations

import base64
import random
import uuid
from pathlib import Path

import pytest
import yaml

from moat_gateway import keys, literals

ROOT = Path(__file__).resolve().parents[3]
_DICE = random.Random(11)


def _bytes(n: int) -> bytes:
    return _DICE.randbytes(n)


@pytest.mark.parametrize(
    "value",
    [
        "sk-proj-REALkey0123456789abcdefghij",
        "sk-moat-admin-" + base64.urlsafe_b64encode(_bytes(32)).decode().rstrip("="),
        pytest.param(keys.new_secret(), id="one of ours"),
        "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ",
        "Bearer sk-proj-REALkey0123456789abcdefghij",
        "0123456789abcdef" * 2,
        "3f7b9c0e5d2a4186b0c9d8e7f6a51423",
        "wJalrXUtnFEMI7K7MDENGbPxRfiCY4EX9MPLE3KEY",
    ],
)
def test_real_ones_are_found(value: str) -> None:
    assert literals.looks_secret("api_key", value)
    assert not literals.looks_secret("model", value)  # a model may have any name


def test_random_values_are_found_nearly_always() -> None:
    values = [_bytes(16).hex() for _ in range(200)] + [base64.b64encode(_bytes(24)).decode() for _ in range(200)]
    values += [str(uuid.UUID(bytes=_bytes(16))) for _ in range(200)]
    assert sum(literals.looks_secret("api_key", v) for v in values) > 0.95 * len(values)


@pytest.mark.parametrize(
    "value",
    [
        "not-needed", "x", "none", "EMPTY", "dummy", "sk-1234", "sk-no-key-required", "sk-this-is-no-real-key-at-all",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "sk-" + "*" * 30, "sk-local-vllm-server-1-no-key-2027", "0" * 40, "",
        "<your-api-key-from-the-portal-2027>", "${API_KEY_OF_MODEL_1}", "os.environ/UP_KEY_0A1B2C3D4E5F6A7B8C9D",
        "file:/run/secrets/0a1b2c3d4e5f6a7b8c9d0e1f", "dummy-key-for-local-vllm-server-1",
        "no-key-is-needed-for-llama-3.1-8b-instruct", "local-model-key-2027-v2-abc", "MyLocalPlaceholderForVllm2027",
    ],
)  # fmt: skip
def test_placeholders_are_not(value: str) -> None:
    assert not literals.looks_secret("api_key", value)


@pytest.mark.parametrize(
    "name",
    [
        "api_key", "OPENAI_API_KEY", "x-api-key", "Authorization", "aws_secret_access_key", "client_secret", "hf_token",
        "redis_password", "vertex_credentials", "langfuse_secret_key", "apikey", "api_keys",
    ],
)  # fmt: skip
def test_names_of_parameters(name: str) -> None:
    assert literals.looks_secret(name, "sk-proj-REALkey0123456789abcdefghij")


@pytest.mark.parametrize("name", ["max_tokens_id", "langfuse_public_key", "model_name", "monkey", "aws_access_key_id"])
def test_other_names(name: str) -> None:
    assert not literals.looks_secret(name, "sk-proj-REALkey0123456789abcdefghij")


def test_wherever_it_stands() -> None:
    secret = "3f7b9c0e5d2a4186b0c9d8e7f6a51423"
    data = {
        "model_list": [{"litellm_params": {"api_key": secret, "extra_headers": {"X-Api-Key": secret}}}],
        "router_settings": {"redis_url": f"redis://:{secret}@valkey:6379", "api_keys": ["not-needed", secret]},
        "vertex": "-----BEGIN PRIVATE KEY-----\nMIIE",
    }
    assert [at for at, _ in literals.find(data)] == [
        ("model_list", 0, "litellm_params", "api_key"),
        ("model_list", 0, "litellm_params", "extra_headers", "X-Api-Key"),
        ("router_settings", "redis_url"),
        ("router_settings", "api_keys", 1),
        ("vertex",),
    ]


def test_our_own_configurations_pass() -> None:
    files = [
        ROOT / "compose/config/demo.yaml",
        ROOT / "molecule/shared/site/config/config.yaml",
        ROOT / "images/gateway/moat_gateway/starter/config.yaml",
    ]
    assert [f for f in files if list(literals.find(yaml.safe_load(f.read_text("utf-8"))))] == []
