# SPDX-License-Identifier: Apache-2.0
"""The evidence as two files: ``egress-report.json`` for programs, ``egress-report.html`` for the reviewer.

The JSON is :meth:`Report.to_dict`, whole. The page (:mod:`moat.site.egresscheck.page`) says the same to a
person.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from moat.site.egresscheck.model import JSON_NAME, Report
from moat.site.egresscheck.page import page
from moat.site.state import write_atomically

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
        # Not for everyone: it tells about the site's inside.
        write_atomically(folder / name, text.encode("utf-8"), 0o640)
