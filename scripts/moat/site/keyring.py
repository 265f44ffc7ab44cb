# SPDX-License-Identifier: Apache-2.0
"""Which release keys count: those of the command line, else those pinned on this host.

A key that comes with the bundle proves nothing, since whoever can replace the bundle can replace
the key. So a key file below the bundle's folder, or on the same removable device, never counts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import KeyProblem
from moat.minisign import MAX_BYTES, PublicKey, parse_public_key, parse_public_key_file

DEFAULT_TRUSTED_KEYS: Final = Path("/etc/moat/trusted-keys")
_STRING_PREFIX: Final = "RW"
_STRING_LENGTH: Final = 56


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--key`` and ``--trusted-keys``."""
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="FILE_OR_STRING",
        help="trust this public key (a file, or the string RW...) instead of the pinned ones; may be repeated",
    )
    parser.add_argument(
        "--trusted-keys",
        type=Path,
        default=DEFAULT_TRUSTED_KEYS,
        metavar="DIR",
        help="folder of pinned public keys (*.pub); default %(default)s",
    )


def _is_removable(device: int) -> bool:
    """Tell whether the kernel calls the disk of a file system removable (a stick, a card, a DVD)."""
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for place in (node / "removable", node / ".." / "removable"):  # a disk, or a partition of one
        try:
            return place.read_text("ascii").strip() == "1"
        except (OSError, ValueError):
            continue
    return False


def lies_on_medium(key: Path, bundle: Path) -> bool:
    """Tell whether a key file came with the bundle.

    Raises:
        OSError: one of the two cannot be examined.
    """
    real_key, real_bundle = key.resolve(strict=True), bundle.resolve(strict=True)
    if real_key.is_relative_to(real_bundle):
        return True
    device = real_bundle.stat().st_dev
    return real_key.stat().st_dev == device and _is_removable(device)


def _read(path: Path) -> PublicKey:
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES)
    except OSError as e:
        raise KeyProblem(
            f"the public key {path} cannot be read",
            found=e.strerror,
            expected="a public key file, or the key's string RW...",
            hint="give the path of moat.pub, or the 56 characters of the key",
            path=str(path),
        ) from e
    return parse_public_key_file(data, str(path))


def trusted_keys(given: Sequence[str], pinned: Path, bundle: Path, console: Console) -> tuple[PublicKey, ...]:
    """Return the keys that count for ``bundle``.

    Args:
        given: what ``--key`` was given; where there is any, the pinned keys are not looked at.
        pinned: folder of ``*.pub`` files; it need not exist.
        bundle: the bundle's folder, whose own keys never count.
        console: told about every key that is passed over.

    Raises:
        KeyProblem: a given key is not a public key, or a pinned one is damaged.
    """
    keys: list[PublicKey] = []
    paths: list[Path] = []
    for text in given:
        if len(text) == _STRING_LENGTH and text.startswith(_STRING_PREFIX) and not Path(text).exists():
            keys.append(parse_public_key(text))
        else:
            paths.append(Path(text))
    if not given:
        try:
            paths = sorted(p for p in pinned.iterdir() if p.suffix == ".pub")
        except FileNotFoundError:
            paths = []
        except OSError as e:
            raise KeyProblem(
                f"the folder of trusted keys {pinned} cannot be read",
                found=e.strerror,
                hint="run as a user who may read it, or give the key with --key",
                path=str(pinned),
            ) from e
    for path in paths:
        key = _read(path)
        try:
            on_medium = lies_on_medium(path, bundle)
        except OSError:
            on_medium = False  # the bundle's folder is not there: the command says so itself
        if on_medium:
            console.warn(f"the key {path} lies on the medium, so it does not count")
            continue
        keys.append(key)
    return tuple(dict.fromkeys(keys))
