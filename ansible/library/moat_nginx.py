#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_nginx``: put a configuration of nginx in force without cutting a stream, or refuse it.

The whole folder is written beside the live one and tested there (``nginx -t``) as the unit's user. What nginx refuses
is never put in place. Then the live files are replaced one by one, and nginx is reloaded if it does not run with them:
a digest in ``/run`` says with which it was last started or reloaded, so that a run which was interrupted between the
two is finished by the next one.
"""

from __future__ import annotations

import grp
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_nginx
short_description: Test a configuration of nginx, then put it in force by a reload
options:
  files: {description: "Contents by path below the folder.", type: dict, required: true}
  unit_file: {description: What the drop-in of nginx.service holds., type: str, required: true}
  path: {description: The folder., type: path, default: /etc/moat/nginx}
  drop_in: {description: The drop-in., type: path, default: /etc/systemd/system/nginx.service.d/moat.conf}
  group: {description: Group that may read the files., type: str, default: www-data}
  close_seconds:
    description: Seconds before a reload in which each answer closes its client's connection.
    type: float
    default: 4
  restart:
    description: Restart nginx if its drop-in changed; that closes its ports until the last stream has ended.
    type: bool
    default: false
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Put the configuration of nginx in force
  moat_nginx: {files: {nginx.conf: "..."}, unit_file: "[Service]"}
"""

RETURN = r"""
action: {description: "started, restarted, reloaded or nothing.", type: str, returned: always}
replaced: {description: The files that were replaced or removed., type: list, returned: always}
"""

UNIT = "nginx.service"
NGINX = "/usr/sbin/nginx"
#: Which run of the unit was last given which configuration.
MARKER = Path("/run/moat-nginx.digest")
#: Reloads nginx when the certificate is replaced by its file.
WATCH = "moat-nginx-tls.path"
#: While it exists, each answer closes its client's connection.
CLOSING = Path("/run/moat-nginx/closing")
TEMPORARY = "TemporaryFileSystem=/var/cache/moat-nginx:mode=1777"


