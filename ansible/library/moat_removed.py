#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_removed``: stop and forget units, remove files and folders, remove users.

For uninstalling: what is not there is not an error, a second run changes nothing, and the answer lists exactly what
went. Only absolute paths below a few roots are taken, links are removed and never followed, and a mount point is
emptied, not removed.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused

DOCUMENTATION = r"""
module: moat_removed
short_description: Remove units, files and users, if they are there
options:
  stop:
    description: Patterns of units that are stopped and disabled.
    type: list
    elements: str
    default: []
  stop_if:
    description: The same for units of Debian's packages, by the file that makes each of them Moat's.
    type: dict
    default: {}
  paths:
    description: Files and folders to remove; may hold shell patterns. Folders go with what is in them.
    type: list
    elements: str
    default: []
  empty:
    description: Folders that are removed only if they are empty.
    type: list
    elements: str
    default: []
  users:
    description: System users to remove, with the group of the same name.
    type: list
    elements: str
    default: []
  look:
    description: Folders whose entries are returned afterwards. Once the playbooks are gone, no task can look.
    type: list
    elements: str
    default: []
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Remove the store
  moat_removed: {stop: [minio.service], paths: [/etc/systemd/system/minio.service]}
"""

RETURN = r"""
removed: {description: What went., type: list, returned: always}
left: {description: What is in the folders of look after that., type: list, returned: always}
"""

#: Nothing else is ever removed, whatever a variable says.
ROOTS = (
    "/etc/moat/", "/opt/moat/", "/var/lib/moat/", "/var/log/moat/", "/run/moat", "/etc/systemd/system/",
    "/usr/local/bin/moat", "/usr/local/sbin/moat", "/etc/apt/sources.list.d/moat", "/var/lib/valkey/",
    "/var/lib/redis/", "/etc/tmpfiles.d/moat",
)  # fmt: skip
#: These themselves, too.
FOLDERS = ("/etc/moat", "/opt/moat", "/var/lib/moat", "/var/log/moat")


def allowed(path: str, roots: Sequence[str] = ROOTS, folders: Sequence[str] = FOLDERS) -> bool:
    """Say whether a path may be removed: below a root, without a detour."""
    return os.path.normpath(path) == path.rstrip("/") and (
        path.rstrip("/") in folders or any(path.startswith(r) and path.rstrip("/") + "/" != r for r in roots)
    )


def paths(
    patterns: Sequence[str], dry: bool, roots: Sequence[str] = ROOTS, folders: Sequence[str] = FOLDERS
) -> list[str]:
    """Remove what the patterns name.

    Raises:
        Refused: a pattern names something outside of the roots, or a link leads a folder of it elsewhere.
    """
    gone = []
    for pattern in patterns:
        # Path.glob passes over a link that leads nowhere.
        for name in sorted(glob.glob(pattern)):  # noqa: PTH207
            path = Path(name)
            if not allowed(name, roots, folders) or str(path.parent.resolve()) != str(path.parent):
                raise Refused(f"{name} is not Moat's to remove")
            mounted = path.is_mount()
            inside = sorted(path.iterdir()) if mounted else [path]
            if inside:
                gone.append(name)
            for entry in [] if dry else inside:
                if entry.is_symlink() or not entry.is_dir():
                    entry.unlink()
                else:
                    shutil.rmtree(entry)
    return gone


def empty(names: Sequence[str], dry: bool) -> list[str]:
    """Remove folders in which nothing is left."""
    gone = []
    for name in names:
        path = Path(name)
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            gone.append(name)
            if not dry:
                path.rmdir()
    return gone


def entries(names: Sequence[str]) -> list[str]:
    """Return what is in folders; one that is not there has nothing."""
    return sorted(str(p) for name in names if Path(name).is_dir() for p in Path(name).iterdir())


def run(*argv: str) -> tuple[int, str]:
    """Run a program; return its exit code and what it printed."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def units(patterns: Sequence[str]) -> list[str]:
    """Return the units that run or are enabled."""
    if not patterns:
        return []
    found = []
    for line in run("systemctl", "list-units", "--all", "--plain", "--no-legend", *patterns)[1].splitlines():
        name, _load, active = line.split()[:3]
        if active not in ("inactive", "failed"):
            found.append(name)
    for line in run("systemctl", "list-unit-files", "--plain", "--no-legend", *patterns)[1].splitlines():
        name, state = line.split()[:2]
        if state == "enabled":
            found.append(name)
    # Instances of a template are enabled by their links, which list-unit-files does not show.
    for pattern in patterns:
        found += [p.name for p in Path("/etc/systemd/system").glob(f"*.wants/{pattern}")]
    return sorted(set(found))


def stop(patterns: Sequence[str], dry: bool) -> list[str]:
    """Stop and disable units.

    Raises:
        Refused: one does not stop.
    """
    gone = units(patterns)
    if gone and not dry:
        run("systemctl", "disable", *gone)
        code, text = run("systemctl", "stop", *gone)
        if code:
            raise Refused(f"the units do not stop: {text.strip()}. Do: see journalctl -u UNIT, then run it again")
        run("systemctl", "reset-failed", *gone)
        left = [n for n in units(patterns) if n in gone]
        if left:
            raise Refused(
                f"still running or enabled: {', '.join(left)}. Do: systemctl disable --now UNIT, run it again"
            )
    return [f"unit {n}" for n in gone]


def users(names: Sequence[str], dry: bool) -> list[str]:
    """Remove system users.

    Raises:
        Refused: one is a person's, or a process of it runs.
    """
    gone = []
    for name in names:
        with contextlib.suppress(KeyError):
            if pwd.getpwnam(name).pw_uid >= 1000:
                raise Refused(f"the user {name} is no system user; it is left")
            gone.append(f"user {name}")
            if not dry:
                code, text = run("userdel", name)
                if code:
                    raise Refused(f"the user {name} cannot be removed: {text.strip()}")
    return gone


def main() -> None:
    """Run as Ansible's module."""
    listed = {"type": "list", "elements": "str", "default": []}
    module: Any = AnsibleModule(
        argument_spec={
            "stop": listed,
            "stop_if": {"type": "dict", "default": {}},
            "paths": listed,
            "empty": listed,
            "users": listed,
            "look": listed,
        },
        supports_check_mode=True,
    )
    p, gone, dry = module.params, [], module.check_mode
    try:
        gone += stop(p["stop"] + [unit for unit, path in p["stop_if"].items() if Path(path).exists()], dry)
        removed = paths(p["paths"], dry)
        gone += removed
        if any("/systemd/system/" in r for r in removed) and not dry:
            run("systemctl", "daemon-reload")
        gone += empty(p["empty"], dry)
        gone += users(p["users"], dry)
    except Refused as e:
        module.fail_json(msg=str(e), changed=bool(gone), removed=gone)
    except OSError as e:
        module.fail_json(msg=f"{e.filename} cannot be removed: {e.strerror}", changed=bool(gone), removed=gone)
    else:
        module.exit_json(changed=bool(gone), removed=gone, left=entries(p["look"]))


if __name__ == "__main__":
    main()
