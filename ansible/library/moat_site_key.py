#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_site_key``: the key that signs revisions of the site's configuration, and its replacement.

Two files in minisign's own format (Ed25519, no passphrase): the secret half in the site's secrets, the public half in
the folder of keys that the nodes trust. A replacement counts beside the key before it until that one is dropped. Only
names and ids leave this module.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.moat_common import Refused, write

try:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    HAVE = True
except ImportError:
    HAVE = False

DOCUMENTATION = r"""
module: moat_site_key
short_description: Make, replace and drop the key that signs revisions of the configuration
description:
  - Needs the Python package cryptography, which the control environment has.
options:
  path: {description: The folder of the site's secrets., type: path, required: true}
  keys: {description: The folder of the public keys that nodes trust., type: path, required: true}
  state:
    description:
      - C(present) makes the key if there is none, and its public half.
      - C(next) makes another one beside it, whose public half is trusted too; where there is one already, a replacement
        was cut short, and nothing is made.
      - C(settled) makes the next one the key.
      - C(alone) drops the public halves of the keys that this module made before.
    type: str
    choices: [present, next, settled, alone]
    default: present
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Make the key that signs revisions
  moat_site_key: {path: /etc/moat/site/secrets, keys: /etc/moat/site/site-keys}
"""

RETURN = r"""
made: {description: The id of a new key; empty for none., type: str, returned: always}
trusted: {description: The files of the keys that nodes trust., type: list, returned: always}
"""

NAME, NEXT = "site_key", "site_key.next"
#: What this module makes is named so; other names in the folder are the operator's and never removed.
OURS = "site-{}.pub"
_COMMENT = "untrusted comment: minisign"
_SECRET_BYTES = 158


def generate() -> tuple[str, bytes]:
    """Return the id and the secret file of a new key (an algorithm word, no passphrase, id, seed, public half)."""
    private = Ed25519PrivateKey.generate()
    seed = private.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    public = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    raw_id = secrets.token_bytes(8)
    body = b"Ed\0\0B2" + bytes(48) + raw_id + seed + public + bytes(32)
    key_id = f"{int.from_bytes(raw_id, 'little'):016X}"
    return key_id, f"{_COMMENT} secret key {key_id}\n{base64.b64encode(body).decode('ascii')}\n".encode("ascii")


def public_half(path: Path) -> tuple[str, bytes]:
    """Return the id of a secret key's file, and the file of its public half.

    Raises:
        Refused: it is no such file.
    """
    try:
        lines = path.read_bytes().decode("ascii").splitlines()
        body = base64.b64decode(lines[1], validate=True)
        if len(lines) != 2 or len(body) != _SECRET_BYTES or body[:6] != b"Ed\0\0B2":
            raise ValueError
    except (ValueError, IndexError, binascii.Error):
        raise Refused(
            f"{path} is no secret key of minisign without a passphrase. Do: restore it from the backup of the site "
            "directory, or move it away: a new one is made, and every revision must then be pushed again"
        ) from None
    raw_id, public = body[54:62], body[94:126]
    key_id = f"{int.from_bytes(raw_id, 'little'):016X}"
    text = base64.b64encode(b"Ed" + raw_id + public).decode("ascii")
    return key_id, f"{_COMMENT} public key {key_id}\n{text}\n".encode("ascii")


def make(path: Path, *, dry: bool) -> str:
    """Make a secret key's file where there is none; return its id."""
    if path.is_symlink() or path.exists():
        return ""
    if dry:
        return "?"
    key_id, content = generate()
    write(path, content, 0o600)
    return key_id


def trust(secret: Path, keys: Path, *, dry: bool) -> bool:
    """See that the public half of a key is among those that nodes trust; return whether it was not."""
    key_id, content = public_half(secret)
    path = keys / OURS.format(key_id)
    if path.exists() and path.read_bytes() == content:
        return False
    if not dry:
        write(path, content, 0o644)
    return True


def apply(folder: Path, keys: Path, state: str, *, dry: bool = False) -> tuple[str, bool]:
    """Bring the keys to ``state``; return the id of a new key, and whether anything was changed.

    Raises:
        Refused: a file is no key.
    """
    made, changed = "", False
    if not keys.is_dir() and not dry:
        keys.mkdir(mode=0o755, parents=True)
    current, following = folder / NAME, folder / NEXT
    if state == "settled" and following.exists():
        changed = True
        if not dry:
            following.replace(current)
    elif state in ("present", "next"):
        made = make(current, dry=dry)
        if state == "next":
            made = make(following, dry=dry) or made
    if dry and not current.exists():
        return made, True
    changed |= trust(current, keys, dry=dry)
    if following.exists():
        changed |= trust(following, keys, dry=dry)
    if state == "alone":
        wanted = {OURS.format(public_half(p)[0]) for p in (current, following) if p.exists()}
        for path in sorted(keys.glob(OURS.format("*"))):
            if path.name not in wanted:
                changed = True
                if not dry:
                    path.unlink()
    return made, changed or bool(made)


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "keys": {"type": "path", "required": True, "no_log": False},
            "state": {"type": "str", "choices": ["present", "next", "settled", "alone"], "default": "present"},
        },
        supports_check_mode=True,
    )
    p = module.params
    if not HAVE:
        module.fail_json(msg=missing_required_lib("cryptography"))
    try:
        made, changed = apply(Path(p["path"]), Path(p["keys"]), p["state"], dry=module.check_mode)
        trusted = sorted(path.name for path in Path(p["keys"]).glob("*.pub"))
    except Refused as e:
        module.fail_json(msg=str(e))
    except OSError as e:
        module.fail_json(msg=f"{e.filename} cannot be written: {e.strerror}. Do: make room or run as root, then again")
    else:
        module.exit_json(changed=changed, made=made, trusted=trusted)


if __name__ == "__main__":
    main()
