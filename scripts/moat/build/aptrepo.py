# SPDX-License-Identifier: Apache-2.0
"""Flat apt repositories of locked packages: the bundle's ``debs/``, and the private one that images are made from.

The bundle's repository carries no OpenPGP signature, on purpose. Its Packages and Release files and
every .deb are listed with their sha256 in the bundle's manifest, which the release key signs and
``moat verify`` checks before anything is installed; a second key would be a second thing to keep, to
ship and to trust, and would prove nothing more. The source line therefore says ``trusted=yes``, and
apt still compares each package with the Packages file.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moat.build.locks import LockedFile
from moat.errors import BuildFailed

#: Relations between packages. An index without them makes apt take exactly what it is told.
_RELATIONS = (
    "Depends",
    "Pre-Depends",
    "Recommends",
    "Suggests",
    "Enhances",
    "Breaks",
    "Conflicts",
    "Replaces",
    "Provides",
)


@dataclass(frozen=True)
class Deb:
    """A locked package, where its file is, and its control fields."""

    entry: LockedFile
    path: Path
    control: Mapping[str, str]

    @property
    def name(self) -> str:
        """The package's name."""
        return self.control["Package"]


def read_control(path: Path) -> dict[str, str]:
    """Return the control fields of a .deb in their own order; continuation lines keep their form.

    Raises:
        BuildFailed: dpkg-deb cannot read it.
    """
    done = subprocess.run(["dpkg-deb", "-f", str(path)], capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildFailed(
            f"cannot read the Debian package {path.name}", found=done.stderr.decode("utf-8", "replace"), path=str(path)
        )
    fields: dict[str, str] = {}
    last = ""
    for line in done.stdout.decode("utf-8").splitlines():
        if line[:1] in (" ", "\t"):
            fields[last] += "\n" + line
        elif line:
            last, _, value = line.partition(":")
            fields[last] = value.strip()
    return fields


def stanza(deb: Deb, filename: str, *, relations: bool) -> str:
    """Return the package's paragraph of a Packages file."""
    control = {k: v for k, v in deb.control.items() if relations or k not in _RELATIONS}
    lines = [f"{k}: {v}" for k, v in control.items()]
    lines += [f"Filename: {filename}", f"Size: {deb.entry.size}", f"SHA256: {deb.entry.sha256}"]
    return "\n".join(lines) + "\n"


def packages_file(debs: list[Deb], *, relations: bool = True) -> str:
    """Return a whole Packages file, sorted by package name."""
    ordered = sorted(debs, key=lambda d: (d.name, d.entry.version))
    return "\n".join(stanza(d, f"./{d.entry.filename}", relations=relations) for d in ordered)


def release_file(packages: bytes, *, suite: str, arch: str, source_date_epoch: int) -> str:
    """Return the Release file over one Packages file; apt needs it to show where packages come from."""
    date = datetime.fromtimestamp(source_date_epoch, UTC).strftime("%a, %d %b %Y %H:%M:%S UTC")
    return (
        f"Origin: Moat\nLabel: Moat\nSuite: {suite}\nCodename: {suite}\nArchitectures: {arch} all\n"
        f"Date: {date}\nDescription: Packages of a Moat bundle, verified by its manifest\n"
        f"SHA256:\n {hashlib.sha256(packages).hexdigest()} {len(packages)} Packages\n"
    )


def write_repository(
    folder: Path, debs: list[Deb], *, suite: str, arch: str, source_date_epoch: int, relations: bool = True
) -> None:
    """Write a flat repository: copies of the packages, Packages, Release."""
    folder.mkdir(parents=True)
    for deb in debs:
        shutil.copyfile(deb.path, folder / deb.entry.filename)
    packages = packages_file(debs, relations=relations).encode("utf-8")
    (folder / "Packages").write_bytes(packages)
    release = release_file(packages, suite=suite, arch=arch, source_date_epoch=source_date_epoch)
    (folder / "Release").write_text(release, "utf-8")
