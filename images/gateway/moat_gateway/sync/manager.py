# SPDX-License-Identifier: Apache-2.0
"""``ConfigSyncManager``: watches the pointer, verifies, checks, keeps, and tells the node's gateways."""

from __future__ import annotations

from moat_gateway.settings import Settings


def run(settings: Settings, unknown: tuple[str, ...]) -> int:
    """Run until SIGTERM; return the exit code."""
    raise NotImplementedError(settings.sync_dir, unknown)
