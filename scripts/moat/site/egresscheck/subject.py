# SPDX-License-Identifier: Apache-2.0
"""What a report is about: release, rules and configuration that were in force, in words that can be compared.

A proof of another release, or of other rules, proves nothing about what runs now. ``moat evidence`` reads the same
from the same files, and compares. Nothing here holds a secret: a configuration names files of secrets, and of rules
and files only a hash is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from moat.manifest import MANIFEST_NAME
from moat.site.store import BUNDLE, DEFAULT_STORE

RULES: Final = Path("/etc/moat/nftables/no-egress.nft")
_CONFIG: Final = Path("/etc/moat/config")
_REPORTS: Final = Path("/run/moat/reports")
#: Begins the name of what changes while the site runs, by a push: the configuration of one gateway.
CONFIGURATION: Final = "configuration of "


def of_systemd(root: Path = Path("/"), store: Path = DEFAULT_STORE) -> dict[str, str]:
    """Return what is in force on a host whose services systemd runs; what is not there is left out.

    Args:
        root: where the host's file system begins.
        store: release store.
    """

    def below(path: Path) -> Path:
        return root / str(path).lstrip("/")

    found = {}
    links = {"release": below(store) / "current"}
    links |= {f"release of gateway-{p.name}": p for p in sorted((below(store) / "instances").glob("*"))}
    for name, link in links.items():
        with contextlib.suppress(OSError):
            found[name] = Path(link.readlink()).name
    for name, path in (
        ("manifest", below(store) / "current" / BUNDLE / MANIFEST_NAME),
        ("packet filter's rules", below(RULES)),
    ):
        with contextlib.suppress(OSError):
            found[name] = f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return found | configurations(below(_REPORTS), below(_CONFIG))


def configurations(reports: Path, config: Path) -> dict[str, str]:
    """Return what each gateway of a node serves, by its own report.

    Args:
        reports: folder of the gateways' reports.
        config: folder of the local files, which a gateway serves that has no revision.
    """
    found = {}
    for path in sorted(reports.glob("*.json")):  # gateway-1, of several nodes node1.gateway-1
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads(path.read_bytes())
            revision, digest = int(report["revision"]), report["sha256"]
            text = f"revision {revision}, sha256 {digest}" if revision else f"local files, sha256 {_all_of(config)}"
            found[CONFIGURATION + path.stem] = text
    return found


def _all_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return by its name what is not the same; what is missing on one side is ``none``."""
    return {
        name: (then.get(name, "none"), now.get(name, "none"))
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    }
