# SPDX-License-Identifier: Apache-2.0
"""What a verification sets on the host outside of its own process, and its removal.

Two nftables tables and a routing table, all with names and numbers of our own, so that they can be
removed without knowing the run that made them. The programs in the kernel, the netlink sockets and
the sinkhole end with the process. Three times this is removed: by the run itself; by a *watcher*, a
small shell that reads from a pipe and cleans up when the run was killed outright (the pipe ends
without a word); and by the next run, before it begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import EgressUnproven
from moat.site.egresscheck import signals
from moat.site.egresscheck.tools import ENVIRONMENT

#: Tables of the packet filter (family inet) that only a running verification has.
PACKETS_TABLE: Final = "moat_capture"
DNS_TABLE: Final = "moat_capture_dns"
#: Our routing table, and the place of its rules: behind main (32766) and default (32767), so that they
#: only ever decide where the host itself knows no way.
ROUTES: Final = "52030"
RULE_PRIORITY: Final = "32800"
LOCK: Final = Path("/run/moat-egress.lock")

#: For the watcher; says the same as :func:`remove`. No variable from outside enters it.
_SCRIPT: Final = f"""
read -r word && [ "$word" = done ] && exit 0
nft delete table inet {PACKETS_TABLE} 2>/dev/null
nft delete table inet {DNS_TABLE} 2>/dev/null
for family in -4 -6; do
    while ip $family rule del priority {RULE_PRIORITY} 2>/dev/null; do :; done
    ip $family route flush table {ROUTES} 2>/dev/null
done
exit 0
"""


def _quietly(argv: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(list(argv), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    except OSError as e:
        return 127, str(e)
    return done.returncode, done.stdout


def present() -> list[str]:
    """Return what a run has left on this host (or what is set by the running one), in words."""
    found = [
        f"the table inet {t}"
        for t in (PACKETS_TABLE, DNS_TABLE)
        if _quietly(["nft", "list", "table", "inet", t])[0] == 0
    ]
    for family in ("-4", "-6"):
        code, text = _quietly(["ip", family, "rule", "show", "priority", RULE_PRIORITY])
        if code == 0 and text.strip():
            found.append(f"routing rules of ip {family}")
        code, text = _quietly(["ip", family, "route", "show", "table", ROUTES])
        if code == 0 and text.strip():
            found.append(f"routes of ip {family} in table {ROUTES}")
    return found


def remove(console: Console) -> list[str]:
    """Remove everything that :func:`present` can name, and return what could not be removed."""
    for table in (PACKETS_TABLE, DNS_TABLE):
        _quietly(["nft", "delete", "table", "inet", table])
    for family in ("-4", "-6"):
        while _quietly(["ip", family, "rule", "del", "priority", RULE_PRIORITY])[0] == 0:
            pass
        _quietly(["ip", family, "route", "flush", "table", ROUTES])
    still = present()
    if still:
        console.warn("could not remove " + ", ".join(still) + "; the watcher and the next run try again")
    return still


@contextmanager
def only_one(console: Console, lock: Path = LOCK) -> Iterator[None]:
    """Let one verification run at a time; remove what an earlier one left; have a watcher while it runs.

    Raises:
        EgressUnproven: another one is running.
    """
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    watcher: subprocess.Popen[bytes] | None = None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise EgressUnproven(
                "another verification is running on this host",
                found=f"{lock} is locked",
                expected="one at a time: two would see each other's controls",
                hint="wait until it has ended and run this again",
            ) from e
        left = present()
        if left:
            console.warn("an earlier verification was broken off; removing what it left: " + ", ".join(left))
            remove(console)
        # It holds the lock too: no next run begins before it has cleaned up. Its own session: a lost
        # terminal must not take it along.
        watcher = subprocess.Popen(
            ["sh", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            pass_fds=(fd,),
            start_new_session=True,
        )
        yield
    finally:
        with signals.deferred():
            if watcher is not None:
                _end(watcher)
            os.close(fd)


def _end(watcher: subprocess.Popen[bytes]) -> None:
    """Let the watcher go, with its work if there is any: it does no harm to remove what is not there."""
    pipe = watcher.stdin
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
            if not present():
                pipe.write(b"done\n")
            pipe.close()
    watcher.wait()
