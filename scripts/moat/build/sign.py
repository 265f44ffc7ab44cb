# SPDX-License-Identifier: Apache-2.0
"""``moat sign``: sign a bundle's manifest with the release key.

The signature is minisign's prehashed form, byte for byte what ``minisign -S`` would write with the
same key and trusted comment; Ed25519 is deterministic, so the same manifest gives the same file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moat import minisign
from moat.build.keys import add_passphrase_arguments, passphrase_of, read_private_file
from moat.console import Console
from moat.errors import BadManifest, BuildFailed, KeyProblem
from moat.manifest import MANIFEST_NAME, MAX_BYTES, SIGNATURE_NAME, parse_manifest
from moat.minisign import PublicKey, SecretKey, Signature
from moat.site.state import write_atomically
from moat.site.trust import trusted_comment

NAME = "sign"
HELP = "sign a bundle's manifest with the release key"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--key", type=Path, required=True, metavar="SECRETKEY", help="moat.key of `moat keys new`")
    add_passphrase_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Sign, and say with which key."""
    passphrase = None
    if minisign.is_encrypted(read_private_file(args.key, "secret key")):
        passphrase = passphrase_of(args, f"passphrase of {args.key}: ")
    public = sign_manifest(args.bundle, args.key, passphrase)
    signature = args.bundle / SIGNATURE_NAME
    console.result(
        {"ok": True, "signature": str(signature), "id": public.id_text, "public_key": public.to_string()},
        f"signed: {signature} with key {public.to_string()}",
    )
    return 0


def make_signature(key: SecretKey, data: bytes, trusted: str) -> Signature:
    """Sign ``data`` (prehashed) and the trusted comment.

    Raises:
        KeyProblem: the secret key's two halves do not belong together.
    """
    private = Ed25519PrivateKey.from_private_bytes(key.seed)
    # Signing with a public half that is not the seed's own would leak the seed, and verify nowhere.
    if private.public_key().public_bytes_raw() != key.public:
        raise KeyProblem("the secret key is damaged: its halves do not belong together", hint="restore it")
    first = private.sign(minisign.signed_message(data, prehashed=True))
    return Signature(
        prehashed=True,
        key_id=key.key_id,
        signature=first,
        trusted_comment=trusted,
        global_signature=private.sign(first + trusted.encode()),
    )


def sign_manifest(bundle_dir: Path, key: Path, passphrase: bytes | None) -> PublicKey:
    """Write ``manifest.json.minisig`` next to the manifest of ``bundle_dir``.

    Args:
        bundle_dir: the bundle's folder.
        key: the secret key file, mode 0600.
        passphrase: of the key; ``None`` for a key without one.

    Returns:
        The public half of the key that signed.

    Raises:
        KeyProblem: the key cannot be read or unlocked, or is open to others.
        BadManifest, UnsafePath: there is no manifest, or it is not one that a site would accept.
        BuildFailed: the signature cannot be written.
    """
    secret = minisign.parse_secret_key(read_private_file(key, "secret key"), passphrase)
    try:
        with (bundle_dir / MANIFEST_NAME).open("rb") as f:
            data = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise BadManifest(
            f"{bundle_dir / MANIFEST_NAME} cannot be read",
            found=e.strerror,
            hint="give the folder that `moat build` made",
            path=MANIFEST_NAME,
        ) from e
    signature = make_signature(secret, data, trusted_comment(parse_manifest(data).bundle))
    minisign.verify(secret.public_key, data, signature)  # what left this host was readable by a site
    try:
        write_atomically(bundle_dir / SIGNATURE_NAME, signature.to_bytes())
    except OSError as e:
        raise BuildFailed(f"the signature cannot be written to {bundle_dir}", found=e.strerror) from e
    return secret.public_key
