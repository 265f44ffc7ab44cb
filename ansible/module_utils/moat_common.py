# SPDX-License-Identifier: Apache-2.0
"""What several modules of ``ansible/library`` share; Ansible packs it beside each module that imports it."""

from __future__ import annotations

import os
from pathlib import Path


class Refused(Exception):
    """What the operator has to put right; the text is shown."""


def write(path: Path, data: bytes, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Write a file whole or not at all; owner and mode are right before its name exists.

    A run that was killed leaves at most ``.NAME.tmp``, which the next one takes away: one process writes a file at a
    time.

    Args:
        path: of the file; its folder is there.
        data: its content.
        mode: its permissions.
        owner: user and group by number; without it those of this process.

    Raises:
        OSError: it cannot be written; the file before is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            if owner is not None:
                os.fchown(f.fileno(), *owner)
            os.fchmod(f.fileno(), mode)
            os.fsync(f.fileno())
        temporary.replace(path)
        # The name too outlives a power cut.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
