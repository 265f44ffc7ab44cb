#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the image of the test hosts: a Debian with systemd as process 1, as its installer leaves it, and no more.

What the product needs beyond that (nginx, nftables, python3-venv, ...) has to come from the medium. The image is made
by mmdebstrap from the build host's own Debian mirrors, once: the root file system is kept in the cache under the hash
of this file, so that later runs need no network. It is no part of a bundle.

    build.py debian13      prints the reference of the image; builds it where it is missing
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moat.build.cache import Cache
from moat.build.mirrors import debian_mirrors
from moat.console import Console
from moat.errors import BuildFailed, MoatError

#: Each with its reason: a package that is here by chance hides that the medium does not bring it.
PACKAGES = (
    "systemd-sysv",  # process 1
    "dbus",  # systemctl and systemd-analyze speak through it
    "python3",  # what a site host must bring: Ansible's modules and moat.pyz run on it
    "openssh-server",  # how several nodes are reached
    "openssh-client",  # the first of them reaches the others
    "iproute2",  # on every installed Debian
    "procps",
    "nano",  # stands for what an operator's host has of its own: it must survive
    "libgomp1",  # the test model's server links it; no part of the product
    "libfaketime",  # a clock that is off by a year; no part of the product
)
SUITES = {"debian13": "trixie", "debian12": "bookworm"}


@dataclass(frozen=True)
class TestHostImage:
    """One image: ``name`` as in SUITES, ``key`` is the hash of all that goes into it."""

    name: str
    key: str

    @property
    def reference(self) -> str:
        """The image's name for docker."""
        return f"moat-testhost:{self.name}-{self.key[:12]}"


def describe(name: str) -> TestHostImage:
    """Return what to build for ``name``; the recipe is this file, so its hash is the key."""
    return TestHostImage(name, hashlib.sha256(Path(__file__).read_bytes() + name.encode()).hexdigest())


def _present(reference: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", reference], capture_output=True, check=False).returncode == 0


def _root_tar(image: TestHostImage, console: Console) -> Path:
    """Return the root file system as a tar, from the cache or built."""
    folder = Cache().built_dir(f"testhost-{image.name}-{image.key[:24]}")
    tar = folder / "root.tar"
    if tar.is_file():
        return tar
    mirrors, suite = debian_mirrors(), SUITES[image.name]
    folder.mkdir(exist_ok=True)
    part = folder / "part.tar"
    sources = [
        f"deb [signed-by={mirrors.keyring}] {uri} {suites} main"
        for uri, suites in ((mirrors.main, suite), (mirrors.security, f"{suite}-security"))
    ]
    console.run(
        [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            # No mirror's address stays in the image: such a host has no use for one, and no test may find one.
            "--customize-hook=rm -f $1/etc/apt/sources.list $1/etc/apt/sources.list.d/*",
            # As the installer leaves a host: its own sources file is there, naming nothing that answers.
            "--customize-hook=printf '# the host own sources: none\\n' > $1/etc/apt/sources.list",
            # Each host makes its own when it starts: the machine's id, and its SSH keys.
            "--customize-hook=rm -f $1/etc/machine-id $1/etc/ssh/ssh_host_*; touch $1/etc/machine-id",
            "--customize-hook=mkdir $1/etc/systemd/system/ssh.service.d",
            "--customize-hook=printf '[Service]\\nExecStartPre=\\nExecStartPre=/usr/bin/ssh-keygen -A\\n'"
            " > $1/etc/systemd/system/ssh.service.d/keys.conf",
            # Timers of Debian that would fire during a test, and the console that a container does not have.
            "--customize-hook=chroot $1 systemctl mask apt-daily.timer apt-daily-upgrade.timer getty.target",
            suite,
            str(part),
            *sources,
        ],
        error=BuildFailed,
        what=f"build the test host's root file system ({image.name})",
        hint="the Debian mirror must answer this once; later runs take the result from the cache",
    )
    part.replace(tar)
    return tar


def build(name: str, console: Console) -> TestHostImage:
    """Make the image where docker does not have it.

    Raises:
        MoatError: mmdebstrap or docker failed.
    """
    image = describe(name)
    if not _present(image.reference):
        with console.step(f"test host image {image.reference}"):
            tar = _root_tar(image, console)
            console.run(
                ["docker", "import", str(tar), image.reference], error=BuildFailed, what="import the test host's image"
            )
    return image


def main(argv: list[str]) -> int:
    """Build and print the reference."""
    if len(argv) != 1 or argv[0] not in SUITES:
        print(f"usage: build.py {'|'.join(SUITES)}", file=sys.stderr)
        return 2
    console = Console()
    try:
        print(build(argv[0], console).reference)
    except MoatError as e:
        console.problem(e)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
