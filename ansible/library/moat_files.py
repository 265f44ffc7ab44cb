#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_files``: several folders and small files of a service in one step, secrets among them.

Owner and mode are right before a name exists, so that a secret is at no moment readable by others; a file appears
whole or not at all. Contents are neither returned nor shown as a difference. One step for all of them keeps an
install short, and the reason of a failure comes back in ``problem``: a task with ``no_log`` would hide it, the task
after it shows it.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_files
short_description: Make folders and small files with exact owners and modes
description:
  - Makes folders and files; contents are never shown, not even as a difference.
  - Refuses symbolic links and special files in their place.
options:
  directories:
    description: The folders, parents first.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: The folder., type: path, required: true}
      owner: {description: Its owner., type: str, default: root}
      group: {description: Its group., type: str, default: root}
      mode: {description: Its mode as an octal number in quotes., type: str, required: true}
  files:
    description: The files.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: The file., type: path, required: true}
      content: {description: What it holds., type: str, required: true}
      owner: {description: Its owner., type: str, default: root}
      group: {description: Its group., type: str, default: root}
      mode: {description: Its mode as an octal number in quotes., type: str, required: true}
  only:
    description: Folders in which files that are not listed above are removed.
    type: list
    elements: path
    default: []
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Place the secrets of the store
  moat_files:
    directories: [{path: /etc/moat/secrets/minio, mode: "0700"}]
    files: [{path: /etc/moat/secrets/minio/store_root_user, content: "{{ user }}\n", mode: "0600"}]
  no_log: true
"""

RETURN = r"""
paths:
  description: What was made, replaced, given another owner or mode, or removed.
  type: list
  returned: always
problem:
  description: Why it could not be finished; empty if it could.
  type: str
  returned: always
"""


def owner_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of a user and a group.

    Raises:
        Refused: this host does not have it.
    """
    try:
        return pwd.getpwnam(entry["owner"]).pw_uid, grp.getgrnam(entry["group"]).gr_gid
    except KeyError as e:
        raise Refused(f"{entry['path']}: {e.args[0]}; expected a user and a group of this host") from e


def right(path: Path, entry: Mapping[str, Any], owner: tuple[int, int], folder: bool) -> bool:
    """Say whether owner and mode are as they should be.

    Raises:
        Refused: something else is in the place.
    """
    status = path.lstat()
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode):
        raise Refused(
            f"{path} is not {'a folder' if folder else 'an ordinary file'}. Do: find out who made it, move it away"
        )
    return (status.st_uid, status.st_gid) == owner and stat.S_IMODE(status.st_mode) == int(entry["mode"], 8)


def folders(entries: Sequence[Mapping[str, Any]], dry: bool) -> list[str]:
    """Make the folders; return those that were not right."""
    changed = []
    for entry in entries:
        path = Path(entry["path"])
        there = os.path.lexists(path)
        owner = (0, 0) if dry and not there else owner_of(entry)
        if there and right(path, entry, owner, folder=True):
            continue
        changed.append(str(path))
        if dry:
            continue
        if not there:
            path.mkdir(mode=0o700, parents=True)
        os.chown(path, *owner)
        path.chmod(int(entry["mode"], 8))
    return changed


def files(entries: Sequence[Mapping[str, Any]], dry: bool) -> list[str]:
    """Write the files; return those that were not right."""
    changed = []
    for entry in entries:
        path, data = Path(entry["path"]), entry["content"].encode("utf-8")
        there = os.path.lexists(path)
        owner = (0, 0) if dry and not there else owner_of(entry)
        if there:
            fitting = right(path, entry, owner, folder=False)
            if path.read_bytes() == data:
                if not fitting:
                    changed.append(str(path))
                    if not dry:
                        os.chown(path, *owner)
                        path.chmod(int(entry["mode"], 8))
                continue
        changed.append(str(path))
        if not dry:
            write(path, data, int(entry["mode"], 8), owner)
    return changed


def others(only: Sequence[str], entries: Sequence[Mapping[str, Any]], dry: bool) -> list[str]:
    """Remove the files of a folder that are not listed."""
    listed = {str(Path(e["path"])) for e in entries}
    changed = []
    for name in only:
        for path in sorted(Path(name).iterdir()) if Path(name).is_dir() else []:
            if str(path) not in listed and not path.is_dir():
                changed.append(str(path))
                if not dry:
                    path.unlink()
    return changed


def main() -> None:
    """Run as Ansible's module."""
    owned = {
        "path": {"type": "path", "required": True},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
        "mode": {"type": "str", "required": True},
    }
    content = {"content": {"type": "str", "required": True, "no_log": True}}
    module: Any = AnsibleModule(
        argument_spec={
            "directories": {"type": "list", "elements": "dict", "default": [], "options": owned},
            "files": {"type": "list", "elements": "dict", "default": [], "options": {**owned, **content}},
            "only": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    p, paths, problem = module.params, [], ""
    try:
        paths += folders(p["directories"], module.check_mode)
        paths += files(p["files"], module.check_mode)
        paths += others(p["only"], p["files"], module.check_mode)
    except Refused as e:
        problem = str(e)
    except ValueError as e:
        problem = f"a mode is no octal number ({e}); expected for example 0640 in quotes"
    except OSError as e:
        problem = f"{e.filename} cannot be written: {e.strerror}. Do: make room or run as root, then run it again"
    module.exit_json(changed=bool(paths), paths=paths, problem=problem, failed=bool(problem), msg=problem)


if __name__ == "__main__":
    main()
