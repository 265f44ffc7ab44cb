# SPDX-License-Identifier: Apache-2.0
"""Go programs from locked modules, with the locked toolchain, without a network.

The toolchain is Debian's package unpacked into the cache, never the host's Go. A module is built
in its own folder, so that its own ``go.sum`` judges every dependency; the dependencies come from a
file proxy that is laid out from the locked files. The result is static and free of paths, times
and build ids: the same locks give the same program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from moat.build.aptrepo import Deb
from moat.build.cache import Cache
from moat.build.debroot import extract_tar, file_list
from moat.build.locks import ROOT, LockedFile
from moat.console import Console
from moat.errors import BuildFailed

#: Debian's toolchain packages; which of them the lock holds says which Go it is.
TOOLCHAIN = ("golang-1.24-go", "golang-1.24-src")
#: Where the toolchain lies below the folder that it is unpacked into.
GOROOT = "usr/lib/go-1.24"
MINIO = "github.com/minio/minio"


@dataclass(frozen=True)
class Program:
    """A built program and what went into it, for the SBOM: ``modules`` as (path, version) pairs."""

    name: str
    version: str
    license: str
    path: Path
    modules: tuple[tuple[str, str], ...]


def unpack_toolchain(debs: Sequence[Deb], folder: Path) -> Path:
    """Unpack the toolchain's packages into the new folder and return its GOROOT.

    Raises:
        BuildFailed: a package is not locked.
    """
    by_name = {d.name: d for d in debs}
    for name in TOOLCHAIN:
        if name not in by_name:
            raise BuildFailed(f"the lock lacks the toolchain's package {name}", hint="run `moat lock`")
        deb = by_name[name]
        # The Go tree alone: documentation folders of the two packages are of no use here.
        wanted = {p for p in file_list(deb) if p.startswith(("usr/lib/go-", "usr/share/go-"))}
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb.path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None  # noqa: S101
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                extract_tar(tar, folder, wanted)
    return folder / GOROOT


def file_proxy(entries: Sequence[LockedFile], cache: Cache, folder: Path) -> None:
    """Lay the locked module files out as a Go module proxy (``MODULE/@v/VERSION.{zip,mod,info}``)."""
    for entry in entries:
        path = entry.source.removeprefix("goproxy:")
        if entry.source == path or path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise BuildFailed(f"{entry.filename} has no place in a module proxy", found=entry.source)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(cache.require(entry))


def unzip_module(archive: Path, prefix: str, folder: Path) -> None:
    """Unpack a module's zip, whose members all start with ``prefix`` (``module@version/``)."""
    with zipfile.ZipFile(archive) as z:
        for info in z.infolist():
            name = info.filename
            rest = name.removeprefix(prefix)
            if rest == name or ".." in PurePosixPath(rest).parts or rest.startswith("/"):
                raise BuildFailed(f"unsafe path in {archive.name}: {name}", path=name)
            if rest.endswith("/") or not rest:
                continue
            target = folder / rest
            target.parent.mkdir(parents=True, exist_ok=True)
            with z.open(info) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def go_environment(goroot: Path, scratch: Path, proxy: Path | None) -> dict[str, str]:
    """Return the whole environment of a build: nothing of the host's Go settings is left."""
    return {
        "PATH": f"{goroot / 'bin'}:/usr/bin:/bin",
        "HOME": str(scratch),
        "GOROOT": str(goroot),
        "GOPATH": str(scratch / "gopath"),
        "GOMODCACHE": str(scratch / "modcache"),
        "GOCACHE": str(scratch / "gocache"),
        "GOTMPDIR": str(scratch),
        "GOENV": "off",
        "GOTOOLCHAIN": "local",
        "GOTELEMETRY": "off",
        # go.sum beside the module decides; the checksum database is a network service.
        "GOSUMDB": "off",
        "GOPROXY": f"file://{proxy}" if proxy else "off",
        "GOFLAGS": "-buildvcs=false -mod=readonly -modcacherw",
        "CGO_ENABLED": "0",
        "GOOS": "linux",
        "GOARCH": "amd64",
        "GOAMD64": "v1",
        "LC_ALL": "C.UTF-8",
    }


