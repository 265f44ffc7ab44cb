# SPDX-License-Identifier: Apache-2.0
"""Changing ``keys.yaml``: add, rotate and revoke keys, in place, keeping comments, never leaving a half-written file.

The text is changed where YAML says that the entry begins and ends. The result is parsed and compared with what was
meant; if the file is written in a way that this cannot handle (flow style), it is written anew, without comments.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from moat_gateway import keys
from moat_gateway.errors import BadKeys
from moat_gateway.keys import KeySet
from moat_gateway.sync.files import sync_folder

_EMPTY = "# Teams and client keys of the gateway; secrets are not in here, only their sha256.\nteams: []\nkeys: []\n"
_NEW_FILE_MODE = 0o640
_OVERLAP_MAX = timedelta(days=365)
_ID_ROOM = 56  # characters of an id of 64, so that a suffix fits


def new_key(
    path: Path,
    key_id: str,
    team: str,
    *,
    models: Sequence[str] | None = None,
    not_after: str | None = None,
    create_team: bool = False,
    secret: str | None = None,
) -> str:
    """Add a key and return its secret, which is stored nowhere.

    Args:
        path: the keys file; made if it does not exist.
        key_id: id of the new key.
        team: id of its team.
        models: what the key may use; ``None`` for the team's models.
        not_after: a date, or a time with its zone.
        create_team: make the team if it is not there, with ``models`` (or every model).
        secret: for tests; else a random one.

    Raises:
        BadKeys: the file is bad, the id is taken, or the team is not there.
    """
    secret = secret if secret is not None else keys.new_secret()
    entry: dict[str, Any] = {"id": key_id, "team": team, "sha256": keys.hash_secret(secret)}
    if not_after is not None:
        entry["not_after"] = _end(not_after)
    if models:
        entry["models"] = list(models)

    def change(text: str, now: KeySet) -> str:
        if any(k.id == key_id for k in now.keys):
            raise BadKeys(
                f"the key {key_id} is there already", hint="choose another id, or revoke it first", path=str(path)
            )
        if team not in now.teams:
            if not create_team:
                raise BadKeys(
                    f"the team {team} is not there",
                    found=", ".join(sorted(now.teams)) or "no team",
                    expected=team,
                    hint="add it to the file, or give --create-team",
                    path=str(path),
                )
            text = _with_entry(text, "teams", {"id": team, "models": list(models) if models else ["*"]})
        return _with_entry(text, "keys", entry)

    _edit(path, change, create=True)
    return secret


@dataclass(frozen=True)
class Rotated:
    """What a rotation made.

    Attributes:
        secret: of the key from now on; stored nowhere.
        old_id: under which the old secret goes on.
        old_ends: the first moment at which the old secret no longer counts.
    """

    secret: str = field(repr=False)
    old_id: str
    old_ends: datetime


def parse_overlap(text: str) -> timedelta:
    """Return a length of time such as ``24h``, ``30m``, ``7d`` or ``90s``; ``0`` for none.

    Raises:
        BadKeys: it is none, or longer than a year.
    """
    match = re.fullmatch(r"(0)|([0-9]{1,7})([smhd])", text)
    length = None
    if match:
        units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
        length = timedelta() if match[1] else timedelta(seconds=int(match[2]) * units[match[3]])
    if length is None or length > _OVERLAP_MAX:
        raise BadKeys("--overlap is no length of time", found=text, expected="24h, 30m, 7d or 90s; at most 365d")
    return length


def rotate(
    path: Path,
    key_id: str,
    overlap: timedelta,
    *,
    not_after: str | None = None,
    secret: str | None = None,
    now: datetime | None = None,
) -> Rotated:
    """Give a key a new secret; the old one counts for a while longer, under another id.

    Args:
        path: the keys file.
        key_id: id of the key; team and models stay.
        overlap: how long the old secret counts, but not longer than it did.
        not_after: end of the new secret; default: the end that the key had.
        secret: for tests; else a random one.
        now: for tests.

    Raises:
        BadKeys: the file is bad, has no such key, or the key has ended.
    """
    secret = secret if secret is not None else keys.new_secret()
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    ends = moment + overlap
    new_end = _end(not_after) if not_after is not None else None
    old_id = ""

    def change(text: str, file: KeySet) -> str:
        nonlocal ends, old_id
        index = next((i for i, k in enumerate(file.keys) if k.id == key_id), None)
        if index is None:
            raise _no_such_key(path, file, key_id)
        old = file.keys[index]
        if old.not_after is not None:
            if old.not_after <= moment:
                raise BadKeys(
                    f"the key {key_id} has ended",
                    found=_text(old.not_after),
                    expected="a key that counts",
                    hint="revoke it and make a new one with `moat-gateway keys new`",
                    path=str(path),
                )
            ends = min(ends, old.not_after)
        taken = {k.id for k in file.keys}
        candidates = (f"{key_id[:_ID_ROOM]}.old{'' if n == 1 else n}" for n in itertools.count(1))
        old_id = next(c for c in candidates if c not in taken)
        entry = dict(yaml.safe_load(text)["keys"][index])
        fresh = {**entry, "sha256": keys.hash_secret(secret)}
        if new_end is not None:
            fresh["not_after"] = new_end
        return _with_keys_instead(text, index, [fresh, {**entry, "id": old_id, "not_after": _text(ends)}])

    _edit(path, change, create=False)
    return Rotated(secret, old_id, ends)


def revoke(path: Path, key_id: str) -> tuple[str, ...]:
    """Remove a key, and the old secrets of it that :func:`rotate` left: whoever revokes a key wants none to count.

    Returns:
        The ids of those old secrets.

    Raises:
        BadKeys: the file is bad, or has no such key.
    """
    # `.old` again: an old secret can have been rotated itself.
    leftover = re.compile(re.escape(key_id[:_ID_ROOM]) + r"(?:\.old[0-9]*)+")
    removed: tuple[str, ...] = ()

    def change(text: str, now: KeySet) -> str:
        nonlocal removed
        if all(k.id != key_id for k in now.keys):
            raise _no_such_key(path, now, key_id)
        gone = [i for i, k in enumerate(now.keys) if k.id == key_id or leftover.fullmatch(k.id)]
        removed = tuple(now.keys[i].id for i in gone if now.keys[i].id != key_id)
        for i in reversed(gone):
            text = _without_key(text, i)
        return text

    _edit(path, change, create=False)
    return removed


def _no_such_key(path: Path, now: KeySet, key_id: str) -> BadKeys:
    found = ", ".join(k.id for k in now.keys) or "no key"
    return BadKeys(f"there is no key {key_id}", found=found, expected=key_id, path=str(path))


def _end(text: str) -> str:
    """Return --not-after as the file has it."""
    try:
        return _text(keys.parse_not_after(text))
    except (ValueError, OverflowError):
        raise BadKeys(
            "--not-after is not a moment", found=text, expected="2027-06-30, or a time with its zone"
        ) from None


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _edit(path: Path, change: Callable[[str, KeySet], str], *, create: bool) -> None:
    with _locked(path.parent):
        if create and not path.exists():
            text = _EMPTY
            now = keys.parse(text.encode(), str(path))
        else:
            now = keys.read(path)
            text = path.read_text("utf-8")
        changed = change(text, now).encode()
        keys.parse(changed, f"{path} (as it would be)")
        _replace(path, changed)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, so that two commands do not lose each other's change."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise BadKeys(
            "the folder of the keys file cannot be opened", found=e.strerror or str(e), path=str(folder)
        ) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename; keep the old file's mode and owner."""
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(content)
                f.flush()
                mode = _NEW_FILE_MODE
                with suppress(FileNotFoundError):
                    old = path.stat()
                    mode = old.st_mode & 0o7777
                    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(f.fileno(), old.st_uid, old.st_gid)
                os.fchmod(f.fileno(), mode)
                os.fsync(f.fileno())
            Path(temporary).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(temporary).unlink()
            raise
        sync_folder(path.parent)
    except OSError as e:
        raise BadKeys(
            "cannot be written",
            found=e.strerror or str(e),
            hint="run the command as a user who may write the folder",
            path=str(path),
        ) from e


