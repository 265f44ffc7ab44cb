# SPDX-License-Identifier: Apache-2.0
"""Brings changes into the running gateway: revisions that config-sync put in force on this node, and secret files.

One task looks ten times a second whether ``current.json`` was replaced (a ``stat``), and each ``secrets_poll`` whether
a secret file was. What changed is applied whole or not at all, by :class:`moat_gateway.litellm_port.Serving`; what
needs a restart waits for this gateway's turn. Everything that it finds goes into :class:`Situation`, which status,
metrics and the report to config-sync read.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moat_gateway import config, litellm_port, served, slices
from moat_gateway.errors import BadRevision, GatewayError, UnreadableSecret
from moat_gateway.keys import KeySet
from moat_gateway.keystore import KeyStore
from moat_gateway.litellm_port import NeedsRestart, Serving
from moat_gateway.logs import Log, where_of
from moat_gateway.metrics import Counters
from moat_gateway.prepared import Prepared
from moat_gateway.revision import MANIFEST
from moat_gateway.secretfiles import Look, Watch, read_master_key
from moat_gateway.served import Served
from moat_gateway.settings import Settings
from moat_gateway.sidethread import SideThread
from moat_gateway.sync import nodefolder
from moat_gateway.sync.files import Unusable, boottime, read_bytes, timestamp
from moat_gateway.sync.nodefolder import Current, SyncState

TICK = 0.1  # seconds between two looks at current.json
RETRY = 5.0  # seconds after which what was refused here is tried again: the cause may be gone
_MASTER = "master key"
_MANY_KEYS = 300  # more are made in a thread: it holds the loop for 5 ms at a time at most, whatever their number
_DEEP = frozenset({(), ("effective",), ("effective", "model_list"), ("deployments",), ("keys",), ("keys", "keys")})


@dataclass(frozen=True)
class Refused:
    """A revision that is refused, and why; ``revision`` is ``None`` if not even its number could be read."""

    revision: int | None
    kind: str
    reason: str


@dataclass
class Situation:
    """What serves, and what stands in the way of what should.

    Attributes:
        served: the configuration in force.
        applied_at: since when.
        follows: the setting ``sync_dir`` is there: config-sync brings revisions.
        last_refused: the revision that this gateway cannot serve, or ``None``.
        needs_restart: the names of what waits for a restart.
        sync: how config-sync is; ``None`` if nobody knows.
        secret_problems: secret files whose value does not count, by name.
        passed_over: what was not right at the start, one line each.
        loop_blocked: seconds of the longest hold of the loop by a change.
    """

    served: Served
    applied_at: str
    follows: bool = False
    last_refused: Refused | None = None
    needs_restart: tuple[str, ...] = ()
    sync: SyncState | None = None
    secret_problems: Mapping[str, GatewayError] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    loop_blocked: float = 0.0

    def staleness(self) -> float:
        """Return the seconds since the source last answered; 0 without config-sync.

        If nobody knows when that was, it is the time since the machine started: the metric must not look best where
        config-sync never ran, or its note cannot be read.
        """
        if self.sync is not None:
            return self.sync.staleness()
        return boottime() if self.follows else 0.0

    def refused(self) -> Refused | None:
        """Return what is refused by this gateway, else by config-sync, or ``None``."""
        theirs = self.sync.last_refused if self.sync is not None else None
        if self.last_refused is None and theirs is not None:
            return Refused(theirs.revision, theirs.kind, theirs.reason)
        return self.last_refused

    def degraded(self, settings: Settings) -> list[str]:
        """Return what a person should know, one line each."""
        out = list(self.passed_over)
        if self.follows and self.sync is None:
            out.append("config-sync: it has never run on this node, or its note cannot be read")
        elif self.sync is not None and (trying := self.sync.trying()) is not None:
            # The source is not asked meanwhile, and has answered before it: nothing is lost.
            if self.staleness() > settings.stale_after:
                out.append(f"config-sync: has been trying revision {trying[0]} for {trying[1]:.0f} s")
        elif self.staleness() > settings.stale_after:
            why = self.sync.source.why if self.sync is not None else None
            out.append(
                f"config-sync: the source has not answered for {self.staleness():.0f} s" + (f": {why}" if why else "")
            )
        refused = self.refused()
        if refused is not None:
            who = "config" if refused is self.last_refused else "config-sync"
            what = "what the source offers" if refused.revision is None else f"revision {refused.revision}"
            serves = f"revision {self.served.revision} serves" if self.served.revision else "the local files serve"
            out.append(f"{who}: {what} is refused, {serves}: {refused.reason}")
        if self.needs_restart:
            out.append(f"config: needs restart: {', '.join(self.needs_restart)}")
        out += [f"secrets: {name}: an older value counts: {e.one_line()}" for name, e in self.secret_problems.items()]
        return out


class Live:
    """Applies changes.

    Args:
        settings: in force.
        situation: is kept up to date.
        serving: what LiteLLM serves.
        keys: the key store.
        counters: of changes.
        log: for ``config.*`` and ``secrets.*``.

    Attributes:
        told: is called after every change of the situation.
    """

    def __init__(
        self,
        settings: Settings,
        situation: Situation,
        serving: Serving,
        keys: KeyStore,
        counters: Counters,
        log: Log,
    ) -> None:
        self._settings = settings
        self._situation = situation
        self._serving = serving
        self._keys = keys
        self._counters = counters
        self._log = log
        self.told: Callable[[], None] = lambda: None
        self._sync_dir = Path(settings.sync_dir) if settings.sync_dir else None
        self._watch = nodefolder.CurrentWatch(self._sync_dir) if self._sync_dir else None
        self._secrets = Watch()
        self._master = Watch(read_master_key)
        self._master_now = ""
        self._values: Mapping[str, str] = {}
        self._blocked_by: str | None = None  # sha256 of the revision that waits for a restart
        self._revision_restart: tuple[str, ...] = ()  # why that one does
        self._entry_restart: tuple[str, ...] = ()  # deployments that take a secret at their start only
        self._section_values: Mapping[str, str] = {}  # with which LiteLLM was given its sections
        self._judged: tuple[Served, Mapping[str, str]] | None = None
        self._outside: Mapping[str, GatewayError] = {}
        self._refused_values: Mapping[str, str] | None = None
        self._refused_secrets: Mapping[str, GatewayError] = {}
        self._retry_at: float | None = None
        self._retry_secrets_at: float | None = None
        self._lock = asyncio.Lock()
        self._looks: set[asyncio.Task[None]] = set()
        self._thread = SideThread("moat-live")

    def begin(self, secrets: Mapping[str, str], master_key: str) -> None:
        """Note what the gateway was started with."""
        self._values = dict(secrets)
        self._note_sections()
        self._master_now = master_key
        self._secrets.look(self._situation.served.files)
        self._master.look({_MASTER: self._settings.master_key_file})

    async def run(self) -> None:
        """Look for changes, for ever."""
        changed = True
        next_secrets = 0.0
        while True:
            now = time.monotonic()
            try:
                # A change that failed to be looked at stays one.
                changed = changed or (self._watch is not None and self._watch.changed())
                if changed or (self._retry_at is not None and now >= self._retry_at):
                    async with self._lock:
                        await self._look_at_current()
                    changed = False
                if now >= next_secrets or (self._retry_secrets_at is not None and now >= self._retry_secrets_at):
                    next_secrets = now + self._settings.secrets_poll
                    async with self._lock:
                        await self._look_at_secrets()
            except Exception as e:
                # A defect must not end the looking for changes.
                self._log.event("defect", "error", error=type(e).__name__, where=where_of(e))
                await asyncio.sleep(1.0)
            await asyncio.sleep(TICK)

    async def look(self) -> bool:
        """Look at ``current.json`` at once, if it changed; return whether it had."""
        if self._watch is None or not self._watch.changed():
            return False
        # The caller is a request, and a client that goes away must not leave the change half looked at.
        task = asyncio.ensure_future(self._look_locked())
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)
        await asyncio.shield(task)
        return True

    async def _look_locked(self) -> None:
        async with self._lock:
            await self._look_at_current()

    async def look_at_everything(self) -> None:
        """Look at the revision and the secrets at once, whether they changed or not."""
        async with self._lock:
            await self._look_at_secrets(again=True)
            await self._look_at_current()

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    # --- the revision ---

    async def _look_at_current(self) -> None:
        if self._sync_dir is None:
            return
        self._retry_at = None
        number = 0
        try:
            current = await self._thread.run(lambda: nodefolder.read_current(self._sync_dir or Path()))
            if current is None or current.sha256 == self._situation.served.sha256:
                if current is not None:
                    self._settled()
                return
            number = current.revision
            if current.sha256 != self._blocked_by:
                await self._take(current)
        except NeedsRestart as e:
            self._blocked_by = current.sha256 if current is not None else None
            self._situation.last_refused = None
            self._revision_restart = e.names
            self._name_restarts(number)
        except GatewayError as e:
            self._refused(number, e)
        except Exception as e:
            # Whatever it was, the old configuration serves; a defect must not end the looking for newer ones.
            self._log.event("defect", "error", error=type(e).__name__, where=where_of(e))
            self._refused(number, BadRevision("applying it failed unexpectedly", found=type(e).__name__))
        self.told()

    def _settled(self) -> None:
        """What is in force is what is wanted: nothing is refused and no revision waits."""
        s = self._situation
        before = (s.last_refused, s.needs_restart, s.passed_over)
        self._blocked_by, s.last_refused, s.passed_over = None, None, ()
        self._revision_restart = ()
        self._name_restarts(s.served.revision)
        if before != (s.last_refused, s.needs_restart, s.passed_over):
            self.told()

    async def _take(self, current: Current) -> None:
        noticed = time.monotonic()
        work = slices.Slices()
        raw = await self._thread.run(lambda: self._read(current))
        work.begin()
        try:
            plain = await slices.loads(raw, _DEEP, work.pause)
        except (ValueError, RecursionError) as e:
            raise BadRevision("the prepared configuration cannot be read", found=type(e).__name__) from None
        await work.rest()
        prepared = Prepared.from_plain(plain)
        await work.rest()
        if prepared.revision != current.revision:
            raise BadRevision(
                "the prepared configuration is of another revision",
                found=str(prepared.revision),
                expected=str(current.revision),
            )
        wanted = served.of_revision(prepared, current.sha256)
        work.end()
        look = await self._thread.run(lambda: self._secrets.look({**self._situation.served.files, **wanted.files}))
        key_set = await self._key_set(prepared)
        self._say_problems(look)
        values = self._usable(wanted, look)
        for problem in (await self._leading_outside(wanted, values)).values():
            raise problem
        work.begin()
        change = await self._serving.prepare(wanted.wanted(values), work.pause)
        await work.rest()
        change.commit()
        self._keys.replace(key_set)
        s = self._situation
        s.served, s.applied_at = wanted, timestamp()
        self._took_secrets(values)
        s.secret_problems = {n: p for n, p in look.problems.items() if n in wanted.files}
        self._settled()
        await work.rest()
        await change.tidy(work.pause)
        work.end()
        self._hold(work.longest)
        self._counters.reloads["applied"] += 1
        self._log.event(
            "config.applied",
            revision=wanted.revision,
            sha256=current.sha256,
            seconds=round(time.monotonic() - noticed, 3),
            made=change.made,
            loop_ms=round(1000 * work.longest, 2),
            loop_cpu_ms=round(1000 * work.longest_own, 2),
        )

    def _read(self, current: Current) -> str:
        """Return ``prepared.json`` of the revision that is in force; runs in the thread."""
        assert self._sync_dir is not None  # noqa: S101 - there is no current revision without it
        path = nodefolder.revision_folder(self._sync_dir, current.revision) / MANIFEST
        try:
            found = hashlib.sha256(read_bytes(path)).hexdigest()
        except (FileNotFoundError, Unusable) as e:
            raise BadRevision("the kept revision cannot be read", found=str(e)[:100], path=str(path)) from e
        if found != current.sha256:
            raise BadRevision(
                "the kept revision is not the one that was accepted",
                found=found,
                expected=current.sha256,
                path=str(path),
            )
        try:
            return nodefolder.read_prepared(self._sync_dir, current.revision).decode("ascii")
        except UnicodeDecodeError as e:
            raise BadRevision("the prepared configuration cannot be read", found=type(e).__name__) from None

    def _usable(self, wanted: Served, look: Look) -> dict[str, str]:
        missing = [n for n in wanted.files if n not in look.values]
        if missing:
            problem = look.problems.get(missing[0])
            raise problem if problem is not None else UnreadableSecret(f"the secret {missing[0]} has no value")
        values = {n: look.values[n] for n in wanted.files}
        self._log.hide(values.values())
        return values

    async def _key_set(self, prepared: Prepared) -> KeySet:
        if prepared.keys_sha256 == self._keys.current.sha256:
            return self._keys.current
        if len(prepared.keys.get("keys") or ()) > _MANY_KEYS:
            return await self._thread.run(prepared.key_set)
        return prepared.key_set()

    def _refused(self, number: int, e: GatewayError) -> None:
        reason = Refused(number, e.kind, e.one_line())
        self._retry_at = time.monotonic() + RETRY
        if self._situation.last_refused == reason:
            return
        self._situation.last_refused = reason
        self._counters.reloads["refused"] += 1
        self._log.event("config.refused", "error", revision=number, kind=e.kind, message=e.one_line())

    def _name_restarts(self, number: int) -> None:
        """Name everything that waits for a restart, and say so when that is something else than before."""
        stale = frozenset(n for n, v in self._section_values.items() if self._values.get(n, v) != v)
        sections = (f"secrets in {section}" for section in self._situation.served.sections_of(stale))
        names = tuple(dict.fromkeys((*self._revision_restart, *self._entry_restart, *sections)))
        before, self._situation.needs_restart = self._situation.needs_restart, names
        if not names or names == before:
            return
        self._counters.reloads["restart"] += 1
        self._log.event(
            "config.needs_restart",
            "warning",
            revision=number,
            names=list(names),
            policy=self._settings.restart_policy if self._sync_dir else "report",
        )

    # --- secrets ---

    async def _look_at_secrets(self, *, again: bool = False) -> None:
        s = self._situation
        if self._sync_dir is not None:
            s.sync = await self._thread.run(lambda: nodefolder.read_sync(self._sync_dir or Path()))
        files = s.served.files
        look, master = await self._thread.run(
            lambda: (self._secrets.look(files), self._master.look({_MASTER: self._settings.master_key_file}))
        )
        self._log.hide([*look.values.values(), *master.values.values()])
        self._say_problems(look)
        self._say_problems(master)
        key = master.values.get(_MASTER, self._master_now)
        if key != self._master_now:
            litellm_port.set_master_key(key)
            self._keys.set_master(hashlib.sha256(key.encode()).hexdigest())
            self._master_now = key
            self._log.event("secrets.changed", names=[_MASTER], seconds=0.0, made=0)
            self.told()
        values = {n: look.values.get(n, v) for n, v in self._values.items()}
        await self._judge(values)
        values = {**values, **{n: self._values[n] for n in self._outside}}
        if values == self._values:
            self._none_refused()
        elif again or values != self._refused_values or time.monotonic() >= (self._retry_secrets_at or 0.0):
            await self._take_secrets(values)
        problems = {**self._refused_secrets, **self._outside, **look.problems, **master.problems}
        if problems != s.secret_problems:
            s.secret_problems = problems
            self.told()

    async def _leading_outside(self, served: Served, values: Mapping[str, str]) -> Mapping[str, GatewayError]:
        """Return which values that are not in force yet lead out of the allow-list, where no start would take them."""
        changed = {n: v for n, v in values.items() if self._values.get(n) != v}
        if not changed:
            return {}
        return await self._thread.run(
            lambda: config.outside(served.effective, changed, served.files, self._settings.allow)
        )

    async def _judge(self, values: Mapping[str, str]) -> None:
        """Find what of these values must not be taken; the same ones are not judged again at each look."""
        served = self._situation.served
        if self._judged is not None and self._judged[0] is served and self._judged[1] == values:
            return
        before, self._outside = self._outside, await self._leading_outside(served, values)
        self._judged = (served, values)
        for name, e in self._outside.items():
            if name not in before or before[name].one_line() != e.one_line():
                self._log.event("secrets.refused", "error", secret=name, message=e.one_line())

    async def _take_secrets(self, values: Mapping[str, str]) -> None:
        begun = time.monotonic()
        s = self._situation
        names = frozenset(n for n, v in values.items() if self._values[n] != v)
        work = slices.Slices()
        try:
            change = await self._serving.prepare(s.served.wanted(values), work.pause)
            await work.rest()
            change.commit()
        except NeedsRestart as e:
            # The values count as seen: only a restart helps, and that is named.
            self._took_secrets(values, e.names)
            self._name_restarts(s.served.revision)
            self.told()
            return
        except GatewayError as e:
            self._refuse_secrets(values, names, e)
            return
        self._took_secrets(values)
        await work.rest()
        await change.tidy(work.pause)
        work.end()
        self._hold(work.longest)
        self._counters.reloads["applied"] += 1
        self._log.event(
            "secrets.changed", names=sorted(names), seconds=round(time.monotonic() - begun, 3), made=change.made
        )
        self._name_restarts(s.served.revision)
        self.told()

    def _took_secrets(self, values: Mapping[str, str], need_restart: tuple[str, ...] = ()) -> None:
        """These values are in force, or wait for a restart."""
        self._values, self._entry_restart = values, need_restart
        self._none_refused()
        self._note_sections()

    def _none_refused(self) -> None:
        self._refused_values, self._refused_secrets, self._retry_secrets_at = None, {}, None

    def _note_sections(self) -> None:
        """Note with which secrets LiteLLM has its sections: those that it read first, until a restart."""
        held = (n for n in self._situation.served.section_secrets() if n in self._values)
        self._section_values = {n: self._section_values.get(n, self._values[n]) for n in held}

    def _refuse_secrets(self, values: Mapping[str, str], names: frozenset[str], e: GatewayError) -> None:
        self._refused_values, self._retry_secrets_at = values, time.monotonic() + RETRY
        before = {n: p.one_line() for n, p in self._refused_secrets.items()}
        if before == dict.fromkeys(names, e.one_line()):
            return
        self._refused_secrets = dict.fromkeys(names, e)
        self._counters.reloads["refused"] += 1
        for name in sorted(names):
            self._log.event("secrets.refused", "error", secret=name, message=e.one_line())

    # --- small steps ---

    def _say_problems(self, look: Look) -> None:
        for name in look.news:
            self._log.event("secrets.refused", "error", secret=name, message=look.problems[name].one_line())

    def _hold(self, seconds: float) -> None:
        self._situation.loop_blocked = max(self._situation.loop_blocked, seconds)
