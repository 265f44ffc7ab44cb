# SPDX-License-Identifier: Apache-2.0
"""Proves that every role is described: README, meta, and an argument spec with the names and values of its defaults.

A default that nobody documented, a documented one that nothing reads, or two values for one variable would each
mislead the operator who writes vars.yml.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ANSIBLE = Path(__file__).resolve().parents[3] / "ansible"
ROLES = sorted(p.name for p in (ANSIBLE / "roles").iterdir() if p.is_dir())
EXPECTED = {
    "preflight", "bundle", "base", "apt_offline", "minio", "valkey", "gateway", "config_sync", "nginx", "no_egress",
    "evidence",
}  # fmt: skip
TYPES = {"str", "int", "float", "bool", "list", "dict", "path", "raw"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8")) or {}


def differences(role: str, defaults: dict[str, Any], options: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is wrong between a role's defaults and its spec."""
    wrong = [f"{n}: in defaults/main.yml alone" for n in sorted(set(defaults) - set(options))]
    for name, option in sorted(options.items()):
        if not option.get("required") and name not in defaults:
            wrong.append(f"{name}: in the spec alone")
        if not name.startswith(f"{role}_"):
            wrong.append(f"{name}: does not begin with the role's name")
        if option.get("type") not in TYPES:
            wrong.append(f"{name}: has no type that Ansible knows")
        if option.get("type") == "list" and "elements" not in option:
            wrong.append(f"{name}: a list without the type of its elements")
        if len(str(option.get("description", ""))) < 6:
            wrong.append(f"{name}: is not described")
        if name in defaults and option.get("default") != defaults[name]:
            wrong.append(f"{name}: {option.get('default')!r} in the spec, {defaults[name]!r} in the defaults")
    return wrong


def test_the_roles_are_those_of_the_architecture() -> None:
    assert set(ROLES) == EXPECTED


@pytest.mark.parametrize("role", ROLES)
def test_spec_and_defaults_say_the_same(role: str) -> None:
    folder = ANSIBLE / "roles" / role
    specs = load(folder / "meta/argument_specs.yml")["argument_specs"]
    assert differences(role, load(folder / "defaults/main.yml"), specs["main"].get("options", {})) == []
    assert specs["main"]["short_description"]


def test_the_comparison_finds_planted_differences() -> None:
    good = {"type": "int", "default": 1, "description": "How many of them."}
    assert differences("a", {"a_x": 1}, {"a_x": good}) == []
    assert differences("a", {"a_x": 2}, {"a_x": good}) == ["a_x: 1 in the spec, 2 in the defaults"]
    assert differences("a", {"a_x": 1, "a_y": 1}, {"a_x": good}) == ["a_y: in defaults/main.yml alone"]
    assert differences("a", {}, {"a_x": good}) == ["a_x: in the spec alone"]
    assert differences("a", {"b_x": 1}, {"b_x": good}) == ["b_x: does not begin with the role's name"]
    assert len(differences("a", {"a_x": 1}, {"a_x": {"type": "lst", "default": 1}})) == 2


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_a_readme_meta_and_tasks(role: str) -> None:
    folder = ANSIBLE / "roles" / role
    assert (folder / "README.md").read_text("utf-8").splitlines()[0].replace("`", "") == f"# Role {role}"
    info = load(folder / "meta/main.yml")["galaxy_info"]
    assert info["role_name"] == role
    assert info["license"] == "Apache-2.0"
    assert load(folder / "tasks/main.yml")


@pytest.mark.parametrize("role", ROLES)
def test_each_default_is_explained_where_it_stands(role: str) -> None:
    """A comment stands above every default, or above the group of lines that it belongs to."""
    lines = (ANSIBLE / "roles" / role / "defaults/main.yml").read_text("utf-8").splitlines()
    explained = False
    for line in lines[lines.index("---") + 1 :]:
        if line.startswith("#"):
            explained = True
        elif not line.strip():
            explained = False
        elif re.match(r"[a-z]", line):
            assert explained, f"{role}: {line}"
