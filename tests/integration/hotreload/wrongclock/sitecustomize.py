# SPDX-License-Identifier: Apache-2.0
"""Shifts the wall clock of a Python process by ``$TEST_CLOCK_SHIFT`` seconds, as a host whose clock is wrong has it.

A process cannot be given another wall clock on Linux (time namespaces shift the monotonic clocks only), so what Python
code asks is shifted: ``time.time``, ``time.time_ns``, ``time.localtime`` and ``gmtime`` of now, ``datetime.now``. The
times of files stay those of the real clock.
"""

from __future__ import annotations

import datetime
import functools
import os
import time
from collections.abc import Callable

_SHIFT = float(os.environ["TEST_CLOCK_SHIFT"])
_time, _time_ns, _strftime = time.time, time.time_ns, time.strftime
_datetime = datetime.datetime


class _Kind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _datetime)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, _datetime)


class _Shifted(_datetime, metaclass=_Kind):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
        return _datetime.now(tz) + datetime.timedelta(seconds=_SHIFT)

    @classmethod
    def utcnow(cls) -> datetime.datetime:  # type: ignore[override]
        return _datetime.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(seconds=_SHIFT)


def _of_now(convert: Callable[[float], time.struct_time], seconds: float | None = None) -> time.struct_time:
    return convert(_time() + _SHIFT if seconds is None else seconds)


time.time = lambda: _time() + _SHIFT
time.time_ns = lambda: _time_ns() + int(_SHIFT * 1e9)
# Partials, not functions: classes keep these as attributes (logging's converter), where a function becomes a method.
time.gmtime = functools.partial(_of_now, time.gmtime)
time.localtime = functools.partial(_of_now, time.localtime)
time.strftime = lambda form, moment=None: _strftime(form, time.localtime() if moment is None else moment)
datetime.datetime = _Shifted  # type: ignore[misc]
