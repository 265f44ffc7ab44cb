#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Takes the small real model and its server out of a demo bundle, for test hosts to run as their upstream.

A site's models are the site's own; the installed product holds none. The tests need one that gives real tokens, so
the tree of the bundle's model image is put into the cache, and a test host runs it on its own Python, as a unit of its
own, from a read-only mount.

    model.py BUNDLE      prints the folder (app/, wheels/, models/); unpacks it where it is missing
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from moat.build.cache import Cache
from moat.console import Console
from moat.errors import BuildFailed, MoatError
from moat.manifest import MANIFEST_NAME, parse_manifest


def unpack(bundle: Path, console: Console) -> Path:
    """Return the folder with the model's tree.

    Raises:
        MoatError: the bundle has no model, or docker refuses its image.
    """
    manifest = parse_manifest((bundle / MANIFEST_NAME).read_bytes())
    image = next((i for i in manifest.images if i.reference.startswith("moat/model:")), None)
    if image is None:
        raise BuildFailed("this bundle has no model", hint="the tests take a bundle of the profile demo (make demo)")
    folder = Cache().built_dir("testmodel-" + image.reference.rpartition("-")[2])
    if folder.is_dir():
        return folder

    def docker(*words: str) -> str:
        return console.run(["docker", *words], error=BuildFailed, what="unpack the model's image").strip()

    if subprocess.run(["docker", "image", "inspect", image.reference], capture_output=True, check=False).returncode:
        docker("load", "--quiet", "--input", str(bundle / "images" / "model.tar"))
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    container = docker("create", image.reference)
    try:
        docker("cp", f"{container}:/opt/moat/.", str(part))
    finally:
        docker("rm", "--force", container)
    part.rename(folder)
    return folder


def main(argv: list[str]) -> int:
    """Unpack and print the folder."""
    if len(argv) != 1:
        print("usage: model.py BUNDLE", file=sys.stderr)
        return 2
    console = Console()
    try:
        print(unpack(Path(argv[0]), console))
    except MoatError as e:
        console.problem(e)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
