# SPDX-License-Identifier: Apache-2.0
"""A built demo bundle, and the ways to look into it that share no code with the builder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.build.building import TARGET, Built, build_demo, moat_build, shared

from moat.build.cache import Cache
from moat.build.locks import Locks, active_locks


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """A demo bundle built from the cache, and the copy of the checkout that it is built of: one for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with shared(folder / "demo-bundle", build_demo) as place:
        yield Built(place / "checkout", next((place / "bundles").iterdir()))


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Path:
    """The folder in ``$MOAT_TEST_BUNDLE``, or the built demo bundle."""
    given = os.environ.get("MOAT_TEST_BUNDLE")
    found: Path = Path(given) if given else request.getfixturevalue("built").bundle
    return found


@pytest.fixture(scope="session")
def bundle12(tmp_path_factory: pytest.TempPathFactory, cache: Cache) -> Iterator[Path]:
    """A site bundle for Debian 12, whose inputs `make demo` has not fetched: without them its tests are left out."""
    target = "debian12-amd64"
    locked = active_locks("site", target, cache_root=cache.root).everything
    if missing := [e.filename for e in locked if not cache.has_entry(e)]:
        command = f"moat fetch --profile site --target {target}"
        pytest.skip(f"{len(missing)} files of {target} are not in the cache; `{command}` brings them")
    folder = tmp_path_factory.mktemp("bundles12")
    yield moat_build(folder, profile="site", target=target)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cache() -> Cache:
    return Cache()


@pytest.fixture(scope="session")
def locks(cache: Cache) -> Locks:
    return active_locks("demo", TARGET, cache_root=cache.root)
