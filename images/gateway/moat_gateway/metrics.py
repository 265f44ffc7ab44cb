# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - a table whose rows are sentences
"""What the gateway counts, and Prometheus' text format of it (``docs/reference/metrics.md``; a test compares)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric family; ``label`` is the name of its only label, or ``None``."""

    name: str
    type: str
    help: str
    label: str | None = None


METRICS: tuple[Metric, ...] = (
    Metric("moat_ready", "gauge", "1 while /_moat/ready says 200."),
    Metric("moat_in_flight", "gauge", "Requests that are being served, probes left out."),
    Metric("moat_active_streams", "gauge", "Streamed answers that have begun and not ended."),
    Metric("moat_requests_total", "counter", "Requests that ended, by class of their status.", "code"),
    Metric("moat_request_seconds_total", "counter", "Seconds that ended requests took, streams included.", None),
    Metric("moat_auth_refused_total", "counter", "Requests refused for their key.", "reason"),
    Metric("moat_egress_denied_total", "counter", "Connections and look-ups refused because they are not in the allow-list."),
    Metric("moat_config_revision", "gauge", "Revision of the configuration in force; 0 for local files."),
    Metric("moat_config_reload_total", "counter", "Changes of configuration or secrets that were applied, refused, or found to need a restart.", "result"),
    Metric("moat_config_sync_refused_total", "counter", "Revisions that this node's config-sync refused since it was started; 0 without config-sync."),
    Metric("moat_config_staleness_seconds", "gauge", "Seconds since the source of revisions last answered config-sync, or, if that is not known, since the machine started; 0 without `sync_dir`."),
    Metric("moat_config_loop_blocked_seconds", "gauge", "Longest time for which a change has held the event loop so far."),
    Metric("moat_secrets_degraded", "gauge", "Secret files whose value cannot be used or applied, so that an older one counts."),
    Metric("moat_keys", "gauge", "Client keys in force."),
    Metric("moat_keys_degraded", "gauge", "1 while the keys file is bad and an older one serves."),
    Metric("moat_start_seconds", "gauge", "Seconds from the start of the process to ready."),
)  # fmt: skip

CODE_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")
REFUSALS = ("missing", "unknown", "expired")
RELOADS = ("applied", "refused", "restart")


class Counters:
    """The numbers themselves; only the event loop's thread changes them."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.active_streams = 0
        self.seconds = 0.0
        self.requests = dict.fromkeys(CODE_CLASSES, 0)
        self.refused = dict.fromkeys(REFUSALS, 0)
        self.reloads = dict.fromkeys(RELOADS, 0)


Sample = float | Mapping[str, float]


def render(sources: Mapping[str, Callable[[], Sample]]) -> str:
    """Return the exposition text.

    Args:
        sources: for each name in :data:`METRICS`, what gives its value, or its values by label.
    """
    lines = []
    for m in METRICS:
        value = sources[m.name]()
        lines += [f"# HELP {m.name} {m.help}", f"# TYPE {m.name} {m.type}"]
        if isinstance(value, Mapping):
            lines += [f'{m.name}{{{m.label}="{label}"}} {v:g}' for label, v in value.items()]
        else:
            lines.append(f"{m.name} {value:g}" if value < 1e6 else f"{m.name} {value:.0f}")
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """Return the reference page."""
    lines = [
        "# Metrics of the gateway",
        "",
        "`GET /metrics` on the admin socket, Prometheus text format. Each gateway process has its own. A test compares this page with the",
        "code. (LiteLLM's own metrics appear on its `/metrics` path only if the configuration names the callback `prometheus`.)",
        "",
        "| metric | type | label | meaning |",
        "|---|---|---|---|",
        *(f"| `{m.name}` | {m.type} | {f'`{m.label}`' if m.label else ''} | {m.help} |" for m in METRICS),
        "",
        f"Values of `code`: {', '.join(CODE_CLASSES)}. Values of `reason`: {', '.join(REFUSALS)}. Values of "
        f"`result`: {', '.join(RELOADS)}.",
    ]
    return "\n".join(lines) + "\n"
