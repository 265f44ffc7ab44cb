# SPDX-License-Identifier: Apache-2.0
"""``images/<name>/recipe.yaml``: what an image is made of, as data.

A recipe names every source of an image's files: locked Debian packages, locked wheels, compiled
programs, members of locked files, our own code, and overlays with the reason for each. A file
that comes from none of them is a stray, and a test fails on it. What is left out of a package or
a wheel (``drop``) is named with its reason too.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import yaml

from moat.build.locks import ROOT
from moat.errors import BuildFailed

IMAGES = ROOT / "images"


@dataclass(frozen=True)
class Drop:
    """A path (or glob over whole paths) that is left out, with everything below it, and why.

    Files named ``keep`` stay (``copyright``), and so do links between package folders.
    """

    path: str
    why: str
    keep: str = ""


@dataclass(frozen=True)
class Overlay:
    """One file, folder or link that no package owns.

    Exactly one of ``text``, ``source`` (a file beside the recipe), ``generate`` (``ca-bundle``),
    ``target`` (a symbolic link's) and ``directory`` says what it is. ``mode`` is octal, ``owner``
    is ``uid:gid``.
    """

    path: str
    why: str
    text: str | None = None
    source: str | None = None
    generate: str | None = None
    target: str | None = None
    directory: bool = False
    mode: str = "0755"
    owner: str = "0:0"


@dataclass(frozen=True)
class Wheels:
    """The locked wheels with the use ``use``, unpacked into ``into``."""

    use: str
    into: str


@dataclass(frozen=True)
class Project:
    """A Python project of this repository: its wheel is built and unpacked into ``into``."""

    folder: str
    into: str


@dataclass(frozen=True)
class Folder:
    """A folder of Python sources of this repository, copied into ``into``."""

    folder: str
    into: str


@dataclass(frozen=True)
class Program:
    """A compiled program (``moat.build.golang``) and where it goes."""

    name: str
    to: str


@dataclass(frozen=True)
class Member:
    """One member (a glob that matches exactly one) of a locked zip file (a wheel), and where it goes."""

    file: str
    member: str
    to: str


@dataclass(frozen=True)
class LayerRecipe:
    """One layer. ``packages`` is the use in the lock, ``bytecode`` the folders whose sources are compiled."""

    name: str
    packages: str | None = None
    drop: tuple[Drop, ...] = ()
    bytecode: tuple[str, ...] = ()
    overlays: tuple[Overlay, ...] = ()
    wheels: Wheels | None = None
    project: Project | None = None
    folders: tuple[Folder, ...] = ()
    programs: tuple[Program, ...] = ()
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """One image."""

    name: str
    summary: str
    user: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    workdir: str
    ports: tuple[int, ...]
    env: dict[str, str]
    layers: tuple[LayerRecipe, ...]
    profiles: tuple[str, ...] = ("demo", "site")
    stop_signal: str = "SIGTERM"


T = TypeVar("T")
#: Which dataclass the members of a field are.
_NESTED: dict[str, type[Any]] = {
    "layers": LayerRecipe,
    "drop": Drop,
    "overlays": Overlay,
    "wheels": Wheels,
    "project": Project,
    "folders": Folder,
    "programs": Program,
    "members": Member,
}


def _make(cls: type[T], raw: object, where: str) -> T:
    """Turn a mapping into ``cls``, refusing unknown and missing fields by name."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is not a mapping")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(raw) - set(known)):
        raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}")
    required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(raw)):
        raise ValueError(f"{where} lacks fields: {', '.join(missing)}")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        nested = _NESTED.get(name)
        if nested is not None and isinstance(value, list):
            values[name] = tuple(_make(nested, v, f"{where}.{name}[{i}]") for i, v in enumerate(value))
        elif nested is not None:
            values[name] = _make(nested, value, f"{where}.{name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def check_path(path: str) -> str:
    """Return a path inside an image (relative, clean).

    Raises:
        ValueError: it is absolute, empty, or climbs.
    """
    if not path or path.startswith("/") or ".." in PurePosixPath(path).parts or str(PurePosixPath(path)) != path:
        raise ValueError(f"{path!r} is not a clean relative path")
    return path


def _check(recipe: Recipe) -> None:
    for layer in recipe.layers:
        for o in layer.overlays:
            check_path(o.path)
            kinds = [
                o.text is not None,
                o.source is not None,
                o.generate is not None,
                o.target is not None,
                o.directory,
            ]
            if sum(kinds) != 1:
                raise ValueError(
                    f"overlay {o.path}: exactly one of text, source, generate, target, directory is needed"
                )
            if not o.why.strip():
                raise ValueError(f"overlay {o.path}: say why")
            if int(o.mode, 8) & 0o6000:
                raise ValueError(f"overlay {o.path}: no setuid or setgid")
        for d in layer.drop:
            if not d.why.strip():
                raise ValueError(f"drop {d.path}: say why")
        for p in layer.programs:
            check_path(p.to)
        for m in layer.members:
            check_path(m.to)
    uid = recipe.user.split(":")[0]
    if not uid.isdigit() or int(uid) == 0:
        raise ValueError("user must be numeric and not root")


def read_recipe(path: Path) -> Recipe:
    """Read one recipe.

    Raises:
        BuildFailed: it is malformed; the message names the field.
    """
    try:
        recipe = _make(Recipe, yaml.safe_load(path.read_text("utf-8")), path.parent.name)
        _check(recipe)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as e:
        raise BuildFailed(
            f"the recipe {path} cannot be used", found=str(e), hint="see docs/bundle.md for the fields", path=str(path)
        ) from e
    return recipe


def read_recipes(profile: str, folder: Path = IMAGES) -> list[Recipe]:
    """Return the recipes of one profile, by name."""
    recipes = [read_recipe(p) for p in sorted(folder.glob("*/recipe.yaml"))]
    return [r for r in recipes if profile in r.profiles]
