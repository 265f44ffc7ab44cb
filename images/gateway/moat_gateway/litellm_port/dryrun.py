# SPDX-License-Identifier: Apache-2.0
"""Building LiteLLM's router to see whether it can be built; only a process that ends afterwards may do this.

A running gateway builds it with ``ignore_invalid_deployments``: what cannot be used is dropped with a warning. Here it
is an error, so that a deployment that would silently be missing is named before anything is changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from moat_gateway.configrules import REFERENCE
from moat_gateway.litellm_port.words import ROUTER_SETTINGS

#: Of ``litellm_settings``, what the router looks at while it is built.
_READ_BY_THE_ROUTER = (
    "allowed_fails", "content_policy_fallbacks", "context_window_fallbacks", "default_fallbacks", "fallbacks",
    "max_fallbacks", "num_retries", "request_timeout",
)  # fmt: skip


class BadDeployment(Exception):
    """LiteLLM refuses one deployment.

    Args:
        index: in ``model_list``.
        name: its ``model_name``.
    """

    def __init__(self, index: int, name: str) -> None:
        super().__init__(f"model_list[{index}] ({name})")


def import_router() -> None:
    """Import what :func:`build_router` needs; it takes seconds."""
    import litellm

    _ = litellm.Router  # imported when it is first named


def build_router(effective: Mapping[str, Any]) -> None:
    """Build the router of a configuration, in a process whose environment holds the secrets.

    Raises:
        BadDeployment: caused by what LiteLLM raises about one deployment.
        ValueError: it left a deployment out.
        Exception: whatever else LiteLLM raises.
    """
    import litellm
    from litellm.types.router import RouterGeneralSettings

    plain = _resolved(effective)
    for name in _READ_BY_THE_ROUTER:
        if (plain.get("litellm_settings") or {}).get(name) is not None:
            setattr(litellm, name, plain["litellm_settings"][name])
    settings = {k: v for k, v in (plain.get("router_settings") or {}).items() if k in ROUTER_SETTINGS}
    plugins = settings.pop("plugins", None)
    if plugins:
        settings["plugins"] = [_named(name) for name in plugins]
    entries = plain["model_list"]

    def build(model_list: list[Any], **more: Any) -> Any:
        return litellm.Router(
            model_list=model_list,
            router_general_settings=RouterGeneralSettings(async_only_mode=True),
            ignore_invalid_deployments=False,
            **more,
        )

    try:
        router = build(entries, search_tools=plain.get("search_tools"), **settings)
    except MemoryError:
        raise
    except Exception:
        # LiteLLM does not say which deployment it is; alone, it fails too.
        for i, entry in enumerate(entries):
            try:
                build([entry])
            except Exception as e:
                raise BadDeployment(i, entry["model_name"]) from e
        raise
    held = {d["model_info"]["id"] for d in router.model_list}
    missing = [e["model_name"] for e in entries if str(e["model_info"]["id"]) not in held]
    if missing:
        raise ValueError(f"the router leaves out {len(missing)} of {len(entries)} deployments, first {missing[0]}")


def _resolved(value: Any) -> Any:
    """Return a copy with the values of the references, as LiteLLM's proxy makes one when it loads its file."""
    if isinstance(value, Mapping):
        return {k: _resolved(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v) for v in value]
    if isinstance(value, str) and value.startswith(REFERENCE):
        return os.environ.get(value.removeprefix(REFERENCE))
    return value


def _named(name: str) -> Any:
    import importlib

    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
