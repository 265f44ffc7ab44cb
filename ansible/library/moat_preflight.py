#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_preflight``: would the installation succeed on this host? It changes nothing.

All checks run and all failures come back at once, each with what was found, what is expected and what to do: an
operator beside a rack should not learn of them one by one. What the installation would do on this host comes back, too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: moat_preflight
short_description: Check that Moat can be installed on this host, and say what would be done
description:
  - Changes nothing.
options:
  target: {description: "What the bundle is made for, for instance debian13-amd64.", type: str, required: true}
  created: {description: When the inputs of the bundle were locked, in seconds since 1970., type: int, required: true}
  max_age_days: {description: How long after that a clock is believed., type: int, required: true}
  control_time: {description: The clock of the control host, in seconds since 1970., type: float, required: true}
  ports:
    description: The ports that will be listened on.
    type: list
    elements: dict
    required: true
    suboptions:
      port: {description: The number., type: int, required: true}
      variable: {description: The variable that changes it., type: str, required: true}
      units: {description: Units that may hold it already., type: list, elements: str, required: true}
  services: {description: Services that must be ours if they run., type: list, elements: str, required: true}
  packages: {description: Debian packages that will be installed., type: list, elements: str, required: true}
  memory: {description: Bytes of memory that are needed., type: int, required: true}
  store: {description: The release store., type: path, required: true}
  release: {description: The name of the release., type: str, required: true}
  store_bytes: {description: Bytes that the release takes in the store., type: int, required: true}
  var_bytes: {description: Bytes that must be free below /var., type: int, required: true}
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Check the host
  moat_preflight:
    target: debian13-amd64
    created: 1795438309
"""

RETURN = r"""
failures: {description: What is wrong; each with what, found, expected and do., type: list, returned: always}
plan: {description: What would be done on this host., type: list, returned: always}
"""

DAY = 86400
#: Written at the end of an installation (`moat stage --record`).
INSTALLED = Path("/var/lib/moat/installed.json")
#: More than this between two hosts' clocks, and their logs and expiry times contradict each other.
MAX_SKEW = 60
#: What Compose leaves in its deployment folder, which is the store's place, too.
COMPOSE = ("compose.yaml", "state/prepared.json")

Failure = dict[str, str]


def failure(what: str, found: str, expected: str, do: str) -> Failure:
    """Return one entry of ``failures``."""
    return {"what": what, "found": found, "expected": expected, "do": do}


def day(seconds: float) -> str:
    """Return a time as a person reads it."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def size(count: float) -> str:
    """Return bytes as a person reads them."""
    return f"{count / 2**30:.1f} GiB"


def system(target: str) -> Iterator[Failure]:
    """Distribution, architecture, Python, systemd."""
    release: dict[str, str] = {}
    try:
        for line in Path("/etc/os-release").read_text("utf-8").splitlines():
            name, _, value = line.partition("=")
            release[name] = value.strip('"')
    except OSError:
        pass
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    found = f"{release.get('ID', 'unknown')}{release.get('VERSION_ID', '')}-{machine}"
    if found != target:
        yield failure("system", found, target, f"bring the bundle for {found} if there is one, or take another host")
    # It runs with the host's own Python, whatever that is.
    if sys.version_info < (3, 11):  # noqa: UP036
        version = ".".join(str(n) for n in sys.version_info[:3])
        yield failure("Python", version, "3.11 or newer", "install python3 of Debian 12 or 13 from the medium's debs/")
    if not Path("/run/systemd/system").is_dir():
        name = Path("/proc/1/comm").read_text("utf-8").strip()
        yield failure("init", f"{name} as process 1", "systemd", "boot the host with systemd, Debian's default")


