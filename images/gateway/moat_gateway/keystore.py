# SPDX-License-Identifier: Apache-2.0
"""The keys in force: of the revision that serves, or the last good local ``keys.yaml``, read again when it changes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from moat_gateway import keys
from moat_gateway.errors import BadKeys
from moat_gateway.keys import Identity, KeySet, Verdict
from moat_gateway.logs import Log
from moat_gateway.sidethread import SideThread
from moat_gateway.sync.files import Stamp
from moat_gateway.sync.files import stamp as _stamp


class KeyStore:
    """Answers who a secret belongs to.

    Args:
        path: the keys file; it must be good at the start (:meth:`load_first`), unless a revision's keys serve.
        master_sha256: hex sha256 of the administrator's key.
        log: for ``keys.loaded`` and ``keys.refused``.
        now: the clock, UTC.
    """

    def __init__(
        self, path: Path, master_sha256: str, log: Log, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path: Path | None = path  # None: the keys are those of a revision
        self._master = master_sha256
        self._log = log
        self._now = now
        self._seen: Stamp | None = None
        self._lock = threading.Lock()  # one reader at a time: the poll and POST /reload
        self._thread = SideThread("moat-keys")
        self.current = KeySet()
        self.problem: BadKeys | None = None
        #: Looks at once whether there is a newer revision; for a key that nobody knows.
        self.look_for_revision: Callable[[], Awaitable[bool]] | None = None

    def load_first(self) -> None:
        """Read the file for the first time.

        Raises:
            BadKeys: there is no good file to begin with.
        """
        assert self._path is not None  # noqa: S101 - no revision has served yet
        self._seen = _stamp(self._path)
        self.current = keys.read(self._path)
        self._log_loaded()

    def replace(self, key_set: KeySet) -> None:
        """Put the keys of a revision into force; from then on the local file does not count."""
        self._path = None
        self.problem = None
        changed = key_set.sha256 != self.current.sha256
        self.current = key_set
        if changed:
            self._log_loaded()

    def set_master(self, sha256: str) -> None:
        """Put another administrator's key into force; the one before does not count any more."""
        self._master = sha256

    def identify(self, secret: str) -> Identity | Verdict:
        """Say whose secret this is now."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        if hmac.compare_digest(digest, self._master):
            return Identity(None, "master", digest, None, ("*",))
        return self.current.identify(secret, self._now())

    def refresh(self, *, force: bool = False) -> bool:
        """Read the file if it changed (or always, with ``force``); return whether a good file is in force.

        A bad or vanished file changes nothing but :attr:`problem`. A file that changes while it is read is left
        for the next look.
        """
        with self._lock:
            path = self._path
            if path is None:
                return True
            before = _stamp(path)
            if before == self._seen and not force:
                return self.problem is None
            try:
                loaded = keys.read(path)
                if _stamp(path) != before:
                    return self.problem is None
            except BadKeys as e:
                self._seen = before
                self.problem = e
                self._log.event("keys.refused", "error", message=e.one_line())
                return False
            if self._path is None:  # a revision came in between
                return True
            self._seen = before
            self.problem = None
            changed = loaded.sha256 != self.current.sha256
            self.current = loaded
            if changed:
                self._log_loaded()
            return True

    async def recheck(self) -> bool:
        """Read the file at once if it changed since the last look; return whether it was read.

        For a key that nobody knows: it may be younger than the last poll, and the first request with a new key is
        the one that a person makes by hand. A refusal costs one ``stat`` more.
        """
        if self.look_for_revision is not None and await self.look_for_revision():
            return True
        if self._path is None or _stamp(self._path) == self._seen:
            return False
        await self._thread.run(self.refresh)
        return True

    async def poll(self, interval: float) -> None:
        """Look at the file every ``interval`` seconds, for ever; reading happens off the event loop."""
        while True:
            await asyncio.sleep(interval)
            if self._path is not None and _stamp(self._path) != self._seen:
                await self._thread.run(self.refresh)

    def _log_loaded(self) -> None:
        now = self.current
        self._log.event("keys.loaded", keys=len(now.keys), teams=len(now.teams), sha256=now.sha256)
