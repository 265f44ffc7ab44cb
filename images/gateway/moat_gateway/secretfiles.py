# SPDX-License-Identifier: Apache-2.0
"""Secrets come from files, one value a file; they are read again when they change, and never logged.

A reference ``os.environ/NAME`` of the LiteLLM configuration is answered by the file ``NAME`` in the secrets folder,
or, if there is none, by the file ``name`` in lower case. The inherited environment is never asked: it is visible to
whoever may inspect the container.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moat_gateway.errors import BadMasterKey, GatewayError, UnreadableSecret
from moat_gateway.sync.files import Stamp, stamp

MASTER_KEY_MIN = 32  # characters
_MAX_BYTES = 64 << 10
_REFERENCE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
#: Keys of documentation, compose samples and tutorials; compared without case and without the prefix ``sk-``.
WELL_KNOWN = frozenset(
    {
        "1234", "12345", "123456", "12345678", "1234567890", "0000", "test", "test-key", "testing", "changeme",
        "change-me", "change_me", "default", "secret", "password", "admin", "master", "master-key", "master_key",
        "litellm", "litellm-key", "litellm-master-key", "litellm_master_key", "your-master-key", "your_master_key",
        "my-master-key", "key", "none",
        "local", "demo", "example", "proxy", "replace-me", "replaceme", "xxx", "xxxx",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Secrets:
    """The values that the configuration asked for, by the name in its references.

    The values are kept out of ``repr``, so that no traceback or log of the object shows them.
    """

    values: Mapping[str, str] = field(default_factory=dict, repr=False)


def is_reference_name(name: str) -> bool:
    """Say whether a name can be the name of a secret."""
    return bool(_REFERENCE_NAME.fullmatch(name))


def read_value(path: Path) -> str:
    """Return the one line of a secret file (a newline at its end is not part of the secret).

    Raises:
        UnreadableSecret: it cannot be read, is empty, too large, not UTF-8, or holds control characters.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(_MAX_BYTES + 1)
    except OSError as e:
        raise UnreadableSecret(
            "the secret cannot be read",
            found=e.strerror or str(e),
            hint="check that the file exists, its owner and its mode (0400 or 0600 for the gateway's user)",
            path=str(path),
        ) from e
    try:
        value = raw.decode("utf-8")
    except UnicodeDecodeError:
        value = "\0"
    value = value.removesuffix("\n").removesuffix("\r")
    if not value or len(raw) > _MAX_BYTES or "\0" in value:
        raise UnreadableSecret(
            "the secret is empty, too large or not text",
            found=f"{len(raw)} bytes",
            expected="one value as UTF-8 text, at most 64 KiB",
            hint="write the value into the file",
            path=str(path),
        )
    return value


def find(folder: Path, name: str) -> Path | None:
    """Return the file that answers ``os.environ/NAME``, or ``None``."""
    for candidate in (folder / name, folder / name.lower()):
        # lexists: a dangling link or a folder is a broken secret, not a missing one.
        if candidate.is_symlink() or candidate.exists():
            return candidate
    return None


def read_master_key(path: Path) -> str:
    """Return the administrator's key.

    Raises:
        BadMasterKey: the file is missing, or the key is well known, too short, or too simple.
        UnreadableSecret: the file is there and cannot be read.
    """
    if not path.exists() and not path.is_symlink():
        raise BadMasterKey(
            "there is no master key",
            found="no such file",
            expected="a file with one line of at least 32 random characters",
            hint="make one (for instance `openssl rand -hex 32`), mode 0400, or correct MOAT_MASTER_KEY_FILE",
            path=str(path),
        )
    key = read_value(path)
    bare = key.strip().lower().removeprefix("sk-")
    if bare in WELL_KNOWN:
        raise BadMasterKey(
            "the master key is a well-known one",
            expected="at least 32 random characters",
            hint="make a new one, for instance with `openssl rand -hex 32`",
            path=str(path),
        )
    if len(key) < MASTER_KEY_MIN or any(c.isspace() or not c.isprintable() for c in key):
        raise BadMasterKey(
            "the master key is too short or holds blanks",
            found=f"{len(key)} characters",
            expected=f"at least {MASTER_KEY_MIN} characters, no blanks",
            hint="make a new one, for instance with `openssl rand -hex 32`",
            path=str(path),
        )
    if len(set(bare)) < 8:
        raise BadMasterKey(
            "the master key is too simple",
            found=f"{len(set(bare))} different characters",
            expected="at least 8",
            hint="make a new one, for instance with `openssl rand -hex 32`",
            path=str(path),
        )
    return key


@dataclass(frozen=True)
class Look:
    """What the files held at one look.

    Attributes:
        values: the last good value of each name; a name that never had one is missing.
        problems: the names whose file cannot be used now, and why.
        news: the problems that were not there at the look before.
    """

    values: Mapping[str, str] = field(repr=False)
    problems: Mapping[str, GatewayError] = field(default_factory=dict)
    news: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Known:
    stamp: Stamp | None
    value: str | None = field(repr=False)
    problem: GatewayError | None


class Watch:
    """Reads files again when they change, and keeps the last good value of each.

    Args:
        read: reads one file; what it raises is the file's problem.
    """

    def __init__(self, read: Callable[[Path], str] = read_value) -> None:
        self._read = read
        self._known: dict[Path, _Known] = {}

    def look(self, files: Mapping[str, Path]) -> Look:
        """Look at these files; the price of an unchanged one is a ``stat``. Files that are not named are forgotten."""
        known = {path: self._at(path) for path in dict.fromkeys(files.values())}
        before, self._known = self._known, known
        values = {n: v for n, path in files.items() if (v := known[path].value) is not None}
        problems = {n: p for n, path in files.items() if (p := known[path].problem) is not None}
        news = tuple(n for n, p in problems.items() if (b := before.get(files[n])) is None or b.problem is not p)
        return Look(values, problems, news)

    def _at(self, path: Path) -> _Known:
        old = self._known.get(path)
        for _ in range(3):
            before = stamp(path)
            if old is not None and before == old.stamp:
                return old
            try:
                value: str | None = self._read(path)
                problem: GatewayError | None = None
            except GatewayError as e:
                value, problem = (old.value if old is not None else None), e
            if stamp(path) == before:
                return _Known(before, value, problem)
        # It is being written: the next look finds it whole.
        return old or _Known((0, 0, 0, 0), value, problem)
