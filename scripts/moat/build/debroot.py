# SPDX-License-Identifier: Apache-2.0
"""Debian root file systems from locked packages: unpacked by mmdebstrap, never configured.

``--variant=extract`` runs no maintainer script, so nothing in an image was computed by a program
from outside the lock. The lock is the closure: the private index carries no dependencies, and apt
is told every package by name. What mmdebstrap adds of its own (apt's configuration, device nodes,
the host's resolver) is not in any package's file list and is left behind.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moat.build.aptrepo import Deb, write_repository
from moat.build.layers import Node, Tree
from moat.console import Console
from moat.errors import BuildFailed

#: Debian merged these into /usr; packages may still name the old places.
USRMERGE = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def merged(path: str) -> str:
    """Return a package's path with the old top folders moved into ``usr``."""
    clean = str(PurePosixPath(path.removeprefix("./").removeprefix("/") or "."))
    top, _, rest = clean.partition("/")
    return f"usr/{top}/{rest}" if top in USRMERGE and rest else clean


@dataclass(frozen=True)
class DebFile:
    """One path of a package: its package, type (``f``, ``d``, ``l``), mode and link target."""

    package: str
    kind: str
    mode: int
    target: str


def file_list(deb: Deb) -> dict[str, DebFile]:
    """Return what a package installs, by merged path."""
    listed: dict[str, DebFile] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb.path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for m in tar:
                path = merged(m.name)
                if path == "." or (m.issym() and path in USRMERGE):
                    continue
                kind = "d" if m.isdir() else "l" if m.issym() else "f"
                if not (m.isdir() or m.issym() or m.isreg() or m.islnk()):
                    raise BuildFailed(f"{deb.name} holds a device or pipe: {m.name}", path=m.name)
                listed[path] = DebFile(deb.name, kind, m.mode & 0o1777, m.linkname if m.issym() else "")
    if process.returncode != 0:
        raise BuildFailed(f"cannot unpack the Debian package {deb.entry.filename}")
    return listed


def extract_tar(tar: tarfile.TarFile, root: Path, wanted: set[str]) -> set[str]:
    """Unpack the wanted members below ``root`` and return their paths; nothing is followed out of it.

    Members are regular files, folders, symbolic links (written as they are, never followed) and
    hard links within the same tar (which become copies).
    """
    done: set[str] = set()
    later: list[tuple[str, str]] = []
    for m in tar:
        path = str(PurePosixPath(m.name.removeprefix("./") or "."))
        if path not in wanted:
            continue
        target = root / path
        _no_links_above(root, path)
        if m.isdir():
            target.mkdir(parents=True, exist_ok=True)
        elif m.issym():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(m.linkname)
        elif m.isreg():
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(m)
            assert source is not None  # noqa: S101 - regular members have content
            with target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            target.chmod(m.mode & 0o777)
        elif m.islnk():
            later.append((path, str(PurePosixPath(m.linkname.removeprefix("./")))))
        else:
            raise BuildFailed(f"unexpected kind of member in a root file system: {m.name}", path=m.name)
        done.add(path)
    for path, linked in later:
        source_path = root / linked
        _no_links_above(root, linked)
        shutil.copyfile(source_path, root / path)
        (root / path).chmod(source_path.stat().st_mode & 0o777)
    return done


def _no_links_above(root: Path, path: str) -> None:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise BuildFailed(f"unsafe path: {path}", path=path)
    for parent in pure.parents:
        if str(parent) != "." and (root / parent).is_symlink():
            raise BuildFailed(f"unsafe path: {path} lies below the link {parent}", path=path)


def make_root(root: Path, debs: Sequence[Deb], *, suite: str, arch: str, epoch: int, console: Console) -> None:
    """Unpack packages into the new folder ``root``, with ``var/lib/dpkg/status.d/NAME`` for scanners.

    Raises:
        BuildFailed: mmdebstrap failed, or a package's file did not arrive.
    """
    wanted: dict[str, DebFile] = {}
    for deb in debs:
        for path, f in file_list(deb).items():
            if path in wanted and not wanted[path].kind == f.kind == "d":
                raise BuildFailed(f"{path} is in two packages", found=f"{wanted[path].package} and {f.package}")
            wanted.setdefault(path, f)
    root.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="moat-root-", dir=root.parent) as scratch:
        repository, archive = Path(scratch) / "debs", Path(scratch) / "root.tar"
        write_repository(repository, list(debs), suite=suite, arch=arch, source_date_epoch=epoch, relations=False)
        # mmdebstrap's own user switch (_apt) must be able to read the folder.
        Path(scratch).chmod(0o755)
        console.run(
            [
                "mmdebstrap",
                "--quiet",
                "--variant=extract",
                "--mode=root",
                f"--architectures={arch}",
                "--format=tar",
                "--include=" + ",".join(sorted(d.name for d in debs)),
                suite,
                str(archive),
                f"deb [trusted=yes] copy:{repository} ./",
            ],
            error=BuildFailed,
            what="unpack the base packages",
            hint="`apt-get install mmdebstrap`; scripts/host-setup.sh does it",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8"},
            show=False,
        )
        with tarfile.open(archive, mode="r|") as tar:
            arrived = extract_tar(tar, root, set(wanted))
    if missing := sorted(set(wanted) - arrived):
        raise BuildFailed(
            "files of locked packages did not arrive in the root file system", found=", ".join(missing[:5])
        )
    for link in USRMERGE:
        # For programs that run in this root during the build; an image gets the links from its recipe.
        if (root / "usr" / link).is_dir():
            (root / link).symlink_to(f"usr/{link}")
    status = root / "var/lib/dpkg/status.d"
    status.mkdir(parents=True)
    for deb in debs:
        text = "".join(f"{k}: {v}\n" for k, v in deb.control.items())
        (status / deb.name).write_text(text, "utf-8")


def root_tree(root: Path, debs: Sequence[Deb]) -> Tree:
    """Return the layer entries of a root made from ``debs``: modes from the packages, everything root's."""
    tree = Tree()
    for deb in debs:
        owner = f"deb:{deb.name}"
        for path, f in file_list(deb).items():
            if f.kind == "d":
                # Folders that several packages share take the first one's mode.
                tree.add(Node(path, f.mode, owner))
            elif f.kind == "l":
                tree.add(Node(path, 0o777, owner, target=f.target))
            else:
                tree.add(Node(path, f.mode, owner, source=root / path))
        tree.add(
            Node(f"var/lib/dpkg/status.d/{deb.name}", 0o644, owner, source=root / f"var/lib/dpkg/status.d/{deb.name}")
        )
    return tree


_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\n.+?-----END CERTIFICATE-----\n", re.DOTALL)


def ca_bundle(root: Path) -> bytes:
    """Return what update-ca-certificates would write: the package's certificates, by file name.

    Raises:
        BuildFailed: there is none.
    """
    found: list[bytes] = []
    for path in sorted((root / "usr/share/ca-certificates").rglob("*.crt")):
        found += _CERTIFICATE.findall(path.read_bytes().replace(b"\r\n", b"\n"))
    if not found:
        raise BuildFailed("no certificates for the CA bundle", hint="add ca-certificates to the image's packages")
    return b"".join(found)
