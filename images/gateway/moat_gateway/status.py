# SPDX-License-Identifier: Apache-2.0
"""The state of the running gateway, and the fixed fields of ``GET /status``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from moat_gateway import __version__, litellm_port, metrics
from moat_gateway.egress import EgressGuard
from moat_gateway.keystore import KeyStore
from moat_gateway.live import Situation
from moat_gateway.metrics import Counters
from moat_gateway.settings import Settings
from moat_gateway.sync.files import boot_id, boottime
from moat_gateway.sync.reports import GatewayRefused, Report

# ruff: noqa: E501 - a table whose rows are sentences
#: The fields of ``GET /status`` and what each means (docs/gateway.md; a test compares).
STATUS_FIELDS: dict[str, str] = {
    "name": "the setting `instance`",
    "pid": "process id",
    "version": "of Moat's layer",
    "litellm": "version of LiteLLM",
    "started_at": "UTC",
    "ready": "whether `/_moat/ready` says 200",
    "not_ready": "why not; empty when ready",
    "draining": "whether it is ending: SIGTERM, or its turn to restart",
    "models": "names that clients use",
    "config": "`sha256` of the configuration file in force, `revision` (0 for local files), `applied_at`, `last_refused` (`revision`, `kind`, `reason`; by this gateway, else by config-sync), `needs_restart` (names), `staleness_seconds` and `source` of revisions (`kind`, `where`, `reachable`, `why`)",
    "keys": "`count`, `teams`, `sha256` of the keys file in force",
    "in_flight": "requests that are being served",
    "active_streams": "streamed answers that have begun and not ended",
    "egress": "`allow`, the list in force, and `denied`, the refusals so far",
    "degraded": "what works, but not as it should, each as a sentence",
}


@dataclass
class State:
    """What the stages, the admin socket and the process share.

    Attributes:
        settings: in force.
        situation: what serves, and what stands in the way of what should.
        keys: the key store.
        egress: the guard.
        counters: of the meter and identity stages.
        started_at: of the process.
        loaded: LiteLLM has loaded the configuration and was verified.
        draining: the end has begun.
        start_seconds: from the start of the process to ready.
        dropped: deployments that LiteLLM left out.
    """

    settings: Settings
    situation: Situation
    keys: KeyStore
    egress: EgressGuard
    counters: Counters = field(default_factory=Counters)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    loaded: bool = False
    draining: bool = False
    start_seconds: float = 0.0
    dropped: int = 0

    def not_ready(self) -> tuple[str, ...]:
        """Return why the gateway is not ready; empty when it is."""
        reasons = []
        if not self.loaded:
            reasons.append("the configuration is not loaded")
        if self.draining:
            reasons.append("the gateway is shutting down")
        return tuple(reasons)

    def degraded(self) -> list[str]:
        """Return what works, but not as it should."""
        out = []
        if self.keys.problem is not None:
            out.append(f"keys: an older file serves: {self.keys.problem.one_line()}")
        if self.dropped:
            out.append(f"models: LiteLLM left out {self.dropped} of the deployments")
        return out + self.situation.degraded(self.settings)

    @property
    def started(self) -> str:
        """When the process was started; no two starts have the same."""
        return self.started_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def report(self) -> Report:
        """Return what config-sync is told."""
        s, refused = self.situation, self.situation.last_refused
        return Report(
            name=self.settings.instance,
            pid=os.getpid(),
            boot_id=boot_id(),
            beat_boottime=boottime(),
            revision=s.served.revision,
            sha256=s.served.sha256,
            applied_at=s.applied_at,
            ready=not self.not_ready(),
            draining=self.draining,
            started_at=self.started,
            degraded=tuple(self.degraded()),
            last_refused=GatewayRefused(refused.revision, refused.reason)
            if refused is not None and refused.revision is not None
            else None,
            needs_restart=s.needs_restart,
        )

    def config(self) -> dict[str, Any]:
        """Return the field ``config`` of the status."""
        s = self.situation
        source = s.sync.source if s.sync is not None else None
        refused = s.refused()
        return {
            "sha256": s.served.config_sha256,
            "revision": s.served.revision,
            "applied_at": s.applied_at,
            "last_refused": dict(vars(refused)) if refused is not None else None,
            "needs_restart": list(s.needs_restart),
            "staleness_seconds": round(s.staleness(), 1),
            "source": dict(vars(source)) if source is not None else None,
        }

    def status(self) -> dict[str, Any]:
        """Return the body of ``GET /status``."""
        return {
            "name": self.settings.instance,
            "pid": os.getpid(),
            "version": __version__,
            "litellm": litellm_port.version(),
            "started_at": self.started_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "ready": not self.not_ready(),
            "not_ready": list(self.not_ready()),
            "draining": self.draining,
            "models": list(litellm_port.models()) if self.loaded else [],
            "config": self.config(),
            "keys": {
                "count": len(self.keys.current.keys),
                "teams": len(self.keys.current.teams),
                "sha256": self.keys.current.sha256,
            },
            "in_flight": self.counters.in_flight,
            "active_streams": self.counters.active_streams,
            "egress": {"allow": list(self.settings.egress_allow), "denied": self.egress.denied_total},
            "degraded": self.degraded(),
        }

    def metrics(self) -> str:
        """Return the body of ``GET /metrics``."""
        c = self.counters
        return metrics.render(
            {
                "moat_ready": lambda: float(not self.not_ready()),
                "moat_in_flight": lambda: c.in_flight,
                "moat_active_streams": lambda: c.active_streams,
                "moat_requests_total": lambda: c.requests,
                "moat_request_seconds_total": lambda: c.seconds,
                "moat_auth_refused_total": lambda: c.refused,
                "moat_egress_denied_total": lambda: self.egress.denied_total,
                "moat_config_revision": lambda: self.situation.served.revision,
                "moat_config_reload_total": lambda: c.reloads,
                "moat_config_sync_refused_total": lambda: s.refused_total if (s := self.situation.sync) else 0,
                "moat_config_staleness_seconds": lambda: round(self.situation.staleness(), 1),
                "moat_config_loop_blocked_seconds": lambda: self.situation.loop_blocked,
                "moat_secrets_degraded": lambda: len(self.situation.secret_problems),
                "moat_keys": lambda: len(self.keys.current.keys),
                "moat_keys_degraded": lambda: float(self.keys.problem is not None),
                "moat_start_seconds": lambda: self.start_seconds,
            }
        )
