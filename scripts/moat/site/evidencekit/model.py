# SPDX-License-Identifier: Apache-2.0
"""What crosses the boundaries inside the collection of evidence, and the redaction of what could be a secret."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

#: Runs a program with text for its stdin and returns exit code, stdout and stderr.
Runner = Callable[[Sequence[str], str], tuple[int, str, str]]

REDACTED: Final = "[redacted]"
#: A private key stands at the beginning of its file; certificates may come before it.
_PEM_SEARCHED: Final = 64 * 1024
_SECRET_FOLDERS: Final = ("/etc/moat/secrets", "/etc/moat/site/secrets")
#: A word that says "a secret follows", and what follows.
_NAMED = re.compile(
    r"(?i)\b([\w-]*(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|access[_-]?key|credentials?|authorization)[\w-]*)"
    r"(\s*[=:]\s*|\s+)(?:bearer\s+|basic\s+)?(\"[^\"]*\"|'[^']*'|[^\s;,]+)"
)
_USERINFO = re.compile(r"(//)[^\s/@]+@")
_KEYS = re.compile(r"\b(?:sk|pk|ghp|glpat|xox[abp])-[A-Za-z0-9_-]{8,}|\bAKIA[A-Z0-9]{16}\b")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def redact(text: str) -> str:
    """Return ``text`` without what looks like a secret: values behind telling names, user info of a URL, known keys."""
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _USERINFO.sub(rf"\1{REDACTED}@", text)
    text = _KEYS.sub(REDACTED, text)
    return _NAMED.sub(lambda m: f"{m[1]}{m[2]}{REDACTED}", text)


@dataclass(frozen=True)
class Gap:
    """Something that could not be collected, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Finding:
    """Something that contradicts what Moat promises of a host, and what to do."""

    what: str
    found: str
    expected: str
    hint: str


@dataclass
class Part:
    """One subject.

    Attributes:
        name: of its file, ``<name>.json``.
        title: for a person.
        data: what stays the same from one collection to the next while nothing on the host changes.
        moment: what differs each time: counts, times, process ids.
        gaps: what could not be collected.
        findings: what must not be so.
    """

    name: str
    title: str
    data: dict[str, Any] = field(default_factory=dict)
    moment: dict[str, Any] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def gap(self, what: str, why: object) -> None:
        """Note that something could not be collected."""
        self.gaps.append(Gap(what, redact(str(why)).strip() or "no reason given"))


@dataclass(frozen=True)
class Host:
    """One host, as the collectors see it.

    Attributes:
        root: where its file system begins; ``/`` but for a test's planted tree.
        store: release store.
        trusted_keys: folder of pinned public keys.
        state: folder of ``installed.json``.
        evidence: folder of the collections and of the egress reports.
        now: seconds since 1970.
        run: runs a program.
    """

    root: Path
    store: Path
    trusted_keys: Path
    state: Path
    evidence: Path
    now: float
    run: Runner

    def path(self, text: str | Path) -> Path:
        """Return an absolute path of the host below ``root``."""
        return self.root / str(text).lstrip("/")

    def ask(self, part: Part, what: str, argv: Sequence[str]) -> str | None:
        """Return a program's output, or note a gap and return ``None``."""
        code, out, err = self.run(argv, "")
        if code != 0:
            part.gap(what, f"{' '.join(argv)} ended with code {code}: {last_line(err) or last_line(out)}")
            return None
        return out


def run_program(argv: Sequence[str], stdin: str) -> tuple[int, str, str]:
    """Run one program for at most a minute, in English; a missing one has exit code 127."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=environ,
            timeout=60,
        )
    except OSError as e:
        return 127, "", e.strerror or str(e)
    except subprocess.TimeoutExpired:
        return 124, "", "no answer within 60 seconds"
    return done.returncode, done.stdout, done.stderr


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the ordinary files below a folder, sorted, following no link; a missing folder has none.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        return
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                yield path


def _holds_private_key(path: Path) -> bool:
    if path.suffix == ".key":
        return True
    with path.open("rb") as f:
        return b"PRIVATE KEY-----" in f.read(_PEM_SEARCHED)


def secret_files(host: Host) -> Iterator[Path]:
    """Yield every file of Moat that holds a secret: never read but by the last check before anything is written.

    Raises:
        OSError: a folder or a file below /etc/moat cannot be read.
    """
    folders = [host.path(f) for f in _SECRET_FOLDERS]
    for path in files_below(host.path("/etc/moat")):
        if any(path.is_relative_to(f) for f in folders) or _holds_private_key(path):
            yield path
