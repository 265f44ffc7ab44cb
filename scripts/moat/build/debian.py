# SPDX-License-Identifier: Apache-2.0
"""Debian packages: exact versions and closures, from signed indexes, in an apt root of our own.

The host's packages, sources and pins play no part: apt runs with a private state folder, our own sources (the
target's release, updates and security suites) and a dpkg status that says what counts as installed. The host's
``apt.conf`` stays in force, because proxies and checks are set there. apt checks every index against the archive's
keys; nothing here weakens that.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from moat.build.definitions import DebianSet
from moat.build.locks import LockedFile, Target, with_profile
from moat.build.mirrors import DebianMirrors
from moat.console import Console
from moat.errors import LockFailed

Stanza = dict[str, str]


@dataclass(frozen=True)
class DebianPackage:
    """One package as the signed index describes it.

    Attributes:
        name: of the binary package.
        version: with epoch and revision.
        arch: Debian's architecture, or ``all``.
        pool: path below the mirror, ``pool/...``.
        security: it comes from the security archive.
        sha256: of the .deb.
        size: in bytes.
    """

    name: str
    version: str
    arch: str
    pool: str
    security: bool
    sha256: str
    size: int

    @property
    def filename(self) -> str:
        """Basename in the pool (no epoch)."""
        return self.pool.rsplit("/", 1)[-1]


def _title(field: str) -> str:
    """Return a field's name as apt knows it (``pre-depends`` -> ``Pre-Depends``)."""
    return "SHA256" if field == "sha256" else "-".join(part.capitalize() for part in field.split("-"))


def stanzas(text: str) -> Iterator[Stanza]:
    """Yield the stanzas of a Packages file or of ``apt-cache show``; field names in lower case."""
    for block in re.split(r"\n\s*\n", text):
        stanza: Stanza = {}
        last = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                if last:
                    stanza[last] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                last = name.lower()
                stanza[last] = value.strip()
        if stanza:
            yield stanza


