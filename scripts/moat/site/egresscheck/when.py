# SPDX-License-Identifier: Apache-2.0
"""Times as the report shows them."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def stamp(seconds: float | None = None) -> str:
    """Return a time (seconds since 1970; default now) as UTC, ISO 8601 with milliseconds and ``Z``."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
