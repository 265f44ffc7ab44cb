# SPDX-License-Identifier: Apache-2.0
"""What is installed on this host: ``installed.json`` and a copy of the installed manifest.

``moat load`` writes both when every image is in the engine; ``moat verify`` reads the first to
refuse a replayed older bundle, ``moat plan`` the second to say what would change.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Final

from moat.errors import MoatError, Unreadable
from moat.manifest import MANIFEST_NAME, MAX_BYTES, Manifest, parse_manifest, version_key
from moat.site.trust import Installed

DEFAULT_STATE_DIR: Final = Path("/var/lib/moat")
INSTALLED_NAME: Final = "installed.json"


def _damaged(path: Path, why: str) -> Unreadable:
    return Unreadable(
        f"{path} cannot be used",
        found=why,
        expected="the record that `moat load` wrote",
        hint="run as a user who may read it; if it is damaged, restore it, or remove it and "
        "check by hand that the bundle is not older than what runs",
        path=str(path),
    )


def read_installed(state_dir: Path) -> Installed | None:
    """Return what is installed, or ``None`` where nothing is.

    Raises:
        Unreadable: the record is there but cannot be read or understood. Going on would switch the
            check against older bundles off without a word.
    """
    path = state_dir / INSTALLED_NAME
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        types = {"version": str, "profile": str, "target": str, "manifest_sha256": str, "created": int}
        for name, kind in types.items():
            if type(raw.get(name)) is not kind:
                raise ValueError(f"{name} is missing or of another type")
        version_key(raw["version"])
    except FileNotFoundError:
        return None
    except OSError as e:
        raise _damaged(path, e.strerror or str(e)) from e
    except (ValueError, RecursionError) as e:
        raise _damaged(path, str(e)) from e
    return Installed(**{f.name: raw[f.name] for f in fields(Installed)})


def read_installed_manifest(state_dir: Path) -> Manifest | None:
    """Return the manifest of what is installed, or ``None`` where there is none.

    Raises:
        Unreadable: it is there but cannot be read or understood.
    """
    path = state_dir / MANIFEST_NAME
    try:
        with path.open("rb") as f:
            return parse_manifest(f.read(MAX_BYTES + 1))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise _damaged(path, e.strerror or str(e)) from e
    except MoatError as e:
        raise _damaged(path, e.message) from e


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a power cut, meets the old content or the new, nothing else.

    Raises:
        OSError: the folder is not writable or full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_installed(state_dir: Path, installed: Installed, manifest: bytes) -> None:
    """Record what is installed; ``installed.json`` last, since it is what counts.

    Raises:
        OSError: the folder is not writable or full.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(state_dir / MANIFEST_NAME, manifest)
    text = json.dumps(asdict(installed), sort_keys=True, indent=2) + "\n"
    write_atomically(state_dir / INSTALLED_NAME, text.encode())
