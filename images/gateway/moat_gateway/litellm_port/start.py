# SPDX-License-Identifier: Apache-2.0
"""LiteLLM's environment, its import, its verification, the hook that it calls, and what is read out of it."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moat_gateway.configrules import MASTER_KEY_NAME
from moat_gateway.context import current
from moat_gateway.errors import LiteLLMRefused, NoModels
from moat_gateway.keys import Identity
from moat_gateway.litellm_port.live import Wanted

if TYPE_CHECKING:
    from moat_gateway.stages import ASGIApp

PIN = "1.106.2"

#: Set before LiteLLM is imported; each closes a way out that 1.106.2 has by default.
OFFLINE: Mapping[str, str] = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
    "LITELLM_LOCAL_AUTOROUTER_PRESETS": "True",
    "LITELLM_TELEMETRY": "False",
    "LITELLM_LOG": "WARNING",
    # Rust routes open their own sockets, past the egress check (egress.py).
    "LITELLM_RUST": "False",
    # Anything but DEV: importing LiteLLM in DEV reads a .env file from the working folder upwards.
    "LITELLM_MODE": "PRODUCTION",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "NO_COLOR": "1",
    # The API pages pull scripts from public servers into the reader's browser.
    "NO_REDOC": "True",
    "NO_DOCS": "True",
    "DISABLE_ADMIN_UI": "True",
}

#: Inherited variables that would steer LiteLLM past the configuration that was checked.
_STEERING = re.compile(
    r"LITELLM_.*|(?:https?|all|no)_proxy|WORKER_CONFIG|CONFIG_FILE_PATH|DATABASE_URL|DIRECT_URL|PROMETHEUS_MULTIPROC_DIR"
    r"|CUSTOM_TIKTOKEN_CACHE_DIR|GRACEFUL_SHUTDOWN_TIMEOUT|USE_AWS_KMS|JSON_LOGS|NUM_WORKERS",
    re.IGNORECASE,
)


def steering_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names that :func:`prepare_environment` will remove."""
    return tuple(sorted(k for k in environ if _STEERING.fullmatch(k)))


def prepare_environment(
    environ: MutableMapping[str, str], wanted: Wanted, master_key: str, shutdown_timeout: float, file: Path
) -> None:
    """Set what LiteLLM reads from the environment. Secrets are set in this process only, at run time.

    ``/proc/PID/environ`` shows the environment a process was started with, so what is set here is not in it.

    Args:
        environ: of this process.
        wanted: what LiteLLM shall serve.
        master_key: the administrator's key.
        shutdown_timeout: seconds that requests get at the end.
        file: from which LiteLLM reads its configuration.
    """
    for name in steering_variables(environ):
        del environ[name]
    environ.update(OFFLINE)
    environ.update(wanted.secrets)
    environ[MASTER_KEY_NAME] = master_key
    if names_otel(wanted.effective):
        # Version 1 of that callback exports prompts by default. Without the callback the switch must be off: it
        # would set a tracer up that exports nowhere and warns at each request.
        environ["LITELLM_OTEL_V2"] = "True"
    environ["GRACEFUL_SHUTDOWN_TIMEOUT"] = str(max(1, int(shutdown_timeout)))
    environ["CONFIG_FILE_PATH"] = str(file)


def names_otel(effective: Mapping[str, Any]) -> bool:
    """Say whether a configuration names the OpenTelemetry callback."""
    settings = effective.get("litellm_settings") or {}
    named = [settings.get(s) or [] for s in ("callbacks", "success_callback", "failure_callback", "service_callback")]
    return any(
        n in ("otel", "opentelemetry") for names in named for n in (names if isinstance(names, list) else [names])
    )


def version() -> str:
    """Return LiteLLM's version without importing it; empty if it is not installed."""
    try:
        return importlib.metadata.version("litellm")
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without looking for garbage meanwhile: that takes a third of the time and finds next to nothing.

    Whoever imports collects once afterwards.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def import_app() -> ASGIApp:
    """Import LiteLLM and return its ASGI application.

    Raises:
        LiteLLMRefused: it is not installed, or cannot be imported.
    """
    try:
        with uncollected():
            from litellm.proxy.proxy_server import app
    except ImportError as e:
        raise LiteLLMRefused(
            "LiteLLM cannot be imported",
            found=str(e),
            expected=f"litellm {PIN} and its locked wheels",
            hint="install the bundle's wheels into the environment that runs moat-gateway",
        ) from e
    application: ASGIApp = app
    return application