def clock(created: int, max_age_days: int, control: float, now: float, installed: bool) -> Iterator[Failure]:
    """A wrong clock breaks certificates, the expiry of keys, signatures of packages and the times of the logs.

    How old a bundle may be is asked at the first installation alone: a site that runs for years is not stopped by it.
    """
    earliest, latest = created - DAY, created + max_age_days * DAY
    if now < earliest:
        yield failure(
            "clock",
            day(now),
            f"not before {day(earliest)}, when the inputs of the bundle were locked",
            "the clock is behind: set it with date -u -s 'YYYY-MM-DD HH:MM:SS', then hwclock --systohc",
        )
    elif now > latest and not installed:
        yield failure(
            "clock",
            day(now),
            f"not after {day(latest)}, {max_age_days} days after the inputs of the bundle were locked",
            "if the clock is ahead, set it with date -u -s 'YYYY-MM-DD HH:MM:SS', then hwclock --systohc; if it is"
            " right, the bundle is that old: bring a newer one, or raise preflight_bundle_max_age_days",
        )
    if abs(now - control) > MAX_SKEW:
        yield failure(
            "clock",
            day(now),
            f"that of the host where install.sh runs, {day(control)}, within {MAX_SKEW} s",
            "set both by the site's time server, or by hand",
        )


def room(params: Mapping[str, Any]) -> Iterator[Failure]:
    """Memory and disks."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A machine sold as 2 GiB shows some percent less: the kernel keeps a part.
    if memory < params["memory"] * 0.92:
        yield failure(
            "memory", size(memory), f"{size(params['memory'])} for the services of this host",
            "give the host more memory, or run fewer gateways (gateway_count)",
        )  # fmt: skip
    staged = (Path(params["store"]) / "releases" / params["release"] / "venv").is_dir()
    needs = {params["store"]: 0 if staged else params["store_bytes"], "/var": params["var_bytes"]}
    # Two places on one file system need the sum of both.
    by_device: dict[int, list[str]] = {}
    for place in needs:
        by_device.setdefault(_existing(place).stat().st_dev, []).append(place)
    for places in by_device.values():
        wanted, free = sum(needs[p] for p in places), _free(places[0])
        if free < wanted:
            yield failure(
                f"disk of {' and '.join(places)}", f"{size(free)} free", f"{size(wanted)} or more",
                "make room (journalctl --vacuum-size=200M, apt-get clean), or a larger disk",
            )  # fmt: skip


def _existing(place: str) -> Path:
    there = Path(place)
    while not there.exists():
        there = there.parent
    return there


def _free(place: str) -> int:
    stats = os.statvfs(_existing(place))
    return stats.f_bavail * stats.f_frsize


def listeners() -> dict[int, dict[str, int]]:
    """Return the sockets that listen by TCP port: the user of each by its inode."""
    found: dict[int, dict[str, int]] = {}
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", name).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                found.setdefault(int(fields[1].rsplit(":", 1)[1], 16), {})[fields[9]] = int(fields[7])
    return found


def processes() -> Iterator[tuple[Path, str, str]]:
    """Yield the folder in /proc, the name and the unit of every process."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text("utf-8").strip()
            groups = (process / "cgroup").read_text("utf-8").splitlines()
        except OSError:  # it has ended
            continue
        yield process, name, next((part for g in groups for part in g.split("/") if part.endswith(".service")), "")


def _links(folder: Path) -> Iterator[str]:
    try:
        for fd in folder.iterdir():
            # A busy process closes some while they are read; the others still count.
            with contextlib.suppress(OSError):
                yield str(fd.readlink())
    except OSError:
        return


def holders(inodes: Mapping[str, int]) -> dict[str, str]:
    """Return the unit of each process that holds one of the sockets, by the process's name and number.

    Inside a container root may not look at the files of other users' processes. A socket whose holder cannot be
    seen counts for those units that have a process of the socket's own user.
    """
    found, unseen = {}, dict(inodes)
    everybody = list(processes())
    for process, name, unit in everybody:
        links = set(_links(process / "fd"))
        held = [i for i in inodes if f"socket:[{i}]" in links]
        if held:
            found[f"{name} (process {process.name})"] = unit
            for inode in held:
                unseen.pop(inode, None)
    for process, name, unit in everybody:
        try:
            if unit and process.stat().st_uid in unseen.values():
                found[f"{name} (process {process.name}, by its user)"] = unit
        except OSError:
            continue
    return found


