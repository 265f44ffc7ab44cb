# SPDX-License-Identifier: Apache-2.0
"""What makes a revision acceptable on this node: its signature and hashes, then everything that `validate` checks."""

from __future__ import annotations

from pathlib import Path

from moat_gateway import checks, revision, sitekey
from moat_gateway.dryrun import DryRun
from moat_gateway.revision import Revision
from moat_gateway.settings import Settings
from moat_gateway.sync.follower import Problems
from moat_gateway.sync.nodefolder import revision_folder

_MIB = 1 << 20


class NodeVet:
    """Checks as this node's gateways would: same secrets, same allow-list, same version.

    Keys and secrets are read again each time.

    Args:
        settings: of the sidecar.
        dry_run: the warm child process.
    """

    def __init__(self, settings: Settings, dry_run: DryRun) -> None:
        self._settings = settings
        self._dry_run = dry_run

    def open(self, raw: bytes) -> Revision:
        """See :class:`moat_gateway.sync.follower.Vet`."""
        trusted = sitekey.read_trusted(self._settings.site_keys_dir)
        return revision.open_archive(raw, trusted, limit=self._settings.revision_max * _MIB)

    def read_kept(self, number: int) -> Revision:
        """See :class:`moat_gateway.sync.follower.Vet`."""
        trusted = sitekey.read_trusted(self._settings.site_keys_dir)
        return revision.read_folder(revision_folder(Path(self._settings.sync_dir), number), trusted)

    def prepare(self, revision: Revision, *, dry_run: bool) -> bytes:
        """See :class:`moat_gateway.sync.follower.Vet`."""
        prepared, problems = checks.check(
            revision.files, self._settings, dry_run=self._dry_run if dry_run else None, number=revision.number
        )
        if prepared is None or problems:
            raise Problems(problems)
        return prepared.to_json()