def _with_entry(text: str, section: str, entry: dict[str, Any]) -> str:
    """Return ``text`` with one more entry at the end of ``section``."""
    wanted = yaml.safe_load(text) or {}
    wanted[section] = [*(wanted.get(section) or []), entry]
    node = _section(text, section)
    if node is None:
        candidate = text.rstrip("\n") + f"\n{section}:\n" + _item(entry, 2)
    elif isinstance(node, yaml.SequenceNode) and node.value and not node.flow_style:
        at = _start_of_line(text, _end_of_block(text, node))
        head = text[:at] if not at or text[at - 1] == "\n" else text[:at] + "\n"
        candidate = head + _item(entry, node.start_mark.column) + text[at:]
    else:  # `[]`, or nothing after the colon
        start, end = node.start_mark.index, node.end_mark.index
        line_end = text.find("\n", end)
        line_end = len(text) if line_end < 0 else line_end
        candidate = text[:start].rstrip(" ") + text[end:line_end] + "\n" + _item(entry, 2) + text[line_end + 1 :]
    return candidate if _same(candidate, wanted) else _anew(wanted)


def _without_key(text: str, index: int) -> str:
    """Return ``text`` without the key at ``index``."""
    wanted = yaml.safe_load(text)
    del wanted["keys"][index]
    node = _section(text, "keys")
    if not isinstance(node, yaml.SequenceNode) or node.flow_style:
        return _anew(wanted)
    start = _start_of_line(text, node.value[index].start_mark.index)
    last = index == len(node.value) - 1
    end = _end_of_block(text, node) if last else node.value[index + 1].start_mark.index
    end = _start_of_line(text, end)
    candidate = text[:start] + text[end:]
    if len(node.value) == 1:
        candidate = candidate.replace("keys:", "keys: []", 1)
    return candidate if _same(candidate, wanted) else _anew(wanted)


