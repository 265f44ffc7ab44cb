# SPDX-License-Identifier: Apache-2.0
"""What LiteLLM's ``config.yaml`` may and may not say, as tables; :mod:`moat_gateway.config` applies them.

They are of the pinned LiteLLM: what it reads, and what of it would call a public cloud, a database, or foreign code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

REFERENCE = "os.environ/"
#: A secret by its file; LiteLLM is given REFERENCE and a made-up name of this prefix for it.
FILE_REFERENCE, FILE_NAME_PREFIX = "file:/", "MOAT_FILE_"
MASTER_KEY_NAME = "LITELLM_MASTER_KEY"

#: Keys whose value is a destination even without a scheme.
DESTINATION_KEY = re.compile(
    r"(?:^|_)(?:host|hostname|endpoint|server|url|uri|api_base|base_url|domain|address)$", re.IGNORECASE
)
#: Keys of a deployment, any of which says where its requests go.
BASES = ("api_base", "base_url", "aws_bedrock_runtime_endpoint", "sagemaker_base_url")
#: Callbacks that talk to nobody by themselves, or whose destination stands in the configuration and is checked there.
LOCAL_CALLBACKS = frozenset(
    {
        "prometheus", "otel", "opentelemetry", "dynamic_rate_limiter", "dynamic_rate_limiter_v3",
        "detect_prompt_injection", "s3", "s3_v2", "sqs", "batch_redis_requests", "max_budget_limiter",
    }
)  # fmt: skip
#: Callbacks that call a vendor's cloud unless this parameter of litellm_settings names another place.
CALLBACK_NEEDS = {
    "s3": ("s3_callback_params", "s3_endpoint_url"),
    "s3_v2": ("s3_callback_params", "s3_endpoint_url"),
    "sqs": ("aws_sqs_callback_params", "sqs_queue_url"),
}
CALLBACK_LISTS = ("callbacks", "success_callback", "failure_callback", "service_callback", "audit_log_callbacks")
#: Guardrails that run inside the process.
LOCAL_GUARDRAILS = frozenset({"litellm_content_filter", "tool_permission", "prompt_injection", "custom_guardrail"})
#: Where the configuration may name Python code: it must be of this package, the one that was reviewed.
OWN_CODE = "moat_gateway."
CODE = (
    ("general_settings", "custom_key_generate"),
    ("general_settings", "custom_key_update"),
    ("general_settings", "custom_key_policy"),
    ("general_settings", "custom_team_metadata_validate"),
    ("general_settings", "custom_ui_sso_sign_in_handler"),
    ("litellm_settings", "post_call_rules"),
    ("litellm_settings", "custom_provider_map"),
    ("router_settings", "plugins"),
    ("mcp_tools",),
)
CACHE_TYPES = frozenset({"local", "redis", "redis-semantic", "qdrant-semantic", "disk", "s3"})

_MODELS = "without it a key's models are not enforced"
#: Settings that would take away what Moat enforces: where, which values are refused, why.
REFUSED: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("include",), bool, "the configuration is one file, so that what is checked is what runs"),
    (("sandbox_tools",), bool, "programs that LiteLLM starts are outside of the egress check"),
    (("default_vertex_config",), bool, "it calls a public cloud"),
    (("general_settings", "custom_auth"), bool, "keys come from keys.yaml"),
    (("general_settings", "custom_auth_settings"), bool, "keys come from keys.yaml"),
    (("general_settings", "custom_auth_run_common_checks"), lambda v: v is not True, _MODELS),
    (("general_settings", "custom_sso"), bool, "there is no login without a database"),
    (("general_settings", "enable_jwt_auth"), bool, "keys come from keys.yaml"),
    (("general_settings", "enable_oauth2_auth"), bool, "keys come from keys.yaml"),
    (("general_settings", "enable_oauth2_proxy_auth"), bool, "keys come from keys.yaml"),
    (("general_settings", "litellm_key_header_name"), bool, "keys are taken from the documented headers"),
    (("general_settings", "dangerously_permit_weak_or_unset_master_key"), bool, "the master key is checked by Moat"),
    (("general_settings", "key_management_system"), bool, "secrets come from files"),
    (("general_settings", "use_google_kms"), bool, "secrets come from files"),
    (("general_settings", "use_azure_key_vault"), bool, "secrets come from files"),
    (("general_settings", "alerting"), bool, "alerts would go to a chat service outside"),
    (("litellm_settings", "enable_post_custom_auth_checks"), lambda v: v is not True, _MODELS),
    (("litellm_settings", "disable_hf_tokenizer_download"), lambda v: v is not True, "tokenizers would be fetched"),
    (("litellm_settings", "aiohttp_trust_env"), bool, "a proxy of the environment would carry requests outside"),
)  # fmt: skip
DATABASE = (
    ("general_settings", "database_url"),
    ("general_settings", "database_type"),
    ("general_settings", "store_model_in_db"),
    ("environment_variables", "DATABASE_URL"),
    ("environment_variables", "DIRECT_URL"),
)
#: Sections whose entries carry out requests through ``litellm_params`` and so need to say where.
NEEDS_BASE = ("search_tools", "vector_store_registry", "files_settings", "finetune_settings", "assistant_settings")
#: Names that a reference or ``environment_variables`` must not set: they steer this process, not LiteLLM's providers.
RESERVED_NAMES = re.compile(
    r"PATH|HOME|(?:LD|PYTHON|MOAT|HF|UVICORN|SSL)_.*|PYTHON.*|LITELLM_(?:LOCAL_.*|MASTER_KEY|SALT_KEY|RUST|CONFIG_.*|WORKER_.*"
    r"|DANGEROUSLY_.*|MODE|DEV_.*)|(?:HTTPS?|ALL|NO)_PROXY|WORKER_CONFIG|CONFIG_FILE_PATH|GRACEFUL_SHUTDOWN_TIMEOUT",
    re.IGNORECASE,
)
