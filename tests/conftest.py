# SPDX-License-Identifier: Apache-2.0
"""Gives every test the signals of a terminal.

A shell that starts the tests in the background hands down an ignored SIGINT, and a program that is started with it
keeps it ignored: tests of Ctrl-C would then wait for ever.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