def _with_keys_instead(text: str, index: int, entries: Sequence[dict[str, Any]]) -> str:
    """Return ``text`` with these keys in the place of the one at ``index``; comments around it stay."""
    wanted = yaml.safe_load(text)
    wanted["keys"][index : index + 1] = entries
    node = _section(text, "keys")
    if not isinstance(node, yaml.SequenceNode) or node.flow_style:
        return _anew(wanted)
    start = _start_of_line(text, node.value[index].start_mark.index)
    end = _end_of_block(text, yaml.SequenceNode("", node.value[: index + 1]))
    head = text[:start] + "".join(_item(e, node.start_mark.column) for e in entries)
    candidate = head + text[end:]
    return candidate if _same(candidate, wanted) else _anew(wanted)


def _section(text: str, name: str) -> yaml.Node | None:
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(top, yaml.MappingNode):
        return None
    return next((v for k, v in top.value if k.value == name), None)


def _end_of_block(text: str, node: yaml.SequenceNode) -> int:
    """Return where the last entry ends: comments after it belong to what follows."""
    last = node.value[-1]
    end = last
    while isinstance(end, yaml.MappingNode | yaml.SequenceNode) and end.value and not end.flow_style:
        end = end.value[-1][1] if isinstance(end, yaml.MappingNode) else end.value[-1]
    newline = text.find("\n", end.end_mark.index)
    return len(text) if newline < 0 else newline + 1


def _start_of_line(text: str, at: int) -> int:
    if at >= len(text):
        return len(text)
    return text.rfind("\n", 0, at) + 1


def _item(entry: dict[str, Any], indent: int) -> str:
    body = yaml.safe_dump(entry, sort_keys=False, default_flow_style=None, width=10_000)
    pad = " " * indent
    lines = body.rstrip("\n").split("\n")
    return "".join(f"{pad}{'- ' if i == 0 else '  '}{line}\n" for i, line in enumerate(lines))


def _same(text: str, wanted: dict[str, Any]) -> bool:
    try:
        got = yaml.safe_load(text)
    except yaml.YAMLError:
        return False

    def norm(v: Any) -> Any:
        return {k: x or [] for k, x in v.items()} if isinstance(v, dict) else v

    return bool(norm(got) == norm(wanted))


def _anew(wanted: dict[str, Any]) -> str:
    return yaml.safe_dump(wanted, sort_keys=False, width=10_000)
