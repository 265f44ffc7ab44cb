# SPDX-License-Identifier: Apache-2.0
"""``moat.pyz``: the site's half of moat in one file that any Python 3.11 runs, byte for byte the same each time."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import moat

_SHEBANG: Final = b"#!/usr/bin/env python3\n"
#: The first moment that a zip archive can express.
_ZIP_EPOCH: Final = 315_532_800
#: Kept to what every Python 3 parses, so that an old one gets a sentence and not a SyntaxError.
_MAIN: Final = b"""# SPDX-License-Identifier: Apache-2.0
import sys

if sys.version_info < (3, 11):
    sys.exit("moat needs Python 3.11 or newer; this is " + sys.version.split()[0])

from moat.cli import main

sys.exit(main())
"""


def site_modules() -> Iterator[tuple[str, bytes]]:
    """Yield (name in the archive, content) of the shared modules and of ``moat.site``, sorted."""
    package = Path(moat.__file__).parent
    sources = [*package.glob("*.py"), *(package / "site").rglob("*.py")]
    for source in sorted(sources):
        yield f"moat/{source.relative_to(package).as_posix()}", source.read_bytes()


def build_pyz(out: Path, source_date_epoch: int) -> None:
    """Write the zipapp to ``out`` (mode 0755).

    Members are stored uncompressed, since two zlib versions may compress one text differently.

    Args:
        out: the file; replaced whole or not at all.
        source_date_epoch: the time that all members carry, in seconds since 1970.
    """
    date = time.gmtime(max(source_date_epoch, _ZIP_EPOCH))[:6]
    temporary = out.with_name(f".{out.name}.tmp")
    with temporary.open("wb") as f:
        f.write(_SHEBANG)
        with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
            for name, content in (("__main__.py", _MAIN), *site_modules()):
                member = zipfile.ZipInfo(name, date)
                member.create_system = 3  # Unix, wherever it is built
                member.external_attr = 0o100644 << 16
                archive.writestr(member, content)
    temporary.chmod(0o755)
    temporary.replace(out)
