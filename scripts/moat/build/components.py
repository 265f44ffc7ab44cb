# SPDX-License-Identifier: Apache-2.0
"""What is inside the bundle, one record a component: the common ground of SBOMs, notices and the manifest."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from moat.build import golang
from moat.build.aptrepo import Deb
from moat.build.cache import Cache
from moat.build.licenses import NOASSERTION, from_dep5, from_license_file
from moat.build.locks import IMAGE_TARGET, LockedFile
from moat.errors import BuildFailed

#: Files with licence texts and notices inside a wheel's dist-info or a Go module.
_LICENSE_NAME = re.compile(r"(licen[cs]e|copying|notice|copyright|authors)[^/]*$", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Component:
    """One thing from upstream, or of ours.

    Attributes:
        kind: ``deb``, ``wheel``, ``go-module``, ``program``, ``model``, ``code``.
        name: upstream's name.
        version: exact.
        license: SPDX expression, or ``NOASSERTION``.
        purl: package URL (a name, not an address).
        sha256: of the file that it came as; empty where it is part of another file.
        texts: its licence texts, as (file name, text).
    """

    kind: str
    name: str
    version: str
    license: str
    purl: str
    sha256: str
    texts: tuple[tuple[str, str], ...] = ()


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"


def purl(kind: str, name: str, version: str, qualifiers: Mapping[str, str] | None = None) -> str:
    """Return a package URL, e.g. ``pkg:deb/debian/libc6@2.41-12?arch=amd64&distro=debian-13``."""
    path = "/".join(quote(p, safe="-._~") for p in name.split("/"))
    tail = "&".join(f"{k}={quote(v, safe='-._~')}" for k, v in sorted((qualifiers or {}).items()))
    return f"pkg:{kind}/{path}@{quote(version, safe='-._~')}" + (f"?{tail}" if tail else "")


def deb_component(deb: Deb, distro: str) -> Component:
    """Return the component of a Debian package, with its copyright file."""
    texts: list[tuple[str, str]] = []
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb.path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for m in tar:
                if re.fullmatch(r"\./usr/share/doc/[^/]+/copyright", m.name) and m.isreg():
                    file = tar.extractfile(m)
                    assert file is not None  # noqa: S101
                    texts.append((m.name.removeprefix("./"), _text(file.read())))
    license_ = deb.entry.license
    if license_ == NOASSERTION and texts:
        license_ = from_dep5(texts[0][1])
    qualifiers = {"arch": deb.control["Architecture"], "distro": distro}
    name = purl("deb", f"debian/{deb.name}", deb.entry.version, qualifiers)
    return Component("deb", deb.name, deb.entry.version, license_, name, deb.entry.sha256, tuple(texts))


def _zip_texts(path: Path, inside: str) -> tuple[tuple[str, str], ...]:
    with zipfile.ZipFile(path) as z:
        names = sorted(
            n for n in z.namelist() if re.match(inside, n) and _LICENSE_NAME.search(n) and not n.endswith("/")
        )
        return tuple((n, _text(z.read(n))) for n in names)


def wheel_component(entry: LockedFile, path: Path, *, kind: str = "wheel") -> Component:
    """Return the component of a wheel, with the texts of its dist-info (or, failing that, of the whole wheel)."""
    texts = _zip_texts(path, r"[^/]+\.dist-info/") or _zip_texts(path, r".*")
    name = purl("pypi", entry.name, entry.version)
    return Component(kind, entry.name, entry.version, entry.license, name, entry.sha256, texts)


def go_component(entry: LockedFile, path: Path) -> Component:
    """Return the component of a Go module, with the licence files at its top."""
    prefix = re.escape(f"{entry.name}@{entry.version}/")
    texts = _zip_texts(path, prefix + r"[^/]+$")
    license_ = entry.license
    if license_ == NOASSERTION and texts:
        license_ = from_license_file(texts[0][1])
    return Component(
        "go-module", entry.name, entry.version, license_, purl("golang", entry.name, entry.version), entry.sha256, texts
    )


def program_components(
    program: golang.Program, go: Sequence[LockedFile], cache: Cache, toolchain: Deb
) -> list[Component]:
    """Return a compiled program's parts: itself, the modules that it was linked from, Go's own library.

    Raises:
        BuildFailed: it was linked from a module that is not locked.
    """
    zips = {(e.name, e.version): e for e in go if e.kind == "go-module"}
    wanted = set(program.modules) | ({(golang.MINIO, program.version)} if program.name == "minio" else set())
    parts = []
    for name, version in sorted(wanted):
        entry = zips.get((name, version))
        if entry is None:
            raise BuildFailed(f"{program.name} was linked from a module that is not locked", found=f"{name} {version}")
        parts.append(go_component(entry, cache.require(entry)))
    digest = hashlib.sha256(program.path.read_bytes()).hexdigest()
    itself = Component(
        "program",
        program.name,
        program.version,
        program.license,
        purl("generic", program.name, program.version),
        digest,
    )
    library = deb_component(toolchain, IMAGE_TARGET.distro)
    go_version = toolchain.entry.version.split("-")[0]
    stdlib = Component(
        "go-module", "std", go_version, "BSD-3-Clause", purl("golang", "std", go_version), "", library.texts
    )
    return [itself, stdlib, *parts]


def license_field(license_: str) -> list[dict[str, object]]:
    """Return CycloneDX's ``licenses`` of one component; what nobody states is pointed to, not guessed."""
    if license_ in ("", NOASSERTION):
        return [{"license": {"name": "not stated in a recognised form; see THIRD-PARTY-NOTICES.txt"}}]
    if re.search(r"\s", license_):
        return [{"expression": license_}]
    return [{"license": {"id": license_}} if not license_.startswith("LicenseRef-") else {"expression": license_}]


def notices(components: Iterable[Component]) -> str:
    """Return THIRD-PARTY-NOTICES.txt: every component with its licence, then every text once."""
    unique = sorted(set(components))
    numbers: dict[str, int] = {}
    lines = [
        "THIRD-PARTY NOTICES",
        "",
        "Every component of this bundle, its version, its licence (SPDX, where upstream states one) and the numbers of",
        "its licence texts below. Debian's copyright files refer to full texts in /usr/share/common-licenses, which",
        "every Debian host has.",
        "",
    ]
    for c in unique:
        refs = [numbers.setdefault(text, len(numbers) + 1) for _, text in c.texts]
        shown = ", ".join(str(n) for n in dict.fromkeys(refs)) or "none shipped by upstream"
        lines.append(f"{c.kind:<10} {c.name} {c.version}: {c.license}; texts: {shown}")
    for text, number in numbers.items():
        lines += ["", "=" * 100, f"TEXT {number}", "=" * 100, text.rstrip("\n")]
    return "\n".join(lines) + "\n"


def dump(document: object) -> bytes:
    """Return readable, deterministic JSON."""
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
