# SPDX-License-Identifier: Apache-2.0
"""``moat doctor``: would the installation succeed on this host?

It changes nothing. With a bundle's path it computes disk space, architecture and clock from the
manifest; without one it checks what holds for every bundle. The judgements are in
:mod:`moat.site.checks`; this module gathers the facts.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import HostNotReady
from moat.manifest import Manifest
from moat.site import checks
from moat.site.checks import Check, Need
from moat.site.engine import Container, Engine, EngineError, EngineInfo
from moat.site.inspect import read_manifest, table
from moat.site.keyring import add_key_arguments
from moat.site.verify import keys_of

NAME = "doctor"
HELP = "check that this host can run a bundle: versions, ports, disk space, clock"

DEFAULT_DEPLOY_DIR: Final = Path("/opt/moat")
#: What the deployment folder takes of a bundle; all else stays on the medium or goes into the engine.
_DEPLOYED: Final = ("compose/", "moat.pyz")
_MIB: Final = 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", type=Path, nargs="?", metavar="PATH", help="the bundle's folder on the medium")
    add_key_arguments(parser)
    parser.add_argument("--https-port", type=int, default=8443, metavar="N", help="default %(default)s")
    parser.add_argument("--http-port", type=int, default=8080, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--dir", type=Path, default=DEFAULT_DEPLOY_DIR, metavar="DIR", help="deployment folder; default %(default)s"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Ask every question, show the answers."""
    manifest: Manifest | None = None
    if args.path is not None:
        manifest, key = read_manifest(args.path, keys_of(args, args.path, console))
        if key is None:
            console.warn("the signature was NOT checked; the figures are what the medium claims")
    results = list(
        examine(manifest, Engine(), args.dir, {"--https-port": args.https_port, "--http-port": args.http_port})
    )
    failed = [c for c in results if not c.ok]
    rows = [("", "check", "found", "expected")]
    rows += [("ok" if c.ok else "NOT OK", c.name, c.found, c.expected) for c in results]
    for c in failed:
        console.problem(HostNotReady(f"{c.name}: {c.found}", expected=c.expected, hint=c.hint))
    code = HostNotReady.exit_code if failed else 0
    end = f"{len(failed)} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed"
    console.result({"ok": not failed, "exit": code, "checks": [asdict(c) for c in results]}, table(rows) + "\n" + end)
    return code


def examine(manifest: Manifest | None, engine: Engine, deploy_dir: Path, ports: dict[str, int]) -> Iterator[Check]:
    """Yield every check.

    Args:
        manifest: of the bundle, or ``None``.
        engine: the container engine.
        deploy_dir: where the deployment will be.
        ports: host port by the flag that changes it.
    """
    bundle = manifest.bundle if manifest else None
    yield checks.architecture(platform.machine(), bundle.target if bundle else None)
    yield checks.processor(_cpu_flags(), bundle.profile if bundle else None)
    yield checks.python(sys.version_info[:3])
    info: EngineInfo | None = None
    containers: list[Container] = []
    present: list[str] = []
    why = ""
    try:
        info = engine.info()
        containers, present = engine.containers(), list(engine.image_ids().values())
    except EngineError as e:
        why = str(e)
    yield checks.engine(info.version if info else None, why)
    try:
        yield checks.compose(engine.compose_version())
    except EngineError as e:
        yield checks.compose(None, str(e))
    for flag, number in ports.items():
        yield checks.port(number, flag, port_is_taken(number), containers)
    yield checks.networks(_routes())
    yield checks.memory(_memory_total(), bundle.profile if bundle else None)
    yield from checks.disk(_needs(manifest, info, present, deploy_dir))
    yield checks.clock(time.time(), bundle.created if bundle else None)
    wall, monotonic = time.time(), time.monotonic()
    time.sleep(0.05)
    yield checks.clock_runs(time.time() - wall, time.monotonic() - monotonic)


def _cpu_flags() -> list[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].split()
    except OSError:
        pass
    return []


def _memory_total() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def port_is_taken(number: int) -> bool:
    """Tell whether something listens on a TCP port of this host, on any address, IPv4 or IPv6."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 (nothing is listened to)
        try:
            with socket.socket(family, socket.SOCK_STREAM) as s:
                # Lets us pass over connections that linger after their close; a listener still refuses us.
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                s.bind((address, number))
        except OSError as e:
            if e.errno in (errno.EADDRINUSE, errno.EACCES):
                return True
            if e.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # a host without IPv6
                raise
    return False


def _routes() -> list[tuple[str, str]]:
    """Return (interface, network) of the IPv4 routing table."""
    routes = []
    try:
        lines = Path("/proc/net/route").read_text("ascii").splitlines()[1:]
    except OSError:
        return []
    for line in lines:
        interface, destination, _gateway, _flags, _refs, _use, _metric, mask, *_ = line.split()
        address = ipaddress.ip_address(int.from_bytes(bytes.fromhex(destination), "little"))
        bits = int.from_bytes(bytes.fromhex(mask), "little").bit_count()
        routes.append((interface, str(ipaddress.ip_network(f"{address}/{bits}", strict=False))))
    return routes


def _needs(manifest: Manifest | None, info: EngineInfo | None, present: list[str], deploy_dir: Path) -> list[Need]:
    root = info.root if info and info.root else "/var/lib/docker"
    images = checks.image_space(manifest, present) if manifest else checks.ENGINE_MARGIN
    deployed = sum(f.size for f in manifest.files if f.path.startswith(_DEPLOYED)) if manifest else 0
    uses = [
        ("images", root, images, "move the engine's data root (data-root in /etc/docker/daemon.json)"),
        ("deployment", str(deploy_dir), deployed + 64 * _MIB, "choose another folder with --dir"),
        ("temporary files", tempfile.gettempdir(), 16 * _MIB, "choose another folder with TMPDIR"),
    ]
    return [Need(use, path, size, *_file_system(Path(path)), change) for use, path, size, change in uses]


def _file_system(path: Path) -> tuple[int, int]:
    """Return the device and the free bytes of the file system that ``path`` is or would be on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return path.stat().st_dev, status.f_bavail * status.f_frsize
