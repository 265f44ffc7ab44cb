# SPDX-License-Identifier: Apache-2.0
"""The folder that becomes a revision: ``config.yaml``, ``keys.yaml``, ``routers/``, and nothing else.

What does not belong is refused and not passed over: a file that somebody wrote is meant to take effect, and a name with
a typing error would not. Links are refused because they lead to what nobody reviewed.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moat_gateway import revision, strictyaml
from moat_gateway.errors import BadConfig, BadRevision, GatewayError

CONFIG, KEYS, ROUTERS, INDEX = "config.yaml", "keys.yaml", "routers", "routers/index.yaml"
#: Settings of this machine may lie beside them; they are no part of a revision.
IGNORED = frozenset({"gateway.yaml"})
LIMIT = 1 << 30  # bytes of all files; the largest that MOAT_REVISION_MAX allows
#: Data, in formats whose reading runs no code.
DATA = frozenset({".safetensors", ".onnx", ".json", ".yaml", ".txt"})
_CODE = frozenset(
    {
        ".py", ".pyc", ".so", ".sh", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz",
        ".h5", ".keras", ".model", ".gguf", ".tar", ".zip", ".gz", ".whl",
    }
)  # fmt: skip
_BACKUP = re.compile(r".*(~|\.bak|\.orig|\.rej|\.tmp|\.old|\.save|\.sw[a-p])|\.#.*|#.*#|4913", re.IGNORECASE)


def load(folder: Path, *, limit: int = LIMIT) -> Mapping[str, bytes]:
    """Read a folder of configuration.

    Args:
        folder: of the operator, or an unpacked revision.
        limit: of all files together, bytes.

    Returns:
        The files by path, ``/`` between names.

    Raises:
        BadRevision: something in it does not belong, is a link or special file, or it is too large.
        BadConfig: it cannot be read, or a needed file is missing.
    """
    files: dict[str, bytes] = {}
    room = limit
    for path, place in _walk(folder, folder, ""):
        _belongs(path)
        files[path] = _read(place, path, room, limit)
        room -= len(files[path])
    _complete(files, str(folder))
    return files


def check(files: Mapping[str, bytes]) -> list[GatewayError]:
    """Return what is wrong with the names of a revision's files, and with ``routers/``; every problem is named."""
    problems: list[GatewayError] = []
    for path in sorted(files):
        try:
            _belongs(path)
        except BadRevision as e:
            problems.append(e)
    try:
        _complete(files, None)
    except BadConfig as e:
        problems.append(e)
    return problems + _routers(files)


