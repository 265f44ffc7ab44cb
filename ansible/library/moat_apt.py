#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_apt``: install packages from one apt source and from nothing else.

The host's own sources, lists and proxies play no part: apt is given one source file, so what it installs is what
the bundle brought, or nothing. Packages that are installed stay as they are. Services are kept from starting with
their packages' own configuration by masks below /run: an interrupted run leaves them at worst until the next run or
the next start of the host, and no other package notices them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused

DOCUMENTATION = r"""
module: moat_apt
short_description: Install packages from one apt source and from nothing else
description:
  - Installs those packages that are not installed; never removes, upgrades only what they need.
  - Keeps services from starting, and finishes what an interrupted dpkg left.
options:
  packages: {description: Names of packages., type: list, elements: str, required: true}
  source: {description: The one source file that apt may read., type: path, required: true}
  keep_stopped: {description: Units that must not start now., type: list, elements: str, default: []}
  other_sources:
    description: C(disabled) moves the host's own sources aside; C(untouched) moves them back if this module moved them.
    type: str
    choices: [untouched, disabled]
    default: untouched
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Install the entrance
  moat_apt:
    packages: [nginx]
    source: /etc/apt/sources.list.d/moat.sources
    keep_stopped: [nginx.service]
"""

RETURN = r"""
installed: {description: Packages that were missing., type: list, returned: always}
moved: {description: Source files that were moved aside or back., type: list, returned: always}
"""

APT = Path("/etc/apt")
ASIDE = APT / "moat-disabled"
MASKS = Path("/run/systemd/system")


def run(argv: Sequence[str], what: str) -> str:
    """Run a program and return its output.

    Raises:
        Refused: it failed; with its last lines.
    """
    # No proxy of the caller's environment, no question, messages that this module can read.
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive",
           "DEBIAN_PRIORITY": "critical", "HOME": "/nonexistent"}  # fmt: skip
    done = subprocess.run(list(argv), env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).decode("utf-8", "replace").strip().splitlines()
        shown = "\n  ".join(lines[-15:])
        raise Refused(f"{what} failed with code {done.returncode}:\n  {shown}")
    return done.stdout.decode("utf-8", "replace")


def states() -> dict[str, str]:
    """Return the state of every package that dpkg knows, by its name."""
    lines = run(["dpkg-query", "-W", "-f", "${Package}\t${db:Status-Status}\n"], "dpkg-query").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def apt(source: str) -> list[str]:
    """Return apt-get with everything shut out that is not the one source."""
    options = [
        f"Dir::Etc::sourcelist={source}",
        "Dir::Etc::sourceparts=-",
        # The lists of the host's own sources stay; those of ours must be whole and signed, or nothing is done.
        "APT::Get::List-Cleanup=false",
        "APT::Update::Error-Mode=any",
        "APT::Install-Recommends=false",
        "Acquire::Languages=none",
        "DPkg::Lock::Timeout=300",
        "Dpkg::Options::=--force-confdef",
        "Dpkg::Options::=--force-confold",
        "Dpkg::Use-Pty=false",
    ]
    return ["apt-get", "-q", *(word for o in options for word in ("-o", o))]


def mask(units: Sequence[str]) -> list[Path]:
    """Keep units from starting; return what was made."""
    made = []
    MASKS.mkdir(parents=True, exist_ok=True)
    for unit in units:
        link = MASKS / unit
        if not os.path.lexists(link):
            link.symlink_to("/dev/null")
            made.append(link)
    return made


def unmask(units: Sequence[str]) -> bool:
    """Take back the masks of this run or of one that was interrupted; return whether there were any."""
    ours = [p for p in (MASKS / u for u in units) if p.is_symlink() and p.readlink() == Path("/dev/null")]
    for link in ours:
        link.unlink()
    if ours:
        run(["systemctl", "daemon-reload"], "systemctl daemon-reload")
    return bool(ours)


def install(packages: Sequence[str], source: str, units: Sequence[str]) -> None:
    """Install packages with their services held back.

    Raises:
        Refused: apt or dpkg failed.
    """
    mask(units)
    try:
        run(["systemctl", "daemon-reload"], "systemctl daemon-reload")
        run([*apt(source), "update"], "apt-get update from the release's own repository")
        run([*apt(source), "install", "--yes", "--no-remove", *packages], f"apt-get install {' '.join(packages)}")
    finally:
        unmask(units)


def sources(source: str) -> list[Path]:
    """Return the source files of the host that are not ours."""
    found = [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*.list"))]
    found += sorted((APT / "sources.list.d").glob("*.sources"))
    return [p for p in found if os.path.lexists(p) and str(p) != source]


def others(wanted: str, source: str, dry: bool) -> list[str]:
    """Move the host's own sources aside, or back; return those that had to be moved."""
    moved = []
    if wanted == "disabled":
        pairs = [(p, ASIDE / p.relative_to(APT)) for p in sources(source)]
    else:
        pairs = [(p, APT / p.relative_to(ASIDE)) for p in sorted(ASIDE.rglob("*")) if p.is_file() or p.is_symlink()]
    for old, new in pairs:
        if wanted != "disabled" and os.path.lexists(new):
            raise Refused(f"{new} is there again, so {old} cannot be moved back. Do: keep one of the two by hand")
        moved.append(str(old))
        if not dry:
            new.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            old.rename(new)
    if wanted != "disabled" and not dry and ASIDE.is_dir():
        for folder in (ASIDE / "sources.list.d", ASIDE):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return moved


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "required": True},
            "source": {"type": "path", "required": True},
            "keep_stopped": {"type": "list", "elements": "str", "default": []},
            "other_sources": {"type": "str", "choices": ["untouched", "disabled"], "default": "untouched"},
        },
        supports_check_mode=True,
    )
    p, missing, moved, changed = module.params, [], [], False
    try:
        moved = others(p["other_sources"], p["source"], module.check_mode)
        known = states()
        broken = [n for n, s in known.items() if s not in ("installed", "not-installed", "config-files")]
        missing = [n for n in p["packages"] if known.get(n) != "installed"]
        if not module.check_mode:
            changed = unmask(p["keep_stopped"])
            if broken:  # an interrupted run; its services must not start either
                mask(p["keep_stopped"])
                try:
                    run(["dpkg", "--configure", "--pending", "--force-confdef", "--force-confold"], "dpkg --configure")
                finally:
                    unmask(p["keep_stopped"])
                known = states()
                missing = [n for n in p["packages"] if known.get(n) != "installed"]
            if missing:
                install(missing, p["source"], p["keep_stopped"])
        changed = changed or bool(missing or moved or broken)
        module.exit_json(changed=changed, installed=missing, moved=moved)
    except Refused as e:
        module.fail_json(msg=f"{e}", installed=[], moved=moved)
    except OSError as e:
        module.fail_json(msg=f"{e.filename}: {e.strerror}", installed=[], moved=moved)


if __name__ == "__main__":
    main()
