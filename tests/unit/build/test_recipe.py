# SPDX-License-Identifier: Apache-2.0
"""Proves that the shipped recipes keep the rules of the house, and that a malformed one is refused by field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moat.build.recipe import read_recipe, read_recipes
from moat.errors import BuildFailed

USERS = {"nginx": 10101, "gateway": 10102, "minio": 10103, "valkey": 10104, "model": 10105}


def test_users_and_profiles_are_those_of_the_architecture() -> None:
    assert {r.name: r.user for r in read_recipes("demo")} == {n: f"{u}:{u}" for n, u in USERS.items()}
    assert {r.name for r in read_recipes("site")} == set(USERS) - {"model"}


def test_layers_are_ordered_by_how_often_they_change() -> None:
    order = {r.name: [part.name for part in r.layers] for r in read_recipes("demo")}
    assert order["gateway"] == ["base", "wheels", "code"]
    assert all(names[0] == "base" for names in order.values())


def test_every_overlay_and_every_drop_says_why() -> None:
    for recipe in read_recipes("demo"):
        for part in recipe.layers:
            assert all(len(o.why) > 10 for o in part.overlays), recipe.name
            assert all(len(d.why) > 10 for d in part.drop), recipe.name


def minimal() -> dict[str, object]:
    return {
        "name": "x",
        "summary": "x",
        "user": "1:1",
        "entrypoint": ["/x"],
        "command": [],
        "workdir": "/",
        "ports": [],
        "env": {},
        "layers": [{"name": "base", "overlays": [{"path": "tmp", "directory": True, "why": "a place"}]}],
    }


def refused(tmp_path: Path, change: dict[str, object]) -> str:
    path = tmp_path / "x" / "recipe.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({**minimal(), **change}), "utf-8")
    with pytest.raises(BuildFailed) as caught:
        read_recipe(path)
    return caught.value.found or ""


def overlay(**fields: object) -> dict[str, object]:
    return {"layers": [{"name": "base", "overlays": [{"path": "etc/x", "why": "because", **fields}]}]}


def test_malformed_recipes_are_refused_by_field(tmp_path: Path) -> None:
    assert "unknown fields: shell" in refused(tmp_path, {"shell": True})
    assert "not root" in refused(tmp_path, {"user": "0:0"})
    assert "not root" in refused(tmp_path, {"user": "nginx"})
    assert "exactly one" in refused(tmp_path, overlay())
    assert "exactly one" in refused(tmp_path, overlay(text="a", target="b"))
    assert "setuid" in refused(tmp_path, overlay(text="a", mode="4755"))
    assert "clean relative path" in refused(tmp_path, overlay(text="a", path="../x"))
    assert "say why" in refused(tmp_path, overlay(text="a", why=" "))
    assert "lacks fields: why" in refused(tmp_path, {"layers": [{"name": "b", "drop": [{"path": "x"}]}]})


def test_a_well_formed_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(minimal()), "utf-8")
    assert read_recipe(path).layers[0].overlays[0].directory
