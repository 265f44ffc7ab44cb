# SPDX-License-Identifier: Apache-2.0
"""``moat evidence``: what a reviewer asks for about a host, collected without changing it.

One folder a collection: a JSON file a subject, ``index.json``, one page for a person, and SHA256SUMS.
It holds no secret: their content is never collected, free text is redacted, and before anything is
written every byte of it is searched for the host's own secrets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from moat import __version__
from moat.console import Console
from moat.errors import EvidenceFailed, MoatError
from moat.site.evidencekit import network, release, services
from moat.site.evidencekit.model import Gap, Host, Part, run_program, secret_files
from moat.site.evidencekit.page import page
from moat.site.keyring import DEFAULT_TRUSTED_KEYS
from moat.site.state import DEFAULT_STATE_DIR, write_atomically
from moat.site.store import DEFAULT_STORE

NAME = "evidence"
HELP = "collect what a reviewer asks for about this host: release, rules, services, secrets' permissions, sockets"

FORMAT: Final = "moat-evidence/1"
DEFAULT_DIR: Final = Path("/var/lib/moat/evidence")
INDEX_NAME, PAGE_NAME, SUMS_NAME = "index.json", "evidence.html", "SHA256SUMS"
#: Shorter lines of a secret file (a user's name, say) would be found in innocent places.
_SHORTEST_SECRET: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="where collections are kept; default %(default)s")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="the release store; default %(default)s")
    parser.add_argument("--trusted-keys", type=Path, default=DEFAULT_TRUSTED_KEYS, help="default %(default)s")
    parser.add_argument("--state-dir", type=Path, default=DEFAULT_STATE_DIR, help="default %(default)s")
    parser.add_argument(
        "--if-changed",
        action="store_true",
        help="write nothing if the last collection says the same but for counts and times",
    )
    parser.add_argument("--keep", type=int, metavar="N", help="afterwards keep the newest N collections")


def run(args: argparse.Namespace, console: Console) -> int:
    """Collect, write, and report; a contradiction ends with the command's exit code after all is written."""
    if os.geteuid() != 0:
        raise EvidenceFailed(
            "the collection needs root",
            found=f"user id {os.geteuid()}",
            expected="0",
            hint="run it as root on the host",
        )
    if args.keep is not None and args.keep < 1:
        raise EvidenceFailed("--keep needs a number of at least 1", found=str(args.keep), hint="--keep 10 keeps ten")
    host = Host(Path("/"), args.store, args.trusted_keys, args.state_dir, args.dir, time.time(), run_program)
    parts = collect(host, console)
    folder, changed = write(host, parts, only_if_changed=args.if_changed)
    removed = prune(args.dir, args.keep) if args.keep is not None and changed else []
    for p in parts:
        for f in p.findings:
            console.problem(EvidenceFailed(f.what, found=f.found, expected=f.expected, hint=f.hint))
    ok = not any(p.findings for p in parts)
    code = 0 if ok else EvidenceFailed.exit_code
    result = {**summary(host, parts), "exit": code, "changed": changed, "folder": str(folder), "removed": removed}
    console.result(result, _text(parts, folder, changed))
    return code


def collect(host: Host, console: Console) -> list[Part]:
    """Collect every part; one that fails as a whole becomes a gap, never an omission."""
    parts: list[Part] = []
    first = _safely("release", "What was installed", lambda: release.release(host, console))
    bundle = first.data.get("bundle")
    created = bundle.get("created") if isinstance(bundle, dict) else None
    rest: tuple[tuple[str, str, Callable[[], Part]], ...] = (
        ("rules", "Packet filter: what may leave", lambda: network.rules(host)),
        ("egress", "The last proof that nothing leaves", lambda: network.egress(host)),
        ("units", "Services and how they are confined", lambda: services.units(host)),
        ("sockets", "Who listens", lambda: network.sockets(host)),
        ("secrets", "Accounts, and who may read the secrets", lambda: services.secrets(host)),
        ("configuration", "Configuration in force", lambda: services.configuration(host)),
        ("packages", "Debian packages and where they come from", lambda: release.packages(host, console)),
        ("clock", "Clock", lambda: services.clock(host, created)),
    )
    parts.append(first)
    for name, title, collector in rest:
        console.info(f"- {title}")
        parts.append(_safely(name, title, collector))
    return parts


def _safely(name: str, title: str, collector: Callable[[], Part]) -> Part:
    try:
        return collector()
    except (OSError, MoatError, ValueError) as e:
        part = Part(name, title)
        part.gap("the whole part", f"{type(e).__name__}: {e}")
        return part


# --- writing ---


def _document(part: Part) -> dict[str, Any]:
    return {"format": FORMAT, "part": part.name, **{k: v for k, v in asdict(part).items() if k != "name"}}


def fingerprint(parts: Sequence[Part]) -> str:
    """Return a hash of what a collection says, without counts, times and process ids."""
    stable = [
        {"name": p.name, "data": p.data, "gaps": [asdict(g) for g in p.gaps], "findings": len(p.findings)}
        for p in parts
    ]
    return hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()


