# SPDX-License-Identifier: Apache-2.0
"""``moat gateway``: a command of ``moat-gateway`` where it reaches the store and the gateways, with files of this host.

The command runs in a container of the service ``admin``, as long as it takes. That container sees ``config/`` of the
deployment folder and nothing else of the host. Every other path that the command's words name is brought to it: a copy,
readable by the container's user, at the same path, and what the command made or changed there is brought back. The exit
code is the command's own.
"""

from __future__ import annotations

import argparse
import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moat.console import Console, human_bytes
from moat.errors import GatewayFiles
from moat.site.deployment import GATEWAY, write_file

NAME = "gateway"
HELP = (
    "run a command of moat-gateway in the deployment (config push DIR, status, keys new, ...), with files of this host"
)

DEFAULT_DIR: Final = Path("/opt/moat")
_MOST_FILES: Final = 10_000
_MOST_BYTES: Final = 1 << 30
#: Where the container keeps its own things: nothing of the host may cover them.
_CONTAINERS: Final = tuple(
    Path(p)
    for p in ("/usr", "/etc", "/opt/moat/app", "/opt/moat/wheels", "/run", "/var/lib/moat", "/tmp")  # noqa: S108
)
_NEVER: Final = tuple(Path(p) for p in ("/proc", "/sys", "/dev"))
#: Folder of the container for files of a folder that it has itself, as of /tmp.
_ELSEWHERE: Final = "/host"
#: Actions of ``config`` whose argument is a folder, and options that take no value before it.
_TAKE_FOLDERS: Final = ("init", "validate", "push", "diff")
_FLAGS: Final = ("--json", "--force", "--debug")

Chown = Callable[[Path, int, int], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="the deployment folder; default %(default)s")
    parser.add_argument(
        "--instance", default="gateway-1", metavar="NAME", help="whom `status` and `reload` ask; default %(default)s"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="as for moat-gateway")


