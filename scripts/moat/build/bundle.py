# SPDX-License-Identifier: Apache-2.0
"""The bundle's folder: everything that travels, its manifest and its signature.

It is assembled in a temporary sibling of the output and renamed, so that a bundle with its final
name is whole. Files are copies: a hard link into the cache would change the bundle with the cache.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moat.build import pywheels
from moat.build.aptrepo import Deb, write_repository
from moat.build.built import fingerprint, key_of, made, source_files
from moat.build.cache import sha256_file
from moat.build.components import (
    Component,
    deb_component,
    dump,
    go_component,
    notices,
    program_components,
    purl,
    wheel_component,
)
from moat.build.golang import minio_entry
from moat.build.images import Image, Workshop
from moat.build.layers import Tree
from moat.build.locks import IMAGE_TARGET, ROOT, LockedFile, Target
from moat.build.pyz import build_pyz
from moat.build.readme import readme_text
from moat.build.recipe import Recipe, read_recipes
from moat.build.sbom import document
from moat.console import Console, human_bytes
from moat.errors import BuildFailed
from moat.manifest import MANIFEST_NAME, BundleInfo, FileEntry, ImageEntry, Manifest, parse_manifest

#: FAT32's largest file, in bytes.
FAT32_MAX = 4_294_967_295
OURS = "Apache-2.0"
#: tiktoken's encodings: the name of each file is the sha1 of the address that tiktoken would ask.
ENCODINGS = {
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
    "p50k_base": "ec7223a39ce59f226a68acc30dc1af2788490e15",
}
#: Distributions that tiktoken needs in order to load a file that is there.
_TIKTOKEN = ("tiktoken", "regex", "requests", "urllib3", "idna", "certifi", "charset-normalizer")


@dataclass(frozen=True)
class Listed:
    """What the manifest says about a file besides its bytes; ``sha256`` is what a lock says of them, if one does."""

    kind: str
    component: str
    version: str
    license: str
    source: str
    sha256: str = ""


def listed_as(kind: str, entry: LockedFile, license_: str | None = None) -> Listed:
    """Return what the manifest says about a locked file that travels as it is."""
    return Listed(kind, entry.name, entry.version, license_ or entry.license, entry.source, entry.sha256)


def requirements_text(name: str, entries: Iterable[tuple[str, str, str]]) -> str:
    """Return a requirements file of exact versions; ``entries`` are (package, version, sha256)."""
    lines = sorted(f"{package}=={version} --hash=sha256:{sha256}\n" for package, version, sha256 in entries)
    command = f"pip install --no-index --no-deps --require-hashes --find-links . -r {name}"
    return f"# Install: {command}\n" + "".join(lines)


class Assembly:
    """One bundle under way.

    Args:
        workshop: the inputs and the images.
        info: what the bundle is.
        folder: the temporary folder that is filled.
    """

    def __init__(self, workshop: Workshop, info: BundleInfo, folder: Path) -> None:
        self.workshop = workshop
        self.info = info
        self.folder = folder
        self.console: Console = workshop.console
        self.listed: dict[str, Listed] = {}
        self.images: list[Image] = []
        self.components: list[Component] = []
        self._deb_components: dict[tuple[str, str], Component] = {}

    def put(self, path: str, data: bytes | Path, listed: Listed, *, mode: int = 0o644) -> None:
        """Write or copy one file into the bundle."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Path):
            shutil.copyfile(data, target)
        else:
            target.write_bytes(data)
        target.chmod(mode)
        self.listed[path] = listed

    def _ours(self, kind: str, component: str) -> Listed:
        return Listed(kind, component, self.info.version, OURS, f"moat:{component}")

    # --- parts ---

    def add_images(self, recipes: Sequence[Recipe]) -> None:
        """Build the images of the profile."""
        for recipe in recipes:
            image = self.workshop.image(recipe, self.folder / "images")
            self.images.append(image)
            # The licences of what is inside are in the image's SBOM; the archive as a whole has none of its own.
            self.listed[f"images/{recipe.name}.tar"] = Listed(
                "image", f"moat/{recipe.name}", self.info.version, "NOASSERTION", f"moat:images/{recipe.name}"
            )

    def wheels(self) -> list[LockedFile]:
        """Return every locked wheel of the folder ``wheels/``: the gateway's, the control environment's, pip."""
        found = {e.filename: e for use in ("wheelhouse", "control", "installer") for e in self.workshop.wheels(use)}
        return [found[name] for name in sorted(found)]

    def add_wheels(self) -> None:
        """Copy the wheels of the target's Python, our own wheel, and a hashed list for each of the two environments."""
        for e in self.wheels():
            self.put(f"wheels/{e.filename}", self.workshop.cache.require(e), listed_as("wheel", e))
        own = self.workshop.project_wheel("images/gateway")
        version = own.name.split("-")[1]
        self.put(f"wheels/{own.name}", own, Listed("wheel", "moat-gateway", version, OURS, "moat:images/gateway"))
        gateway = [(e.name, e.version, e.sha256) for e in self.workshop.wheels("wheelhouse")]
        gateway.append(("moat-gateway", version, sha256_file(own)))
        control = [(e.name, e.version, e.sha256) for e in self.workshop.wheels("control")]
        for name, entries in (("requirements.txt", gateway), ("control-requirements.txt", control)):
            text = requirements_text(name, entries).encode("utf-8")
            self.put(f"wheels/{name}", text, self._ours("index", "wheels"))

    def add_debs(self) -> None:
        """Write the apt repository of what site hosts install."""
        debs = self.workshop.debs("host")
        target = self.workshop.locks.target
        folder = self.folder / "debs"
        write_repository(folder, debs, suite=target.suite, arch=target.arch, source_date_epoch=self.workshop.epoch)
        for d in debs:
            e = d.entry
            license_ = self.deb(d, target).license
            self.listed[f"debs/{e.filename}"] = listed_as("deb", e, license_)
        for name in ("Packages", "Release"):
            self.listed[f"debs/{name}"] = self._ours("index", "debs")

    def add_tokenizers(self) -> None:
        """Extract tiktoken's files from the locked LiteLLM wheel, and prove that they load without a network."""
        litellm = self._wheel("litellm")
        source = self.workshop.cache.require(litellm)
        index: dict[str, dict[str, str]] = {}
        with zipfile.ZipFile(source) as z:
            for encoding, name in ENCODINGS.items():
                found = [n for n in z.namelist() if n.endswith(f"/tokenizers/{name}")]
                if len(found) != 1:
                    raise BuildFailed(
                        f"the LiteLLM wheel does not hold the tokenizer {encoding}", found=str(len(found))
                    )
                data = z.read(found[0])
                index[encoding] = {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
                listed = Listed("tokenizer", encoding, litellm.version, "MIT", f"{litellm.source}#{found[0]}")
                self.put(f"tokenizers/{name}", data, listed)
        self.put("tokenizers/index.json", dump(index), self._ours("index", "tokenizers"))
        proof = prove_tokenizers(self.workshop, self.folder / "tokenizers")
        self.console.info(f"loaded with no network by the gateway's Python: {proof}")

    def _wheel(self, name: str) -> LockedFile:
        for e in self.workshop.wheels("wheelhouse"):
            if e.name == name:
                return e
        raise BuildFailed(f"the lock lacks the wheel {name}", hint="run `moat lock`")

    def add_tree(self, source: Path, place: str, kind: str, *, without: Sequence[str] = ()) -> None:
        """Copy a folder of this repository; ``without`` names paths below it, files or folders, that stay behind."""
        for path in source_files(source):
            relative = path.relative_to(source).as_posix()
            if any(relative == w or relative.startswith(f"{w}/") for w in without):
                continue
            executable = path.stat().st_mode & 0o100
            self.put(f"{place}/{relative}", path, self._ours(kind, place), mode=0o755 if executable else 0o644)

    def deb(self, deb: Deb, target: Target = IMAGE_TARGET) -> Component:
        """Return the component of a package for a target's distribution, read once."""
        key = (deb.entry.sha256, target.name)
        if key not in self._deb_components:
            self._deb_components[key] = deb_component(deb, target.distro)
        return self._deb_components[key]

    def image_components(self, image: Image) -> list[Component]:
        """Return what is inside an image, from the same inputs that its layers were made of."""
        shop, recipe = self.workshop, image.recipe
        parts: list[Component] = []
        for layer in recipe.layers:
            if layer.packages:
                parts += [self.deb(d) for d in shop.debs(layer.packages)]
            if layer.wheels:
                parts += [wheel_component(e, shop.cache.require(e)) for e in shop.layer_wheels(recipe, layer)]
            for p in layer.programs:
                toolchain = next(d for d in shop.debs("builder") if d.name == "golang-1.24-src")
                parts += program_components(shop.program(p.name), shop.locks.go, shop.cache, toolchain)
            for m in layer.members:
                e = shop.locked(m.file)
                parts.append(wheel_component(e, shop.cache.require(e), kind="model"))
            if layer.project:
                wheel = shop.project_wheel(layer.project.folder)
                name, version = wheel.name.split("-")[:2]
                name = name.replace("_", "-")
                parts.append(Component("code", name, version, OURS, purl("pypi", name, version), sha256_file(wheel)))
            for f in layer.folders:
                name = Path(f.folder).name
                parts.append(
                    Component("code", name, self.info.version, OURS, purl("generic", name, self.info.version), "")
                )
        return parts

    def add_sboms(self) -> None:
        """Write an SBOM for each image, for the wheel house and for the apt repository; collect the notices."""
        shop, epoch = self.workshop, self.workshop.epoch
        for image in self.images:
            parts = self.image_components(image)
            self.components += parts
            a = image.archive
            data = document(
                name=f"moat/{image.recipe.name}",
                version=a.reference.rsplit(":", 1)[1],
                kind="container",
                sha256=a.image_id.removeprefix("sha256:"),
                components=parts,
                source_date_epoch=epoch,
            )
            self.put(f"sbom/image-{image.recipe.name}.cdx.json", data, self._ours("sbom", f"image-{image.recipe.name}"))
        wheels = [wheel_component(e, shop.cache.require(e)) for e in self.wheels()]
        debs = [self.deb(d, shop.locks.target) for d in shop.debs("host")]
        for name, parts in (("wheels", wheels), ("debs", debs)):
            self.components += parts
            data = document(
                name=name, version=self.info.version, kind="file", sha256="", components=parts, source_date_epoch=epoch
            )
            self.put(f"sbom/{name}.cdx.json", data, self._ours("sbom", name))
        self.put("THIRD-PARTY-NOTICES.txt", notices(self.components).encode("utf-8"), self._ours("notices", "notices"))

    def add_sources(self) -> None:
        """Ship the source of what the AGPL covers, beside the program compiled from it."""
        if any(p.name == "minio" for i in self.images for part in i.recipe.layers for p in part.programs):
            e = minio_entry(self.workshop.locks.go)
            component = go_component(e, self.workshop.cache.require(e))
            listed = listed_as("source", e, component.license)
            self.put(f"sources/minio-{e.version}.zip", self.workshop.cache.require(e), listed)

    def add_top(self) -> None:
        """Write moat.pyz and README.txt; copy install.sh, ansible/, compose/ and docs/.

        Raises:
            BuildFailed: the installer is missing from the checkout.
        """
        build_pyz(self.folder / "moat.pyz", self.workshop.epoch)
        self.listed["moat.pyz"] = self._ours("program", "moat")
        self.put("README.txt", readme_text(self.info).encode("utf-8"), self._ours("doc", "readme"))
        self.put("LICENSE.txt", ROOT / "LICENSE", self._ours("doc", "license"))
        installer = ROOT / "ansible" / "install.sh"
        if not installer.is_file():
            raise BuildFailed(
                "the installer is missing from the checkout",
                found="no ansible/install.sh",
                hint="restore it from git; a bundle without it cannot be installed from a medium",
                path=str(installer),
            )
        # Beside the README, where an operator looks for it; the playbooks stay in their folder.
        self.put("install.sh", installer, self._ours("program", "install"), mode=0o755)
        self.add_tree(ROOT / "ansible", "ansible", "ansible", without=["install.sh", "tests"])
        for name, kind in (("compose", "compose"), ("docs", "doc")):
            if (ROOT / name).is_dir():
                self.add_tree(ROOT / name, name, kind)

    # --- the end ---

    def write_manifest(self) -> Manifest:
        """Hash every file, compare it with its lock, and write the manifest; a file that is not listed is a defect.

        Raises:
            BuildFailed: a stray file, one too large for FAT32, or one that differs from its lock.
        """
        found = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if not p.is_dir()}
        if strays := sorted(set(found) ^ set(self.listed)):
            raise BuildFailed("the bundle's files and their list differ", found=", ".join(strays[:5]))
        total = sum(p.stat().st_size for p in found.values())
        entries = []
        with self.console.progress("hash the bundle", total) as bar:
            for path, p in sorted(found.items()):
                size = p.stat().st_size
                if size > FAT32_MAX:
                    raise BuildFailed(
                        f"{path} is too large for a FAT32 medium",
                        found=f"{size} bytes",
                        expected=f"at most {FAT32_MAX}",
                    )
                x, digest = self.listed[path], sha256_file(p)
                if x.sha256 and digest != x.sha256:
                    raise BuildFailed(
                        f"{path} is not the file that the lock names",
                        found=digest,
                        expected=x.sha256,
                        hint=f"the cache is damaged: delete {self.workshop.cache.path(x.sha256)}, then `moat fetch`",
                        path=path,
                    )
                entries.append(FileEntry(path, size, digest, x.kind, x.component, x.version, x.license, x.source))
                bar.add(size)
        images = tuple(
            ImageEntry(
                i.recipe.name,
                i.archive.reference,
                i.archive.image_id,
                f"images/{i.recipe.name}.tar",
                i.archive.unpacked,
            )
            for i in self.images
        )
        manifest = Manifest(self.info, tuple(entries), images)
        data = manifest.to_bytes()
        parse_manifest(data)  # what leaves this host is something that a site accepts
        (self.folder / MANIFEST_NAME).write_bytes(data)
        return manifest


