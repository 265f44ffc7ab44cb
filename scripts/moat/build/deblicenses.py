# SPDX-License-Identifier: Apache-2.0
"""Licences of Debian packages, from the copyright file that every package carries.

Debian's own review admits only free software (DFSG) to ``main``, which is why the policy allows what is in it. For the
bill of materials the machine-readable files (DEP-5) are turned into SPDX; free text stays ``NOASSERTION``, unless
``bundles/policy.yaml`` states what a person read in it.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from moat.build.cache import Cache
from moat.build.licenses import NOASSERTION, from_dep5
from moat.build.locks import LockedFile
from moat.build.policy import Policy
from moat.errors import LockFailed


def _copyright(deb: Path, package: str) -> tuple[str, str]:
    """Return a package's copyright file as ``(text, "")``, or ``("", package)`` where it is a link to that one's."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        text, other = "", ""
        if process.stdout is None:
            raise LockFailed(f"cannot read {deb.name}")
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                name = member.name.removeprefix("./").rstrip("/")
                if name == f"usr/share/doc/{package}/copyright" and member.isfile():
                    extracted = tar.extractfile(member)
                    text = extracted.read().decode("utf-8", "replace") if extracted else ""
                elif name == f"usr/share/doc/{package}" and member.issym():
                    other = re.sub(r"^(.*/)?(\./)?", "", member.linkname.rstrip("/"))
                elif name == f"usr/share/doc/{package}/copyright" and member.issym():
                    found = re.search(r"([^/]+)/copyright$", member.linkname)
                    other = found[1] if found else ""
        process.stdout.read()
    if process.returncode != 0:
        raise LockFailed(f"dpkg-deb cannot read {deb.name}", hint="delete it from the cache and fetch again")
    return text, other


def fill_in(entries: Iterable[LockedFile], cache: Cache, policy: Policy) -> list[LockedFile]:
    """Return the entries with the licences of their packages, which are in the cache already.

    Raises:
        FetchFailed: a package is not in the cache.
        LockFailed: a package cannot be read.
    """
    listed = list(entries)
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(
            zip((e.name for e in listed), pool.map(lambda e: _copyright(cache.require(e), e.name), listed), strict=True)
        )

    def license_of(name: str, seen: frozenset[str] = frozenset()) -> str:
        text, other = found.get(name, ("", ""))
        if text:
            return from_dep5(text)
        return license_of(other, seen | {name}) if other and other not in seen | {name} else NOASSERTION

    return [replace(e, license=policy.license_of(e.kind, e.name, e.version, license_of(e.name))) for e in listed]
