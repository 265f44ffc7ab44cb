# SPDX-License-Identifier: Apache-2.0
"""The folder that ``moat-gateway config init`` writes: a configuration to start from."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from moat_gateway import configdir
from moat_gateway.errors import BadConfig
from moat_gateway.settings import Settings

_EXAMPLE = "model:8081"
_ONE_SERVER = re.compile(r"[A-Za-z0-9.-]+:[0-9]+|\[[0-9a-fA-F:]+\]:[0-9]+")


def write(folder: Path, settings: Settings) -> tuple[str, ...]:
    """Make the folder, if it is not there, and the files in it.

    The example names the first server that the settings allow, so that it can be checked as it is.

    Returns:
        The names of the files.

    Raises:
        BadConfig: a file is in the way, or the folder cannot be written.
    """
    names = (configdir.CONFIG, configdir.KEYS)
    there = [n for n in names if os.path.lexists(folder / n)]
    if there:
        raise BadConfig(
            "there is a configuration already",
            found=", ".join(there),
            expected="a folder without one",
            hint="give another folder; nothing is overwritten",
            path=str(folder),
        )
    server = next((d for d in settings.egress_allow if _ONE_SERVER.fullmatch(d)), _EXAMPLE)
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        for name in names:
            text = resources.files(__package__).joinpath(name).read_text("utf-8").replace(_EXAMPLE, server)
            fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                f.write(text)
    except OSError as e:
        raise BadConfig(
            "the folder cannot be written", found=e.strerror or str(e), hint="choose another place", path=str(folder)
        ) from e
    return names
