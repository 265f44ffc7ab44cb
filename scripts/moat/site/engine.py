# SPDX-License-Identifier: Apache-2.0
"""The container engine, through its own command line: argument lists, bounded waits, no shell.

Only what ``plan``, ``doctor`` and ``load`` need. Nothing here pulls: an image comes from the medium
or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moat.errors import LoadFailed

PROJECT: Final = "moat"
#: A daemon that hangs must not hang us; the slowest of these questions takes well under a second.
ASK_SECONDS: Final = 60
#: How much of a program's output is looked at for its last words.
_WORDS_BYTES: Final = 8192


class EngineError(Exception):
    """The engine could not be asked; ``str()`` is its own last words."""


@dataclass(frozen=True)
class EngineInfo:
    """What the engine says of itself. ``root`` is where it keeps images, on its own host."""

    version: str
    root: str
    architecture: str


@dataclass(frozen=True)
class Container:
    """One running container: the image reference it was started from, its Compose names, host ports."""

    image: str
    project: str
    service: str
    ports: tuple[int, ...]


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``20.10.24+dfsg1`` is (20, 10, 24).

    Raises:
        ValueError: there are none.
    """
    match = re.match(r"v?(\d{1,9}(?:\.\d{1,9})*)", text.strip())
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a version")
    return tuple(int(n) for n in match[1].split("."))


class Engine:
    """The docker engine that ``docker`` on this host talks to.

    Args:
        program: argv prefix of the client.
    """

    def __init__(self, program: Sequence[str] = ("docker",)) -> None:
        self._program = tuple(program)

    def _ask(self, *argv: str) -> str:
        try:
            done = subprocess.run(
                [*self._program, *argv],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ASK_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise EngineError(f"no answer within {ASK_SECONDS} s") from e
        except OSError as e:
            raise EngineError(f"cannot start {self._program[0]}: {e.strerror}") from e
        if done.returncode != 0:
            raise EngineError(_last_words(done.stderr or done.stdout))
        return done.stdout.decode("utf-8", "replace")

    def _ask_json(self, *argv: str) -> Any:
        answer = self._ask(*argv)
        try:
            return json.loads(answer)
        except ValueError as e:
            raise EngineError(f"not JSON: {answer[:80]!r}") from e

    def info(self) -> EngineInfo:
        """Return version, data root and architecture.

        Raises:
            EngineError: the client is missing, or the daemon does not answer.
        """
        raw = self._ask_json("info", "--format", "{{json .}}")
        # An unreachable daemon is exit code 0 with ServerErrors in older clients.
        if not isinstance(raw, dict) or not raw.get("ServerVersion"):
            errors = raw.get("ServerErrors") if isinstance(raw, dict) else None
            raise EngineError("; ".join(map(str, errors or ["the daemon does not answer"])))
        return EngineInfo(
            str(raw["ServerVersion"]), str(raw.get("DockerRootDir", "")), str(raw.get("Architecture", ""))
        )

    def compose_version(self) -> str:
        """Return the Compose plugin's version.

        Raises:
            EngineError: there is no such plugin.
        """
        return self._ask("compose", "version", "--short").strip()

    def image_ids(self) -> dict[str, str]:
        """Return the id (``sha256:...``) of every tagged image, by its reference ``name:tag``.

        Raises:
            EngineError: the engine cannot be asked.
        """
        listing = self._ask("image", "ls", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}")
        return dict(line.split(" ", 1) for line in listing.splitlines() if " " in line and "<none>" not in line)

    def image_id(self, reference: str) -> str | None:
        """Return one image's id, or ``None`` where the engine does not have it.

        Raises:
            EngineError: the engine cannot be asked.
        """
        try:
            return self._ask("image", "inspect", "--format", "{{.Id}}", "--", reference).strip()
        except EngineError as e:
            if "no such image" in str(e).lower():
                return None
            raise

    def containers(self) -> list[Container]:
        """Return the running containers.

        Raises:
            EngineError: the engine cannot be asked.
        """
        ids = self._ask("ps", "--quiet", "--no-trunc").split()
        if not ids:
            return []
        found = []
        for raw in self._ask_json("container", "inspect", "--", *ids):
            labels = raw["Config"].get("Labels") or {}
            bindings = (raw["HostConfig"].get("PortBindings") or {}).values()
            ports = {int(b["HostPort"]) for bound in bindings for b in bound or () if b.get("HostPort", "").isdecimal()}
            found.append(
                Container(
                    image=raw["Config"]["Image"],
                    project=labels.get("com.docker.compose.project", ""),
                    service=labels.get("com.docker.compose.service", ""),
                    ports=tuple(sorted(ports)),
                )
            )
        return found

    def load(self, blocks: Iterable[memoryview]) -> None:
        """Feed one image archive to ``docker load``.

        The client's output goes to a file, not to a pipe: nobody has to empty it while we write, so
        neither side can wait for the other for ever.

        Args:
            blocks: the archive. What its iterator raises ends the load: the engine sees the stream
                break off, drops what it has, and the exception goes on to the caller.

        Raises:
            LoadFailed: the engine refused it; its last words are in ``found``.
        """
        with tempfile.TemporaryFile() as output:
            try:
                child = subprocess.Popen(
                    [*self._program, "load", "--quiet"], stdin=subprocess.PIPE, stdout=output, stderr=output
                )
            except OSError as e:
                raise LoadFailed(
                    "docker cannot be started", found=e.strerror, hint="install docker.io; `moat doctor` checks it"
                ) from e
            try:
                code = _feed(child, blocks)
            except BaseException:  # also Ctrl-C
                child.kill()
                child.wait()
                raise
            if code == 0:
                return
            output.seek(max(0, output.seek(0, os.SEEK_END) - _WORDS_BYTES))
            words = _last_words(output.read())
            full = "no space left" in words.lower()
            raise LoadFailed(
                "the engine refused the image",
                found=words or f"exit code {code}",
                hint="make room in the engine's data root (docker info shows it) and run the command again"
                if full
                else "see `moat doctor`, mend it and run the command again; loaded images are kept",
            )


def _feed(child: subprocess.Popen[bytes], blocks: Iterable[memoryview]) -> int:
    """Write ``blocks`` to the child's input and return its exit code."""
    if child.stdin is None:
        raise AssertionError("the pipe was asked for")
    try:
        for block in blocks:
            try:
                child.stdin.write(block)
            except BrokenPipeError:
                break  # it gave up early and says why; a full disk, mostly
    finally:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
    return child.wait()


def _last_words(output: bytes) -> str:
    lines = output[-_WORDS_BYTES:].decode("utf-8", "replace").strip().splitlines()
    return " ".join(lines[-3:])[-600:]
