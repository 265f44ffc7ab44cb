# SPDX-License-Identifier: Apache-2.0
"""The judgements of ``moat doctor``, one function a question: facts in, a :class:`Check` out.

Nothing here looks at the host; :mod:`moat.site.doctor` gathers the facts. So each judgement can be
tested with the facts of a host that one does not have.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from moat.console import human_bytes
from moat.manifest import Manifest
from moat.site.engine import PROJECT, Container, parse_version

#: docker 20.10 is the oldest engine that loads the bundle's archives; Compose 2.20 knows every key of compose.yaml.
ENGINE_AT_LEAST: Final = (20, 10)
COMPOSE_AT_LEAST: Final = (2, 20)
PYTHON_AT_LEAST: Final = (3, 11)
#: Two gateways (360 MB each), MinIO (140), nginx and Valkey (70), and room for prompts; the demo's model takes 400.
MEMORY_AT_LEAST: Final = {"site": 5 * 1024**3 // 2, "demo": 3 * 1024**3}
#: Fixed by compose.yaml, so that the firewall's rules are static.
SUBNETS: Final = {"moat-edge": "172.30.241.0/24", "moat-core": "172.30.242.0/24"}
#: A bundle is never made before the project began; used where no bundle is at hand.
CLOCK_NOT_BEFORE: Final = 1_735_689_600
_TEN_YEARS: Final = 10 * 366 * 86_400
_DAY: Final = 86_400
#: What the engine writes beside images: container logs (10 x 50 MB at most) and the store's volume at its beginning.
ENGINE_MARGIN: Final = 1024**3
_MACHINES: Final = {"amd64": ("x86_64", "amd64"), "arm64": ("aarch64", "arm64")}


@dataclass(frozen=True)
class Check:
    """One question and its answer. ``hint`` says what to do and is empty when all is well."""

    name: str
    ok: bool
    found: str
    expected: str
    hint: str = ""


def _check(name: str, ok: bool, found: str, expected: str, hint: str) -> Check:
    return Check(name, ok, found, expected, "" if ok else hint)


@dataclass(frozen=True)
class Need:
    """Disk space that one use takes. ``device`` identifies the file system, ``free`` is what it has left (bytes)."""

    use: str
    path: str
    size: int
    device: int
    free: int
    change: str


def architecture(machine: str, target: str | None) -> Check:
    """Is the processor of the kind that the bundle's programs are built for?"""
    wanted = target.rsplit("-", 1)[-1] if target else "amd64"
    names = _MACHINES.get(wanted, (wanted,))
    hint = "use a host of that architecture, or bring the bundle that was built for this one"
    return _check("architecture", machine in names, machine, names[0], hint)


def processor(flags: Iterable[str], profile: str | None) -> Check:
    """Does the processor have what the demo's model server is compiled for?"""
    if profile not in (None, "demo"):
        return Check("processor", True, "any", "any (the bundle brings no model server)")
    found = "avx2" in set(flags)
    hint = "use a processor made after 2013, or expose AVX2 to the virtual machine (CPU type host)"
    return _check("processor", found, "AVX2" if found else "no AVX2", "AVX2 (for the demo's model)", hint)


def python(version: Sequence[int]) -> Check:
    """Is this Python new enough for moat.pyz?"""
    return _check(
        "python",
        tuple(version[:2]) >= PYTHON_AT_LEAST,
        ".".join(map(str, version[:3])),
        "3.11 or newer",
        "install python3 of Debian 12 or newer",
    )


def _at_least(name: str, found: str, wanted: tuple[int, ...], hint: str) -> Check:
    expected = ".".join(map(str, wanted)) + " or newer"
    try:
        return _check(name, parse_version(found) >= wanted, found, expected, hint)
    except ValueError:
        return Check(name, False, found or "nothing", expected, hint)


def engine(version: str | None, why: str = "") -> Check:
    """Does the container engine answer, and is it new enough? ``None`` is an engine that does not answer."""
    if version is None:
        return Check(
            "engine",
            False,
            why,
            "a docker engine that answers",
            "install docker.io, start it (systemctl start docker), and run as root or as a member of the group docker",
        )
    return _at_least("engine", version, ENGINE_AT_LEAST, "install docker.io of Debian 12 or newer")


def compose(version: str | None, why: str = "") -> Check:
    """Is the Compose plugin there, and new enough? ``None`` is no plugin."""
    hint = "install docker-compose of Debian 13, or put the plugin into /usr/libexec/docker/cli-plugins"
    if version is None:
        return Check("compose", False, why, "the Compose plugin 2.20 or newer", hint)
    return _at_least("compose", version, COMPOSE_AT_LEAST, hint)


def port(number: int, flag: str, taken: bool, containers: Iterable[Container]) -> Check:
    """Is a port of the host free, or held by the project that runs already?"""
    holders = [c for c in containers if number in c.ports]
    ours = [c for c in holders if c.project == PROJECT]
    if ours:
        return Check(f"port {number}", True, f"held by our own service {ours[0].service}", "free, or ours")
    found = "free"
    if holders:
        found = f"held by the container {holders[0].project}/{holders[0].service or holders[0].image}"
    elif taken:
        found = "held by another program"
    hint = f"see who listens: ss -ltnp 'sport = :{number}'; stop it, or choose another with {flag}"
    hint += " (here and for moat prepare)"
    return _check(f"port {number}", found == "free", found, "free", hint)


def memory(total: int, profile: str | None) -> Check:
    """Has the host the memory that the services take (bytes)?"""
    wanted = MEMORY_AT_LEAST.get(profile or "demo", MEMORY_AT_LEAST["site"])
    # A machine sold as 2 GiB shows some percent less: the kernel keeps a part.
    return _check(
        "memory",
        total >= wanted * 0.92,
        human_bytes(total),
        f"{human_bytes(wanted)} or more",
        "give the machine more memory",
    )


def disk(needs: Iterable[Need]) -> list[Check]:
    """Has each file system room for all that comes onto it? Uses on one file system are added up."""
    groups: dict[int, list[Need]] = {}
    for need in needs:
        groups.setdefault(need.device, []).append(need)
    checks = []
    for group in groups.values():
        wanted = sum(n.size for n in group)
        parts = ", ".join(f"{n.use} {human_bytes(n.size)} in {n.path}" for n in group)
        # The largest use is what one moves first.
        largest = max(group, key=lambda n: n.size)
        checks.append(
            _check(
                f"disk {largest.path}",
                group[0].free >= wanted,
                f"{human_bytes(group[0].free)} free",
                f"{human_bytes(wanted)} ({parts})",
                f"make room there, or {largest.change}",
            )
        )
    return checks


def image_space(manifest: Manifest, present: Iterable[str]) -> int:
    """Return the bytes that loading takes in the engine's data root at its peak.

    The engine keeps each image unpacked, and while it loads one a copy of its archive beside it.
    """
    there = set(present)
    lacking = [i for i in manifest.images if i.id not in there]
    sizes = {f.path: f.size for f in manifest.files}
    archive = max((sizes[i.archive] for i in lacking), default=0)
    return sum(i.unpacked for i in lacking) + archive + ENGINE_MARGIN


def _day(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return f"{seconds:.0f} seconds after 1970"


def clock(now: float, created: int | None) -> Check:
    """Is the host's clock plausible? A wrong one breaks certificates, key expiry and the audit trail's times."""
    earliest = CLOCK_NOT_BEFORE if created is None else created - _DAY
    latest = (CLOCK_NOT_BEFORE if created is None else created) + _TEN_YEARS
    why = "" if created is None else ", when the bundle's inputs were locked"
    return _check(
        "clock",
        earliest <= now <= latest,
        _day(now),
        f"not before {_day(earliest)}{why}, and not ten years after",
        "set it: date -u -s 'YYYY-MM-DD HH:MM:SS', then hwclock --systohc; check the site's time server",
    )


def clock_runs(wall: float, monotonic: float) -> Check:
    """Does the clock run as fast as time passes? Arguments: what both clocks moved by, in seconds."""
    return _check(
        "clock runs",
        abs(wall - monotonic) < 1,
        f"{wall:.2f} s passed on the clock, {monotonic:.2f} s in fact",
        "the same within a second",
        "something sets the clock while we look; let the time service finish, then run this again",
    )


def networks(routes: Iterable[tuple[str, str]]) -> Check:
    """Are the addresses of our container networks free?

    Args:
        routes: (interface, network as ``a.b.c.d/n``) of the host's routing table.
    """
    taken = [
        f"{network} on {interface}"
        for interface, network in routes
        if interface not in SUBNETS
        and ipaddress.ip_network(network).prefixlen > 0
        and any(ipaddress.ip_network(network).overlaps(ipaddress.ip_network(s)) for s in SUBNETS.values())
    ]
    return _check(
        "networks",
        not taken,
        ", ".join(taken) or "free",
        " and ".join(SUBNETS.values()) + " unused on this host",
        "move the other network (docker network rm), or change both subnets in compose.yaml and the firewall's rules",
    )