def _walk(top: Path, folder: Path, below: str) -> Iterable[tuple[str, Path]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as e:
        raise BadConfig(
            "the folder cannot be read",
            found=e.strerror or str(e),
            expected=f"a folder with {CONFIG} and {KEYS}",
            hint="make one with `moat-gateway config init`, or correct the path",
            path=str(folder),
        ) from e
    for entry in entries:
        path = below + entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if path in IGNORED:
            continue
        if stat.S_ISDIR(mode) and (below or entry.name == ROUTERS):
            revision.check_path(path)
            yield from _walk(top, top / path, path + "/")
        elif stat.S_ISREG(mode):
            yield path, Path(entry.path)
        elif stat.S_ISDIR(mode):
            _belongs(path)
        else:
            raise _bad(
                path,
                "is a link" if stat.S_ISLNK(mode) else "is neither a file nor a folder",
                "plain files",
                "put the file itself there",
            )


def _read(place: Path, path: str, room: int, limit: int) -> bytes:
    try:
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as f:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _bad(path, "is not a plain file", "plain files", "put the file itself there")
            data = f.read(room + 1)
    except OSError as e:
        raise BadConfig(
            "cannot be read", found=e.strerror or str(e), hint="check the file's owner and mode", path=path
        ) from e
    if len(data) > room:
        raise _bad(path, "makes the revision too large", f"at most {limit} bytes in all", "make it smaller")
    return data


def _belongs(path: str) -> None:
    """Refuse a path that is no part of a revision.

    Raises:
        BadRevision: with the reason.
    """
    name = path.rpartition("/")[2]
    if _BACKUP.fullmatch(name):
        raise _bad(path, "is an editor's backup or a temporary file", None, "remove it")
    if not path.startswith(ROUTERS + "/"):
        if path in (CONFIG, KEYS):
            return
        near = difflib.get_close_matches(path.lower(), (CONFIG, KEYS, ROUTERS, *IGNORED), 1, 0.75)
        hint = f"rename it to {near[0]}" if near else "move it out of the folder"
        raise _bad(path, "does not belong into a revision", f"{CONFIG}, {KEYS} and {ROUTERS}/ only", hint)
    revision.check_path(path)
    suffix = Path(name).suffix.lower()
    if name.startswith("."):
        raise _bad(path, "is a hidden file", "files that are seen", "remove it")
    if suffix in _CODE:
        raise _bad(
            path,
            "is of a format that can hold code, or that needs code to be unpacked",
            " ".join(sorted(DATA)),
            "convert the model to .safetensors or .onnx",
        )
    if suffix not in DATA:
        raise _bad(path, "is of a format that no router reads", " ".join(sorted(DATA)), "remove or convert it")


def _complete(files: Mapping[str, bytes], folder: str | None) -> None:
    for name in (CONFIG, KEYS):
        if name not in files:
            raise BadConfig(
                f"{name} is missing",
                found=", ".join(sorted(files)[:5]) or "no file",
                expected=f"{CONFIG} and {KEYS}",
                hint="make it; `moat-gateway config init` writes both to start from",
                path=folder or name,
            )


def _routers(files: Mapping[str, bytes]) -> list[GatewayError]:
    """Compare ``routers/`` with its index: every file listed, every hash right."""
    there = {path: data for path, data in files.items() if path.startswith(ROUTERS + "/") and path != INDEX}
    if INDEX not in files:
        if not there:
            return []
        return [
            BadConfig(
                f"{INDEX} is missing",
                found=", ".join(sorted(there)[:5]),
                expected="a list of the models with their sha256",
                hint=f"write {INDEX}: `models: [{{file: NAME, sha256: HASH}}]`",
                path=INDEX,
            )
        ]
    try:
        document = strictyaml.parse_bytes(files[INDEX], name=INDEX, error=BadConfig)
    except GatewayError as e:
        return [e]
    problems: list[GatewayError] = []

    def report(
        at: tuple[str | int, ...], message: str, *, kind: type[GatewayError] = BadRevision, **more: str | None
    ) -> None:
        problems.append(kind(message, path=INDEX, line=document.line(at), **more))

    data = {} if document.data is None else document.data
    if not isinstance(data, dict) or set(data) - {"models"} or not isinstance(data.get("models"), list | None):
        report(
            (),
            "is not a list of models",
            kind=BadConfig,
            expected="`models:` and a list below it",
            hint="correct the file",
        )
        return problems
    listed: set[str] = set()
    for i, entry in enumerate(data.get("models") or []):
        at = ("models", i)
        if not _is_entry(entry):
            report(
                at,
                f"models[{i}] is not an entry",
                kind=BadConfig,
                expected="file and sha256, both text",
                hint="correct the line; put quotation marks around a hash of digits only",
            )
            continue
        path = f"{ROUTERS}/{entry['file']}"
        if path in listed:
            report(at, f"{entry['file']} is listed twice", hint="remove one of the two")
        listed.add(path)
        if path not in there:
            report(at, f"{entry['file']} is not there", expected=path, hint="add the file, or remove the entry")
        elif (digest := revision.sha256(there[path])) != entry["sha256"]:
            report(
                at,
                f"{entry['file']} is not the file that the index means",
                found=f"sha256 {digest}",
                expected=f"sha256 {entry['sha256'][:80]}",
                hint="bring the right file, or write its hash",
            )
    for path in sorted(set(there) - listed):
        report((), f"{path} is not listed", expected="every file below routers/ in the index", hint="list or remove it")
    return problems


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and set(entry) == {"file", "sha256"} and all(isinstance(v, str) for v in entry.values())
    )


def _bad(path: str, what: str, expected: str | None, hint: str) -> BadRevision:
    # As repr: the name of a file is anybody's, and must not reach a terminal as control characters.
    shown = path if path.isascii() and path.isprintable() else ascii(path)
    return BadRevision(what, expected=expected, hint=hint, path=shown[:200])