def ports(wanted: Sequence[Mapping[str, Any]]) -> Iterator[Failure]:
    """Each is free, or held by a unit of ours."""
    listening = listeners()
    for one in wanted:
        if one["port"] not in listening:
            continue
        who = holders(listening[one["port"]])
        seen = {name: unit for name, unit in who.items() if not name.endswith("by its user)")}
        ours = any(unit in one["units"] for unit in who.values())
        others = sorted(name for name, unit in seen.items() if unit not in one["units"])
        if others or not ours:
            yield failure(
                f"port {one['port']}",
                f"held by {', '.join(others) or 'a program that cannot be seen'}",
                "free, or held by " + " or ".join(one["units"][:2]),
                f"stop that program, or choose another port with {one['variable']}",
            )


def strangers(services: Sequence[str], store: str) -> Iterator[Failure]:
    """No service of the same name that somebody else set up, and no deployment with containers."""
    for unit in services:
        done = subprocess.run(
            ["systemctl", "show", "-p", "ActiveState", "-p", "DropInPaths", "-p", "FragmentPath", unit],
            capture_output=True,
            check=False,
        )
        shown = dict(line.split("=", 1) for line in done.stdout.decode("utf-8", "replace").splitlines() if "=" in line)
        paths = [*shown.get("DropInPaths", "").split(), shown.get("FragmentPath", "")]
        ours = any("moat" in Path(p).read_text("utf-8", "replace") for p in paths if p and Path(p).is_file())
        if shown.get("ActiveState") == "active" and not ours:
            yield failure(
                f"service {unit}",
                "running, and not set up by Moat",
                "none, because Moat runs its own under this name",
                f"take another host; or, if nobody needs it: systemctl disable --now {unit}",
            )
    there = [name for name in COMPOSE if (Path(store) / name).exists()]
    if there:
        yield failure(
            "other deployment",
            f"{store}/{there[0]}, a deployment with containers",
            "one kind of installation on a host",
            f"stop it (docker compose --project-directory {store} down) and move {store} away, or take another host",
        )


def plan(params: Mapping[str, Any]) -> Iterator[str]:
    """Say what would be done on this host."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"], capture_output=True, check=False
    )
    there = {line.split()[0] for line in done.stdout.decode().splitlines() if line.endswith(" installed")}
    missing = [p for p in params["packages"] if p not in there]
    store = Path(params["store"])
    current = store / "current"
    before = current.readlink().name if current.is_symlink() else ""
    if not before:
        yield f"install release {params['release']} in {store}"
    elif before != params["release"]:
        yield f"go from release {before} to {params['release']}"
    else:
        yield f"release {before} is installed; bring back what differs"
    yield f"Debian packages: {' '.join(missing) or 'nothing to install'}"
    yield f"units: {' '.join(params['services']) or 'none'}"
    yield f"ports: {' '.join(str(p['port']) for p in params['ports']) or 'none'}"


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "target": {"type": "str", "required": True},
            "created": {"type": "int", "required": True},
            "max_age_days": {"type": "int", "required": True},
            "control_time": {"type": "float", "required": True},
            "ports": {
                "type": "list", "elements": "dict", "required": True,
                "options": {
                    "port": {"type": "int", "required": True},
                    "variable": {"type": "str", "required": True},
                    "units": {"type": "list", "elements": "str", "required": True},
                },
            },
            "services": {"type": "list", "elements": "str", "required": True},
            "packages": {"type": "list", "elements": "str", "required": True},
            "memory": {"type": "int", "required": True},
            "store": {"type": "path", "required": True},
            "release": {"type": "str", "required": True},
            "store_bytes": {"type": "int", "required": True},
            "var_bytes": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )  # fmt: skip
    p = module.params
    failures = [
        *system(p["target"]),
        *clock(p["created"], p["max_age_days"], p["control_time"], time.time(), INSTALLED.exists()),
        *room(p),
        *ports(p["ports"]),
        *strangers(p["services"], p["store"]),
    ]
    module.exit_json(changed=False, failures=failures, plan=list(plan(p)))


if __name__ == "__main__":
    main()
