#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_venv``: a Python environment from a bundle's wheels, whole or not at all, without a network.

A virtual environment cannot be built under another name and then renamed: its scripts name their interpreter by its
path. So a marker, written last and flushed to disk, says that an environment is whole, from which requirements it was
made, and for which Python: its minor version and binary interface, since an update from 3.13.5 to 3.13.7 runs it as it
is. Without it, or with another content, everything is built anew; but not under the feet of a process that uses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_venv
short_description: Make a Python environment from wheels that are on this host
description:
  - Installs a list of requirements with their hashes by the pip that lies among the wheels; nothing else is asked.
  - Compiles every module once, so that a service without the right to write starts fast.
options:
  path: {description: Folder of the environment., type: path, required: true}
  wheels: {description: Folder of the wheels., type: path, required: true}
  requirements: {description: File with the list of requirements and their hashes., type: path, required: true}
  pip: {description: The pip wheel; default is the one among the wheels., type: path}
  python: {description: The interpreter., type: path, default: /usr/bin/python3}
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Make the environment of the gateway
  moat_venv:
    path: /opt/moat/releases/0.1.0-0123456789ab/venv
    wheels: /opt/moat/releases/0.1.0-0123456789ab/bundle/wheels
    requirements: /opt/moat/releases/0.1.0-0123456789ab/bundle/wheels/requirements.txt
