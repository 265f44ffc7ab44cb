# SPDX-License-Identifier: Apache-2.0
"""Go modules of a program that is compiled in its own module's folder, with the locked toolchain.

Which files a build needs is not computed but observed: the locked toolchain lists the packages of the main package with
an empty module cache, and what it fetched for that (archives and ``.mod`` files) is what is locked. ``.info`` files are
left out: each proxy words them anew, and with exact versions Go reads none. A second listing with an empty cache and
those files alone, no network, proves that they suffice. Every file is compared with the ``h1:`` sums of the program's
own ``go.sum``; the program's own archive is compared with the checksum database by Go itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moat.build.cache import Cache, sha256_file
from moat.build.definitions import GoProgram
from moat.build.licenses import NOASSERTION, from_license_file
from moat.build.locks import LockedFile
from moat.build.mirrors import go_proxies
from moat.build.policy import Policy
from moat.console import Console
from moat.errors import HashMismatch, LockFailed

_KINDS = {"zip": "go-module", "mod": "go-mod"}


def toolchain(debs: Sequence[LockedFile], cache: Cache, console: Console) -> Path:
    """Unpack the locked Go packages into the cache once and return the GOROOT.

    Args:
        debs: lock entries of the toolchain's Debian packages, in the cache already.
        cache: where.
        console: for steps.

    Raises:
        LockFailed: the packages are not locked, or hold no toolchain.
        FetchFailed: the cache does not hold them.
    """
    if not debs:
        raise LockFailed("no Go toolchain is locked", hint="run `moat lock --only debs` first")
    key = hashlib.sha256("".join(sorted(e.sha256 for e in debs)).encode()).hexdigest()[:24]
    folder = cache.built_dir(f"go-toolchain-{key}")
    if not folder.is_dir():
        scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".tmp", dir=folder.parent))
        try:
            for e in debs:
                argv = ["dpkg-deb", "-x", str(cache.require(e)), str(scratch)]
                console.run(argv, error=LockFailed, what=f"unpacking {e.filename}", show=False)
            scratch.chmod(0o755)
            try:
                scratch.rename(folder)
            except OSError:  # another moat was faster; its folder is the same
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    roots = sorted(folder.glob("usr/lib/go-*"))
    if len(roots) != 1 or not (roots[0] / "bin" / "go").exists():
        raise LockFailed("the locked packages hold no Go toolchain", found=", ".join(e.filename for e in debs))
    return roots[0]


def escape(module: str) -> str:
    """Return a module path or version as proxies spell it: an upper-case letter becomes ``!`` and its lower case."""
    return re.sub(r"[A-Z]", lambda m: "!" + m[0].lower(), module)


def unescape(path: str) -> str:
    """Undo :func:`escape`."""
    return re.sub(r"!([a-z])", lambda m: m[1].upper(), path)


def _h1(files: Iterable[tuple[str, Callable[[], bytes]]]) -> str:
    # golang.org/x/mod/sumdb/dirhash, Hash1: sha256 over the sorted lines "<sha256>  <name>\n".
    summary = hashlib.sha256()
    for name, read in sorted(files, key=lambda f: f[0].encode()):
        summary.update(f"{hashlib.sha256(read()).hexdigest()}  {name}\n".encode())
    return "h1:" + base64.b64encode(summary.digest()).decode()


def h1_zip(path: Path) -> str:
    """Return the ``h1:`` sum of a module's archive."""
    with zipfile.ZipFile(path) as z:
        return _h1((n, lambda n=n: z.read(n)) for n in z.namelist())  # type: ignore[misc]


def h1_mod(path: Path) -> str:
    """Return the ``h1:`` sum of a ``.mod`` file."""
    return _h1([("go.mod", path.read_bytes)])


def read_go_sum(text: str) -> dict[tuple[str, str], str]:
    """Return ``(module, version or version/go.mod) -> h1 sum``.

    Raises:
        LockFailed: a line is malformed, or two lines disagree.
    """
    sums: dict[tuple[str, str], str] = {}
    for line in text.splitlines():
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 3 or not parts[2].startswith("h1:"):
            raise LockFailed("go.sum is malformed", found=line)
        if sums.setdefault((parts[0], parts[1]), parts[2]) != parts[2]:
            raise LockFailed("go.sum contradicts itself", found=line)
    return sums


