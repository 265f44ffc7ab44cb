# SPDX-License-Identifier: Apache-2.0
"""Programs of the host that look up names for others, and the sockets at which they are asked.

What they ask is theirs: no layer tells for whom it was. So no service may reach them; it then asks the name servers
itself, where the capture hears it. Which socket a process finds at a path is a matter of its own mounts
(``InaccessiblePaths=``), so it is looked at through them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

RESOLVED: Final = Path("/run/systemd/resolve/io.systemd.Resolve")
#: Path -> who answers there. The bus: systemd-resolved and Avahi look up names there too.
SOCKETS: Final = {
    RESOLVED: "systemd-resolved",
    Path("/run/nscd/socket"): "nscd",
    Path("/run/avahi-daemon/socket"): "Avahi",
    Path("/run/dbus/system_bus_socket"): "the system bus",
}


def reachable(pid: int, path: Path, proc: Path = Path("/proc")) -> bool | None:
    """Say whether a process finds this host's own socket at ``path``; ``None`` if that cannot be told (any more)."""
    try:
        outside = path.stat()
    except OSError:
        return False  # nobody is there
    root = proc / str(pid) / "root"
    try:
        root.stat()
    except OSError:
        return None
    try:
        inside = (root / path.relative_to("/")).stat()
    except OSError:
        return False
    return (inside.st_dev, inside.st_ino) == (outside.st_dev, outside.st_ino)
