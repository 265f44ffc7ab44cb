# SPDX-License-Identifier: Apache-2.0
"""A dry run: can LiteLLM load a configuration and build its router, in time, in memory, without the network?

Importing LiteLLM takes seconds, loading a configuration a fraction of one. So a child process imports it once and then
forks for each run (:mod:`moat_gateway.dryrunchild`); what a run does to LiteLLM's globals, to its environment and to
its memory ends with it. The child is given references; only a fork reads the secrets, from their files.

A run is killed with all it started when its time is over, and cannot take more memory than it may. The child itself may
die at any time (the kernel's memory killer prefers it): the next run starts a new one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from moat_gateway import configdir, dryrunchild
from moat_gateway.errors import DryRunFailed
from moat_gateway.litellm_port import OFFLINE
from moat_gateway.settings import Settings

START_TIMEOUT = 180.0  # seconds; importing LiteLLM takes four, on a busy machine many times that
_ANSWER_MARGIN = 15.0  # seconds over a run's own limit, after which the child itself is taken for stuck
_END_TIMEOUT = 2.0  # seconds
_INHERITED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")


class DryRunUnavailable(DryRunFailed):
    """The dry run could not take place; it says nothing about the configuration, and may be tried again."""


class DryRun:
    """Builds routers, one at a time, in forks of a warm child process.

    Args:
        settings: limits of time and memory.
        cold: for one run: the child is started by it and ends with it.
        python: an interpreter that has LiteLLM.
    """

    def __init__(self, settings: Settings, *, cold: bool = False, python: str = sys.executable) -> None:
        self._timeout = settings.dry_run_timeout
        self._memory = settings.dry_run_memory << 20
        self._cold = cold
        self._python = python
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the child and do not wait for it; :meth:`run` does."""
        with self._lock:
            self._started()

    def run(self, prepared_json: bytes) -> None:
        """Build the router of a prepared configuration.

        Raises:
            DryRunFailed: it cannot be built, takes too long, or too much memory.
            DryRunUnavailable: the child could not be started, or died twice, or :meth:`close` was called.
        """
        with self._lock:
            try:
                answer = self._asked(prepared_json)
            finally:
                if self._cold:
                    self._end()
        if not answer["ok"]:
            raise _failed(answer, self._timeout, self._memory)

    def close(self) -> None:
        """End the child, for good; a run that another thread waits for raises ``DryRunUnavailable`` at once."""
        self._closed = True
        # Without the lock: the thread that holds it waits for the child.
        child = self._child
        if child is not None:
            child.kill()
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        child = self._child
        return child.process.pid if child is not None and child.process.poll() is None else None

    @property
    def resident_bytes(self) -> int:
        """How much memory the child had when it was ready; 0 before."""
        child = self._child
        return child.resident if child is not None else 0

    def _started(self) -> _Child:
        if self._child is not None and self._child.process.poll() is not None:
            self._end()
        if self._child is None:
            self._child = _Child(self._python)
        child = self._child
        if self._closed:  # looked at after the child is known: close() kills what it sees, or is seen here
            self._end()
            raise DryRunUnavailable("the dry run was ended", hint="start it again", path=configdir.CONFIG)
        return child

    def _asked(self, prepared_json: bytes) -> dict[str, Any]:
        # Twice: a child that was killed while it was idle is noticed only now.
        for attempt in (1, 2):
            try:
                return self._started().ask(prepared_json, self._timeout, self._memory)
            except (OSError, EOFError, ValueError) as e:
                self._end()
                if attempt == 2 and not self._closed:
                    raise DryRunUnavailable(
                        "the dry run's process died or does not answer",
                        found=type(e).__name__,
                        expected="an answer",
                        hint="see whether the machine ran out of memory; it is tried again",
                        path=configdir.CONFIG,
                    ) from e
        raise AssertionError("unreachable")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """The child process and the socket to it."""

    def __init__(self, python: str) -> None:
        package = str(Path(__file__).resolve().parents[1])
        environment = {k: os.environ[k] for k in _INHERITED if k in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (package, environment.get("PYTHONPATH")) if p)
        # Each arena reserves 64 MiB of the address space that a run may use.
        environment |= {**OFFLINE, "MALLOC_ARENA_MAX": "2", "PYTHONSAFEPATH": "1"}
        self.resident = 0
        self._ready = False
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [python, "-m", "moat_gateway.dryrunchild", str(theirs.fileno())],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    # LiteLLM prints what it is configured with.
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as e:
            ours.close()
            raise DryRunUnavailable(
                "the dry run's process cannot be started", found=e.strerror or str(e), path=configdir.CONFIG
            ) from e
        self._socket = ours

    def ask(self, prepared_json: bytes, timeout: float, memory: int) -> dict[str, Any]:
        """Send one configuration and return what became of it."""
        if not self._ready:
            self._wait_ready()
        self._socket.settimeout(timeout + _ANSWER_MARGIN)
        dryrunchild.send(self._socket, dryrunchild.request(prepared_json, timeout, memory))
        return dryrunchild.receive_answer(self._socket, time.monotonic() + timeout + _ANSWER_MARGIN)

    def _wait_ready(self) -> None:
        answer = dryrunchild.receive_answer(self._socket, time.monotonic() + START_TIMEOUT)
        if not answer["ok"]:
            raise DryRunUnavailable(
                "LiteLLM cannot be imported for the dry run",
                found=str(answer["found"]),
                expected="LiteLLM and its locked wheels",
                hint="install the bundle's wheels into the environment that runs moat-gateway",
                path=configdir.CONFIG,
            )
        self.resident = int(answer["resident"])
        self._ready = True

    def kill(self) -> None:
        """Kill it; what it runs ends with it (``PR_SET_PDEATHSIG``). Whoever waits for its answer is woken."""
        with suppress(ProcessLookupError):
            self.process.kill()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Close the socket, at which the child ends with what it runs; kill it if it does not."""
        self._socket.close()
        try:
            self.process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _failed(answer: dict[str, Any], timeout: float, memory: int) -> DryRunFailed:
    why = answer["why"]
    if why == "time":
        return DryRunFailed(
            "LiteLLM's router takes too long to be built",
            found=f"not ready after {timeout:g} s",
            expected=f"at most {timeout:g} s",
            hint="make the configuration smaller, or raise MOAT_DRY_RUN_TIMEOUT",
            path=configdir.CONFIG,
        )
    if why == "memory":
        return DryRunFailed(
            "LiteLLM's router takes too much memory",
            found=f"more than {memory >> 20} MiB",
            expected=f"at most {memory >> 20} MiB",
            hint="make the configuration smaller, or raise MOAT_DRY_RUN_MEMORY",
            path=configdir.CONFIG,
        )
    if why == "unable":
        return DryRunUnavailable(
            "the dry run could not be carried out",
            found=str(answer["found"]),
            hint="make the secret's file readable, or what else is named; it is tried again",
            path=configdir.CONFIG,
        )
    return DryRunFailed(
        "LiteLLM cannot use the configuration",
        found=str(answer["found"]),
        expected="a router with every deployment",
        hint="correct what is named",
        path=configdir.CONFIG,
    )