def summary(host: Host, parts: Sequence[Part]) -> dict[str, Any]:
    """Return what ``index.json`` and ``--json`` have in common."""
    return {
        "format": FORMAT,
        "ok": not any(p.findings for p in parts),
        "complete": not any(p.gaps for p in parts),
        "host": socket.gethostname(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(host.now)),
        "moat": __version__,
        "fingerprint": fingerprint(parts),
        "parts": [
            {"name": p.name, "file": f"{p.name}.json", "gaps": len(p.gaps), "findings": len(p.findings)} for p in parts
        ],
        "findings": [{"part": p.name, **asdict(f)} for p in parts for f in p.findings],
        "gaps": [{"part": p.name, **asdict(g)} for p in parts for g in p.gaps],
    }


def collections(folder: Path) -> list[Path]:
    """Return the folders of earlier collections, oldest first; others (egress reports) are not ours."""
    return sorted(
        p.parent for p in folder.glob(f"*/{INDEX_NAME}") if re.fullmatch(r"[0-9]{8}T[0-9]{6}Z(-\d+)?", p.parent.name)
    )


def write(host: Host, parts: list[Part], *, only_if_changed: bool = False) -> tuple[Path, bool]:
    """Write one collection and return its folder and whether anything was written.

    Raises:
        EvidenceFailed: it cannot be written, or it would hold a secret of this host.
    """
    base = host.path(host.evidence)
    if only_if_changed:
        for last in collections(base)[-1:]:
            try:
                same = json.loads((last / INDEX_NAME).read_bytes()).get("fingerprint") == fingerprint(parts)
            except (OSError, ValueError, AttributeError):
                same = False
            if same:
                return last, False
    index = summary(host, parts)
    files = {f"{p.name}.json": _json(_document(p)) for p in parts}
    files[INDEX_NAME] = _json(index)
    files[PAGE_NAME] = page(parts, index["host"], index["created"], __version__).encode()
    refuse_secrets(host, files)
    files[SUMS_NAME] = b"".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode() for name, data in sorted(files.items())
    )
    name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(host.now))
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = next(f for i in range(1000) if not (f := base / (f"{name}-{i}" if i else name)).exists())
        temporary = base / f".{folder.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        for file, data in files.items():
            write_atomically(temporary / file, data, 0o600)
        temporary.rename(folder)
    except OSError as e:
        raise EvidenceFailed(
            f"the evidence cannot be written below {base}",
            found=e.strerror or str(e),
            expected="a folder that root may write",
            hint="make room, or give another folder with --dir",
            path=str(base),
        ) from e
    return folder, True


def _json(document: object) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n"


def refuse_secrets(host: Host, files: dict[str, bytes]) -> None:
    """Refuse to write anything in which a secret of this host is found, as it is or escaped for JSON or HTML.

    Raises:
        EvidenceFailed: naming the file of the secret and the file that would have held it, never the secret.
    """
    try:
        places = list(secret_files(host))
        for place in places:
            for line in {w.strip() for w in place.read_bytes().splitlines()}:
                # Headers of PEM files are in public certificates too.
                if len(line) < _SHORTEST_SECRET or line.startswith(b"-----"):
                    continue
                escaped = json.dumps(line.decode("utf-8", "replace"))[1:-1].encode()
                for name, data in files.items():
                    if line in data or escaped in data:
                        raise EvidenceFailed(
                            f"the collection would hold a secret; nothing was written: {name}",
                            found=f"the content of {place}",
                            expected="no secret of this host anywhere",
                            hint="find out which unit, source or rule carries the secret in clear text, remove it "
                            "there, and replace the secret (rotate_secrets.yml)",
                        )
    except OSError as e:
        raise EvidenceFailed(
            "whether the collection holds a secret cannot be told; nothing was written",
            found=f"{e.filename}: {e.strerror}",
            expected="secrets that root may read",
            hint="repair the file's permissions or its disk",
        ) from e


def prune(folder: Path, keep: int) -> list[str]:
    """Remove all but the newest collections and return the names; egress reports in folders of their own stay."""
    old = collections(folder)[:-keep]
    for one in old:
        if not (one / "egress-report.json").exists():
            shutil.rmtree(one)
    return [one.name for one in old if not one.exists()]


def _text(parts: Sequence[Part], folder: Path, changed: bool) -> str:
    lines = []
    for p in parts:
        word = f"{len(p.findings)} CONTRADICTION(S)" if p.findings else "ok" if not p.gaps else "incomplete"
        lines.append(f"{p.name:<14} {word}")
        lines += [f"  not collected: {g.what}: {g.why}" for g in p.gaps]
    lines.append(f"evidence: {folder / PAGE_NAME}" + ("" if changed else " (nothing new since)"))
    return "\n".join(lines)


__all__ = ["Gap", "collect", "fingerprint", "page", "prune", "refuse_secrets", "run", "summary", "write"]
