# SPDX-License-Identifier: Apache-2.0
"""The certificate of the published port: the site's own, or one that is made on this host.

Python's standard library cannot make certificates, so `moat-gateway tls self-signed` does it in a
container of the loaded gateway image: no network, no capabilities, read-only, one folder mounted.
"""

from __future__ import annotations

import shutil
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moat.console import Console
from moat.errors import PrepareFailed
from moat.site.deployment import GATEWAY, NGINX, write_failed, write_file, write_pair

if TYPE_CHECKING:
    from moat.site.layout import Record
    from moat.site.verify import VerifiedBundle

_MAX: Final = 1024 * 1024


@dataclass(frozen=True)
class Pair:
    """A certificate chain, its private key, and the authority that clients are given (all PEM)."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes


def given(cert: Path, key: Path, ca: Path | None) -> Pair:
    """Read the site's own certificate and check that it can be served.

    Raises:
        PrepareFailed: a file cannot be read, is not PEM, has a passphrase, or the two do not belong together.
    """
    chain, secret = _read(cert), _read(key)
    authority = _read(ca) if ca is not None else _last_certificate(chain)

    def no_passphrase() -> str:
        raise PrepareFailed(
            f"{key} asks for a passphrase",
            expected="a private key without one: nginx starts without anybody there to type it",
            hint="write it out without a passphrase, e.g. openssl pkey -in KEY -out NEW, into a file of mode 0600",
            path=str(key),
        )

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_passphrase)
    except (ssl.SSLError, OSError) as e:
        mismatch = "MISMATCH" in str(e)
        raise PrepareFailed(
            "the certificate and the key do not belong together" if mismatch else f"{cert} or {key} cannot be used",
            found=str(e),
            expected="a PEM certificate with its chain, and its private key in PEM",
            hint="give the pair that was made together",
            path=str(cert),
        ) from e
    return Pair(chain, secret, authority)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            data = f.read(_MAX)
    except OSError as e:
        raise PrepareFailed(f"{path} cannot be read", found=e.strerror, hint="check the path", path=str(path)) from e
    if b"-----BEGIN " not in data:
        raise PrepareFailed(f"{path} is not PEM", expected="-----BEGIN ...", hint="convert it to PEM", path=str(path))
    return data


def _last_certificate(chain: bytes) -> bytes:
    return chain[chain.rindex(b"-----BEGIN CERTIFICATE-----") :] if b"-----BEGIN CERTIFICATE-----" in chain else chain


def to_make(root: Path, names: Sequence[str], before: Record | None) -> bool:
    """Say whether a certificate has to be made: there is none, or the one made here is for other names."""
    there = all((root / p).exists() for p in ("tls/cert.pem", "tls/key.pem", "tls/ca.pem", "client/ca.pem"))
    if not there:
        return True
    return before is not None and before.tls == "made" and tuple(before.names) != tuple(names)


def make(root: Path, names: Sequence[str], bundle: VerifiedBundle, console: Console) -> None:
    """Make certificate and key in a container and put them in place.

    Raises:
        PrepareFailed: the container failed, or the disk is full.
    """
    image = next(i.reference for i in bundle.manifest.images if i.name == "gateway")
    try:
        # Inside the deployment folder: the engine's host and this one are the same file system there.
        work = Path(tempfile.mkdtemp(prefix=".tls-", dir=root / "tls"))
    except OSError as e:
        raise write_failed(root / "tls", e) from e
    try:
        shutil.chown(work, GATEWAY, GATEWAY)
        argv = [
            "docker", "run", "--rm", "--pull", "never", "--network", "none", "--read-only", "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges:true", "--user", f"{GATEWAY}:{GATEWAY}", "--tmpfs", "/tmp:size=16m",  # noqa: S108
            "--memory", "512m", "--pids-limit", "64", "--mount", f"type=bind,src={work},dst=/out",
            image, "tls", "self-signed", "--out", "/out",
        ]  # fmt: skip
        for name in names:
            argv += ["--name", name]
        console.run(argv, error=PrepareFailed, what="make the certificate", hint="see docs/compose.md, TLS")
        cert, key = (work / "cert.pem").read_bytes(), (work / "key.pem").read_bytes()
        ca = (work / "ca.pem").read_bytes() if (work / "ca.pem").exists() else cert
        write_pair(root, [(root / "tls/key.pem", key, 0o600, NGINX), (root / "tls/cert.pem", cert, 0o644, 0)])
        write_file(root / "tls/ca.pem", ca, 0o644, 0)
        write_file(root / "client/ca.pem", ca, 0o644, 0)
    except OSError as e:
        raise write_failed(root / "tls", e) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
