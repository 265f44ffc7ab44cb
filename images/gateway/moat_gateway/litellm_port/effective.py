# SPDX-License-Identifier: Apache-2.0
"""The file from which LiteLLM loads its configuration, and reads again whenever one of its pages asks for it.

It must therefore follow every change that is taken live, or such a page would bring the old settings back. The text of
each deployment is kept, so that a change of one of them does not write all of them in YAML again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from moat_gateway.errors import LiteLLMRefused

_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_WIDE = 1 << 30  # characters: one line a deployment


class EffectiveFile:
    """The file, in a private folder of its own, because LiteLLM imports Python modules that lie beside it.

    It holds references to secrets, not their values.

    Raises:
        LiteLLMRefused: no folder can be made.
    """

    def __init__(self) -> None:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="moat-gateway-"))
        except OSError as e:
            raise _unwritable(e) from e
        self.path = self._folder / "config.yaml"
        self._beside = self._folder / "next"

    def write(self, head: str, entries: Iterable[str]) -> None:
        """Write the next content beside the file; :meth:`swap` makes it the content.

        Raises:
            LiteLLMRefused: it cannot be written.
        """
        try:
            self._beside.write_text(head + "model_list:\n" + "".join(entries), "utf-8")
            self._beside.chmod(0o600)
        except OSError as e:
            raise _unwritable(e) from e

    def swap(self) -> None:
        """Make what was written the content, in one step.

        Raises:
            LiteLLMRefused: it cannot be renamed.
        """
        try:
            self._beside.rename(self.path)
        except OSError as e:
            raise _unwritable(e) from e

    def remove(self) -> None:
        """Remove the file and its folder."""
        for path in (self.path, self._beside):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()


def head_text(effective: Mapping[str, Any]) -> str:
    """Return everything but the deployments, as YAML."""
    rest = {k: v for k, v in effective.items() if k != "model_list"}
    return str(yaml.dump(rest, Dumper=_Dumper, sort_keys=False, allow_unicode=True)) if rest else ""


def entry_text(entry: Mapping[str, Any]) -> str:
    """Return one deployment as an item of a YAML list, on one line."""
    text = yaml.dump(
        dict(entry), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=_WIDE
    )
    return f"- {text}"


def _unwritable(e: OSError) -> LiteLLMRefused:
    return LiteLLMRefused(
        "the configuration for LiteLLM cannot be written",
        found=e.strerror or str(e),
        expected="a temporary folder that may be written",
        hint="mount a tmpfs at the temporary folder, or set TMPDIR",
    )