#: Runs with the gateway image's Python inside a root file system, in the namespace without a network.
_LOAD = """
import sys, tiktoken
text = "Air gap: \\u00e9t\\u00e9, \\u4f60\\u597d, 12345 tokens."
for name in sys.argv[1:]:
    encoding = tiktoken.get_encoding(name)
    tokens = encoding.encode(text)
    assert encoding.decode(tokens) == text and 5 < len(tokens) < 40, (name, tokens)
    print(name, len(tokens), end="; ")
"""


def prove_tokenizers(workshop: Workshop, folder: Path) -> str:
    """Encode and decode with every vendored encoding, by the gateway image's Python and the locked tiktoken.

    tiktoken checks each file's hash itself, and without a network it can take it from nowhere else.

    Returns:
        What was loaded, with the number of tokens of a test sentence.

    Raises:
        BuildFailed: an encoding cannot be loaded or does not give the text back.
    """
    entries = [e for e in workshop.wheels("image:gateway") if e.name in _TIKTOKEN]
    files = {p.name: sha256_file(p) for p in sorted(folder.iterdir())}
    key = key_of("tokenizer-proof", fingerprint("bundle", "pywheels"), [e.sha256 for e in entries], files, _LOAD)

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            root = Path(scratch) / "root"
            shutil.copytree(workshop.root("image:gateway"), root, symlinks=True)
            tree = Tree()
            for e in entries:
                pywheels.unpack(
                    workshop.cache.require(e), e.name, root / "proof", "proof", tree, dropped=["*.data/scripts"]
                )
            shutil.copytree(folder, root / "tokenizers")
            env = pywheels.python_environment(workshop.epoch, PYTHONPATH="/proof", TIKTOKEN_CACHE_DIR="/tokenizers")
            argv = [f"/usr/bin/python{IMAGE_TARGET.python}", "-c", _LOAD, *ENCODINGS]
            said = pywheels.run_in_root(root, argv, stdin=b"", env=env, what="load the tokenizers")
        (out / "proof.txt").write_bytes(said)

    done = made(workshop.cache, key, "load the tokenizers with the gateway's Python", workshop.console, make)
    return (done / "proof.txt").read_text("utf-8").strip("; \n")


def build_bundle(workshop: Workshop, info: BundleInfo, folder: Path) -> Manifest:
    """Fill ``folder`` with a whole bundle, unsigned, and return its manifest."""
    work, console = Assembly(workshop, info, folder), workshop.console
    work.add_images(read_recipes(info.profile))
    with console.step("wheel house"):
        work.add_wheels()
    with console.step("apt repository"):
        work.add_debs()
    with console.step("tokenizers"):
        work.add_tokenizers()
    with console.step("SBOMs and notices"):
        work.add_sboms()
        work.add_sources()
    with console.step("moat.pyz, install.sh, ansible, compose, docs"):
        work.add_top()
    with console.step("manifest"):
        manifest = work.write_manifest()
        total = sum(f.size for f in manifest.files)
        console.info(f"{len(manifest.files)} files, {human_bytes(total)}")
    return manifest
