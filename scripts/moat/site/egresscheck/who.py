# SPDX-License-Identifier: Apache-2.0
"""Whose attempt it was: from a user id, a process id or a control group to a component.

``/proc`` is read at the moment of the attempt. A process that has already ended is known by its user
id (and its control group, where the layer says it) only; nothing is guessed beyond that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from moat.site.egresscheck import control
from moat.site.egresscheck.model import Component

UNKNOWN: Final = "unknown"
#: Between the names of components that run as one user, where only the user is known.
OR: Final = " or "


#: A service of the system's manager; a person's session, or a container, is none.
_SERVICE: Final = re.compile(r"(?:^|/)system\.slice/(?:.*/)?[^/]+\.service(?:$|/)", re.MULTILINE)


class Who:
    """The people of one site.

    Args:
        components: the site's services.
        proc: the mounted process file system (a parameter for tests).
    """

    def __init__(self, components: Sequence[Component], proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._names: dict[int, list[str]] = {}
        self._marks: list[tuple[re.Pattern[str], str]] = []
        for c in components:
            if c.name not in self._names.setdefault(c.uid, []):
                self._names[c.uid].append(c.name)
            mark = c.cgroup or c.unit
            if mark:
                # A whole element of the path, or a container's scope `docker-<id>.scope`.
                self._marks.append((re.compile(r"(?:^|[/-])" + re.escape(mark) + r"(?:$|[/.])", re.MULTILINE), c.name))

    @property
    def uids(self) -> list[int]:
        """The user ids of the components, root left out: root's packets are the whole host's."""
        return sorted(uid for uid in self._names if uid != 0)

    @property
    def root(self) -> bool:
        """Whether a component has processes of root."""
        return 0 in self._names

    def by_group(self, path: str) -> str | None:
        """Return the component whose control group ``path`` lies in."""
        return next((name for mark, name in self._marks if mark.search(path)), None)

    def by_uid(self, uid: int) -> str | None:
        """Return the component(s) of a user; root is nobody's alone."""
        return OR.join(self._names[uid]) if uid != 0 and uid in self._names else None

    def component(self, uid: int, pid: int | None = None, group: str = "") -> str | None:
        """Return the component, by the most exact trace that there is; ``None`` if it is none of the site's.

        A process of a component's user in the unit of somebody else is named as what it is: users may be shared
        (``www-data``). It is not passed over, because the capture refuses it like the component's own.
        """
        path = (self.group(pid) if pid is not None else "") or group
        return self.by_group(path) or self.neighbour(uid, path) or self.by_uid(uid)

    def neighbour(self, uid: int, path: str) -> str | None:
        """Return words for a process of a component's user whose control group is another service's."""
        if uid == 0 or uid not in self._names or not _SERVICE.search(path) or self.by_group(path):
            return None
        return f"another program of user {control.name_of(uid)}"

    def group(self, pid: int) -> str:
        """Return the control groups of a process as text; empty if it is gone."""
        try:
            lines = (self._proc / str(pid) / "cgroup").read_text("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return "\n".join(line.split(":", 2)[-1] for line in lines)

    def words(self, pid: int) -> str:
        """Return ``pid/comm``; only the number if the process is gone."""
        try:
            comm = (self._proc / str(pid) / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            return str(pid)
        return f"{pid}/{comm}"

    def process_of_port(self, protocol: str, port: int, uid: int | None = None) -> int | None:
        """Return the process that has a socket bound to a local port, or ``None`` if it is gone."""
        inodes = {inode for inode, owner in self._sockets(protocol, port) if uid is None or owner == uid}
        if not inodes:
            return None
        wanted = {f"socket:[{inode}]" for inode in inodes}
        for entry in self._proc.iterdir():
            if entry.name.isdecimal() and (uid is None or _owner(entry) in (uid, None)) and _has(entry / "fd", wanted):
                return int(entry.name)
        return None

    def _sockets(self, protocol: str, port: int) -> Iterator[tuple[str, int]]:
        for name in (protocol, protocol + "6"):
            try:
                lines = (self._proc / "net" / name).read_text("ascii", "replace").splitlines()[1:]
            except OSError:
                continue
            for line in lines:
                # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
                fields = line.split()
                if len(fields) > 9 and int(fields[1].rpartition(":")[2], 16) == port and fields[9] != "0":
                    yield fields[9], int(fields[7])


def _owner(entry: Path) -> int | None:
    try:
        return entry.stat().st_uid
    except OSError:
        return None


def _has(folder: Path, wanted: set[str]) -> bool:
    try:
        for name in os.listdir(folder):  # noqa: PTH208 - see below
            try:
                if os.readlink(f"{folder}/{name}") in wanted:  # noqa: PTH115 - thousands of them, while a process lives
                    return True
            except OSError:
                continue
    except OSError:
        return False
    return False


def listening_ports(proc: Path = Path("/proc")) -> list[int]:
    """Return the TCP ports that something on this host listens on."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text("ascii", "replace").splitlines()[1:]
        except OSError:
            continue
        found |= {int(f[1].rpartition(":")[2], 16) for f in (line.split() for line in lines) if f[3] == "0A"}
    return sorted(found)
