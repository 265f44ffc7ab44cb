# SPDX-License-Identifier: Apache-2.0
"""The two programs of the host that the capture uses: ``nft`` and ``ip``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Final

from moat.site.egresscheck.model import NotAvailable

#: Both are in sbin, which is not on everybody's path (`su`, Ansible over SSH).
ENVIRONMENT: Final = {**os.environ, "PATH": f"/usr/sbin:/sbin:{os.environ.get('PATH', os.defpath)}", "LC_ALL": "C"}


def run(argv: Sequence[str], stdin: str = "") -> str:
    """Run a program and return its stdout.

    Raises:
        NotAvailable: it is not installed, or it refuses; the message has its words.
    """
    try:
        done = subprocess.run(list(argv), input=stdin, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    except OSError as e:
        raise NotAvailable(f"cannot start `{argv[0]}`: {e.strerror}") from e
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise NotAvailable(f"`{' '.join(argv[:6])}` refuses: {words[0] if words else f'code {done.returncode}'}")
    return done.stdout
