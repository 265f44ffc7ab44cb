# SPDX-License-Identifier: Apache-2.0
"""A Python environment with the gateway's locked wheels, for the Python that runs the tests.

It is made once from the cache (``$MOAT_CACHE/venv/gateway-<key>``); what the cache lacks is fetched by `moat fetch`'s
own code, by hash. ``$MOAT_TEST_GATEWAY_PYTHON`` names another environment instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import Marker
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from moat.build.cache import Cache
from moat.build.fetch import fetch
from moat.build.locks import LOCKS, LockedFile, Locks, Target, read_lock, read_locked_at
from moat.console import Console

#: As in the images and at a site: else each of some hundred processes would compile LiteLLM anew, for ten seconds.
_COMPILE = (
    "import compileall, py_compile, sys;"
    "compileall.compile_dir(sys.argv[1], quiet=2, workers=0, stripdir=sys.argv[1], prependdir=sys.argv[2],"
    " invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
)


def gateway_python() -> Path:
    """Return the interpreter of the environment; make the environment if it is not there."""
    named = os.environ.get("MOAT_TEST_GATEWAY_PYTHON")
    if named:
        return Path(named)
    cache = Cache()
    wheels = _wheels_for_this_python()
    made_of = "".join(w.to_line() for w in wheels) + sys.version + _COMPILE
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    place = cache.root / "venv" / f"gateway-{key}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / "gateway.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _make(place, wheels, cache)
    return place / "bin" / "python"


def _wheels_for_this_python() -> tuple[LockedFile, ...]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    tags = {str(t): i for i, t in enumerate(sys_tags())}
    best: dict[str, tuple[int, LockedFile]] = {}
    for e in read_lock(LOCKS / "wheels.jsonl"):
        if version in e.pythons and "image:gateway" in e.uses and (not e.marker or Marker(e.marker).evaluate()):
            ranks = [tags[str(t)] for t in parse_wheel_filename(e.filename)[3] if str(t) in tags]
            if ranks and (e.name not in best or min(ranks) < best[e.name][0]):
                best[e.name] = (min(ranks), e)
    if "litellm" not in best:
        raise RuntimeError(f"the lock holds no gateway for Python {version}; there are 3.11 and 3.13")
    return tuple(best[name][1] for name in sorted(best))


def _make(place: Path, wheels: tuple[LockedFile, ...], cache: Cache) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    this = Target("this-host", "", "amd64", version, version)
    fetch(Locks("site", this, read_locked_at(LOCKS), wheels, (), (), ()), cache, Console())
    # A relative name in the cache is a hash; the installer needs the wheel's own name.
    with tempfile.TemporaryDirectory(prefix="moat-wheels-") as folder:
        files = []
        for w in wheels:
            link = Path(folder) / w.filename
            link.symlink_to(cache.require(w))
            files.append(str(link))
        half = place.with_name(place.name + ".half")
        shutil.rmtree(half, ignore_errors=True)
        uv = Path(sys.executable).parent / "uv"
        _run([str(uv), "venv", "--quiet", "--offline", "--python", sys.executable, str(half)])
        python = str(half / "bin" / "python")
        _run([str(uv), "pip", "install", "--quiet", "--offline", "--no-index", "--no-deps", "--python", python, *files])
        _run([python, "-I", "-c", _COMPILE, str(half / "lib"), str(place / "lib")])
        half.rename(place)


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "VIRTUAL_ENV": ""})
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} {argv[1]} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    print(gateway_python())
