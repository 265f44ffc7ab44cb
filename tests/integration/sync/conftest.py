# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the locked environment, a node of its own, and one running config-sync that some tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.gateway.environment import gateway_python
from tests.integration.sync.drive import Drive
from tests.integration.sync.sidecar import Node, Sidecar


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter with the gateway's locked wheels."""
    return gateway_python()


@pytest.fixture
def node(tmp_path: Path, python: Path) -> Node:
    """A node that nothing runs on yet."""
    return Node(tmp_path / "node", python, Drive(tmp_path / "drive"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Iterator[Sidecar]:
    """A running config-sync with a revision in force; the dry run may take four seconds."""
    folder = tmp_path_factory.mktemp("shared")
    node = Node(folder / "node", python, Drive(folder / "drive"), {"MOAT_DRY_RUN_TIMEOUT": "4"})
    node.drive.push()
    with node.start() as sidecar:
        sidecar.wait_current(1)
        yield sidecar
        assert sidecar.stop() == 0
