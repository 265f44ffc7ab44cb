# SPDX-License-Identifier: Apache-2.0
"""Gives every test the signals of a terminal, and leaves out what takes minutes unless it is asked for.

A shell that starts the tests in the background hands down an ignored SIGINT, and a program that is started with it
keeps it ignored: tests of Ctrl-C would then wait for ever.
"""

from __future__ import annotations

import os
import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that are marked ``long`` in an ordinary run (docs/developers.md)."""
    if "MOAT_LONG_TESTS" not in os.environ:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long: MOAT_LONG_TESTS=1"))
