# SPDX-License-Identifier: Apache-2.0
"""A node's folder of revisions, written by the functions of config-sync itself, for gateways without a sidecar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from moat_gateway import checks, revision
from moat_gateway.errors import GatewayError
from moat_gateway.revision import Revision
from moat_gateway.settings import Settings
from moat_gateway.sitekey import SigningKey
from moat_gateway.sync.files import boot_id, boottime, timestamp
from moat_gateway.sync.keeper import Keeper
from moat_gateway.sync.nodefolder import SourceState, SyncState, Turn


class Node:
    """Writes ``<sync_dir>`` as config-sync does.

    Args:
        folder: holds ``sync`` and ``reports`` then.
        secrets: the folder of secrets of the gateways.
    """

    def __init__(self, folder: Path, secrets: Path) -> None:
        self.sync_dir, self.reports_dir = folder / "sync", folder / "reports"
        self.reports_dir.mkdir(parents=True)
        self.keeper = Keeper(self.sync_dir)
        self.number = 0
        self._key = SigningKey.generate()
        self._settings = Settings(secrets_dir=secrets)
        self.state = SyncState(
            node="node",
            pid=1,
            boot_id=boot_id(),
            checked_boottime=boottime(),
            checked_at=timestamp(),
            source=SourceState("directory", "of this test", True),
            interval=1.0,
        )
        self.tell()

    def tell(self, *, turn: Turn | None = None, checked: bool = True) -> None:
        """Write ``sync.json`` anew."""
        moment = boottime() if checked else self.state.checked_boottime
        self.state = replace(self.state, turn=turn, checked_boottime=moment)
        self.keeper.tell(self.state)

    def make(self, files: Mapping[str, str]) -> tuple[Revision, bytes]:
        """Return the next revision and its ``prepared.json``.

        Raises:
            GatewayError: the content is not right.
        """
        self.number += 1
        raw = revision.build(
            {path: text.encode() for path, text in files.items()},
            number=self.number,
            previous=self.number - 1,
            author="test",
            message="",
            created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            content_of=None,
            key=self._key,
        )
        made = revision.open_archive(raw, [self._key.public], limit=1 << 26)
        prepared, problems = checks.check(made.files, self._settings, dry_run=None, number=made.number)
        if prepared is None:
            raise problems[0] if problems else GatewayError("nothing was prepared")
        return made, prepared.to_json()

    def put(self, config: str, keys: str) -> int:
        """Put a new revision into force on this node and return its number."""
        made, prepared = self.make({"config.yaml": config, "keys.yaml": keys})
        self.keeper.keep(made, prepared)
        self.keeper.commit(made)
        return made.number

    def put_prepared(self, config: str, keys: str, prepared: bytes) -> int:
        """The same, with a ``prepared.json`` of the test's own."""
        made, _ = self.make({"config.yaml": config, "keys.yaml": keys})
        self.keeper.keep(made, prepared)
        self.keeper.commit(made)
        return made.number
