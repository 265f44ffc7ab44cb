# SPDX-License-Identifier: Apache-2.0
"""Loading a configuration as LiteLLM's proxy does at its start, to see whether it can; the process must end then.

A gateway that starts drops a deployment that cannot be used, with a warning. Here that is an error, so that what would
silently be missing is named before anything is changed.
"""

from __future__ import annotations

import asyncio
import copy
import os
import secrets
from collections.abc import Mapping
from typing import Any

from moat_gateway.configrules import MASTER_KEY_NAME, REFERENCE
from moat_gateway.litellm_port.start import names_otel, uncollected

#: LiteLLM looks for Python modules beside its file; here is nothing.
_NO_FILE = "/nonexistent/config.yaml"


class BadDeployment(Exception):
    """LiteLLM refuses one deployment.

    Args:
        index: in ``model_list``.
        name: its ``model_name``.
    """

    def __init__(self, index: int, name: str) -> None:
        super().__init__(f"model_list[{index}] ({name})")


def import_proxy() -> None:
    """Import what :func:`load` needs; it takes seconds."""
    with uncollected():
        from litellm.proxy import proxy_server

    _ = proxy_server.ProxyConfig


def load(effective: Mapping[str, Any]) -> None:
    """Load a configuration and build its router, in a process whose environment holds the secrets.

    Raises:
        BadDeployment: caused by what LiteLLM raises about one deployment.
        ValueError: the router leaves a deployment out.
        Exception: whatever else LiteLLM raises.
    """
    from litellm.proxy import proxy_server

    # The administrator's key is no part of a revision, and need not be on this side.
    os.environ[MASTER_KEY_NAME] = "sk-" + secrets.token_hex(32)
    if names_otel(effective):
        os.environ["LITELLM_OTEL_V2"] = "True"
    given = copy.deepcopy(dict(effective))

    class Held(proxy_server.ProxyConfig):  # type: ignore[misc]
        async def _get_config_from_file(self, config_file_path: str | None = None) -> dict[str, Any]:
            return given

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    # The loop is left as it is: what was begun on it (connections, exporters) ends with the process.
    router, *_ = loop.run_until_complete(Held().load_config(router=None, config_file_path=_NO_FILE))
    held = {str(d["model_info"]["id"]) for d in router.model_list} if router is not None else set()
    entries = effective["model_list"]
    missing = [i for i, e in enumerate(entries) if str(e["model_info"]["id"]) not in held]
    for i in missing:
        _build_alone(i, entries[i])
    if missing:
        first = entries[missing[0]]["model_name"]
        raise ValueError(f"the router leaves out {len(missing)} of {len(entries)} deployments, first {first}")


def _build_alone(index: int, entry: Mapping[str, Any]) -> None:
    """Find out why a deployment is left out: LiteLLM says so only in its log."""
    import litellm

    try:
        litellm.Router(model_list=[_resolved(entry)], ignore_invalid_deployments=False)
    except MemoryError:
        raise
    except Exception as e:
        raise BadDeployment(index, entry["model_name"]) from e


def _resolved(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _resolved(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v) for v in value]
    if isinstance(value, str) and value.startswith(REFERENCE):
        return os.environ.get(value.removeprefix(REFERENCE))
    return value
