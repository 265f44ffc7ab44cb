# SPDX-License-Identifier: Apache-2.0
"""Proves that the garbage collection that an import is spared is back afterwards, also when the import fails."""

from __future__ import annotations

import gc

import pytest

from moat_gateway.litellm_port.start import uncollected


def test_no_garbage_is_looked_for_meanwhile_and_afterwards_it_is_again() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_import_that_fails_leaves_it_on() -> None:
    with pytest.raises(ImportError), uncollected():
        import moat_gateway.no_such_module  # noqa: F401
    assert gc.isenabled()