"""

RETURN = r"""
seconds: {description: What each step took., type: dict, returned: when it was made}
"""

MARKER = ".moat-complete.json"
#: Changes when environments are made in another way, so that older ones are made anew.
FORMAT = 1


def run(argv: list[str], what: str) -> str:
    """Run a program and return what it printed.

    Raises:
        Refused: it failed; the last lines that it printed are in the text.
    """
    # No setting of this host's pip counts, and no index is asked.
    environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "PIP_CONFIG_FILE": os.devnull}
    try:
        done = subprocess.run(
            argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True
        )
    except OSError as e:
        raise Refused(f"{what}: {argv[0]} cannot be run: {e.strerror}. Do: install Debian's python3-venv") from e
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise Refused(
            f"{what} failed ({done.returncode}):\n{last}\nDo: verify the medium (moat verify), look for room on the "
            "disk (df), and run this again; the half-made environment is made anew"
        )
    return done.stdout


def wanted(python: str, requirements: Path) -> dict[str, Any]:
    """Return what the marker of a whole environment says."""
    code = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_config_var('SOABI'))"
    version = run([python, "-I", "-c", code], "asking Python for its version").strip()
    try:
        digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    except OSError as e:
        raise Refused(f"{requirements}: {e.strerror}. Do: stage the release again (moat stage)") from e
    return {"format": FORMAT, "python": version, "requirements": digest}


def present(path: Path) -> dict[str, Any] | None:
    """Return what the marker says, or ``None`` without one."""
    try:
        return dict(json.loads((path / MARKER).read_text("utf-8")))
    except (OSError, ValueError):
        return None


def users(path: Path, proc: Path = Path("/proc")) -> list[str]:
    """Return the processes that run from an environment: by a program of it, or by a library that they have loaded."""
    found, real = [], path.resolve()
    for process in sorted(proc.glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            words = [
                Path(os.fsdecode(w)) for w in (process / "cmdline").read_bytes().split(b"\0") if w.startswith(b"/")
            ]
            # Its python is a link to the host's, and a gateway is started under the name of a link to the release.
            ours = any(real in (w.parent.resolve() / w.name).parents for w in words)
            ours = ours or f" {real}/" in (process / "maps").read_text("utf-8", "replace")
            name = (process / "comm").read_text("utf-8", "replace").strip()
        except OSError:  # it has ended
            continue
        if ours and process.name != str(os.getpid()):
            found.append(f"{name} (process {process.name})")
    return found


def find_pip(wheels: Path) -> Path:
    """Return the pip wheel.

    Raises:
        Refused: there is none, or more than one.
    """
    found = sorted(p for p in wheels.glob("pip-*.whl") if re.fullmatch(r"pip-[0-9.]+-py3-none-any\.whl", p.name))
    if len(found) != 1:
        raise Refused(f"{wheels}: found {len(found)} pip wheels, expected one. Do: stage the release again")
    return found[0]


def build(
    path: Path, wheels: Path, requirements: Path, pip: Path, python: str, marker: dict[str, Any]
) -> dict[str, Any]:
    """Make the environment, and the marker last."""
    seconds = {}
    begun = time.monotonic()

    def took(step: str) -> None:
        nonlocal begun
        seconds[step] = round(time.monotonic() - begun, 1)
        begun = time.monotonic()

    if path.exists():
        # The marker first: what is half removed must not look whole.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    run([python, "-m", "venv", "--without-pip", str(path)], "making the environment")
    took("venv")
    inside = str(path / "bin" / "python")
    argv = [
        inside,
        "-I",
        str(pip / "pip"),
        "--isolated",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
    ]
    argv += ["--require-hashes", "--no-cache-dir", "--disable-pip-version-check", "--no-warn-script-location"]
    argv += ["--only-binary", ":all:", "--find-links", str(wheels), "--requirement", str(requirements)]
    run(argv, "installing the wheels")
    took("install")
    compile_all(inside, path)
    took("compile")
    for entry in path.rglob("*"):
        if not entry.is_symlink():
            entry.chmod(0o755 if entry.is_dir() or entry.stat().st_mode & 0o100 else 0o644)
    path.chmod(0o755)
    # Everything is on the disk before the marker says so.
    os.sync()
    write(path / MARKER, (json.dumps(marker, sort_keys=True) + "\n").encode("utf-8"), 0o644)
    took("sync")
    return seconds


def compile_all(python: str, path: Path) -> None:
    """Compile every module by the environment's own interpreter; a file that no Python can read is left out.

    The bytecode is not compared with the source at each start ("unchecked"): both belong to root, and a release is
    never changed in place.
    """
    code = (
        "import compileall, py_compile, sys;"
        "compileall.compile_dir(sys.argv[1], quiet=2, force=True, workers=0,"
        " invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
    )
    run([python, "-I", "-c", code, str(path / "lib")], "compiling the modules")


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "wheels": {"type": "path", "required": True},
            "requirements": {"type": "path", "required": True},
            "pip": {"type": "path"},
            "python": {"type": "path", "default": "/usr/bin/python3"},
        },
        supports_check_mode=True,
    )
    p = module.params
    path, wheels, requirements = Path(p["path"]), Path(p["wheels"]), Path(p["requirements"])
    os.umask(0o022)
    try:
        if module.check_mode and not requirements.exists():
            module.exit_json(changed=True)  # the release comes with the real run
        marker = wanted(p["python"], requirements)
        if present(path) == marker:
            module.exit_json(changed=False)
        running = users(path) if path.exists() else []
        if running:
            there = present(path) or {}
            raise Refused(
                f"{path} has to be made anew, and it is in use. Found {', '.join(running)}; it was made for Python "
                f"{there.get('python', 'unknown')}, and {p['python']} is {marker['python']}; expected no process that "
                "runs from it. Do: bring a newer release, whose environment is another folder; or stop them (systemctl "
                "stop moat.target 'moat-gateway@*' moat-config-sync), then run this again"
            )
        pip = Path(p["pip"]) if p["pip"] else find_pip(wheels)
        if module.check_mode:
            module.exit_json(changed=True)
        seconds = build(path, wheels, requirements, pip, p["python"], marker)
    except Refused as e:
        module.fail_json(msg=str(e))
    except OSError as e:
        module.fail_json(msg=f"{e.filename or path}: {e.strerror}. Do: make room or mend the disk, then run it again")
    else:
        module.exit_json(changed=True, seconds=seconds)


if __name__ == "__main__":
    main()