class AptRoot:
    """A private apt for one target.

    Args:
        folder: state, made when absent (``$MOAT_CACHE/apt/...``).
        target: what to resolve for.
        mirrors: where from.
        console: for steps.
    """

    def __init__(self, folder: Path, target: Target, mirrors: DebianMirrors, console: Console) -> None:
        # One state folder a set of mirrors: the indexes of one must not answer for another.
        key = hashlib.sha256(repr((mirrors, target.name)).encode()).hexdigest()[:16]
        self._dir = folder / f"{target.name}-{key}"
        self._target = target
        self._mirrors = mirrors
        self._console = console
        self._available: dict[str, Stanza] | None = None
        self._base: tuple[str, ...] | None = None

    def update(self) -> None:
        """Fetch and check the indexes.

        Raises:
            LockFailed: an index is not there, or its signature or date does not hold.
        """
        for sub in ("state/lists/partial", "cache/archives/partial"):
            (self._dir / sub).mkdir(parents=True, exist_ok=True)
        self._write_status([])
        suite, m = self._target.suite, self._mirrors
        (self._dir / "moat.sources").write_text(
            "\n".join(
                f"Types: deb\nURIs: {uri}/\nSuites: {suites}\nComponents: main\nSigned-By: {m.keyring}\n"
                for uri, suites in ((m.main, f"{suite} {suite}-updates"), (m.security, f"{suite}-security"))
            ),
            "utf-8",
        )
        settings = {
            "Dir::State": self._dir / "state",
            "Dir::State::status": self._dir / "status",
            "Dir::Cache": self._dir / "cache",
            # Without it every call reads the status anew; apt's own check misses a change within one second.
            "Dir::Cache::pkgcache": "",
            "Dir::Etc::sourcelist": self._dir / "moat.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": self._target.arch,
            "APT::Architectures": self._target.arch,
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            "Acquire::Languages": "none",
            # The private folder may lie where only its owner can read.
            "APT::Sandbox::User": "",
        }
        (self._dir / "apt.conf").write_text(
            # The host's hooks are for the host's own apt (some empty its package cache).
            "#clear APT::Architectures;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
            + "".join(f'{name} "{value}";\n' for name, value in settings.items()),
            "utf-8",
        )
        self._run("apt-get", "update", "--error-on=any", what="fetching Debian's indexes")
        self._available = None
        self._base = None

    def _run(self, program: str, *arguments: str, what: str) -> str:
        # C: the output is parsed.
        env = {**os.environ, "LC_ALL": "C", "LANG": "C"}
        return self._console.run(
            [program, "-q", "-c", str(self._dir / "apt.conf"), *arguments],
            error=LockFailed,
            what=what,
            env=env,
            show=False,
            hint="check the mirror (apt's sources, or MOAT_DEBIAN_MIRROR) and this host's clock",
        )

    def _write_status(self, base: Iterable[Stanza], assumed: Iterable[Stanza] = ()) -> None:
        """Write the dpkg status.

        Args:
            base: packages that are installed as the archive has them, dependencies and all.
            assumed: packages that count as installed with their own dependencies left out.
        """
        # The base keeps every field: apt takes an entry that differs in any for another version, and "upgrades" it.
        out = ["\n".join(f"{_title(n)}: {v}" for n, v in {**s, "status": "install ok installed"}.items()) for s in base]
        for s in assumed:
            # A version above all others satisfies every ">=" and no "Breaks: (<< ...)".
            fields = [f"Package: {s['package']}", "Status: install ok installed", "Version: 9999:1"]
            fields += [f"Architecture: {s['architecture']}", "Maintainer: none", "Description: counted as installed"]
            fields += [f"{_title(n)}: {s[n]}" for n in ("provides", "multi-arch", "essential") if n in s]
            out.append("\n".join(fields))
        (self._dir / "status").write_text("".join(stanza + "\n\n" for stanza in out), "utf-8")

    def available(self) -> dict[str, Stanza]:
        """Return the newest stanza of each package by name."""
        if self._available is None:
            text = self._run("apt-cache", "dumpavail", what="reading Debian's indexes")
            self._available = {s["package"]: s for s in stanzas(text)}
        return self._available

    def _stanza(self, name: str) -> Stanza:
        try:
            return self.available()[name]
        except KeyError:
            raise LockFailed(
                f"Debian {self._target.suite} has no package {name}",
                expected="names as in bundles/components.yaml",
                hint="correct the name in bundles/components.yaml",
            ) from None

    def base(self) -> tuple[str, ...]:
        """Return the names of what the smallest Debian has: required packages and apt, with what they need."""
        if self._base is None:
            wanted = [
                n
                for n, s in self.available().items()
                if s.get("priority") == "required" or s.get("essential") == "yes" or n == "apt"
            ]
            self._base = tuple(sorted(p.name for p in self.closure(wanted)))
        return self._base

    def closure(
        self, packages: Iterable[str], *, base: Iterable[str] = (), assume: Iterable[str] = ()
    ) -> list[DebianPackage]:
        """Return the packages that an installation would add.

        Args:
            packages: names; always part of the result.
            base: names that are installed, with what they need (those in ``packages`` are not).
            assume: names that count as installed without what they need.

        Raises:
            LockFailed: a package is unknown or cannot be installed.
        """
        wanted = sorted(set(packages))
        if not wanted:
            return []
        for name in wanted:
            self._stanza(name)
        self._write_status(
            [self._stanza(n) for n in sorted(set(base) - set(wanted) - set(assume))],
            [self._stanza(n) for n in sorted(set(assume) - set(wanted))],
        )
        arguments = ("-y", "--print-uris", "--no-install-recommends", "install", *wanted)
        text = self._run("apt-get", *arguments, what=f"resolving {' '.join(wanted)}")
        places = [(m[1], m[2]) for m in re.finditer(r"^'([^']+)' (\S+) \d+ ", text, re.M)]
        return sorted(self._packages(places), key=lambda p: (p.name, p.version))

    def check_installs(self, name: str, path: Path, *, base: Iterable[str]) -> None:
        """Ask apt whether a .deb from elsewhere installs on the base, with what the target's release has.

        Raises:
            LockFailed: it does not.
        """
        self._write_status([self._stanza(n) for n in sorted(set(base))])
        with tempfile.TemporaryDirectory(dir=self._dir) as scratch:
            file = Path(scratch) / name  # apt tells a file by its ending, which the cache's names have not
            file.symlink_to(path)
            self._run("apt-get", "-s", "--no-install-recommends", "install", str(file), what=f"trying {name}")

    def _packages(self, places: Iterable[tuple[str, str]]) -> Iterator[DebianPackage]:
        """Look ``(URI, apt's local file name)`` up in the indexes."""
        wanted: dict[tuple[str, str, str], bool] = {}
        for uri, local_name in places:
            name, version, _ = unquote(local_name).removesuffix(".deb").split("_")
            decoded = unquote(uri)
            for base, security in ((self._mirrors.security, True), (self._mirrors.main, False)):
                if decoded.startswith(base + "/pool/"):
                    wanted[name, version, decoded.removeprefix(base + "/")] = security
                    break
            else:
                raise LockFailed(f"apt names a place outside the mirrors for {name}", found=local_name)
        arguments = [f"{name}={version}" for name, version, _ in wanted]
        for s in stanzas(self._run("apt-cache", "show", *arguments, what="reading the indexes' entries")):
            key = (s["package"], s["version"], s.get("filename", ""))
            if key in wanted:
                security = wanted.pop(key)
                yield DebianPackage(*key[:2], s["architecture"], key[2], security, s["sha256"], int(s["size"]))
        if wanted:
            raise LockFailed("the indexes have no entry for a resolved package", found=repr(sorted(wanted)))


