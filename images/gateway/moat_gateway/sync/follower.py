# SPDX-License-Identifier: Apache-2.0
"""Follows the pointer of the source: what is new is fetched, vetted, kept and put in force; what is bad is refused.

One step is one question to the source. A step never raises: whatever goes wrong, the revision in force stays, and the
board and the log say why. No wall clock decides anything.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from moat_gateway import ustar
from moat_gateway.errors import BadRevision, GatewayError, OlderRevision, SyncFolderFailed
from moat_gateway.logs import Log, where_of
from moat_gateway.revision import MANIFEST, SIGNATURE, Revision
from moat_gateway.revstore import NoRevision, Pointer, Source
from moat_gateway.settings import Settings
from moat_gateway.sync.board import Board
from moat_gateway.sync.files import timestamp
from moat_gateway.sync.keeper import Keeper
from moat_gateway.sync.nodefolder import Current, kept, read_current, read_prepared, usable_order
from moat_gateway.sync.retry import Plan, fingerprint, plan

SLOWEST = 5.0  # seconds between two questions to a source that does not answer
_MIB = 1 << 20


class Problems(Exception):
    """A revision was refused for these reasons, the first of them the one that counts."""

    def __init__(self, problems: list[GatewayError]) -> None:
        super().__init__(problems[0].message)
        self.problems = problems


class Vet(Protocol):
    """What makes a revision acceptable; see :mod:`moat_gateway.sync.vetting`."""

    def open(self, raw: bytes) -> Revision:
        """Return the revision in an archive, verified."""

    def read_kept(self, number: int) -> Revision:
        """Return a kept revision, verified again."""

    def prepare(self, revision: Revision, *, dry_run: bool) -> bytes:
        """Check everything and return what the gateways need (``prepared.json``)."""


@dataclass
class _Pending:
    """A refused revision that may heal."""

    plan: Plan
    due: float | None
    pause: float
    seen: tuple[tuple[str, int, int, int], ...]


class Follower:
    """The loop's state and its one step.

    Args:
        settings: of the sidecar.
        keeper: of the node's folder.
        source: where revisions come from.
        vet: what makes one acceptable.
        board: where the state is told.
        log: for events.
        clock: seconds that never go back.
        jitter: a number from 0 to 1, another each time.
    """

    def __init__(
        self,
        settings: Settings,
        keeper: Keeper,
        source: Source,
        vet: Vet,
        board: Board,
        log: Log,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._keeper = keeper
        self._source = source
        self._vet = vet
        self._board = board
        self._log = log
        self._clock = clock
        self._jitter = jitter
        self.current: Current | None = None
        self._archive = ""  # sha256 of the archive in force, as the pointer has it
        self._damaged = False  # what is kept of the revision in force cannot be used
        self._kept_seen: tuple[tuple[str, int, int, int], ...] | None = None  # inputs, if what is kept has a problem
        self._inputs = (settings.secrets_dir, settings.site_keys_dir)
        self._pointer: Pointer | None = None
        self._pending: _Pending | None = None
        self._failures = 0
        self._waiting = False

    # --- the start ---

    def recover(self) -> None:
        """Verify what is kept, say what is damaged, and remove what was never in force."""
        folder = self._keeper.folder
        unreadable = False
        self._damaged, self._kept_seen = False, None
        self._board.note("kept")
        try:
            self.current = read_current(folder)
        except BadRevision as e:
            unreadable = True
            self._log.event("sync.damaged", "error", revision=None, message=e.one_line())
        order = usable_order(folder)
        if self.current is not None:
            for number in set(kept(folder)) - set(order):
                # A kill came between its last byte and `current.json`: the source still has it.
                with self._folder_may_fail():
                    self._keeper.drop(number)
            order = (self.current.revision,)
        for number in order:
            try:
                revision = self._vet.read_kept(number)
                if self.current is not None and revision.sha256 != self.current.sha256:
                    raise BadRevision(
                        f"the kept revision {number} is not the one that was accepted",
                        found=f"sha256 {revision.sha256}",
                        expected=f"sha256 {self.current.sha256}",
                        hint="it is fetched again",
                    )
            except GatewayError as e:
                self._log.event("sync.damaged", "error", revision=number, message=e.one_line())
                continue
            except Exception as e:
                self._defect(e)
                continue
            self._adopt(revision)
            break
        else:
            if self.current is not None:
                # Its number still counts: nothing older is taken.
                self._damaged = True
                self._board.accepted(self.current.revision)
                self._kept_problem(f"the kept copy of revision {self.current.revision} cannot be used")
        if unreadable and self.current is None:
            self._kept_problem("nothing that was kept can be used")

    def _adopt(self, revision: Revision) -> None:
        self._archive = _archive_sha256(revision)
        known = self.current
        self.current = known or Current(revision.number, revision.sha256, timestamp())
        self._board.accepted(revision.number)
        with self._folder_may_fail():
            if self._prepare_again(revision) or known is None:
                # Replaced, though it may say the same: gateways look at a revision when the file changes.
                self.current = self._keeper.commit(revision)

    def _prepare_again(self, revision: Revision) -> bool:
        """Bring the prepared form up to this version and these settings; return whether it changed."""
        number = revision.number
        try:
            prepared = self._vet.prepare(revision, dry_run=False)
        except Problems as e:
            self._log.event("sync.damaged", "error", revision=number, message=_all_lines(e.problems))
            self._kept_problem(f"revision {number} would be refused now: {e.problems[0].one_line()}")
            return False
        except Exception as e:
            # A defect of the checks must not take config-sync down: the gateways serve this revision.
            self._defect(e)
            self._kept_problem(f"revision {number} could not be checked: {type(e).__name__}")
            return False
        try:
            if read_prepared(self._keeper.folder, number) == prepared:
                return False
        except BadRevision as e:
            self._log.event("sync.damaged", "error", revision=number, message=e.one_line())
        self._keeper.write_prepared(number, prepared)
        return True

    def _kept_problem(self, text: str) -> None:
        self._board.note("kept", text)
        self._kept_seen = fingerprint(self._inputs)

    def _look_at_kept_again(self) -> None:
        """Verify what is kept once more when secrets or site keys changed: it may have been for want of them."""
        if self._kept_seen is not None and fingerprint(self._inputs) != self._kept_seen:
            try:
                self.recover()
            except Exception as e:
                self._defect(e)

    @contextmanager
    def _folder_may_fail(self) -> Generator[None]:
        """Go on with what is kept when the folder cannot be written: a full disk must not end config-sync."""
        try:
            yield
        except (SyncFolderFailed, OSError) as e:
            message = e.one_line() if isinstance(e, SyncFolderFailed) else e.strerror or str(e)
            self._log.event("sync.damaged", "error", revision=None, message=message)
            self._board.note("folder", message)

    # --- the loop ---

    def pause(self) -> float:
        """Return the seconds until the next step."""
        base = self._settings.reload_interval / 4 * (0.75 + self._jitter() / 2)
        if self._failures:
            return min(SLOWEST, base * 2.0 ** min(self._failures, 20))
        if self._pending is not None:
            # A retry is not late because the pointer is asked for seldom.
            base = min(base, self._settings.secrets_poll)
        return base

    def step(self, *, asked: bool = False) -> None:
        """Ask the source once and do what follows.

        Args:
            asked: somebody asked for a check at once; what may heal is tried again now.
        """
        self._look_at_kept_again()
        try:
            pointer = self._source.pointer(self._pointer.etag if self._pointer is not None else None)
        except NoRevision as e:
            self._answered()
            self._nothing(e)
            return
        except BadRevision as e:
            self._answered()
            self._pointer = None
            self._pending = None
            self._refuse(None, [e], Plan())
            return
        except GatewayError as e:
            self._lost(e.one_line())
            return
        except Exception as e:
            self._defect(e)
            self._lost(f"a defect of config-sync: {type(e).__name__}")
            return
        self._answered()
        self._waiting = False
        self._board.note("source")
        if pointer is not None:
            self._pointer, self._pending = pointer, None
            self._board.pointer(pointer.revision)
            self._consider(pointer)
        elif self._pending is not None and self._pointer is not None and (asked or self._due(self._pending)):
            self._consider(self._pointer)

    def _answered(self) -> None:
        if self._failures:
            self._log.event("sync.source_back", source=self._source.describe())
        self._failures = 0
        self._board.answered()

    def _lost(self, why: str) -> None:
        if not self._failures:
            self._log.event(
                "sync.source_lost",
                "warning",
                source=self._source.describe(),
                message=why,
                revision=self.current.revision if self.current is not None else None,
            )
        self._failures += 1
        self._board.lost(why)

    def _nothing(self, error: NoRevision) -> None:
        self._pointer = None
        self._pending = None
        self._board.pointer(None)
        if not self._waiting:
            self._waiting = True
            self._log.event("sync.waiting", message=error.one_line())
        if self.current is not None:
            self._board.note(
                "source", f"the source holds no revision any more; revision {self.current.revision} stays in force"
            )

    def _due(self, pending: _Pending) -> bool:
        if pending.due is not None and self._clock() >= pending.due:
            return True
        return bool(pending.plan.folders) and fingerprint(pending.plan.folders) != pending.seen

    # --- one revision ---

    def _consider(self, pointer: Pointer) -> None:
        begun = self._clock()
        # Before anything is read: a change that comes meanwhile is a change.
        settings = self._settings
        seen = {f: fingerprint((f,)) for f in self._inputs}
        fetching = False
        try:
            if self._known(pointer):
                return
            fetching = True
            self._board.trying(pointer.revision)
            raw = self._source.fetch(pointer, settings.revision_max * _MIB)
            fetching = False
            self._take(pointer, raw, begun)
            return
        except Problems as e:
            problems: list[BaseException] = list(e.problems)
        except GatewayError as e:
            problems = [e]
        except Exception as e:
            self._defect(e)
            problems = [e]
        finally:
            self._board.trying(None)
        how = plan(problems, fetching=fetching, secrets_dir=settings.secrets_dir, site_keys_dir=settings.site_keys_dir)
        self._refuse(pointer.revision, problems, how)
        if how.first is None and not how.folders:
            self._pending = None
            return
        pause = how.first or 0.0
        if self._pending is not None and self._pending.plan == how:
            pause = min(self._pending.pause * 2, how.longest)
        self._pending = _Pending(
            how,
            self._clock() + pause if how.first is not None else None,
            pause,
            tuple(e for f in how.folders for e in seen[f]),
        )

    def _known(self, pointer: Pointer) -> bool:
        """Return whether the pointer names what is in force; refuse one that leads back."""
        current = self.current
        if current is None or pointer.revision > current.revision:
            return False
        if pointer.revision < current.revision:
            raise OlderRevision(
                f"the source leads back to revision {pointer.revision}",
                found=f"revision {pointer.revision}",
                expected=f"a number above {current.revision}, which is in force on this node",
                hint=f"if the source was restored from a backup, push with --revision {current.revision + 1}; "
                "to go back on purpose use `moat-gateway config rollback`",
            )
        if pointer.sha256 != self._archive or self._damaged:
            return False
        self._pending = None
        self._board.healed()
        return True

    def _take(self, pointer: Pointer, raw: bytes, begun: float) -> None:
        revision = self._vet.open(raw)
        if revision.number != pointer.revision:
            raise BadRevision(
                "the pointer and the archive do not name the same revision",
                found=f"revision {revision.number} in {pointer.object}",
                expected=f"revision {pointer.revision}",
                hint="push the configuration again",
            )
        current = self.current
        if current is not None and revision.number == current.revision and revision.sha256 != current.sha256:
            raise BadRevision(
                f"another revision {revision.number} was accepted here before",
                found=f"sha256 {revision.sha256}",
                expected=f"sha256 {current.sha256}",
                hint=f"two sites pushed the same number; push again with --revision {current.revision + 1} or above",
            )
        repaired = current is not None and revision.number == current.revision
        prepared = self._vet.prepare(revision, dry_run=not repaired)
        self._keeper.keep(revision, prepared)
        self.current = self._keeper.commit(revision)
        self._archive = pointer.sha256
        self._damaged, self._kept_seen = False, None
        self._pending = None
        self._board.accepted(revision.number)
        self._board.note("kept")
        self._log.event(
            "sync.accepted",
            revision=revision.number,
            sha256=revision.sha256,
            key=revision.key_id,
            files=len(revision.files),
            author=revision.author,
            repaired=repaired,
            seconds=round(self._clock() - begun, 3),
        )
        self._board.note("folder")
        with self._folder_may_fail():
            self._keeper.prune(self._settings.sync_keep, revision.number)

    def _refuse(self, revision: int | None, problems: Sequence[BaseException], how: Plan) -> None:
        first = problems[0]
        kind = first.kind if isinstance(first, GatewayError) else "error"
        reason = _all_lines(problems)
        if self._board.refused(revision, kind, reason):
            self._log.event(
                "sync.refused", "error", revision=revision, kind=kind, message=reason, tried_again=how.words()
            )

    def _defect(self, error: BaseException) -> None:
        self._log.event("defect", "error", error=type(error).__name__, where=where_of(error))


def _all_lines(problems: Sequence[BaseException]) -> str:
    first = problems[0]
    text = first.one_line() if isinstance(first, GatewayError) else f"a defect of config-sync: {type(first).__name__}"
    more = len(problems) - 1
    return f"{text} (and {more} more)" if more else text


def _archive_sha256(revision: Revision) -> str:
    """Return the sha256 of the archive that a kept revision came in: there is one spelling only."""
    members = [(MANIFEST, revision.manifest), (SIGNATURE, revision.signature)]
    members += [(path, revision.files[path]) for path in sorted(revision.files)]
    return hashlib.sha256(ustar.build(members)).hexdigest()
