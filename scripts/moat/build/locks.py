# SPDX-License-Identifier: Apache-2.0
"""The lock files in ``bundles/locks/``: one JSON object a line, sorted, reviewed as diffs.

A lock names bytes, never hosts: ``source`` says which kind of place serves the file and under
which path, and the host comes from the build host's own configuration (pip's index, apt's
sources, Go's proxy). So a lock made behind one mirror is fetched through another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from moat.errors import LockFailed

#: This checkout (scripts/moat/build/locks.py is three levels down).
ROOT = Path(__file__).resolve().parents[3]
LOCKS = ROOT / "bundles" / "locks"
#: What a bundle can be made of; ``demo`` adds a small real model and its server.
PROFILES = ("demo", "site")


@dataclass(frozen=True, order=True)
class LockedFile:
    """One input by its bytes.

    Attributes:
        kind: ``wheel``, ``deb``, ``go-module`` (zip), ``go-mod`` (.mod file), ``model``, ``tokenizer``.
        name: package, module or model name.
        version: exact version (Debian: with epoch and revision).
        filename: basename in the bundle and in the cache's views.
        sha256: of the file, lower-case hex.
        size: in bytes.
        license: SPDX expression, or ``NOASSERTION`` where upstream says nothing usable.
        source: ``pypi:NAME``, ``debian:SUITE/COMPONENT/POOL-PATH`` (security suites: ``debian-security:...``),
            ``goproxy:ESCAPED-PATH``, ``hf:REPO@REVISION/FILE``.
        uses: where it goes, sorted: ``image:NAME`` (base packages or wheels of one image), ``wheelhouse``,
            ``host`` (apt repository of the bundle), ``builder`` (toolchain of the build, never shipped),
            ``profile:demo`` (only when the profile is demo).
        marker: environment marker of a wheel (``python_full_version >= '3.12'``), or empty.
        pythons: target Pythons that a wheel is for, e.g. ``("3.11", "3.13")``; empty for all else.
    """

    kind: str
    name: str
    version: str
    filename: str
    sha256: str
    size: int
    license: str
    source: str
    uses: tuple[str, ...] = ()
    marker: str = ""
    pythons: tuple[str, ...] = ()

    def to_line(self) -> str:
        """Return the canonical line (no newline)."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


def read_lock(path: Path) -> list[LockedFile]:
    """Read one ``*.jsonl`` lock.

    Raises:
        LockFailed: a line is malformed, has unknown or missing fields, or the file is not sorted.
    """
    names = {f.name for f in fields(LockedFile)}
    entries: list[LockedFile] = []
    try:
        # Not splitlines(): JSON leaves characters such as U+2028 as they are, and they end no line here.
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise LockFailed(
            f"cannot read the lock {path.name}", found=str(e), hint="make it with `moat lock`", path=str(path)
        ) from e
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            raw = json.loads(line)
            if set(raw) != names:
                raise ValueError(f"fields {sorted(set(raw) ^ names)} are missing or unknown")
            raw["uses"], raw["pythons"] = tuple(raw["uses"]), tuple(raw["pythons"])
            entries.append(LockedFile(**raw))
        except (ValueError, TypeError) as e:
            raise LockFailed(
                f"{path.name} line {number} is not a lock entry",
                found=str(e),
                expected="one JSON object as written by `moat lock`",
                hint="restore the file from git",
                path=str(path),
            ) from e
    if entries != sorted(entries):
        raise LockFailed(f"{path.name} is not sorted", hint="re-make it with `moat lock`", path=str(path))
    return entries


