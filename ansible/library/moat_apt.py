#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_apt``: install packages from one apt source and from nothing else.

The host's own sources, lists and proxies play no part: apt is given one source file, so what it installs is what
the bundle brought, or nothing. Packages that are installed stay as they are. Services must not run with the packages'
own configuration, neither now nor after a power cut: masks below /run keep them from starting while apt works; and a
package enables its service, which would run at the next start of the host, so a condition in /etc that is never met
holds back those that are new, until they are disabled again. The role of a service enables it, when it is ours.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_apt
short_description: Install packages from one apt source and from nothing else
description:
  - Installs those packages that are not installed; never removes, upgrades only what they need.
  - Keeps services from starting, and finishes what an interrupted dpkg left.
options:
  packages: {description: Names of packages., type: list, elements: str, required: true}
  source: {description: The one source file that apt may read., type: path, required: true}
  keep_stopped:
    description: Units that must not start, now or at the next start of the host, before something else enables them.
    type: list
    elements: str
    default: []
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
UNITS = Path("/etc/systemd/system")
#: In the folder UNIT.d while a package of its unit is being installed; `moat.conf` there is what makes a unit ours.
HOLD, OURS = "moat-hold.conf", "moat.conf"
HELD = """\
# SPDX-License-Identifier: Apache-2.0
# Made by Moat while a package is installed: until the end of that, the package's own configuration must not run.
[Unit]
ConditionPathExists=!/
"""


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


def unit_state(unit: str) -> tuple[str, str]:
    """Return whether a unit is active and whether it is enabled, in systemd's words."""
    text = run(["systemctl", "show", "-p", "ActiveState", "-p", "UnitFileState", unit], f"systemctl show {unit}")
    shown = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return shown.get("ActiveState", ""), shown.get("UnitFileState", "")


def hold(units: Sequence[str]) -> None:
    """Keep units that nobody uses yet from starting, also after a power cut."""
    for unit in units:
        folder = UNITS / f"{unit}.d"
        if (folder / OURS).exists() or (folder / HOLD).exists():
            continue
        active, enabled = unit_state(unit)
        if active in ("inactive", "failed") and enabled != "enabled":
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            write(folder / HOLD, HELD.encode(), 0o644)


def release() -> bool:
    """Disable what is held back, by this run or by one that was interrupted, and hold it no longer.

    Returns:
        Whether there was any.
    """
    held = sorted(UNITS.glob(f"*.service.d/{HOLD}"))
    for file in held:
        unit = file.parent.name.removesuffix(".d")
        # First this, then the condition away: between the two, too, a start of the host starts nothing.
        if unit_state(unit)[1] == "enabled":
            run(["systemctl", "disable", "--quiet", unit], f"systemctl disable {unit}")
        file.unlink()
        if not any(file.parent.iterdir()):
            file.parent.rmdir()
    if held:
        run(["systemctl", "daemon-reload"], "systemctl daemon-reload")
    return bool(held)


@contextmanager
def held_back(units: Sequence[str]) -> Iterator[None]:
    """Let dpkg work while these services neither start nor are left enabled."""
    hold(units)
    mask(units)
    try:
        run(["systemctl", "daemon-reload"], "systemctl daemon-reload")
        yield
    finally:
        unmask(units)
        release()


def install(packages: Sequence[str], source: str) -> None:
    """Install packages.

    Raises:
        Refused: apt or dpkg failed.
    """
    run([*apt(source), "update"], "apt-get update from the release's own repository")
    run([*apt(source), "install", "--yes", "--no-remove", *packages], f"apt-get install {' '.join(packages)}")


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
            if broken or missing:
                with held_back(p["keep_stopped"]):
                    if broken:  # an interrupted run; its services must not start either
                        argv = ["dpkg", "--configure", "--pending", "--force-confdef", "--force-confold"]
                        run(argv, "dpkg --configure")
                        known = states()
                        missing = [n for n in p["packages"] if known.get(n) != "installed"]
                    if missing:
                        install(missing, p["source"])
            else:  # what a run left that was cut after the packages
                changed = unmask(p["keep_stopped"])
                changed = release() or changed
        changed = changed or bool(missing or moved or broken)
        module.exit_json(changed=changed, installed=missing, moved=moved)
    except Refused as e:
        module.fail_json(msg=f"{e}", installed=[], moved=moved)
    except OSError as e:
        module.fail_json(msg=f"{e.filename}: {e.strerror}", installed=[], moved=moved)


if __name__ == "__main__":
    main()