def run(args: argparse.Namespace, console: Console) -> int:
    """Bring, run, bring back."""
    root: Path = args.dir.absolute()
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not (root / "compose.yaml").is_file():
        raise GatewayFiles(
            f"{root} is no deployment folder",
            found="no compose.yaml",
            expected="the folder that `moat prepare` made",
            hint="name it with --dir",
            path=str(root),
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", args.instance):
        raise GatewayFiles("--instance is no name of a gateway", found=args.instance, expected="for example gateway-1")
    try:
        with tempfile.TemporaryDirectory(prefix="gateway-", dir=root / "state") as work:
            brought = Brought(Path(work), root / "config")
            argv = brought.words(words)
            code = subprocess.run(_argv(root, args.instance, brought.mounts(), argv), check=False).returncode
            for path in brought.back():
                console.info(f"written: {path}")
    except OSError as e:
        raise GatewayFiles(
            "a file cannot be brought to moat-gateway, or back",
            found=f"{e.filename or ''}: {e.strerror}".lstrip(": "),
            expected="folders that root may read and write",
            hint="run it as root, and see that there is room",
        ) from e
    return code


def _argv(root: Path, instance: str, mounts: Sequence[str], words: Sequence[str]) -> list[str]:
    # The container's own user and name would say nothing to whoever reads the history.
    named = any(w.partition("=")[0] == "--author" for w in words)
    if tuple(words[:2]) in (("config", "push"), ("config", "rollback")) and not named:
        words = [*words[:2], f"--author={_author()}", *words[2:]]
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    argv = ["docker", "compose", "--project-directory", str(root), "run", "--rm", "--no-deps"]
    argv += [] if terminal else ["-T"]
    argv += ["-e", f"MOAT_ADMIN_SOCKET=/run/moat/{instance}.sock"]
    for mount in mounts:
        argv += ["-v", mount]
    return [*argv, "admin", *words]


def _author() -> str:
    return f"{os.environ.get('SUDO_USER') or getpass.getuser()}@{socket.gethostname()}"


@dataclass
class Brought:
    """The copies of one run.

    Args:
        work: an empty folder for them.
        config: the folder that the container sees anyway.
        chown: gives a copy to the container's user.
    """

    work: Path
    config: Path
    chown: Chown = os.chown
    #: Folder on the host -> its copy, and where the container sees it.
    _folders: dict[Path, tuple[Path, Path]] = field(default_factory=dict)
    _whole: list[Path] = field(default_factory=list)  # those of which everything was copied
    _before: dict[Path, bytes] = field(default_factory=dict)
    _bytes: int = 0

    def words(self, words: Sequence[str]) -> list[str]:
        """Return the words of the command as the container is to read them; what they name is copied.

        Only words (or values of ``--option=value``) that begin with ``/`` or ``.`` can be paths, and plain names of
        folders where a command of ``config`` takes a folder.

        Raises:
            GatewayFiles: a path is a link, holds too much, or would cover what the container needs.
            OSError: it cannot be read.
        """
        for word in (words[i] for i in _folders(words) if words[1] != "init"):
            # Said here: the command would name the place of the container where it looked.
            if (named := _path(word)) is not None and not os.path.lexists(named):
                raise GatewayFiles(
                    f"{named} is not there",
                    found="no such folder",
                    expected="a folder with config.yaml and keys.yaml",
                    hint="correct the path, or make one: moat gateway config init DIR",
                    path=str(named),
                )
        plain = _plain_folders(words)
        split = [
            w.partition("=") if w.startswith("--") else ("", "", f"./{w}" if i in plain else w)
            for i, w in enumerate(words)
        ]
        paths = {value: path for _, _, value in split if (path := _path(value)) is not None}
        # Folders first, and those above others before these: a file is then known to be in one of them.
        for path in sorted(set(paths.values()), key=lambda p: (not p.is_dir(), len(p.parts))):
            self._bring(path)
        return [o + e + (str(self._inside(paths[v])) if v in paths else v) for o, e, v in split]

    def mounts(self) -> list[str]:
        """Return the values of docker's ``-v``."""
        return [f"{copy}:{inside}" for copy, inside in self._folders.values()]

    def back(self) -> list[Path]:
        """Write what the command made or changed to its place on this host, and return those paths.

        Raises:
            OSError: it cannot be written.
        """
        written = []
        for host, (copy, _) in self._folders.items():
            for file in sorted(p for p in copy.rglob("*") if p.is_file() and not p.is_symlink()):
                # Locks and temporary files of the command begin with a dot.
                part = file.relative_to(copy)
                if any(name.startswith(".") for name in part.parts):
                    continue
                data = file.read_bytes()
                if self._before.get(file) == data:
                    continue
                target = host / part
                target.parent.mkdir(parents=True, exist_ok=True)
                owner = target.stat() if target.exists() else target.parent.stat()
                write_file(target, data, file.stat().st_mode & 0o777, owner.st_uid)
                os.chown(target, owner.st_uid, owner.st_gid)
                written.append(target)
        return written

    def _bring(self, path: Path) -> None:
        if any(path == known or known in path.parents for known in (self.config, *self._whole)):
            return
        refused = [c for c in _NEVER if c == path or c in path.parents]
        if path.is_dir():
            refused += _covered(path)
        if path.is_symlink() or refused:
            raise GatewayFiles(
                f"{path} cannot be brought to moat-gateway",
                found="a symbolic link" if path.is_symlink() else f"it would cover {refused[0]} of the container",
                expected="a file or folder of its own",
                hint="name what the link leads to" if path.is_symlink() else "copy what is meant to another folder",
                path=str(path),
            )
        if path.is_dir():
            copy = self._folder(path)
            self._whole.append(path)
            for source in sorted(path.rglob("*")):
                self._take(source, copy / source.relative_to(path))
        elif path.parent.is_dir():
            # Its folder, with nothing else in it: a command replaces a file by writing another one beside it.
            copy = self._folder(path.parent)
            if os.path.lexists(path):
                self._take(path, copy / path.name)

    def _folder(self, host: Path) -> Path:
        if host not in self._folders:
            number = len(self._folders)
            copy = self.work / str(number)
            copy.mkdir(mode=0o700)
            self.chown(copy, GATEWAY, GATEWAY)
            self._folders[host] = (copy, Path(f"{_ELSEWHERE}/{number}") if _covered(host) else host)
        return self._folders[host][0]

    def _inside(self, path: Path) -> Path:
        """Return where the container sees a path: at the same place, unless something of its own is there."""
        for host, (_, inside) in self._folders.items():
            if path == host or host in path.parents:
                return inside / path.relative_to(host)
        return path

    def _take(self, source: Path, copy: Path) -> None:
        if source.is_symlink():
            copy.symlink_to(source.readlink())  # for moat-gateway to refuse, by its name
            return
        if source.is_dir():
            copy.mkdir(mode=0o700)
        elif source.is_file():
            self._bytes += source.stat().st_size
            if self._bytes > _MOST_BYTES or len(self._before) >= _MOST_FILES:
                raise GatewayFiles(
                    "too much to bring to moat-gateway",
                    found=f"more than {human_bytes(_MOST_BYTES)} or {_MOST_FILES} files",
                    expected="a folder of configuration",
                    hint="name the folder itself, not one above it",
                    path=str(source),
                )
            shutil.copyfile(source, copy)
            copy.chmod(source.stat().st_mode & 0o700 | 0o400)
            self._before[copy] = copy.read_bytes()
        else:
            raise GatewayFiles(
                f"{source} is neither a file nor a folder", hint="move it away", path=str(source)
            )  # fmt: skip
        self.chown(copy, GATEWAY, GATEWAY)


def _path(word: str) -> Path | None:
    """Return the path of this host that a word names, or ``None`` if it names none."""
    if not re.match(r"/|\.\.?(/|$)", word):
        return None
    path = Path(word).absolute()  # not resolved: what a link leads to is not what was named
    return path.resolve() if ".." in path.parts else path


def _folders(words: Sequence[str]) -> set[int]:
    """Return where a command of ``config`` is given a folder.

    Numbers are revisions (``config diff 3 4``), and a word behind an option may be its value.
    """
    if len(words) < 3 or words[0] != "config" or words[1] not in _TAKE_FOLDERS:
        return set()
    return {
        i
        for i, w in enumerate(words)
        if i >= 2
        and not w.startswith("-")
        and not w.isdigit()
        and not (words[i - 1].startswith("-") and "=" not in words[i - 1] and words[i - 1] not in _FLAGS)
    }


def _plain_folders(words: Sequence[str]) -> set[int]:
    """Return where a word without a slash names a folder: ``config push site`` means ``./site``."""
    return {
        i
        for i in _folders(words)
        if re.fullmatch(r"[A-Za-z0-9_][^/]*", words[i]) and (Path(words[i]).is_dir() or words[1] == "init")
    }


def _covered(folder: Path) -> list[Path]:
    """Return what of the container's own would not be seen any more below a folder that is mounted."""
    return [c for c in _CONTAINERS if folder == c or folder in c.parents]
