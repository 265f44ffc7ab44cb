#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_secret``: the site's own secrets, made where they are missing and never shown.

A secret is one line in a file of mode 0600. What is there is never overwritten unless ``state: rotated`` asks for it,
and then the value before stays beside it (``NAME.previous``) until ``state: settled``: services that can take two
values at once are changed without a gap. Only names leave this module, never a value.
"""

from __future__ import annotations

import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_secret
short_description: Make the secrets of a site
description:
  - Makes each missing secret as a file of mode 0600, from the system's random source; never overwrites one.
  - Returns names only.
options:
  path:
    description: The folder of the secrets; made with mode 0700 if it is missing.
    type: path
    required: true
  secrets:
    description: Name of each secret, and what its value begins with (may be empty).
    type: dict
    required: true
  state:
    description:
      - C(present) makes what is missing.
      - C(rotated) makes a new value and keeps the one before as NAME.previous; where there is one already, a rotation
        was cut short, and nothing is made.
      - C(settled) removes NAME.previous.
    type: str
    choices: [present, rotated, settled]
    default: present
  bytes:
    description: Random bytes of a value, before their encoding.
    type: int
    default: 32
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Make the secrets that are missing
  moat_secret:
    path: /etc/moat/site/secrets
    secrets: {master_key: sk-moat-admin-, valkey_password: ""}
"""

RETURN = r"""
made:
  description: Names of the secrets that got a new value.
  type: list
  returned: always
settled:
  description: Names of the secrets whose value before was removed.
  type: list
  returned: always
"""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def check(folder: Path, names: Mapping[str, str]) -> None:
    """Refuse a name or a file that cannot be a secret's.

    Raises:
        Refused: a name is no plain name, or a file is empty, a link, or open to others.
    """
    for name in names:
        if not NAME.fullmatch(name):
            raise Refused(f"{name!r} cannot be a secret's name; expected letters, digits and _")
        path = folder / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path} is no ordinary file; expected a file of mode 0600. Do: find out who made it")
        if not status.st_size:
            raise Refused(
                f"the secret {path} is empty; expected one line. Do: restore it from the backup of the site "
                "directory, or remove the file and run again: a new secret is made"
            )


def apply(
    folder: Path,
    names: Mapping[str, str],
    state: str,
    size: int,
    *,
    dry: bool = False,
    token: Callable[[int], str] = secrets.token_urlsafe,
) -> tuple[list[str], list[str], bool]:
    """Bring the folder to ``state``.

    Args:
        folder: of the secrets.
        names: each secret's name, and what its value begins with.
        state: present, rotated or settled.
        size: random bytes of a value.
        dry: say what would be done, do nothing.
        token: source of a value from its size.

    Returns:
        Names made, names settled, and whether a mode was put right.
    """
    check(folder, names)
    made, settled, modes = [], [], False
    if not folder.is_dir() and not dry:
        folder.mkdir(mode=0o700, parents=True)
    modes |= tighten(folder, 0o700, dry)
    for name, prefix in names.items():
        path, before = folder / name, folder / f"{name}.previous"
        there = path.exists()
        if state == "settled":
            if before.exists():
                settled.append(name)
                if not dry:
                    before.unlink()
        # A rotation that was cut short left both: the next run goes on with its new value.
        elif not there or (state == "rotated" and not under_way(path, before)):
            made.append(name)
            if not dry:
                if there:
                    write(before, path.read_bytes(), 0o600)
                write(path, (prefix + token(size) + "\n").encode("ascii"), 0o600)
        modes |= tighten(path, 0o600, dry)
    return made, settled, modes


def under_way(path: Path, before: Path) -> bool:
    """Say whether a rotation has begun and not ended: there are two values, and they differ."""
    return before.exists() and before.read_bytes() != path.read_bytes()


def tighten(path: Path, mode: int, dry: bool) -> bool:
    """Set a mode where it differs; say whether it did."""
    if not path.exists() or stat.S_IMODE(path.stat().st_mode) == mode:
        return False
    if not dry:
        path.chmod(mode)
    return True


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "secrets": {"type": "dict", "required": True, "no_log": False},
            "state": {"type": "str", "choices": ["present", "rotated", "settled"], "default": "present"},
            "bytes": {"type": "int", "default": 32},
        },
        supports_check_mode=True,
    )
    p = module.params
    if p["bytes"] < 16:
        module.fail_json(msg="a secret of less than 16 random bytes can be guessed; expected at least 16")
    try:
        made, settled, modes = apply(
            Path(p["path"]),
            {k: v or "" for k, v in p["secrets"].items()},
            p["state"],
            p["bytes"],
            dry=module.check_mode,
        )
    except Refused as e:
        module.fail_json(msg=str(e))
    except OSError as e:
        module.fail_json(msg=f"{e.filename} cannot be written: {e.strerror}. Do: make room or run as root, then again")
    else:
        module.exit_json(changed=bool(made or settled or modes), made=made, settled=settled)


if __name__ == "__main__":
    main()
