# SPDX-License-Identifier: Apache-2.0
"""Proves that the object store does not go back to an older release by itself, whatever release the site runs.

Which of two bundles is newer is asked of the real moat.pyz, by the words that the role gives to Python on the node.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ansible.test_expressions import engine, holds, load, task, trusted
from tests.unit.site.bundles import CREATED, HOST_PYTHON, make_bundle

VARIABLES = load("roles/minio/vars/main.yml")
TASKS = load("roles/minio/tasks/main.yml")


def compared(wanted: Path, runs: Path) -> str:
    """Run the task's command: the release of this run, and the one that the store runs."""
    argv = [HOST_PYTHON, "-I", "-c", VARIABLES["_minio_order"], str(wanted), str(runs)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout.strip()


def test_versions_and_then_the_time_of_the_locks_say_which_is_newer(tmp_path: Path) -> None:
    def made(name: str, version: str, created: int = CREATED) -> Path:
        return make_bundle(tmp_path / name, tmp_path / "keys", version=version, created=created).path

    old, new, later = made("a", "0.9.0"), made("b", "0.10.0"), made("c", "0.9.0", CREATED + 60)
    assert compared(old, new) == "newer"
    assert compared(old, later) == "newer"
    assert compared(new, old) == "not newer"
    assert compared(old, old) == "not newer"
    # A release that is gone cannot be kept.
    assert compared(old, tmp_path / "gone") == ""


@pytest.mark.parametrize(
    ("answer", "more", "moves"),
    [
        ({"stdout": "newer"}, {}, False),
        ({"stdout": "newer"}, {"minio_allow_older": "true"}, True),
        ({"stdout": "not newer"}, {}, True),
        ({"stdout": ""}, {}, True),
        # It was not asked: the first installation, or the same release.
        ({"skipped": True}, {}, True),
    ],
)
def test_the_link_of_the_store_moves_forwards_alone(answer: dict[str, Any], more: dict[str, Any], moves: bool) -> None:
    values = {**trusted(load("roles/minio/defaults/main.yml")), **trusted(VARIABLES), "__minio_newer": answer, **more}
    assert holds(task(TASKS, "Point to the release that the store runs")["when"], **values) is moves
    assert holds(task(TASKS, "Say that the store stays at its newer release")["when"], **values) is not moves


@pytest.mark.parametrize(("link", "asked"), [("", False), ("releases/b", False), ("releases/a", True)])
def test_only_another_release_is_compared(link: str, asked: bool) -> None:
    when = task(TASKS, "Look whether that one is newer")["when"]
    assert holds(when, __minio_before={"stdout": link}, moat_release="b") is asked


def test_what_is_said_names_both_releases_and_the_way_back() -> None:
    message = trusted(task(TASKS, "Say that the store stays at its newer release")["ansible.builtin.debug"]["msg"])
    said = engine(__minio_before={"stdout": "releases/b"}, moat_release="a").template(message)
    assert said.startswith("The store goes on with b, which is newer than a")
    assert "-e minio_allow_older=true" in said
