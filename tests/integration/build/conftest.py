# SPDX-License-Identifier: Apache-2.0
"""A built demo bundle, and the ways to look into it that share no code with the builder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.build.building import TARGET, moat_build

from moat.build.cache import Cache
from moat.build.locks import Locks, active_locks


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in ``$MOAT_TEST_BUNDLE``, or a demo bundle built from the cache (seconds when it is warm)."""
    given = os.environ.get("MOAT_TEST_BUNDLE")
    if given:
        yield Path(given)
        return
    folder = tmp_path_factory.mktemp("bundles")
    yield moat_build(folder)
    shutil.rmtree(folder)  # pytest would keep three of them, 750 MB each


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