def check_sum(entry: LockedFile, path: Path, sums: Mapping[tuple[str, str], str]) -> None:
    """Compare one file with ``go.sum``.

    Raises:
        LockFailed: ``go.sum`` does not name it.
        HashMismatch: it is not the file that ``go.sum`` means.
    """
    version = entry.version if entry.kind == "go-module" else f"{entry.version}/go.mod"
    expected = sums.get((entry.name, version))
    if expected is None:
        raise LockFailed(f"go.sum of the program does not name {entry.filename}", expected=f"{entry.name} {version}")
    found = h1_zip(path) if entry.kind == "go-module" else h1_mod(path)
    if found != expected:
        raise HashMismatch(
            f"{entry.filename} is not the module that the program was written against",
            found=found,
            expected=expected,
            hint="the proxy altered it: use another one (GOPROXY), and tell who runs this one",
            path=entry.filename,
        )


def _environment(goroot: Path, scratch: Path, *, proxy: str, sumdb: bool) -> dict[str, str]:
    keep = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy")
    env = {k: os.environ[k] for k in (*keep, "no_proxy", "GOSUMDB", "GONOSUMDB", "GOPRIVATE") if k in os.environ}
    if not sumdb:
        env["GOSUMDB"] = "off"
    return env | {
        "PATH": f"{goroot / 'bin'}:/usr/bin:/bin",
        "HOME": str(scratch),
        "GOROOT": str(goroot),
        "GOPATH": str(scratch / "gopath"),
        "GOMODCACHE": str(scratch / "modcache"),
        "GOCACHE": str(scratch / "gocache"),
        "GOENV": "off",
        "GOTOOLCHAIN": "local",
        "GOTELEMETRY": "off",
        "GOPROXY": proxy,
        "GOFLAGS": "-buildvcs=false -mod=readonly -modcacherw",
        "CGO_ENABLED": "0",
        "GOOS": "linux",
        "GOARCH": "amd64",
        "GOAMD64": "v1",
        "LC_ALL": "C.UTF-8",
    }


def _listing(source: Path, env: Mapping[str, str], console: Console) -> str:
    """List the packages of the main package, which makes Go fetch all that a build reads."""
    return console.run(
        ["go", "list", "-deps", "-f", "{{.ImportPath}}", "."],
        error=LockFailed,
        what="listing the packages of the Go program",
        hint="check GOPROXY; a module that no proxy serves cannot be locked",
        env=env,
        cwd=str(source),
        show=False,
    )


def unzip(archive: Path, prefix: str, folder: Path) -> None:
    """Unpack a module's archive, whose members all start with ``prefix`` (``module@version/``).

    Raises:
        LockFailed: a member is elsewhere, or escapes.
    """
    with zipfile.ZipFile(archive) as z:
        for info in z.infolist():
            rest = info.filename.removeprefix(prefix)
            if rest == info.filename or rest.startswith("/") or ".." in rest.split("/"):
                raise LockFailed(f"unsafe path in {archive.name}", found=info.filename, expected=prefix + "...")
            if rest and not rest.endswith("/"):
                target = folder / rest
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(z.read(info))


def resolve(program: GoProgram, debs: Sequence[LockedFile], cache: Cache, console: Console) -> list[LockedFile]:
    """Lock every module file that the build of a program reads; the files are in the cache afterwards.

    Raises:
        LockFailed: a module cannot be had, or is not in the program's ``go.sum``.
        HashMismatch: a module is not the one that ``go.sum`` means.
    """
    goroot = toolchain(debs, cache, console)
    with tempfile.TemporaryDirectory(prefix="moat-go-", dir=_scratch(cache)) as name:
        scratch = Path(name)
        source = scratch / "source"
        proxy = ",".join(go_proxies(goroot))
        main = _download_main(program, goroot, scratch, proxy, console)
        unzip(main, f"{program.module}@{program.version}/", source)
        # go.sum beside the module decides from here on; the database knows the program's own archive only.
        _listing(source, _environment(goroot, scratch, proxy=proxy, sumdb=False), console)
        downloaded = scratch / "modcache" / "cache" / "download"
        entries = [_entry(path, downloaded, program, cache) for path in _module_files(downloaded)]
        sums = read_go_sum((source / "go.sum").read_text("utf-8"))
        for e in entries:
            if (e.name, e.version) != (program.module, program.version):
                check_sum(e, cache.path(e.sha256), sums)
        _prove(entries, source, goroot, cache, console)
    console.info(f"{program.name}: {sum(e.kind == 'go-module' for e in entries)} modules, {len(entries)} files")
    return sorted(entries)


