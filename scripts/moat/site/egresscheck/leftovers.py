# SPDX-License-Identifier: Apache-2.0
"""What a verification sets on the host outside of its own process, and its removal.

Two nftables tables and a routing table, all with names and numbers of our own, so that they can be
removed without knowing the run that made them. What has no name of our own is *noted* in the file of the
lock before it is done: containers that are stopped, a way inside a container. The programs in the kernel,
the netlink sockets and the sinkhole end with the process. Three times all this is undone: by the run
itself; by a *watcher*, a small shell that reads from a pipe and cleans up when the run was killed outright
(the pipe ends without a word); and by the next run, before it begins.
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

#: What starts containers that were stopped, as they are.
UP: Final = ("up", "--detach", "--no-recreate", "--pull", "never")

#: For the watcher; says the same as :func:`remove`. No variable from outside enters it; $1 is the file of the lock.
#: The program that was stopping containers may have outlived the run: it is waited for by stopping them once more.
_SCRIPT: Final = f"""
read -r word && [ "$word" = done ] && exit 0
nft delete table inet {PACKETS_TABLE} 2>/dev/null
nft delete table inet {DNS_TABLE} 2>/dev/null
for family in -4 -6; do
    while ip $family rule del priority {RULE_PRIORITY} 2>/dev/null; do :; done
    ip $family route flush table {ROUTES} 2>/dev/null
done
undone=yes
while IFS= read -r line; do
    rest=${{line#* }}
    case $line in
    way*) nsenter --target "${{rest%% *}}" --net -- ip route del "${{rest#* }}/32" ;;
    stopped*) docker compose --project-directory "$rest" stop
        docker compose --project-directory "$rest" {" ".join(UP)} || undone=no ;;
    esac </dev/null >/dev/null 2>&1
done <"$1"
[ $undone = yes ] && : >"$1"
exit 0
"""

#: The file of the lock that this process holds, which has the notes; one verification runs at a time.
_notes: Path | None = None


def note_way(pid: int, address: str) -> str:
    """Note that the network of a process gets a way to an address, and return the note for :func:`strike`."""
    return _note(f"way {pid} {address}")


def note_stopped(directory: Path) -> str:
    """Note that the containers of a deployment are stopped, and return the note for :func:`strike`."""
    return _note(f"stopped {directory}")


def _note(line: str) -> str:
    if _notes is not None:
        with _notes.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
    return line


def strike(line: str) -> None:
    """Take a note back: it has been undone."""
    if _notes is not None:
        _notes.write_text("".join(f"{each}\n" for each in _noted() if each != line), "utf-8")


def _noted() -> list[str]:
    return _notes.read_text("utf-8").splitlines() if _notes is not None else []


def _undo(line: str) -> bool:
    """Undo what a note says, and return whether it is undone."""
    what, _, rest = line.partition(" ")
    if what == "stopped":
        return _quietly(["docker", "compose", "--project-directory", rest, *UP])[0] == 0
    pid, _, address = rest.partition(" ")
    ip = ["nsenter", "--target", pid, "--net", "--", "ip", "route"]
    _quietly([*ip, "del", f"{address}/32"])
    code, text = _quietly([*ip, "show", f"{address}/32"])
    return code != 0 or not text.strip()  # a network that cannot be entered is gone, and the way with it


def _in_words(line: str) -> str:
    what, _, rest = line.partition(" ")
    if what == "stopped":
        return f"stopped containers (start them with `docker compose --project-directory {rest} {' '.join(UP)}`)"
    pid, _, address = rest.partition(" ")
    return f"a way to {address} in the network of process {pid}"


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
    return found + [_in_words(line) for line in _noted()]


def remove(console: Console) -> list[str]:
    """Remove everything that :func:`present` can name, and return what could not be removed."""
    for table in (PACKETS_TABLE, DNS_TABLE):
        _quietly(["nft", "delete", "table", "inet", table])
    for family in ("-4", "-6"):
        while _quietly(["ip", family, "rule", "del", "priority", RULE_PRIORITY])[0] == 0:
            pass
        _quietly(["ip", family, "route", "flush", "table", ROUTES])
    for line in _noted():
        if _undo(line):
            strike(line)
    still = present()
    if still:
        console.warn("could not undo: " + ", ".join(still) + "; the watcher and the next run try again")
    return still


@contextmanager
def only_one(console: Console, lock: Path = LOCK) -> Iterator[None]:
    """Let one verification run at a time; remove what an earlier one left; have a watcher while it runs.

    Raises:
        EgressUnproven: another one is running.
    """
    global _notes  # noqa: PLW0603 - as the lock itself: of the host, not of a caller
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
        _notes = lock
        left = present()
        if left:
            console.warn("an earlier verification was broken off; undoing what it left: " + ", ".join(left))
            remove(console)
        # It holds the lock too: no next run begins before it has cleaned up. Its own session: a lost
        # terminal must not take it along.
        watcher = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "sh", str(lock.absolute())],
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
            _notes = None
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