def run(*argv: str) -> tuple[int, str]:
    """Run a program; return its exit code and what it printed."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True)
    return done.returncode, done.stdout.strip()


def must(*argv: str) -> str:
    """Run a program that must succeed.

    Raises:
        Refused: it did not.
    """
    code, text = run(*argv)
    if code:
        journal = run("journalctl", "-u", UNIT, "-n", "10", "-o", "cat")[1]
        raise Refused(f"`{' '.join(argv)}` failed ({code}): {text}\n{UNIT} says:\n{journal}")
    return text


def folders(root: Path, files: Mapping[str, str], gid: int) -> None:
    """Make the folders of the files, readable for root and the group alone."""
    for folder in sorted({root, *((root / name).parent for name in files)}):
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        os.chown(folder, 0, gid)
        folder.chmod(0o750)


def differing(root: Path, files: Mapping[str, str], gid: int) -> list[str]:
    """Return the names whose file is missing, differs, or has the wrong owner or mode; those that are too many, too."""
    found = []
    for name, text in files.items():
        try:
            status = (root / name).lstat()
            right = (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, gid, 0o640)
            if not right or (root / name).read_bytes() != text.encode("utf-8"):
                found.append(name)
        except OSError:
            found.append(name)
    there = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()] if root.is_dir() else []
    return sorted(found + [name for name in there if name not in files])


def test(root: Path, files: Mapping[str, str], gid: int, group: str) -> None:
    """Have nginx test the files in a folder beside the live one.

    Raises:
        Refused: it does not accept them.
    """
    staging = root.with_name(root.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        folders(staging, files, gid)
        for name, text in files.items():
            # Certificates are named by their final place, and the test opens the file of the process id.
            there = text.replace(f"{root}/", f"{staging}/").replace("/run/moat-nginx/", "/run/moat-nginx-test/")
            write(staging / name, there.encode("utf-8"), 0o640, (0, gid))
        argv = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "-p", f"User={group}", "-p", TEMPORARY]
        argv += ["-p", "RuntimeDirectory=moat-nginx-test", "-p", "CapabilityBoundingSet=CAP_NET_BIND_SERVICE"]
        argv += ["-p", "AmbientCapabilities=CAP_NET_BIND_SERVICE"]
        code, text = run(*argv, NGINX, "-t", "-q", "-c", str(staging / "nginx.conf"), "-e", "stderr")
        if code:
            text = text.replace(f"{staging}/", f"{root}/")
            raise Refused(f"nginx refuses the configuration; the one before it stays in force.\n{text}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def workers(main_pid: str) -> set[str]:
    """Return the processes whose parent is the main process."""
    try:
        return set(Path(f"/proc/{main_pid}/task/{main_pid}/children").read_text("ascii").split())
    except OSError:
        return set()


def show(name: str) -> str:
    """Return a property of the unit."""
    return run("systemctl", "show", UNIT, f"--property={name}", "--value")[1]


def reload(close_seconds: float) -> None:
    """Reload nginx, and see that new workers run: a signal alone says nothing.

    At a reload nginx closes idle connections of clients at once, and a request that is on its way into one is lost. So
    for some seconds before it each answer closes its connection (compose/nginx/paths.conf): no client that is asking
    has an idle one left.

    Raises:
        Refused: the old workers are still the only ones after ten seconds.
    """
    main_pid = show("MainPID")
    before = workers(main_pid)
    CLOSING.touch(mode=0o644)
    try:
        time.sleep(close_seconds)
        must("systemctl", "reload", UNIT)
        deadline = time.monotonic() + 10
        while not workers(main_pid) - before:
            if time.monotonic() > deadline:
                journal = run("journalctl", "-u", UNIT, "-n", "10", "-o", "cat")[1]
                raise Refused(f"nginx was reloaded and has no new workers after 10 s; it says:\n{journal}")
            time.sleep(0.05)
    finally:
        CLOSING.unlink(missing_ok=True)


def latest_change(paths: list[Path]) -> float:
    """Return when the latest of these files was changed, in seconds since 1970."""
    return max((p.stat().st_ctime for p in paths if p.exists()), default=0.0)


def started_at() -> float:
    """Return when nginx was started, in seconds since 1970."""
    since_boot = int(show("ExecMainStartTimestampMonotonic") or 0) / 1e6
    return time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - since_boot)


def needed(replaced: list[str], root: Path, files: Mapping[str, str], ours: bool, restart: bool) -> str:
    """Return what nginx needs in order to run with what is wanted: started, restarted, reloaded, or nothing at all."""
    if show("ActiveState") not in ("active", "reloading"):
        return "started"
    if restart or not ours:
        return "restarted"
    known = MARKER.read_text("ascii").split() if MARKER.exists() else ["", ""]
    if known[0] == show("InvocationID"):
        return "reloaded" if replaced or known[1] != digest(files) else ""
    # Somebody else started it (a reboot, Restart=): it has read what was there then.
    return "reloaded" if replaced or latest_change([root / name for name in files]) > started_at() else ""


def digest(files: Mapping[str, str]) -> str:
    """Return a digest of the whole configuration."""
    return hashlib.sha256("\0".join(f"{k}\0{files[k]}" for k in sorted(files)).encode()).hexdigest()


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "files": {"type": "dict", "required": True, "no_log": True},
            "unit_file": {"type": "str", "required": True},
            "path": {"type": "path", "default": "/etc/moat/nginx"},
            "drop_in": {"type": "path", "default": "/etc/systemd/system/nginx.service.d/moat.conf"},
            "group": {"type": "str", "default": "www-data"},
            "close_seconds": {"type": "float", "default": 4.0},
            "restart": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    p = module.params
    root, drop_in, files = Path(p["path"]), Path(p["drop_in"]), p["files"]
    try:
        gid = grp.getgrnam(p["group"]).gr_gid
        replaced = differing(root, files, gid)
        unit_differs = not drop_in.exists() or drop_in.read_text("utf-8") != p["unit_file"]
        # Stopping nginx closes its ports until the last stream has ended, so a changed drop-in waits for the next
        # start, unless a restart is asked for, or what runs is still Debian's own nginx.
        pending = unit_differs or latest_change([drop_in]) > started_at()
        action = needed(replaced, root, files, drop_in.exists(), p["restart"] and pending)
        enabled = show("UnitFileState") == "enabled"
        if module.check_mode:
            module.exit_json(
                changed=bool(replaced or action or unit_differs or not enabled),
                action=action or "nothing",
                replaced=replaced,
            )
        watched = bool(replaced) and run("systemctl", "is-active", WATCH)[1] == "active"
        if replaced:
            test(root, files, gid, p["group"])
            if watched:
                # It is this module that reloads now; the unit would do it once more.
                must("systemctl", "stop", WATCH)
            folders(root, files, gid)
            for name in replaced:
                if name in files:
                    write(root / name, files[name].encode("utf-8"), 0o640, (0, gid))
                else:
                    (root / name).unlink()
        if unit_differs:
            drop_in.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            drop_in.parent.chmod(0o755)
            write(drop_in, p["unit_file"].encode("utf-8"), 0o644, (0, 0))
            must("systemctl", "daemon-reload")
        if pending and action in ("", "reloaded"):
            module.warn(
                "The drop-in of nginx.service changed; it counts from the next start of nginx. Do, when it suits: "
                "moat-site site --tags nginx -e nginx_restart=true"
            )
        if action == "reloaded":
            reload(p["close_seconds"])
        elif action:
            must("systemctl", "restart", UNIT)
        if action:
            MARKER.write_text(f"{show('InvocationID')} {digest(files)}\n", "ascii")
        if watched:
            must("systemctl", "start", WATCH)
        if not enabled:
            must("systemctl", "enable", "--quiet", UNIT)
    except Refused as e:
        module.fail_json(msg=str(e))
    except KeyError:
        module.fail_json(msg=f"this host has no group {p['group']}. Do: run the role apt_offline first")
    except OSError as e:
        module.fail_json(msg=f"{e.filename}: {e.strerror}. Do: make room or mend the disk, then run it again")
    module.exit_json(
        changed=bool(replaced or action or unit_differs or not enabled), action=action or "nothing", replaced=replaced
    )


if __name__ == "__main__":
    main()
