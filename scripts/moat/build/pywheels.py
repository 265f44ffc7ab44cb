# SPDX-License-Identifier: Apache-2.0
"""Locked wheels as files of an image: unpacked by their own RECORD, byte-compiled by the target's Python.

A wheel is a zip with a list of its files and their hashes. Unpacking it by that list, instead of by
an installer, writes nothing that depends on the build host (an installer puts its interpreter's
path into console scripts and their hashes into RECORD), runs nothing, and checks every file.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.markers import Marker
from packaging.utils import canonicalize_name, parse_wheel_filename

from moat.build.layers import Node, Tree, _matches
from moat.build.locks import LockedFile, Target
from moat.build.wheeltags import target_environment, target_tags
from moat.console import Console
from moat.errors import BuildFailed

#: Interpreters that compile at the same time. It is fixed because marshal's output can depend on what the
#: same process compiled before: the same split gives the same bytes on any number of cores.
_SHARDS = 4


@dataclass(frozen=True)
class WheelFile:
    """One file of a wheel: where it goes below site-packages, and its member in the zip."""

    path: str
    member: str
    sha256: str
    executable: bool


def select(entries: Iterable[LockedFile], target: Target) -> list[LockedFile]:
    """Return the wheels that the target installs: by marker, and the best file of each package.

    Raises:
        BuildFailed: a package has no wheel for the target, or two versions apply.
    """
    environment, rank = target_environment(target), {t: i for i, t in enumerate(target_tags(target))}
    best: dict[str, tuple[int, LockedFile]] = {}
    wanted: set[str] = set()
    for e in entries:
        if e.kind != "wheel" or (e.marker and not Marker(e.marker).evaluate(environment)):
            continue
        name = str(canonicalize_name(e.name))
        wanted.add(name)
        ranks = [rank[t] for t in parse_wheel_filename(e.filename)[3] if t in rank]
        if not ranks:
            continue
        if name in best and best[name][1].version != e.version:
            raise BuildFailed(
                f"two versions of {name} apply to {target.name}", found=f"{best[name][1].version}, {e.version}"
            )
        if name not in best or min(ranks) < best[name][0]:
            best[name] = (min(ranks), e)
    if missing := sorted(wanted - set(best)):
        raise BuildFailed(
            f"no wheel for {target.name}", found=", ".join(missing), hint="re-make the lock with `moat lock`"
        )
    return [best[name][1] for name in sorted(best)]


def wheel_files(path: Path, name: str) -> list[WheelFile]:
    """Return a wheel's files by its RECORD; ``NAME.data/{purelib,platlib}`` fold into the top.

    Raises:
        BuildFailed: the zip and RECORD differ, or a path is unsafe.
    """
    with zipfile.ZipFile(path) as z:
        members = {i.filename: i for i in z.infolist() if not i.filename.endswith("/")}
        records = [m for m in members if re.fullmatch(r"[^/]+\.dist-info/RECORD", m)]
        if len(records) != 1:
            raise BuildFailed(f"the wheel {name} has no RECORD", found=str(len(records)), expected="1", path=name)
        rows = list(csv.reader(io.StringIO(z.read(records[0]).decode("utf-8"))))
    result: list[WheelFile] = []
    listed: set[str] = set()
    for row in rows:
        if len(row) < 2 or row[0].endswith("/"):
            continue
        member, algorithm = row[0], row[1]
        listed.add(member)
        parts = PurePosixPath(member).parts
        if member.startswith("/") or ".." in parts or member not in members:
            raise BuildFailed(f"the wheel {name} lists what it does not hold", found=member, path=name)
        own = member == records[0] or re.fullmatch(r"[^/]+\.dist-info/RECORD\.(jws|p7s)", member) is not None
        if not own and not algorithm.startswith("sha256="):
            raise BuildFailed(
                f"the wheel {name} lists a file without sha256", found=f"{member}: {algorithm}", path=name
            )
        digest = "" if own else _hex(algorithm.removeprefix("sha256="))
        target = member
        if parts[0].endswith(".data") and len(parts) > 2 and parts[1] in ("purelib", "platlib"):
            target = "/".join(parts[2:])
        mode = members[member].external_attr >> 16
        result.append(WheelFile(target, member, digest, bool(mode & 0o111)))
    # PEP 427: signatures are the only files that RECORD may leave out.
    if extra := sorted(
        m for m in set(members) - listed if not m.endswith((".dist-info/RECORD.jws", ".dist-info/RECORD.p7s"))
    ):
        raise BuildFailed(
            f"the wheel {name} holds what its RECORD does not list", found=", ".join(extra[:5]), path=name
        )
    return result


def _hex(urlsafe: str) -> str:
    return base64.urlsafe_b64decode(urlsafe + "=" * (-len(urlsafe) % 4)).hex()


def unpack(path: Path, name: str, folder: Path, prefix: str, tree: Tree, *, dropped: Sequence[str] = ()) -> set[str]:
    """Unpack one wheel into ``folder`` and add its files to ``tree`` below ``prefix``.

    Args:
        path: the wheel's file.
        name: ``package-version``, for messages and as the owner of the files.
        folder: site-packages on this machine.
        prefix: site-packages in the image.
        tree: takes the files; a file that two wheels bring is an error unless it is the same.
        dropped: patterns below site-packages that are left out.

    Returns:
        The patterns of ``dropped`` that matched.

    Raises:
        BuildFailed: a file's content is not what RECORD says.
    """
    used: set[str] = set()
    with zipfile.ZipFile(path) as z:
        for f in wheel_files(path, name):
            hit = {d for d in dropped if _matches(f.path, d)}
            used |= hit
            if hit:
                continue
            if PurePosixPath(f.path).parts[0].endswith(".data"):
                raise BuildFailed(
                    f"the wheel {name} installs outside site-packages",
                    found=f.member,
                    hint="drop it in the recipe, with the reason, or give it an overlay",
                    path=name,
                )
            data = z.read(f.member)
            if f.sha256 and hashlib.sha256(data).hexdigest() != f.sha256:
                raise BuildFailed(f"a file of the wheel {name} is not what its RECORD says", found=f.member, path=name)
            target = folder / f.path
            if target.exists():
                if target.read_bytes() == data:
                    continue
                raise BuildFailed(f"two wheels bring different files as {f.path}", found=name, path=f.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            tree.add(Node(f"{prefix}/{f.path}", 0o755 if f.executable else 0o644, f"wheel:{name}", source=target))
    return used


#: Runs inside the root file system with the target's Python: one shard of the sources, in order.
_COMPILE = r"""
import json, py_compile, sys
shown = json.load(sys.stdin)
failed = []
for path in shown:
    try:
        # The path inside the image is what tracebacks show; no time and no host path enters the file.
        py_compile.compile(path, dfile=path, doraise=True, quiet=1,
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    except (py_compile.PyCompileError, OSError) as e:
        failed.append([path, str(e).splitlines()[-1] if str(e) else type(e).__name__])
json.dump(failed, sys.stdout)
"""


def run_in_root(root: Path, argv: Sequence[str], *, stdin: bytes, env: dict[str, str], what: str) -> bytes:
    """Run a program inside a root file system (chroot) and return its stdout.

    Raises:
        BuildFailed: it cannot be started or fails.
    """
    # An absolute path: the environment is the one of the program inside, not ours.
    command = [shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or "/usr/sbin/chroot", str(root), *argv]
    done = subprocess.run(command, input=stdin, env=env, capture_output=True, check=False)
    if done.returncode != 0:
        tail = done.stderr.decode("utf-8", "replace").strip().splitlines()[-15:]
        raise BuildFailed(
            f"{what}: {argv[0]} in {root} ended with code {done.returncode}", found="\n            ".join(tail)
        )
    return done.stdout


def python_environment(epoch: int, **more: str) -> dict[str, str]:
    """Return the whole environment of the target's Python during the build."""
    return {
        "PATH": "/usr/bin",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SOURCE_DATE_EPOCH": str(epoch),
        "LC_ALL": "C.UTF-8",
        **more,
    }


def byte_compile(root: Path, tree: Tree, *, python: str, epoch: int, console: Console) -> int:
    """Compile every ``.py`` of ``tree`` that lies in ``root``, and add the ``.pyc`` files to it.

    A source that is no valid Python of this version (templates, fixtures for other versions) has no
    ``.pyc``, as with any installer; it is counted and shown.

    Returns:
        The number of files compiled.
    """
    sources = [n for n in tree if n.path.endswith(".py") and n.target is None and not n.is_directory]
    shards = [[f"/{n.path}" for n in sources[i::_SHARDS]] for i in range(_SHARDS)]
    env = python_environment(epoch)

    def one(shard: list[str]) -> list[list[str]]:
        stdin = json.dumps(shard).encode("utf-8")
        # Not -I: it ignores PYTHONHASHSEED, which the order of sets in bytecode depends on.
        argv = [f"/usr/bin/python{python}", "-P", "-S", "-c", _COMPILE]
        out: list[list[str]] = json.loads(run_in_root(root, argv, stdin=stdin, env=env, what="byte-compile"))
        return out

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        failed = {path.removeprefix("/"): why for part in pool.map(one, shards) for path, why in part}
    tag = "cpython-" + python.replace(".", "")
    for n in sources:
        if n.path in failed:
            continue
        pure = PurePosixPath(n.path)
        pyc = f"{pure.parent}/__pycache__/{pure.stem}.{tag}.pyc"
        tree.add(Node(pyc, 0o644, n.owner, source=root / pyc))
    for path, why in sorted(failed.items()):
        console.info(f"no bytecode for {path}: {why}")
    return len(sources) - len(failed)


def build_wheel(project: Path, out: Path, *, epoch: int, console: Console) -> Path:
    """Build the wheel of a project of this repository with hatchling and return its path."""
    import sys

    out.mkdir(parents=True, exist_ok=True)
    source = out / "source"
    # hatchling reads .gitignore upwards and VCS state: a copy of the project's files alone has neither.
    shutil.copytree(project, source, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    console.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        error=BuildFailed,
        what=f"build the wheel of {project.name}",
        cwd=str(source),
        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8"},
        show=False,
    )
    shutil.rmtree(source)
    wheels = sorted(out.glob("*.whl"))
    if len(wheels) != 1:
        raise BuildFailed(f"the project {project} did not give one wheel", found=", ".join(w.name for w in wheels))
    return wheels[0]
