# SPDX-License-Identifier: Apache-2.0
"""Docker's Compose plugin, where the host has none or one that is too old.

Debian 12 has no Compose v2. The bundle's apt repository carries Debian 13's package, whose one
program needs nothing but the C library and runs on Debian 12 too; taking the program alone leaves the
host's docker packages as they are.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Final

from moat.build.cache import Cache
from moat.build.locks import active_locks
from moat.console import Console
from moat.demo.places import PROFILE, TARGET
from moat.errors import DemoFailed
from moat.site.checks import COMPOSE_AT_LEAST
from moat.site.engine import Engine, EngineError, parse_version

PLUGIN: Final = Path("/usr/local/lib/docker/cli-plugins/docker-compose")
_MEMBER: Final = "./usr/libexec/docker/cli-plugins/docker-compose"


def installed() -> str:
    """Return the plugin's version, or an empty string without one that is new enough."""
    try:
        version = Engine().compose_version()
        return version if parse_version(version) >= COMPOSE_AT_LEAST else ""
    except (EngineError, ValueError):
        return ""


def ensure(console: Console) -> str:
    """Install the plugin if needed and return its version.

    Raises:
        DemoFailed: the lock or the package does not hold it, or it does not run here.
        FetchFailed: the package is not in the cache.
    """
    version = installed()
    if version:
        console.info(f"Compose {version} is there")
        return version
    package = next((e for e in active_locks(PROFILE, TARGET).used_by("host") if e.name == "docker-compose"), None)
    if package is None:
        raise DemoFailed("the lock has no package docker-compose", hint="run `moat lock --only debs`")
    console.info(f"installing {PLUGIN} from {package.filename} (no Compose 2.20 or newer here)")
    program = read_member(Cache().require(package), _MEMBER)
    PLUGIN.parent.mkdir(parents=True, exist_ok=True)
    temporary = PLUGIN.with_name(f".{PLUGIN.name}.{os.getpid()}")
    temporary.write_bytes(program)
    temporary.chmod(0o755)
    temporary.replace(PLUGIN)
    version = installed()
    if not version:
        raise DemoFailed(
            f"{PLUGIN} does not run here", expected="Compose 2.20 or newer", hint="run `docker compose version`"
        )
    return version


def read_member(deb: Path, name: str) -> bytes:
    """Return one ordinary file of a Debian package's data; nothing is unpacked to disk.

    Raises:
        DemoFailed: the package has no such file.
    """
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=False)
    if done.returncode == 0:
        try:
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                member = archive.getmember(name)
                found = archive.extractfile(member) if member.isfile() else None
                if found is not None:
                    return found.read()
        except (tarfile.TarError, KeyError):
            pass
    raise DemoFailed(f"{deb.name} does not hold {name}", hint="see `dpkg-deb --contents`")
