# SPDX-License-Identifier: Apache-2.0
"""Proves that a control that hangs fails as a control, in its time: the run that made it must be able to go on.

That a control is caught is proved in test_capture.py.
"""

from __future__ import annotations

import os

import pytest

from moat.site.egresscheck import control

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="starts processes of another user: needs root")
NOBODY = 65534


def test_a_control_that_does_not_end_is_killed_and_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_SECONDS", 1)
    monkeypatch.setattr(control, "_PROGRAM", "import sys, time; time.sleep(600)")
    with pytest.raises(OSError, match=f"user {NOBODY} did not end within 1 s"):
        control.attempt(NOBODY, "connect", "198.51.100.9", 20001)


def test_a_control_that_connects_without_a_packet_ends_well() -> None:
    assert control.attempt(NOBODY, "connect", "127.0.0.1", 20001) == ""