async def custom_auth(request: Any, api_key: str) -> Any:
    """Tell LiteLLM who asks; it calls this for every request (``general_settings.custom_auth``).

    The identity stage has decided already: what it found is in the request's context, and the presented key is not
    looked at again. LiteLLM is given the hash of the secret, never the secret.

    Raises:
        litellm.proxy._types.ProxyException: 401: LiteLLM asks about a request that passed no identity stage.
    """
    from litellm.proxy._types import ProxyException

    context = current.get()
    who = context.identity if context is not None else None
    if who is None:
        raise ProxyException(message="No API key was given.", type="auth_error", param=None, code=401)
    return _auth_object(who)


def _auth_object(who: Identity) -> Any:
    from litellm.proxy._types import LitellmUserRoles, UserAPIKeyAuth

    if who.admin:
        return UserAPIKeyAuth(
            api_key=who.sha256, key_alias=who.key, user_id="moat-admin", user_role=LitellmUserRoles.PROXY_ADMIN
        )
    team = who.record
    assert team is not None  # noqa: S101 - only the administrator has no record
    return UserAPIKeyAuth(
        api_key=who.sha256,
        key_alias=who.key,
        models=_in_litellms_words(who.models),
        team_id=team.id,
        team_alias=team.id,
        team_models=_in_litellms_words(team.models),
        team_rpm_limit=team.rpm,
        team_tpm_limit=team.tpm,
        expires=who.not_after.isoformat() if who.not_after is not None else None,
        user_role=LitellmUserRoles.INTERNAL_USER,
    )


def _in_litellms_words(models: tuple[str, ...]) -> list[str]:
    """Return a models list for LiteLLM, which lets "*" use every model but lists none of them under `/v1/models`."""
    return ["all-proxy-models"] if models == ("*",) else list(models)


def models() -> tuple[str, ...]:
    """Return the model names that the router serves now, sorted."""
    from litellm.proxy import proxy_server

    router = proxy_server.llm_router
    return tuple(sorted(router.model_names)) if router is not None else ()


def deployments() -> int:
    """Return how many deployments the router holds now."""
    from litellm.proxy import proxy_server

    router = proxy_server.llm_router
    return len(router.model_list) if router is not None else 0


def verify() -> None:
    """Check, after LiteLLM has loaded the configuration, that it really is as Moat relies on.

    Raises:
        LiteLLMRefused: a hook or a switch is not in force: the pin has moved, or something undid it.
        NoModels: LiteLLM dropped every deployment.
    """
    import litellm
    from litellm.proxy import proxy_server
    from litellm.proxy.auth import user_api_key_auth

    hook = getattr(proxy_server, "user_custom_auth", None)
    settings = getattr(proxy_server, "general_settings", None) or {}
    facts = {
        "general_settings.custom_auth is Moat's hook": hook is custom_auth,
        "general_settings.custom_auth_run_common_checks": settings.get("custom_auth_run_common_checks") is True,
        "litellm.enable_post_custom_auth_checks": getattr(litellm, "enable_post_custom_auth_checks", None) is True,
        "litellm.disable_hf_tokenizer_download": getattr(litellm, "disable_hf_tokenizer_download", None) is True,
        "no database client": getattr(proxy_server, "prisma_client", None) is None,
        "the master key is the one of the file": getattr(proxy_server, "master_key", None)
        == os.environ.get(MASTER_KEY_NAME),
        # With it, LiteLLM would ask its own hook before ours.
        "no litellm-enterprise": getattr(user_api_key_auth, "enterprise_custom_auth", None) is None
        and not _installed("litellm-enterprise"),
    }
    wrong = [name for name, ok in facts.items() if not ok]
    if wrong:
        raise LiteLLMRefused(
            f"LiteLLM {version()} does not hold what Moat relies on: {', '.join(wrong)}",
            expected=f"LiteLLM {PIN}, unmodified",
            hint="install the bundle's wheels; with another version, see the contract tests",
        )
    if not models():
        raise NoModels(
            "LiteLLM found no valid deployment in the configuration",
            hint="see the library.log events above; correct model_list",
        )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
