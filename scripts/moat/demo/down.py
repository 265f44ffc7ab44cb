# SPDX-License-Identifier: Apache-2.0
"""``make demo-down``: remove the demo's containers, networks, volumes, images, rules and files, and nothing else.

The cache, the release key and the bundle stay. Everything is named: a project label, an image
reference of the bundle, a chain of ours, a path below ``.moat/``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from moat.console import Console
from moat.demo.places import BUNDLES, CLIENT_KEY, CURL_HEADER, DEMO_JSON, DEPLOY, IMAGES, PROJECT, ROOT
from moat.demo.steps import Steps, moat
from moat.errors import DemoFailed

_LABEL = f"label=com.docker.compose.project={PROJECT}"


def down(console: Console) -> None:
    """Take the demo down; where nothing runs, say so.

    Raises:
        DemoFailed: the engine refused, or another deployment of the same project runs here.
    """
    steps = Steps(console)
    remove_lost(steps)
    check_ours()
    with console.step("stop and remove containers, networks and volumes"):
        if (DEPLOY / "compose.yaml").exists() and (DEPLOY / ".env").exists():
            argv = ["docker", "compose", "--project-directory", str(DEPLOY), "--profile", "demo", "--profile", "tools"]
            steps.watch([*argv, "down", "--volumes", "--remove-orphans"], what="stop the services")
        _remove_leftovers(steps)
    with console.step("remove the images of the bundle"):
        _remove_images(steps)
    with console.step("remove the firewall's rules"):
        steps.watch(moat("firewall", "remove"), what="remove the rules")
    with console.step("remove the deployment folder and the client key"):
        shutil.rmtree(DEPLOY, ignore_errors=False) if DEPLOY.exists() else None
        for path in (CLIENT_KEY, CURL_HEADER, DEMO_JSON):
            path.unlink(missing_ok=True)
    console.result({"ok": True}, f"the demo is down; the bundle stays in {BUNDLES.relative_to(ROOT)}/, the cache too")


def _lines(argv: list[str]) -> list[str]:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def _folders(*more: str) -> set[str]:
    """Return the folders whose containers of the project are on this host; ``more`` are arguments of ``docker ps``."""
    form = '{{.Label "com.docker.compose.project.working_dir"}}'
    return set(_lines(["docker", "ps", *more, "--filter", _LABEL, "--format", form]))


def _is_lost(folder: str) -> bool:
    """Whether this is the place of a demo, in a checkout that is gone."""
    return folder.endswith(f"/{DEPLOY.relative_to(ROOT)}") and not Path(folder).exists()


def remove_lost(steps: Steps) -> None:
    """Remove what is left of a demo whose checkout is gone, so that nobody can take it down from there any more.

    A demo is known by its folder's name, and is left alone while one of its containers runs.
    """
    folders, running = _folders("--all") - {str(DEPLOY)}, _folders()
    lost = {f for f in folders - running if _is_lost(f)}
    for folder in sorted(lost):
        with steps.console.step(f"remove the stopped demo of a checkout that is gone: {folder}"):
            of_it = f"label=com.docker.compose.project.working_dir={folder}"
            ids = _lines(["docker", "ps", "--all", "--quiet", "--filter", _LABEL, "--filter", of_it])
            # By what they mount, not by the project's label: a site that is stopped keeps its data under the same one.
            form = '{{range .Mounts}}{{if eq .Type "volume"}}{{.Name}} {{end}}{{end}}'
            volumes = sorted(set(_lines(["docker", "inspect", "--format", form, *ids])))
            steps.ask(["docker", "rm", *ids], what="remove its containers")
            if volumes:
                steps.ask(["docker", "volume", "rm", *volumes], what="remove its volumes")


def check_ours() -> None:
    """See that no other deployment of Moat is on this host: there is one Compose project ``moat`` a host.

    Raises:
        DemoFailed: its containers belong to another folder, which may be a real site's.
    """
    folders = _folders("--all") - {str(DEPLOY)}
    if folders:
        hint = "the demo leaves it alone; take it down first if you mean to (docs/compose.md, Removal)"
        lost = next(filter(_is_lost, sorted(folders)), None)
        if lost:
            hint += f"; {lost} is a demo whose checkout is gone: `docker stop` its containers, and run this again"
        raise DemoFailed(
            "another deployment of Moat is on this host",
            found=", ".join(sorted(folders)),
            expected=f"none, or {DEPLOY}",
            hint=hint,
        )


def _remove_leftovers(steps: Steps) -> None:
    """Remove what carries the project's label when the deployment folder is gone already."""
    for what, remove in (
        ("ps --all", "rm --force --volumes"),
        ("network ls", "network rm"),
        ("volume ls", "volume rm"),
    ):
        ids = _lines(["docker", *what.split(), "--quiet", "--filter", _LABEL])
        if ids:
            steps.ask(["docker", *remove.split(), *ids], what="remove what was left")


def _remove_images(steps: Steps) -> None:
    references = IMAGES.read_text("utf-8").split() if IMAGES.exists() else []
    there = set(_lines(["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"]))
    for reference in references:
        if reference in there:
            steps.ask(["docker", "image", "rm", reference], what=f"remove the image {reference}")
    IMAGES.unlink(missing_ok=True)
