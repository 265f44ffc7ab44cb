# SPDX-License-Identifier: Apache-2.0
"""``moat build``: a bundle from the cache and the locks, in a network namespace that has no way out."""

from __future__ import annotations

import argparse
import errno
import shutil
import sys
import tempfile
import time
from pathlib import Path

from moat import __version__, minisign
from moat.build import namespace
from moat.build.built import sweep
from moat.build.bundle import build_bundle
from moat.build.cache import Cache
from moat.build.images import Workshop
from moat.build.keys import add_passphrase_arguments, passphrase_of, read_private_file
from moat.build.locks import PROFILES, TARGETS, active_locks
from moat.build.sign import sign_manifest
from moat.console import Console, human_bytes
from moat.errors import BuildFailed, FetchFailed
from moat.manifest import MANIFEST_NAME, BundleInfo

NAME = "build"
HELP = "make a bundle from the locked files in the cache, with no network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--profile", choices=PROFILES, required=True, help="demo adds a small model and its server")
    parser.add_argument("--target", default=next(iter(TARGETS)), help="distribution and architecture (%(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="the bundle's folder is made in DIR, by its name",
    )
    parser.add_argument("--key", type=Path, metavar="SECRETKEY", help="sign the manifest with this key")
    add_passphrase_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Build one bundle; see ``docs/bundle.md``."""
    namespace.enter(sys.argv[1:])
    isolation = namespace.prove()
    console.info(isolation.text)
    passphrase = None
    if args.key is not None and minisign.is_encrypted(read_private_file(args.key, "secret key")):
        passphrase = passphrase_of(args, f"passphrase of {args.key}: ")
    cache = Cache()
    locks = active_locks(args.profile, args.target, cache_root=cache.root)
    if missing := [e for e in locks.everything if not cache.has_entry(e)]:
        raise FetchFailed(
            f"{len(missing)} locked files are not in the cache",
            found=", ".join(e.filename for e in missing[:5]),
            expected=str(cache.root / "files"),
            hint=f"run `moat fetch --profile {args.profile} --target {args.target}`",
        )
    info = BundleInfo(__version__, args.profile, args.target, locks.locked_at)
    output: Path = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    final = output / info.name
    _may_replace(final)
    sweep(cache, now=time.time())
    workshop = Workshop(locks, cache, __version__, console)
    with console.step(f"build {info.name}"):
        temporary = Path(tempfile.mkdtemp(prefix=f".{info.name}.", dir=output))
        try:
            temporary.chmod(0o755)
            manifest = build_bundle(workshop, info, temporary)
            public = None
            if args.key is not None:
                public = sign_manifest(temporary, args.key, passphrase)
            replace_folder(temporary, final)
        except OSError as e:
            raise out_of_space(e, output, cache.root) from e
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    total = sum(f.size for f in manifest.files)
    console.result(
        {
            "ok": True,
            "bundle": str(final),
            "files": len(manifest.files),
            "bytes": total,
            "images": {i.name: {"reference": i.reference, "id": i.id} for i in manifest.images},
            "signed_by": public.to_string() if public else None,
            "network": {"interfaces": list(isolation.interfaces), "probes": dict(isolation.probes)},
        },
        f"{final}\n{len(manifest.files)} files, {total} bytes, "
        + (f"signed by {public.to_string()}" if public else "not signed (give --key, or run `moat sign`)"),
    )
    return 0


def out_of_space(e: OSError, output: Path, cache: Path) -> Exception:
    """Return the refusal for a full disk, which the operator can act on; any other error stays what it is."""
    if e.errno not in (errno.ENOSPC, errno.EDQUOT):
        return e
    free = ", ".join(f"{p}: {human_bytes(shutil.disk_usage(p).free)} free" for p in (output, cache))
    return BuildFailed(
        "the disk is full",
        found=free,
        expected="about 1 GiB for a bundle, 3 GiB for built things while MinIO is compiled",
        hint="make room, or give another output folder (-o) or cache (MOAT_CACHE); then run the same command again",
        path=e.filename if isinstance(e.filename, str) else None,
    )


def _may_replace(final: Path) -> None:
    """Refuse to replace a folder that is not a bundle."""
    if final.is_symlink() or (final.exists() and not (final / MANIFEST_NAME).is_file()):
        raise BuildFailed(
            f"{final} is in the way",
            found="something that is not a bundle",
            hint="move it away, or give another output folder",
            path=str(final),
        )


def replace_folder(temporary: Path, final: Path) -> None:
    """Give ``temporary`` the name ``final``; an older folder of that name is deleted afterwards."""
    if not final.exists():
        temporary.rename(final)
        return
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old)
