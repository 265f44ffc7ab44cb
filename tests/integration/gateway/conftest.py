# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the locked environment, a model server, a running gateway that most tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.gateway.environment import gateway_python
from tests.integration.gateway.harness import Gateway, Site
from tests.integration.gateway.upstream import Upstream


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter with the gateway's locked wheels."""
    return gateway_python()


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    """One model server for all tests; each test sets its behaviour back."""
    with Upstream() as server:
        yield server


@pytest.fixture(autouse=True)
def _behave(upstream: Upstream) -> Iterator[None]:
    yield
    upstream.behaviour.chunk_delay = 0.0
    gate, upstream.behaviour.gate = upstream.behaviour.gate, None
    if gate is not None:
        gate.release(1000)
    upstream.behaviour.fail_with = 0
    upstream.behaviour.error_text = "boom"
    upstream.behaviour.cut_after = 0
    upstream.behaviour.without_done = upstream.behaviour.without_usage = False
    upstream.behaviour.seen.clear()


@pytest.fixture
def site(tmp_path: Path, python: Path, upstream: Upstream) -> Site:
    """A deployment folder of its own."""
    return Site(tmp_path / "site", python).prepare(upstream.base)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, python: Path, upstream: Upstream) -> Iterator[Gateway]:
    """A running gateway that tests share; its keys file is theirs to extend, not to break."""
    site = Site(tmp_path_factory.mktemp("shared") / "site", python).prepare(upstream.base)
    with site.start().wait_ready() as gateway:
        yield gateway
        assert gateway.stop() == 0


@pytest.fixture(scope="session")
def key(shared: Gateway) -> str:
    """A key of team ``t``, which may use ``small``."""
    secret = shared.site.new_key("of-t", "t")
    assert shared.site.command("reload").returncode == 0
    return secret