def build(
    source: Path, out: Path, *, package: str, variables: Mapping[str, str], env: Mapping[str, str], console: Console
) -> None:
    """Compile ``package`` of the module in ``source`` to the static program ``out``."""
    ldflags = " ".join(["-s", "-w", "-buildid=", *(f"-X {k}={v}" for k, v in sorted(variables.items()))])
    console.run(
        ["go", "build", "-trimpath", "-ldflags", ldflags, "-o", str(out), package],
        error=BuildFailed,
        what=f"compile {out.name}",
        env=env,
        cwd=str(source),
    )


def linked_modules(program: Path, env: Mapping[str, str], console: Console) -> tuple[tuple[str, str], ...]:
    """Return the modules that a program was linked from, as it records them itself."""
    text = console.run(
        ["go", "version", "-m", str(program)], error=BuildFailed, what="list the modules", env=env, show=False
    )
    rows = [line.split("\t") for line in text.splitlines()]
    return tuple((r[2], r[3]) for r in rows if len(r) >= 4 and r[1] == "dep")


def minio_entry(entries: Sequence[LockedFile]) -> LockedFile:
    """Return the lock entry of MinIO's own zip.

    Raises:
        BuildFailed: it is not locked.
    """
    for e in entries:
        if e.kind == "go-module" and e.name == MINIO:
            return e
    raise BuildFailed(f"the lock lacks {MINIO}", hint="run `moat lock`")


def minio_variables(version: str) -> dict[str, str]:
    """Return what MinIO's own build sets, from the pseudo-version ``v0.0.0-YYYYMMDDHHMMSS-COMMIT``."""
    stamp, commit = version.split("-")[-2:]
    stamp = stamp.rsplit(".", 1)[-1]
    at = datetime.strptime(stamp, "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    p = f"{MINIO}/cmd"
    return {
        f"{p}.Version": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        f"{p}.CopyrightYear": str(at.year),
        f"{p}.ReleaseTag": at.strftime("RELEASE.%Y-%m-%dT%H-%M-%SZ"),
        f"{p}.CommitID": commit,
        f"{p}.ShortCommitID": commit,
        f"{p}.GOROOT": "",
        f"{p}.GOPATH": "",
    }


def build_minio(
    entries: Sequence[LockedFile], cache: Cache, goroot: Path, out: Path, console: Console
) -> tuple[tuple[str, str], ...]:
    """Compile MinIO in its module's own folder and return the modules that it was linked from."""
    entry = minio_entry(entries)
    with tempfile.TemporaryDirectory(prefix="moat-go-", dir=out.parent) as name:
        scratch = Path(name)
        source, proxy = scratch / "source", scratch / "proxy"
        unzip_module(cache.require(entry), f"{entry.name}@{entry.version}/", source)
        file_proxy(entries, cache, proxy)
        env = go_environment(goroot, scratch, proxy)
        build(source, out, package=".", variables=minio_variables(entry.version), env=env, console=console)
        return linked_modules(out, env, console)


def build_health(goroot: Path, out: Path, console: Console) -> None:
    """Compile the health checker of this repository (standard library only)."""
    with tempfile.TemporaryDirectory(prefix="moat-go-", dir=out.parent) as name:
        scratch = Path(name)
        shutil.copytree(ROOT / "images" / "healthcheck", scratch / "source")
        env = go_environment(goroot, scratch, None)
        build(scratch / "source", out, package=".", variables={}, env=env, console=console)
        out.chmod(0o755)


def is_static(program: Path) -> bool:
    """Whether an ELF file has no program interpreter, so that it runs in an empty image."""
    with program.open("rb") as f:
        header = f.read(64)
        if header[:4] != b"\x7fELF" or header[4] != 2:
            return False
        offset = int.from_bytes(header[32:40], "little")
        size, count = int.from_bytes(header[54:56], "little"), int.from_bytes(header[56:58], "little")
        for i in range(count):
            f.seek(offset + i * size)
            if int.from_bytes(f.read(4), "little") == 3:  # PT_INTERP
                return False
    return os.access(program, os.X_OK)
