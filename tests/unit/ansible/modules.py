# SPDX-License-Identifier: Apache-2.0
"""Imports a module of ansible/library from where Ansible finds it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import ansible.module_utils

LIBRARY = Path(__file__).resolve().parents[3] / "ansible" / "library"
SHARED = LIBRARY.parent / "module_utils"
# Where the modules look for what they share; Ansible itself packs it beside each of them.
ansible.module_utils.__path__.append(str(SHARED))


def module(name: str) -> ModuleType:
    """Return a module of ansible/library; it is not run."""
    spec = importlib.util.spec_from_file_location(f"moat_library_{name}", LIBRARY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    # Dataclasses look for their module by name.
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded
