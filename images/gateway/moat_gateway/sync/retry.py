# SPDX-License-Identifier: Apache-2.0
"""When a refused revision is tried again, although its pointer did not change.

Most refusals are final: the same bytes will be refused again. What may heal without a push is tried again: by itself
after a growing pause, or when the files change that it was refused for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moat_gateway.dryrun import DryRunUnavailable
from moat_gateway.errors import (
    BadSignature,
    BadSiteKey,
    DryRunFailed,
    GatewayError,
    SyncFolderFailed,
    UnreadableSecret,
    UnsetSecret,
)

#: First and longest pause (s). The object of a pointer may arrive after it (replication): asked for often.
_FETCH = (0.25, 5.0)
_FOLDER = (1.0, 10.0)
#: The dry run's process died, or was not let to its work.
_NO_DRY_RUN = (1.0, 30.0)
#: A dry run is heavy, and what fails once and not again failed for a busy machine at best.
_DRY_RUN = (30.0, 600.0)
_DEFECT = (5.0, 60.0)
_MAX_ENTRIES = 5000  # of a watched folder; more are not looked at


@dataclass(frozen=True)
class Plan:
    """How a refusal may heal.

    Attributes:
        first: seconds until it is tried again by itself, or ``None``.
        longest: to which the pause grows.
        folders: it is tried again when something in them changes.
    """

    first: float | None = None
    longest: float = 0.0
    folders: tuple[Path, ...] = ()

    def words(self) -> str:
        """Say it in the log."""
        words = []
        if self.first is not None:
            words.append(f"after {self.first:g} s, later every {self.longest:g} s")
        if self.folders:
            words.append("when something changes in " + " or ".join(map(str, self.folders)))
        return ", or ".join(words) or "with the next push"


def plan(problems: Sequence[BaseException], *, fetching: bool, secrets_dir: Path, site_keys_dir: Path) -> Plan:
    """Return how a refusal may heal.

    Args:
        problems: everything that was found.
        fetching: the archive could not be had from the source.
        secrets_dir: of the settings.
        site_keys_dir: of the settings.
    """
    pauses: list[tuple[float, float]] = [_FETCH] if fetching else []
    folders: list[Path] = []
    for problem in problems:
        if isinstance(problem, SyncFolderFailed):
            pauses.append(_FOLDER)
        elif isinstance(problem, DryRunUnavailable):
            pauses.append(_NO_DRY_RUN)
        elif isinstance(problem, DryRunFailed):
            pauses.append(_DRY_RUN)
        elif isinstance(problem, UnsetSecret | UnreadableSecret):
            folders.append(secrets_dir)
        elif isinstance(problem, BadSignature | BadSiteKey):
            folders.append(site_keys_dir)
        elif not isinstance(problem, GatewayError):
            pauses.append(_DEFECT)
    first, longest = min(pauses, default=(None, 0.0))
    return Plan(first, longest, tuple(dict.fromkeys(folders)))


def fingerprint(folders: Sequence[Path]) -> tuple[tuple[str, int, int, int], ...]:
    """Return what changes whenever a file below these folders is added, removed, replaced or written."""
    found: list[tuple[str, int, int, int]] = []
    for folder in folders:
        for place, names, files in os.walk(folder):
            for name in (*names, *files):
                path = os.path.join(place, name)  # noqa: PTH118 - many, and often
                try:
                    # Followed: a mounted secret is often a link that is turned to another file.
                    s = os.stat(path)  # noqa: PTH116
                except OSError:
                    found.append((path, 0, 0, 0))
                else:
                    found.append((path, s.st_mtime_ns, s.st_ino, s.st_size))
            if len(found) > _MAX_ENTRIES:
                break
    return tuple(sorted(found))