def write_lock(path: Path, entries: Iterable[LockedFile]) -> None:
    """Write one lock, sorted, by temporary file and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(e.to_line() + "\n" for e in sorted(entries)), "utf-8")
    temporary.replace(path)


@dataclass(frozen=True)
class Target:
    """A distribution and architecture that bundles are made for.

    Attributes:
        name: as on the command line and in the bundle's name.
        suite: Debian's code name.
        arch: Debian's architecture name.
        python: version of the distribution's own Python, ``major.minor``.
        python_full: a full version of it, for environment markers.
    """

    name: str
    suite: str
    arch: str
    python: str
    python_full: str

    @property
    def distro(self) -> str:
        """The distribution as package URLs name it, e.g. ``debian-13``."""
        return self.name.rsplit("-", 1)[0].replace("debian", "debian-")


TARGETS = {
    "debian13-amd64": Target("debian13-amd64", "trixie", "amd64", "3.13", "3.13.5"),
    "debian12-amd64": Target("debian12-amd64", "bookworm", "amd64", "3.11", "3.11.2"),
}
#: Every target's images are made from this one's packages and wheels, with its toolchain: a container brings its own
#: system. What a host installs (the apt repository, the wheels outside images) is of the target itself.
IMAGE_TARGET = TARGETS["debian13-amd64"]


def target_named(name: str) -> Target:
    """Return a target.

    Raises:
        LockFailed: it is unknown.
    """
    if name in TARGETS:
        return TARGETS[name]
    raise LockFailed(f"unknown target {name}", found=name, expected=" or ".join(TARGETS))


@dataclass(frozen=True)
class Locks:
    """Every locked input of one profile and target.

    Attributes:
        profile: ``demo`` or ``site``.
        target: what the bundle is for.
        locked_at: seconds; the ``SOURCE_DATE_EPOCH`` of every build from these locks.
        wheels: those for the target's Python, and for the images'.
        debs: Debian packages: the target's own for ``host``, the images' release for all else.
        go: Go modules of MinIO (``go-module``, ``go-mod``).
        files: model files and tokenizers from a hub.
        local_debs: ``debs`` is this machine's re-made lock (`moat fetch --relock-vanished`), not the committed one.
    """

    profile: str
    target: Target
    locked_at: int
    wheels: tuple[LockedFile, ...]
    debs: tuple[LockedFile, ...]
    go: tuple[LockedFile, ...]
    files: tuple[LockedFile, ...]
    local_debs: bool = False

    @property
    def everything(self) -> tuple[LockedFile, ...]:
        """All entries, in the order of the files."""
        return self.wheels + self.debs + self.go + self.files

    def used_by(self, use: str) -> tuple[LockedFile, ...]:
        """Return the entries whose ``uses`` hold ``use``, e.g. ``image:gateway``, ``host``, ``builder``."""
        return tuple(e for e in self.everything if use in e.uses)


def locks_dir() -> Path:
    """Return the folder of the reviewed locks: ``$MOAT_LOCKS``, or ``bundles/locks``."""
    configured = os.environ.get("MOAT_LOCKS")
    return Path(configured).absolute() if configured else LOCKS


def debs_lock_name(target: Target) -> str:
    """Return the file name of a target's lock of Debian packages."""
    return f"debs-{target.name}.jsonl"


def locks_of(target: Target) -> tuple[Target, ...]:
    """Return the targets whose locks of Debian packages a bundle for ``target`` is made from."""
    return (IMAGE_TARGET,) if target == IMAGE_TARGET else (IMAGE_TARGET, target)


def _debs_for(target: Target, by_lock: dict[str, list[LockedFile]]) -> list[LockedFile]:
    """Return the Debian packages of a bundle: ``host`` from the target's own lock, the rest from the images'."""
    if target == IMAGE_TARGET:
        return by_lock[target.name]
    entries = {e.sha256: e for e in by_lock[target.name]}
    for e in by_lock[IMAGE_TARGET.name]:
        uses = set(e.uses) - {"host"} | set(entries[e.sha256].uses if e.sha256 in entries else ())
        if uses:  # else it is for a host of that release alone
            entries[e.sha256] = replace(e, uses=with_profile(uses))
    return sorted(entries.values())


