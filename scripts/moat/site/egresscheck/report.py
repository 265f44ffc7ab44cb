# SPDX-License-Identifier: Apache-2.0
"""The evidence as two files: ``egress-report.json`` for programs, ``egress-report.html`` for the reviewer.

The JSON is :meth:`Report.to_dict`, whole. The page (:mod:`moat.site.egresscheck.page`) says the same to a
person.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from moat.site.egresscheck.model import Report
from moat.site.egresscheck.page import JSON_NAME, page

HTML_NAME: Final = "egress-report.html"


def as_json(report: Report) -> str:
    """Return the text of ``egress-report.json``, which is also what ``--json`` prints."""
    return json.dumps(report.to_dict(), sort_keys=True)


def write_report(report: Report, folder: Path) -> None:
    """Write both files; each appears whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    for name, text in ((JSON_NAME, as_json(report) + "\n"), (HTML_NAME, page(report))):
        _write(folder / name, text.encode("utf-8"))


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Not for everyone: it tells about the site's inside.
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