def _scratch(cache: Cache) -> Path:
    folder = cache.root / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download_main(program: GoProgram, goroot: Path, scratch: Path, proxy: str, console: Console) -> Path:
    empty = scratch / "empty"
    empty.mkdir()
    env = _environment(goroot, scratch, proxy=proxy, sumdb=True)
    env["GOFLAGS"] = "-modcacherw"
    text = console.run(
        ["go", "mod", "download", "-json", f"{program.module}@{program.version}"],
        error=LockFailed,
        what=f"fetching {program.module}",
        hint="check GOPROXY and the version in bundles/components.yaml",
        env=env,
        cwd=str(empty),
        show=False,
    )
    return Path(json.loads(text)["Zip"])


def _module_files(downloaded: Path) -> list[Path]:
    return sorted(
        p for p in downloaded.rglob("*") if p.parent.name == "@v" and p.suffix in (".zip", ".mod") and p.is_file()
    )


def _entry(path: Path, downloaded: Path, program: GoProgram, cache: Cache) -> LockedFile:
    place = path.relative_to(downloaded).as_posix()
    module, _, file = place.partition("/@v/")
    version, _, ext = file.rpartition(".")
    sha256, size = sha256_file(path), path.stat().st_size
    if not cache.has(sha256):
        copy = cache.partial(sha256)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        cache.adopt(copy, sha256=sha256, size=size)
    name = unescape(module)
    return LockedFile(
        kind=_KINDS[ext],
        name=name,
        version=unescape(version),
        filename=f"{name.rsplit('/', 1)[-1]}@{unescape(version)}.{ext}",
        sha256=sha256,
        size=size,
        license=module_license(path) if ext == "zip" else NOASSERTION,
        source=f"goproxy:{place}",
        uses=tuple(sorted(program.uses)),
    )


def module_license(archive: Path) -> str:
    """Return the licences of the licence files at the top of a module, joined by AND, or ``NOASSERTION``."""
    with zipfile.ZipFile(archive) as z:
        texts = [
            z.read(n).decode("utf-8", "replace")
            for n in sorted(z.namelist())
            if re.fullmatch(r".+@v[^/]+/(LICEN[CS]E|COPYING|UNLICENSE)[^/]*", n, re.I)
        ]
    return from_license_file("\n".join(texts))


def _prove(entries: Sequence[LockedFile], source: Path, goroot: Path, cache: Cache, console: Console) -> None:
    """List once more from the locked files alone.

    Raises:
        LockFailed: they do not suffice.
    """
    with tempfile.TemporaryDirectory(prefix="moat-go-", dir=_scratch(cache)) as name:
        scratch = Path(name)
        for e in entries:
            place = scratch / "proxy" / e.source.removeprefix("goproxy:")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(cache.require(e))
        _listing(source, _environment(goroot, scratch, proxy=f"file://{scratch / 'proxy'}", sumdb=False), console)


def judged(entries: Iterable[LockedFile], program: GoProgram, policy: Policy) -> list[LockedFile]:
    """Apply the licence rules to the modules; ``.mod`` files are build metadata and carry none.

    Raises:
        PolicyRefused: a licence is not allowed.
    """
    out = []
    for e in entries:
        if e.kind != "go-module":
            out.append(e)
            continue
        own = e.name == program.module
        license_ = program.license if own else policy.license_of(e.kind, e.name, e.version, e.license)
        out.append(replace(e, license=license_))
    policy.check_licenses(e for e in out if e.kind == "go-module")
    return sorted(out)


def urls(entry: LockedFile, proxies: Iterable[str]) -> tuple[str, ...]:
    """Return the places of a locked module file.

    Raises:
        LockFailed: its ``source`` is not of that form.
    """
    place = entry.source.removeprefix("goproxy:")
    if place == entry.source or ".." in place.split("/") or place.startswith("/"):
        raise LockFailed(f"{entry.filename} has no usable source", found=entry.source, path=entry.filename)
    return tuple(f"{p}/{place}" for p in proxies)
