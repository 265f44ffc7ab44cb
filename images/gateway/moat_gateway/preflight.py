# SPDX-License-Identifier: Apache-2.0
"""Everything that is read and checked before LiteLLM is imported; `serve` and `check` share it.

It takes a fraction of a second, so that a refusal is on the screen at once and not after LiteLLM's long import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from moat_gateway import config, keys, secretfiles
from moat_gateway.config import CheckedConfig
from moat_gateway.errors import DatabaseSet, GatewayError
from moat_gateway.keys import KeySet
from moat_gateway.settings import Settings


@dataclass(frozen=True)
class Checked:
    """What may run.

    Attributes:
        config: the configuration with the values of its references.
        master_key: the administrator's key.
        keys: the client keys at this moment.
    """

    config: CheckedConfig
    master_key: str = field(repr=False)
    keys: KeySet = field(repr=False)

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
    checked, found = config.read(settings.config, settings.secrets_dir, settings.allow)
    problems += found
    key_set = KeySet()
    try:
        key_set = keys.read(settings.keys)
    except GatewayError as e:
        problems.append(e)
    if problems or checked is None:
        return None, problems
    return Checked(checked, master_key, key_set), []
