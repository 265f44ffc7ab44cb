# SPDX-License-Identifier: Apache-2.0
"""Keeps secrets that are in memory out of core dumps and away from processes of the same user."""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """Allow no core dump, and no look into this process by others of its user (``/proc/PID/mem``, ``ptrace``).

    Root can still look. A kernel or a sandbox that knows no such call changes nothing: it is one of several layers.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