def with_profile(uses: Iterable[str]) -> tuple[str, ...]:
    """Return a Debian package's uses, sorted; what the model's image alone needs is for the demo alone."""
    others = set(uses) - {"profile:demo"}
    return tuple(sorted(others | {"profile:demo"} if others == {"image:model"} else others))


def read_locked_at(directory: Path) -> int:
    """Return ``locked_at`` of ``index.json``, in seconds.

    Raises:
        LockFailed: the file is missing or malformed.
    """
    path = directory / "index.json"
    try:
        value = json.loads(path.read_text("utf-8"))["locked_at"]
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"locked_at is {value!r}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LockFailed(
            "cannot read the locks' index", found=str(e), expected='{"locked_at": SECONDS}', path=str(path)
        ) from e
    return value


def write_index(directory: Path, locked_at: int, **more: str) -> None:
    """Write ``index.json``; ``more`` are further members (the overlay's ``replaces``)."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / "index.tmp"
    temporary.write_text(json.dumps({"locked_at": locked_at, **more}, sort_keys=True) + "\n", "utf-8")
    temporary.replace(directory / "index.json")


def local_debs_dir(cache_root: Path, target: Target) -> Path:
    """Return where this machine's re-made lock of a target's Debian packages is kept."""
    return cache_root / "locks" / target.name


def _overlay(cache_root: Path, directory: Path, target: Target) -> tuple[list[LockedFile], int] | None:
    """Return the local Debian lock if it was made from exactly the reviewed lock of ``directory``."""
    overlay = local_debs_dir(cache_root, target)
    name = debs_lock_name(target)
    if not (overlay / name).is_file() or not (overlay / "index.json").is_file():
        return None
    reviewed = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    # A newer reviewed lock (a pull) wins over whatever this machine made from the older one.
    if json.loads((overlay / "index.json").read_text("utf-8")).get("replaces") != reviewed:
        return None
    return read_lock(overlay / name), read_locked_at(overlay)


def active_locks(profile: str, target: str, *, directory: Path | None = None, cache_root: Path | None = None) -> Locks:
    """Return the locks that `moat fetch` and `moat build` both use.

    Args:
        profile: ``demo`` or ``site``.
        target: e.g. ``debian13-amd64``.
        directory: the reviewed locks; ``None`` is :func:`locks_dir`.
        cache_root: ``None`` is the cache's own default. Only a ``demo`` build looks there for the local
            Debian lock; a ``site`` build counts nothing but reviewed locks.

    Raises:
        LockFailed: a lock is missing or malformed, the profile or target unknown.
    """
    from moat.build.cache import cache_root as default_root  # cache.py imports this module

    if profile not in PROFILES:
        raise LockFailed(f"unknown profile {profile}", found=profile, expected=" or ".join(PROFILES))
    which = target_named(target)
    directory = directory if directory is not None else locks_dir()
    locked_at = read_locked_at(directory)
    by_lock = {t.name: read_lock(directory / debs_lock_name(t)) for t in locks_of(which)}
    local = False
    for t in locks_of(which) if profile == "demo" else ():
        overlay = _overlay(cache_root if cache_root is not None else default_root(), directory, t)
        if overlay is not None:
            by_lock[t.name], local = overlay[0], True
            locked_at = max(locked_at, overlay[1])

    def wanted(entries: Iterable[LockedFile]) -> tuple[LockedFile, ...]:
        return tuple(e for e in entries if profile == "demo" or "profile:demo" not in e.uses)

    pythons = {which.python, IMAGE_TARGET.python}
    wheels = [e for e in read_lock(directory / "wheels.jsonl") if pythons & set(e.pythons)]
    return Locks(
        profile=profile,
        target=which,
        locked_at=locked_at,
        wheels=wanted(wheels),
        debs=wanted(_debs_for(which, by_lock)),
        go=wanted(read_lock(directory / "go-minio.jsonl")),
        files=wanted(read_lock(directory / "files.jsonl")),
        local_debs=local,
    )
