# SPDX-License-Identifier: Apache-2.0
"""The running demo for every test here; it is brought up where it is not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.acceptance.stack import DEMO_JSON, ROOT, Stack, load


@pytest.fixture(scope="session")
def stack() -> Stack:
    """Return the running demo, all services healthy."""
    if not DEMO_JSON.exists():
        subprocess.run([sys.executable, "-m", "moat.demo", "up"], cwd=ROOT, check=True)
    found = load()
    found.compose("up", "--detach", "--wait", "--wait-timeout", "180", "--pull", "never")
    return found
