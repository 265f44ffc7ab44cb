# SPDX-License-Identifier: Apache-2.0
"""JSON lines on stdout, and nothing else there: our events, the libraries' loggers, and what they print.

The real stdout is kept on a private descriptor. Descriptor 1 then leads to stderr, so that native code that prints
cannot break a line in two, and ``sys.stdout``/``sys.stderr`` become events. What a library says while requests are
served may quote a prompt: from then on only *where* it spoke is logged, with the class of the exception.
"""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from moat_gateway.context import current
from moat_gateway.events import EVENTS

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_KEY_SHAPED = re.compile(r"sk-[A-Za-z0-9_-]{8,}|(?i:bearer\s+)[A-Za-z0-9._~+/=-]{8,}")
_MAX_TEXT = 2000  # characters of one string in an event
_REDACTED = "[redacted]"


class Log:
    """Writes events.

    Args:
        write: takes one line of bytes, newline included.
        level: least level that is written.
        now: the clock.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        *,
        level: str = "info",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._write = write
        self._least = LEVELS[level]
        self._now = now
        self._secrets: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self.serving = False

    def hide(self, secrets: Iterable[str]) -> None:
        """Replace these values wherever they would appear."""
        self._secrets = tuple(sorted({*self._secrets, *(s for s in secrets if len(s) >= 6)}, key=len, reverse=True))

    @property
    def debug(self) -> bool:
        """Whether debug events are written."""
        return self._least <= LEVELS["debug"]

    def event(self, name: str, level: str = "info", **fields: Any) -> None:
        """Write one event; its name must be in :data:`moat_gateway.events.EVENTS`."""
        if name not in EVENTS:
            raise KeyError(f"the event {name} is not documented in events.py")
        if LEVELS[level] < self._least:
            return
        request = current.get()
        record: dict[str, Any] = {
            "ts": self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": level,
            "event": name,
            "trace_id": request.trace_id if request else None,
            "span_id": request.span_id if request else None,
            "request_id": request.request_id if request else None,
            "team": request.identity.team if request and request.identity else None,
        }
        record.update((k, self._clean(v)) for k, v in fields.items())
        line = json.dumps(record, ensure_ascii=False, default=lambda v: type(v).__name__)
        with self._lock:
            self._write(line.encode("utf-8", "backslashreplace") + b"\n")

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, _REDACTED)
            value = _KEY_SHAPED.sub(_REDACTED, value)
            return value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "..."
        if isinstance(value, list | tuple):
            return [self._clean(v) for v in value]
        if isinstance(value, dict):
            return {str(k): self._clean(v) for k, v in value.items()}
        return value


def where_of(error: BaseException) -> str:
    """Return ``module:line`` of the innermost frame of an exception."""
    tb = error.__traceback__
    if tb is None:
        return "unknown"
    while tb.tb_next is not None:
        tb = tb.tb_next
    return f"{tb.tb_frame.f_globals.get('__name__', '?')}:{tb.tb_lineno}"


class LibraryHandler(logging.Handler):
    """Turns the records of the libraries' loggers into events."""

    _LEVELS = ((40, "error"), (30, "warning"), (20, "info"))

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as the event ``library.log``."""
        level = next((word for least, word in self._LEVELS if record.levelno >= least), "debug")
        fields: dict[str, Any] = {"logger": record.name, "where": f"{record.module}:{record.lineno}"}
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            fields["error"] = type(error).__name__
        if not self._log.serving:
            try:
                fields["message"] = _ANSI.sub("", record.getMessage())
            except Exception:
                fields["message"] = str(record.msg)
            if error is not None:
                fields["message"] += f": {error}"
        self._log.event("library.log", level, **fields)


class _PrintCapture(io.TextIOBase):
    """Stands in for ``sys.stdout`` and ``sys.stderr``: whole lines become events."""

    def __init__(self, log: Log, level: str, fd: int) -> None:
        self._log = log
        self._level = level
        self._fd = fd
        self._rest = ""
        self._guard = threading.local()

    encoding = "utf-8"
    errors = "backslashreplace"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        # Descriptor 1 leads to stderr by now: whoever writes past Python still cannot reach the log's stream.
        return self._fd

    def write(self, text: str) -> int:
        if getattr(self._guard, "busy", False):
            return len(text)
        self._rest += text
        *lines, self._rest = self._rest.split("\n")
        if len(self._rest) > _MAX_TEXT:
            lines, self._rest = [*lines, self._rest], ""
        self._guard.busy = True
        try:
            for line in lines:
                plain = _ANSI.sub("", line).strip()
                if not plain:
                    continue
                if self._log.serving:
                    self._log.event("library.print", "debug", chars=len(plain))
                else:
                    self._log.event("library.print", self._level, text=plain)
        finally:
            self._guard.busy = False
        return len(text)


def capture_everything(level: str) -> Log:
    """Take stdout over for JSON lines; call once, before any library is imported.

    Returns:
        The log. What Python prints becomes events; what native code prints goes to stderr.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # No core is kept of these processes: functions and line numbers are all that a crash of native code can leave.
    faulthandler.enable(2)
    private = os.dup(1)
    os.set_inheritable(private, False)
    os.dup2(2, 1)

    def write(line: bytes) -> None:
        view = memoryview(line)
        while view:
            try:
                view = view[os.write(private, view) :]
            except BlockingIOError:
                select.select([], [private], [], 1.0)
            except OSError:
                return  # the reader is gone; a gateway goes on without its log rather than fail requests

    log = Log(write, level=level)
    sys.stdout = _PrintCapture(log, "debug", 1)
    sys.stderr = _PrintCapture(log, "warning", 2)
    adopt_loggers(log)
    logging.captureWarnings(True)
    return log


def adopt_loggers(log: Log) -> None:
    """Send every logger's records to ``log``, and take away the handlers that libraries gave themselves."""
    root = logging.getLogger()
    root.handlers[:] = [LibraryHandler(log)]
    # Libraries say a lot; their debug records hold whole requests and are never taken.
    root.setLevel(logging.INFO if log.debug else logging.WARNING)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        # uvicorn writes an access log as soon as that logger leads anywhere; the meter stage writes ours.
        logger.propagate = name != "uvicorn.access"
