# SPDX-License-Identifier: Apache-2.0
"""Wheels: resolved once for every target Python, then pinned to exact files of the index.

uv resolves (``--universal``, binary wheels only, with hashes); which file of a release each target takes is decided
here by the compatibility tags of that target, and size, sha256 and upload time come from the index's JSON API. The
licence is read from the wheel's own metadata.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

from moat.build.definitions import WheelSet
from moat.build.licenses import from_classifiers, from_license_file, from_text
from moat.build.locks import TARGETS, LockedFile, Target
from moat.build.mirrors import uv_program
from moat.build.policy import Policy
from moat.build.wheeltags import target_environment, target_tags
from moat.console import Console
from moat.errors import LockFailed

_JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class IndexFile:
    """One file of the index.

    Attributes:
        filename: as the index has it.
        url: absolute.
        sha256: lower-case hex, or empty where the index gives none.
        size: in bytes, or -1 where the index does not tell.
        uploaded: or ``None`` where the index does not tell.
        yanked: withdrawn by its author.
    """

    filename: str
    url: str
    sha256: str
    size: int
    uploaded: datetime | None
    yanked: bool


@dataclass(frozen=True)
class Pinned:
    """One line of the resolution: an exact version, for the environments of its marker."""

    name: str
    version: str
    marker: str
    hashes: frozenset[str]


@dataclass(frozen=True)
class Choice:
    """A wheel that one or more targets take."""

    pinned: Pinned
    file: IndexFile
    pythons: tuple[str, ...]
    uses: tuple[str, ...]


def all_targets() -> tuple[Target, ...]:
    """Return the targets that wheels are locked for, one a Python, the oldest first."""
    return tuple(sorted({t.python: t for t in TARGETS.values()}.values(), key=lambda t: Version(t.python)))


class Index:
    """The index's simple API in JSON (PEP 691, 700).

    Args:
        url: root of the simple API, no trailing slash.
        client: HTTP.
    """

    def __init__(self, url: str, client: httpx.Client) -> None:
        self._url = url
        self._client = client

    def files(self, name: str) -> list[IndexFile]:
        """Return every file of a package.

        Raises:
            LockFailed: the index does not answer, or not in JSON.
        """
        page = f"{self._url}/{canonicalize_name(name)}/"
        try:
            response = self._client.get(page, headers={"Accept": _JSON})
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}")
            body: Any = response.json()
            return [_index_file(raw, str(response.url)) for raw in body["files"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
            raise LockFailed(
                f"the package index gives no usable list of {name}",
                found=f"{type(e).__name__}: {e}",  # never the address: it may carry a password
                expected="the simple API in JSON (PEP 691)",
                hint="check the network and pip's index-url",
            ) from e


def _index_file(raw: Mapping[str, Any], page: str) -> IndexFile:
    uploaded = raw.get("upload-time")
    return IndexFile(
        filename=str(raw["filename"]),
        url=urljoin(page, str(raw["url"])),
        sha256=str(raw.get("hashes", {}).get("sha256", "")),
        size=int(raw.get("size", -1)),
        uploaded=datetime.fromisoformat(uploaded) if uploaded else None,
        yanked=bool(raw.get("yanked", False)),
    )


def compile_requirements(
    wheel_set: WheelSet,
    index_url: str,
    uv_cache: Path,
    console: Console,
    *,
    before: Mapping[str, datetime],
    prefer: Iterable[LockedFile] = (),
) -> list[Pinned]:
    """Resolve one set with uv, for every target Python at once.

    Args:
        wheel_set: what to resolve.
        index_url: root of the simple API.
        uv_cache: uv's own cache.
        console: for steps.
        before: uploads after this moment do not exist for the resolver: ``""`` for all packages, a name for one.
            Empty where the index tells no upload times (uv would then see no file at all).
        prefer: what is locked now; it stays where it still fits, so that a diff shows only what somebody asked for.

    Raises:
        LockFailed: it does not resolve.
    """
    lowest = min(all_targets(), key=lambda t: Version(t.python)).python
    with tempfile.TemporaryDirectory(prefix="moat-lock-") as scratch:
        requirements, overrides = Path(scratch) / "requirements.in", Path(scratch) / "overrides.txt"
        requirements.write_text("\n".join(wheel_set.requirements) + "\n", "utf-8")
        overrides.write_text("\n".join(wheel_set.overrides) + "\n", "utf-8")
        output = Path(scratch) / "requirements.txt"
        kept = sorted({f"{e.name}=={e.version}" + (f" ; {e.marker}" if e.marker else "") for e in prefer})
        output.write_text("".join(line + "\n" for line in kept), "utf-8")
        argv = [uv_program(), "pip", "compile", "--universal", "--python-version", lowest, "--generate-hashes"]
        argv += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet", "--no-config"]
        for name, moment in sorted(before.items()):
            option, prefix = ("--exclude-newer-package", f"{name}=") if name else ("--exclude-newer", "")
            argv += [option, f"{prefix}{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"]
        argv += ["--override", str(overrides), *(["--no-deps"] if wheel_set.no_deps else [])]
        argv += ["--output-file", str(output), str(requirements)]
        # By environment, since the address may carry a password; further indexes and folders of this machine would let
        # a package of the same name from elsewhere win, so they do not count.
        unwanted = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX_URL", "UV_CONSTRAINT", "UV_OVERRIDE")
        env = {k: v for k, v in os.environ.items() if k not in unwanted}
        env |= {"UV_DEFAULT_INDEX": index_url, "UV_CACHE_DIR": str(uv_cache), "UV_SYSTEM_CERTS": "1"}
        console.run(
            argv,
            error=LockFailed,
            what=f"resolving the wheels of {wheel_set.name}",
            hint="read the last lines above: a requirement of bundles/components.yaml cannot be met",
            env=env,
            show=False,
        )
        return parse_compiled(output.read_text("utf-8"))


def parse_compiled(text: str) -> list[Pinned]:
    """Read uv's output.

    Raises:
        LockFailed: a line is not an exact pin with hashes.
    """
    pinned = []
    for raw in text.replace("\\\n", " ").splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        spec, *hashes = re.split(r"\s+--hash=", line)
        requirement = Requirement(spec.strip())
        exact = re.fullmatch(r"==([^,*]+)", str(requirement.specifier))
        sha256 = frozenset(h.removeprefix("sha256:").strip() for h in hashes if h.startswith("sha256:"))
        if exact is None or not sha256 or requirement.url:
            raise LockFailed(f"{requirement.name} is not resolved to a version with hashes", found=line[:200])
        pinned.append(Pinned(canonicalize_name(requirement.name), exact[1], str(requirement.marker or ""), sha256))
    return pinned


def choose(pinned: Iterable[Pinned], uses: tuple[str, ...], index: Index, policy: Policy) -> list[Choice]:
    """Pick the file of each pin for each target.

    Raises:
        LockFailed: a target has no wheel; the index and the resolution disagree.
        PolicyRefused: a rule refuses a version before anything is downloaded.
    """
    pins = list(pinned)
    for p in pins:
        policy.check_denied("wheel", p.name, p.version, f"{p.name}=={p.version}")
    with ThreadPoolExecutor(max_workers=8) as pool:
        listings = dict(zip([p.name for p in pins], pool.map(index.files, [p.name for p in pins]), strict=True))
    chosen: dict[tuple[Pinned, IndexFile], list[str]] = {}
    for p in pins:
        for target in all_targets():
            if p.marker and not Marker(p.marker).evaluate(target_environment(target)):
                continue
            file = best_file(p, listings[p.name], target, policy)
            chosen.setdefault((p, file), []).append(target.python)
    return [Choice(p, f, tuple(sorted(pythons, key=Version)), uses) for (p, f), pythons in chosen.items()]


def merged(choices: Iterable[Choice]) -> list[Choice]:
    """Join the choices of one file by several sets: its uses and Pythons add up."""
    out: dict[str, Choice] = {}
    for c in choices:
        seen = out.get(c.file.filename)
        if seen is None:
            out[c.file.filename] = c
            continue
        uses = set(seen.uses) | set(c.uses)
        if "profile:demo" not in seen.uses or "profile:demo" not in c.uses:
            uses.discard("profile:demo")  # one of the two needs it in every profile
        pythons = tuple(sorted({*seen.pythons, *c.pythons}, key=Version))
        marker = seen.pinned.marker if seen.pinned.marker == c.pinned.marker else ""
        pinned = Pinned(seen.pinned.name, seen.pinned.version, marker, seen.pinned.hashes)
        out[c.file.filename] = Choice(pinned, seen.file, pythons, tuple(sorted(uses)))
    return list(out.values())


def best_file(pinned: Pinned, files: Iterable[IndexFile], target: Target, policy: Policy) -> IndexFile:
    """Return the wheel that pip would take on the target.

    Raises:
        LockFailed: there is none, or its hash is not among the resolution's.
        PolicyRefused: the release has source archives alone.
    """
    rank = {tag: n for n, tag in enumerate(target_tags(target))}
    release = [f for f in files if _version_of(f.filename, pinned.name) == Version(pinned.version)]
    policy.check_sdist(pinned.name, pinned.version, [f.filename for f in release])
    candidates: list[tuple[int, tuple[int, str], IndexFile]] = []
    for f in release:
        if not f.filename.endswith(".whl") or f.yanked:
            continue
        _, _, build, tags = parse_wheel_filename(f.filename)
        best = min((rank[t] for t in tags if t in rank), default=None)
        if best is not None:
            number = build if build else (0, "")
            candidates.append((best, (-number[0], number[1]), f))
    if not candidates:
        raise LockFailed(
            f"{pinned.name} {pinned.version} has no wheel for Python {target.python} on {target.arch}",
            found=", ".join(sorted(f.filename for f in release)) or "nothing",
            hint="pin a version in bundles/components.yaml that has one",
        )
    file = min(candidates, key=lambda c: c[:2])[2]
    if file.sha256 not in pinned.hashes:
        raise LockFailed(
            f"{file.filename}: the index's list and the resolution disagree on its sha256",
            found=file.sha256 or "none",
            expected="one of the resolved hashes",
            hint="run `moat lock` again; if it stays, the index is not to be trusted",
        )
    if file.size < 0:
        raise LockFailed(f"{file.filename}: the index tells no size", hint="use an index with PEP 700 metadata")
    return file


def _version_of(filename: str, name: str) -> Version | None:
    try:
        if filename.endswith(".whl"):
            found, version, _, _ = parse_wheel_filename(filename)
        else:
            found, version = parse_sdist_filename(filename)
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None  # old or foreign forms (eggs, installers)
    return version if found == name else None


def wheel_license(path: Path) -> str:
    """Return the SPDX expression of a wheel, or ``NOASSERTION``.

    In this order: ``License-Expression`` (PEP 639), ``License`` where it is a known name or text, classifiers that
    name one licence, the licence files of the wheel.

    Raises:
        LockFailed: it is not a wheel.
    """
    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
            metadata = [n for n in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            if len(metadata) != 1:
                raise LockFailed(f"{path.name} is not a wheel", found=f"{len(metadata)} METADATA files")
            headers = HeaderParser().parsestr(z.read(metadata[0]).decode("utf-8", "replace"))
            files = [n for n in names if re.match(r"[^/]+\.dist-info/(licenses/.*)?(LICEN[CS]E|COPYING)", n, re.I)]
            texts = [z.read(n).decode("utf-8", "replace") for n in files]
    except zipfile.BadZipFile as e:
        raise LockFailed(f"{path.name} is not a wheel", found=str(e)) from e
    expression = headers.get("License-Expression")
    if expression:
        return re.sub(r"\s+", " ", expression).strip()
    return (
        from_text(headers.get("License") or "")
        or from_classifiers(headers.get_all("Classifier") or [])
        or from_license_file("\n".join(texts))
    )


def places(entries: Iterable[LockedFile], index: Index) -> dict[str, tuple[str, ...]]:
    """Return where the index serves each locked wheel, by sha256; a wheel that it has no longer is left out.

    Raises:
        LockFailed: the index does not answer.
    """
    names = sorted({e.source.removeprefix("pypi:") for e in entries})
    wanted = {e.sha256 for e in entries}
    with ThreadPoolExecutor(max_workers=8) as pool:
        return {f.sha256: (f.url,) for files in pool.map(index.files, names) for f in files if f.sha256 in wanted}


def members(path: Path) -> list[str]:
    """Return the paths in a wheel.

    Raises:
        LockFailed: it is not a zip archive.
    """
    try:
        with zipfile.ZipFile(path) as z:
            return z.namelist()
    except zipfile.BadZipFile as e:
        raise LockFailed(f"{path.name} is not a wheel", found=str(e)) from e


def locked(choice: Choice, path: Path, policy: Policy, now: datetime) -> LockedFile:
    """Judge a downloaded wheel and return its lock entry; the licences are judged together afterwards.

    Raises:
        PolicyRefused: a rule refuses it.
    """
    p, f = choice.pinned, choice.file
    policy.check_denied("wheel", p.name, p.version, f.filename)
    policy.check_age(p.name, p.version, f.filename, f.uploaded, now)
    policy.check_startup_hooks(p.name, f.filename, members(path))
    return LockedFile(
        kind="wheel",
        name=p.name,
        version=p.version,
        filename=f.filename,
        sha256=f.sha256,
        size=f.size,
        license=policy.license_of("wheel", p.name, p.version, wheel_license(path)),
        source=f"pypi:{p.name}",
        uses=tuple(sorted(choice.uses)),
        marker=p.marker,
        pythons=choice.pythons,
    )
