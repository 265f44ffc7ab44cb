# SPDX-License-Identifier: Apache-2.0
"""Everything that is read and checked before LiteLLM is imported; `serve` and `check` share it.

It takes a fraction of a second, so that a refusal is on the screen at once and not after LiteLLM's long import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moat_gateway import checks, config, keys, revision, secretfiles, served
from moat_gateway.errors import BadRevision, BadSetting, DatabaseSet, GatewayError
from moat_gateway.keys import KeySet
from moat_gateway.served import Served
from moat_gateway.settings import Settings
from moat_gateway.sync import nodefolder
from moat_gateway.sync.reports import report_path


@dataclass(frozen=True)
class Checked:
    """What may run.

    Attributes:
        served: the configuration: a revision of the node, or the local files.
        secrets: the values of its references.
        models: the names that clients use, sorted.
        master_key: the administrator's key.
        keys: the client keys at this moment.
        passed_over: newer revisions of the node that cannot be used, and why.
    """

    served: Served
    secrets: Mapping[str, str] = field(repr=False)
    models: tuple[str, ...]
    master_key: str = field(repr=False)
    keys: KeySet = field(repr=False)
    passed_over: tuple[tuple[int, GatewayError], ...] = ()

    @property
    def master_sha256(self) -> str:
        """Hex sha256 of the administrator's key."""
        return hashlib.sha256(self.master_key.encode()).hexdigest()


def check(settings: Settings, environ: Mapping[str, str]) -> tuple[Checked | None, list[GatewayError]]:
    """Read and check everything.

    Returns:
        What may run, or ``None`` with every problem that was found.
    """
    problems: list[GatewayError] = []
    for name in ("DATABASE_URL", "DIRECT_URL"):
        if environ.get(name):
            problems.append(
                DatabaseSet(
                    f"the environment sets {name}",
                    expected="no database",
                    hint="unset it; keys and teams are in keys.yaml",
                )
            )
    master_key = ""
    try:
        master_key = secretfiles.read_master_key(settings.master_key_file)
    except GatewayError as e:
        problems.append(e)
    passed_over: list[tuple[int, GatewayError]] = []
    if settings.sync_dir:
        if not settings.reports_dir:
            problems.append(
                BadSetting(
                    "sync_dir is set and reports_dir is not",
                    expected="both, or neither",
                    hint="set MOAT_REPORTS_DIR to the folder in which config-sync reads what gateways serve",
                )
            )
        try:
            report_path(Path(settings.reports_dir), settings.instance)
        except GatewayError as e:
            problems.append(e)
        for number in nodefolder.usable_order(Path(settings.sync_dir)):
            try:
                found = _revision(settings, number)
            except GatewayError as e:
                passed_over.append((number, e))
                continue
            if problems:
                return None, problems
            return replace(found, master_key=master_key, passed_over=tuple(passed_over)), []
    checked, wrong = config.read(settings.config, settings.secrets_dir, settings.allow)
    problems += wrong
    key_set = KeySet()
    try:
        key_set = keys.read(settings.keys)
    except GatewayError as e:
        problems.append(e)
    if problems or checked is None:
        # Whoever expected a revision to serve must hear why none does.
        return None, [*problems, *(e for _, e in passed_over)]
    local = served.of_local_files(checked)
    return Checked(local, checked.secrets, checked.models, master_key, key_set, tuple(passed_over)), []


def _revision(settings: Settings, number: int) -> Checked:
    """Read a kept revision and check it as config-sync did, with the settings and secrets of now.

    The signature was verified before it was kept; it may be by a key that is not trusted any more. What counts here is
    that the files are those that were accepted.

    Raises:
        GatewayError: it cannot be used.
    """
    sync_dir = Path(settings.sync_dir)
    kept = revision.read_folder(nodefolder.revision_folder(sync_dir, number), None)
    current = nodefolder.read_current(sync_dir)
    if current is not None and current.revision == number and current.sha256 != kept.sha256:
        raise BadRevision(
            f"the kept revision {number} is not the one that was accepted",
            found=kept.sha256,
            expected=current.sha256,
            hint="restart config-sync; it fetches the revision again",
        )
    prepared, found = checks.check(kept.files, settings, dry_run=None, number=number)
    if prepared is None:
        raise found[0]
    secrets = {name: secretfiles.read_value(Path(path)) for name, path in prepared.references.items()}
    return Checked(served.of_revision(prepared, kept.sha256), secrets, prepared.models, "", prepared.key_set())
