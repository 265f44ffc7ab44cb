# SPDX-License-Identifier: Apache-2.0
"""``moat keys``: make the release key, show its public half.

The files are minisign's own, so the key can be used with ``minisign`` and one made there with
``moat``. A secret key is written once, with mode 0600, and never overwritten.
"""

from __future__ import annotations

import argparse
import getpass
import os
import stat
import sys
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moat import minisign
from moat.console import Console
from moat.errors import KeyProblem
from moat.minisign import MAX_BYTES, PublicKey, SecretKey

NAME = "keys"
HELP = "make a release key (new), or show the public half of one (show)"

KEY_NAME: Final = "moat.key"
PUBLIC_NAME: Final = "moat.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("action", choices=("new", "show"), help="new: write moat.key and moat.pub; show: print the key")
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="folder of moat.key and moat.pub")
    add_passphrase_arguments(parser)


def add_passphrase_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the passphrase comes from; never the command line itself, which others can read."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--passphrase-file", type=Path, metavar="FILE", help="its first line is the passphrase")
    group.add_argument("--no-passphrase", action="store_true", help="the key is protected by its file mode alone")


def run(args: argparse.Namespace, console: Console) -> int:
    """Make a key pair, or show one."""
    if args.action == "new":
        public = new_keys(args.dir, passphrase_of(args, "passphrase for the new release key: ", confirm=True))
        if args.no_passphrase:
            console.warn("the secret key has no passphrase: whoever can read the file can sign bundles")
    else:
        public = read_public_key(args.dir / PUBLIC_NAME)
    console.result(
        {
            "ok": True,
            "id": public.id_text,
            "public_key": public.to_string(),
            "public_key_file": str(args.dir / PUBLIC_NAME),
            "secret_key_file": str(args.dir / KEY_NAME),
        },
        f"key id:     {public.id_text}\npublic key: {public.to_string()}\n"
        "Print the public key on paper and carry it to the site apart from the medium.",
    )
    return 0


def new_keys(folder: Path, passphrase: bytes | None) -> PublicKey:
    """Make a key pair and write ``moat.key`` (0600) and ``moat.pub`` into ``folder``.

    Args:
        folder: is made with mode 0700 where it does not exist.
        passphrase: ``None`` writes the secret key unprotected.

    Raises:
        KeyProblem: one of the two files is already there, or cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    secret = SecretKey(os.urandom(8), private.private_bytes_raw(), private.public_key().public_bytes_raw())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (KEY_NAME, PUBLIC_NAME):
            if os.path.lexists(folder / name):
                raise FileExistsError(17, "File exists", name)
        _write_new(
            folder / KEY_NAME,
            minisign.serialise_secret_key(secret, passphrase=passphrase, salt=os.urandom(32)),
            0o600,
        )
        _write_new(folder / PUBLIC_NAME, secret.public_key.to_bytes(), 0o644)
    except FileExistsError as e:
        raise KeyProblem(
            f"there is a key in {folder} already",
            found=e.filename if isinstance(e.filename, str) else str(e),
            expected=f"neither {KEY_NAME} nor {PUBLIC_NAME}",
            hint="use it, or give another --dir; a key is never overwritten",
            path=str(folder),
        ) from e
    except OSError as e:
        raise KeyProblem(f"the key cannot be written to {folder}", found=e.strerror, path=str(folder)) from e
    return secret.public_key


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet; its mode holds from the first byte on."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_private_file(path: Path, what: str) -> bytes:
    """Return a file that nobody but its owner may be able to read.

    Raises:
        KeyProblem: it cannot be read, or its mode lets others read or change it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as f:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise KeyProblem(f"the {what} {path} is not an ordinary file", path=str(path))
            if stat.S_IMODE(status.st_mode) & 0o077:
                raise KeyProblem(
                    f"the {what} {path} is open to others",
                    found=f"mode {stat.S_IMODE(status.st_mode):04o}",
                    expected="mode 0600",
                    hint=f"chmod 600 {path}; if others have an account here, make a new key",
                    path=str(path),
                )
            return f.read(MAX_BYTES + 1)
    except OSError as e:
        raise KeyProblem(
            f"the {what} {path} cannot be read", found=e.strerror, hint="make one with `moat keys new`", path=str(path)
        ) from e


def passphrase_of(args: argparse.Namespace, prompt: str, *, confirm: bool = False) -> bytes | None:
    """Return the passphrase by the arguments, or asked for on the terminal; ``None`` with --no-passphrase.

    Raises:
        KeyProblem: there is no terminal, the two entries differ, or it is empty.
    """
    if args.no_passphrase:
        return None
    if args.passphrase_file is not None:
        passphrase = read_private_file(args.passphrase_file, "passphrase file").split(b"\n")[0].removesuffix(b"\r")
    else:
        if not sys.stdin.isatty():
            raise KeyProblem(
                "there is no terminal to ask for the passphrase",
                hint="give --passphrase-file FILE, or --no-passphrase",
            )
        passphrase = getpass.getpass(prompt).encode()
        if confirm and getpass.getpass("once more: ").encode() != passphrase:
            raise KeyProblem("the two passphrases differ", hint="run the command again")
    if not passphrase:
        raise KeyProblem("the passphrase is empty", hint="say --no-passphrase if that is what you want")
    return passphrase


def read_public_key(path: Path) -> PublicKey:
    """Return the key of a public key file.

    Raises:
        KeyProblem: it cannot be read, or is not one.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise KeyProblem(
            f"the public key {path} cannot be read",
            found=e.strerror,
            hint="make one with `moat keys new`",
            path=str(path),
        ) from e
    return minisign.parse_public_key_file(data, str(path))
