# SPDX-License-Identifier: Apache-2.0
"""A built demo bundle, and the ways to look into it that share no code with the builder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.integration.build.building import TARGET, moat_build

from moat.build.cache import Cache
from moat.build.locks import Locks, active_locks


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in ``$MOAT_TEST_BUNDLE``, or a demo bundle built from the cache (seconds when it is warm)."""
    given = os.environ.get("MOAT_TEST_BUNDLE")
    return Path(given) if given else moat_build(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def cache() -> Cache:
    return Cache()


@pytest.fixture(scope="session")
def locks(cache: Cache) -> Locks:
    return active_locks("demo", TARGET, cache_root=cache.root)