def resolve(apt: AptRoot, sets: Iterable[DebianSet], target: Target, console: Console) -> list[LockedFile]:
    """Resolve a target's sets of Debian packages; licences are filled in afterwards (:mod:`moat.build.deblicenses`).

    Raises:
        LockFailed: something cannot be resolved.
    """
    uses: dict[DebianPackage, set[str]] = {}
    for s in (s for s in sets if s.target == target.name):
        packages = apt.closure(s.packages, base=apt.base() if s.use == "host" else (), assume=s.assume)
        console.info(f"{s.use}: {len(packages)} packages")
        for p in packages:
            uses.setdefault(p, set()).add(s.use)
    return sorted(_entry(p, used, target) for p, used in uses.items())


def _entry(p: DebianPackage, used: set[str], target: Target) -> LockedFile:
    component = p.pool.removeprefix("pool/").removeprefix("updates/").split("/")[0]
    suite = f"{target.suite}-security" if p.security else target.suite
    archive = "debian-security" if p.security else "debian"
    return LockedFile(
        kind="deb",
        name=p.name,
        version=p.version,
        filename=p.filename,
        sha256=p.sha256,
        size=p.size,
        license="NOASSERTION",
        source=f"{archive}:{suite}/{component}/{p.pool}",
        uses=with_profile(used),
    )


def pool_path(entry: LockedFile) -> tuple[bool, str]:
    """Return ``(from the security archive, pool path)`` of a locked Debian package.

    Raises:
        LockFailed: its ``source`` is not of that form.
    """
    found = re.fullmatch(r"(debian|debian-security):[a-z-]+/[a-z-]+/(pool/[^\s]+\.deb)", entry.source)
    if entry.kind != "deb" or found is None or ".." in found[2].split("/"):
        raise LockFailed(f"{entry.filename} has no usable source", found=entry.source, path=entry.filename)
    return found[1] == "debian-security", found[2]


def suite_of(entry: LockedFile) -> str:
    """Return the release that a locked Debian package is of, without ``-security``."""
    return entry.source.partition(":")[2].partition("/")[0].removesuffix("-security")


def urls(entry: LockedFile, mirrors: DebianMirrors) -> tuple[str, ...]:
    """Return the places of a locked Debian package on the mirror."""
    security, pool = pool_path(entry)
    return (f"{mirrors.security if security else mirrors.main}/{quote(pool)}",)
