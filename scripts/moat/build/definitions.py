# SPDX-License-Identifier: Apache-2.0
"""``bundles/components.yaml``: what goes into a bundle, read into frozen dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moat.build.locks import IMAGE_TARGET, ROOT, TARGETS
from moat.errors import LockFailed

COMPONENTS = ROOT / "bundles" / "components.yaml"


@dataclass(frozen=True)
class WheelSet:
    """Requirements that are resolved together.

    Attributes:
        name: of the set.
        requirements: PEP 508 requirements.
        overrides: requirements that replace whatever the packages ask for.
        uses: what its wheels are for (:class:`moat.build.locks.LockedFile`).
        no_deps: take the named wheels alone.
    """

    name: str
    requirements: tuple[str, ...]
    overrides: tuple[str, ...]
    uses: tuple[str, ...]
    no_deps: bool


@dataclass(frozen=True)
class DebianSet:
    """Debian packages that are closed over their dependencies together.

    Attributes:
        use: ``image:NAME``, ``builder`` or ``host``.
        packages: names.
        assume: names that count as installed already.
        target: name of the target in whose release they are resolved.
        newer: names that are taken from the lock of :data:`moat.build.locks.IMAGE_TARGET`, as they are.
    """

    use: str
    packages: tuple[str, ...]
    assume: tuple[str, ...]
    target: str = IMAGE_TARGET.name
    newer: tuple[str, ...] = ()


@dataclass(frozen=True)
class GoProgram:
    """A program compiled from one Go module, in the module's own folder.

    Attributes:
        name: of the component and of its lock (``go-NAME.jsonl``).
        module: module path.
        version: exact version.
        license: SPDX expression of the program itself.
        toolchain: Debian package of the Go toolchain.
        uses: what its files are for.
    """

    name: str
    module: str
    version: str
    license: str
    toolchain: str
    uses: tuple[str, ...]


@dataclass(frozen=True)
class HubFile:
    """One file of a model hub, pinned by the commit.

    Attributes:
        kind: ``model`` or ``tokenizer``.
        repo: ``OWNER/NAME``.
        revision: commit, 40 hex digits.
        file: path in the repository.
        license: SPDX expression.
        uses: what it is for.
    """

    kind: str
    repo: str
    revision: str
    file: str
    license: str
    uses: tuple[str, ...]


@dataclass(frozen=True)
class Components:
    """The whole file."""

    wheels: tuple[WheelSet, ...]
    debian: tuple[DebianSet, ...]
    go: tuple[GoProgram, ...]
    hub: tuple[HubFile, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the images that have a Debian set (which may be empty)."""
        return tuple(s.use.removeprefix("image:") for s in self.debian if s.use.startswith("image:"))


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{where} must be a list of strings, is {value!r}")
    return tuple(value)


def _members(value: Any, where: str, required: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    if not isinstance(value, dict) or not required <= set(value) <= required | optional:
        found = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{where} has members {found}, wants {sorted(required)} and perhaps {sorted(optional)}")
    return value


def _debian_set(use: str, raw: Any, target: str = IMAGE_TARGET.name) -> DebianSet:
    where = f"debian {use} {target}"
    # Only another release can take something newer from the images' own.
    optional = {"newer"} if target != IMAGE_TARGET.name else set()
    members = _members(raw, where, {"packages", "assume"}, optional)
    return DebianSet(
        use=use,
        packages=_strings(members["packages"], where),
        assume=_strings(members["assume"], where),
        target=target,
        newer=_strings(members.get("newer", []), where),
    )


def _wheel_set(name: str, raw: Any) -> WheelSet:
    where = f"wheels {name}"
    members = _members(raw, where, {"uses", "requirements"}, {"overrides", "no_deps"})
    return WheelSet(
        name=name,
        requirements=_strings(members["requirements"], where),
        overrides=_strings(members.get("overrides", []), where),
        uses=_strings(members["uses"], where),
        no_deps=bool(members.get("no_deps", False)),
    )


def _hub_file(raw: Any) -> HubFile:
    members = _members(raw, "hub", {"kind", "repo", "revision", "file", "license", "uses"})
    file = HubFile(**{**members, "uses": _strings(members["uses"], "hub uses")})
    if not re.fullmatch(r"[0-9a-f]{40}", file.revision):
        # A branch or a tag can be moved under us; a commit cannot.
        raise ValueError(f"hub {file.repo}: revision {file.revision!r} is not a commit of 40 hex digits")
    if file.kind not in ("model", "tokenizer"):
        raise ValueError(f"hub {file.repo}: kind {file.kind!r} is neither model nor tokenizer")
    return file


def read_components(path: Path = COMPONENTS) -> Components:
    """Read the definitions.

    Raises:
        LockFailed: the file is missing or not of this form.
    """
    try:
        raw = _members(yaml.safe_load(path.read_text("utf-8")), path.name, {"wheels", "debian", "go", "hub"})
        debian = _members(raw["debian"], "debian", {"images", "builder", "host"})
        hosts = _members(debian["host"], "debian host", set(TARGETS))
        return Components(
            wheels=tuple(_wheel_set(name, value) for name, value in sorted(raw["wheels"].items())),
            debian=(
                *(_debian_set(f"image:{name}", value) for name, value in sorted(debian["images"].items())),
                _debian_set("builder", debian["builder"]),
                *(_debian_set("host", hosts[target], target) for target in TARGETS),
            ),
            go=tuple(
                GoProgram(
                    name=name,
                    **{
                        **_members(value, f"go {name}", {"module", "version", "license", "toolchain", "uses"}),
                        "uses": _strings(value["uses"], f"go {name}"),
                    },
                )
                for name, value in sorted(raw["go"].items())
            ),
            hub=tuple(_hub_file(value) for value in raw["hub"]),
        )
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise LockFailed(
            f"cannot read the definitions in {path.name}",
            found=str(e),
            hint="compare with the file in git",
            path=str(path),
        ) from e
