# SPDX-License-Identifier: Apache-2.0
"""``moat prepare``: the deployment folder of one host, from a verified bundle.

Two phases: first the bundle is verified, the options are checked and everything is compared,
nothing is changed; then the changes that were shown are made. A second run changes nothing. It
writes nothing outside of the deployment folder. What is in the folder is in
:mod:`moat.site.layout`, how it is compared and written in :mod:`moat.site.deployment`.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import os
import re
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import MoatError, PrepareFailed
from moat.manifest import FileEntry
from moat.site import certificate, deployment, layout, scan
from moat.site.engine import Engine, EngineError
from moat.site.layout import Options
from moat.site.verify import VerifiedBundle, add_trust_arguments, installed_of, keys_of, verify_bundle

NAME = "prepare"
HELP = "make or update the deployment folder of one host from a verified bundle"

DEFAULT_DIR: Final = Path("/opt/moat")
#: The largest file of compose/ and moat.pyz are far below; a bundle is not asked to be small by trust.
_MAX_FILE: Final = 16 * 1024 * 1024
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))


def _name(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is neither a host name nor an address") from None
        return text.lower()


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments. What is not given stays as the last run left it."""
    parser.add_argument("path", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="the deployment folder; default %(default)s")
    parser.add_argument("--profile", choices=layout.PROFILES, help="default: the bundle's own")
    parser.add_argument(
        "--name",
        action="append",
        type=_name,
        default=[],
        metavar="HOST",
        help="a name or address by which clients call this host, for the certificate; may be repeated",
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="the site's own certificate (PEM, with its chain)"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM, without a passphrase)")
    parser.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="the authority that clients trust (PEM); default the chain's last"
    )
    parser.add_argument("--https-port", type=_port, help=f"default {layout.HTTPS_PORT}")
    parser.add_argument("--http-port", type=_port, help=f"default {layout.HTTP_PORT}")
    parser.add_argument(
        "--bind", type=_address, metavar="ADDRESS", help="address of this host to listen on; default all"
    )
    add_trust_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Verify, compare, show, change."""
    root = args.dir.absolute()
    if (args.tls_cert is None) != (args.tls_key is None):
        raise PrepareFailed("--tls-cert and --tls-key belong together", hint="give both or neither")
    keys = keys_of(args, args.path, console)
    with console.step("verify the bundle (nothing is changed yet)"):
        bundle = verify_bundle(args.path, keys, console, target=args.target, installed=installed_of(args))
    with console.step(f"compare with {root}"):
        _check_root(root, bundle)
        before = layout.read_record(root)
        options = _options(args, bundle, before)
        _check_images(bundle, options)
        files = _read_files(bundle)
        secrets = layout.Secrets.read_or_make(root)
        pair = certificate.given(args.tls_cert, args.tls_key, args.tls_ca) if args.tls_cert else None
        items = layout.items(root, files, bundle, options, secrets, pair)
        changes = deployment.plan(root, items)
        make_tls = pair is None and certificate.to_make(root, options.names, before)
    for change in changes:
        console.info(change.text)
    if make_tls:
        console.info(f"{'make':<18} tls/ (a certificate of this site's own for {', '.join(options.names)})")
    if not changes and not make_tls:
        return _done(console, root, options, [], False)
    with console.step(f"change {root}"):
        record = [c for c in changes if c.item.path == layout.RECORD]
        deployment.apply(root, [c for c in changes if c not in record])
        if make_tls:
            certificate.make(root, options.names, bundle, console)
        deployment.apply(root, record)  # last: it says that all the rest is there
    return _done(console, root, options, [c.text for c in changes], make_tls)


def _done(console: Console, root: Path, options: Options, changes: list[str], made_tls: bool) -> int:
    changed = bool(changes) or made_tls
    console.result(
        {
            "ok": True,
            "exit": 0,
            "dir": str(root),
            "profile": options.profile,
            "changed": changed,
            "changes": [" ".join(c.split()) for c in changes] + (["make tls/"] if made_tls else []),
            "https_port": options.https_port,
            "http_port": options.http_port,
            "ca_file": str(root / layout.CA),
            "problems": [],
        },
        f"prepared: {root}, profile {options.profile}, {len(changes) + made_tls} changes\n"
        f"next: moat firewall apply && docker compose --project-directory {root} up -d --wait"
        if changed
        else f"prepared: {root}, profile {options.profile}, nothing to change",
    )
    return 0


def _check_root(root: Path, bundle: VerifiedBundle) -> None:
    if os.geteuid() != 0:
        raise PrepareFailed(
            "only root can give the secrets to the services' users",
            found=f"user {os.geteuid()}",
            expected="root",
            hint="run the same command with sudo",
        )
    if root.resolve().is_relative_to(bundle.path.resolve()):
        raise PrepareFailed(
            f"{root} lies inside the bundle",
            expected="a folder on this host's disk",
            hint="give another folder with --dir",
            path=str(root),
        )
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise PrepareFailed(
            f"{root} is not a folder",
            found="a symbolic link" if root.is_symlink() else "something else",
            expected="a folder, or nothing",
            hint="give another folder with --dir",
            path=str(root),
        )
    # A run that was cut short leaves compose.yaml or secrets/ without the record: those are ours too.
    if root.is_dir() and not (root / layout.RECORD).exists():
        foreign = sorted(p.name for p in root.iterdir() if p.name not in layout.TOP_LEVEL)
        if foreign:
            raise PrepareFailed(
                f"{root} holds files that `moat prepare` did not make",
                found=", ".join(foreign[:5]),
                expected="an empty folder, none, or one that this command made",
                hint="give another folder with --dir",
                path=str(root),
            )


def _options(args: argparse.Namespace, bundle: VerifiedBundle, before: layout.Record | None) -> Options:
    """Return the options in force: given now, else as before, else the default."""
    own = bundle.manifest.bundle.profile
    profile = args.profile or (before.profile if before else own)
    if before is not None and profile != before.profile:
        raise PrepareFailed(
            "the profile of a deployment folder cannot be changed",
            found=profile,
            expected=before.profile,
            hint="prepare another folder with --dir, or remove this one (docs/compose.md, Removal)",
        )
    if profile == "demo" and own != "demo":
        raise PrepareFailed(
            "this bundle has no model for the profile demo",
            found=f"a bundle of the profile {own}",
            expected="a bundle of the profile demo",
            hint="use --profile site, or build with `moat build --profile demo`",
        )
    options = Options(
        profile=profile,
        names=tuple(dict.fromkeys([*args.name, *layout.OWN_NAMES])) if args.name or not before else before.names,
        https_port=args.https_port or (before.https_port if before else layout.HTTPS_PORT),
        http_port=args.http_port or (before.http_port if before else layout.HTTP_PORT),
        bind=args.bind or (before.bind if before else layout.BIND),
    )
    if options.https_port == options.http_port:
        raise PrepareFailed(
            "the two ports are the same", found=str(options.https_port), hint="give --https-port or --http-port"
        )
    return options


def _check_images(bundle: VerifiedBundle, options: Options) -> None:
    """Refuse a bundle without a needed image, and an engine that was not loaded from it."""
    listed = {i.name: i for i in bundle.manifest.images}
    engine = Engine()
    for name in layout.images_of(options.profile):
        if name not in listed:
            raise PrepareFailed(
                f"the bundle has no image {name}",
                found=", ".join(listed) or "no images",
                hint="build the bundle again with `moat build`",
            )
        image = listed[name]
        try:
            found = engine.image_id(image.reference)
        except EngineError as e:
            raise PrepareFailed(
                "the container engine does not answer",
                found=str(e),
                expected="a running docker engine that you may use",
                hint="start it; `moat doctor` checks it",
            ) from e
        if found != image.id:
            raise PrepareFailed(
                f"the engine does not have the image {image.reference}",
                found=found or "no such image",
                expected=image.id,
                hint=f"run `moat load {bundle.path}` first",
            )


def _read_files(bundle: VerifiedBundle) -> dict[str, bytes]:
    """Return compose/ and moat.pyz of the bundle, each compared with the manifest once more."""
    wanted: list[FileEntry] = [
        f for f in bundle.manifest.files if f.path.startswith(layout.BUNDLE_FOLDER) or f.path == layout.PYZ
    ]
    files: dict[str, bytes] = {}
    with scan.open_root(bundle.path) as root:
        for entry in wanted:
            try:
                data = scan.read_small(root, entry.path, _MAX_FILE)
            except (FileNotFoundError, MoatError) as e:
                raise PrepareFailed(
                    f"{entry.path} cannot be read any more", found=str(e), hint="copy the bundle again", path=entry.path
                ) from e
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise PrepareFailed(
                    f"{entry.path} changed after it was verified",
                    hint="do not use this medium: it answers differently each time",
                    path=entry.path,
                )
            files[entry.path.removeprefix(layout.BUNDLE_FOLDER)] = data
    missing = sorted(layout.NEEDED - set(files))
    if missing:
        raise PrepareFailed(
            "the bundle lacks files of the Compose deployment",
            found="missing: " + ", ".join(missing),
            hint="build the bundle again with `moat build`",
        )
    return files
