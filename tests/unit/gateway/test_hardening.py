# SPDX-License-Identifier: Apache-2.0
"""Proves that a process that asked for it makes no core dump and cannot be looked into by its own user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[3] / "images/gateway"
PROGRAM = """
import ctypes, json, resource, sys
sys.path.insert(0, sys.argv[1])
get = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
before = get()
from moat_gateway import hardening
hardening.forbid_core_dumps()
print(json.dumps([before, get(), list(resource.getrlimit(resource.RLIMIT_CORE))]))
"""


def test_no_core_dump_and_no_look_into_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(PACKAGE)], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == [1, 0, [0, 0]]
