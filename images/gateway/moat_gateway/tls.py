# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway tls self-signed``: a certificate authority of this deployment and one server certificate from it.

For sites without an authority of their own. The authority's private key is used once and thrown away: nothing else
can ever be signed with it, and clients may trust ``ca.pem`` without trusting more than this one server.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from moat_gateway.allowlist import NotADestination, as_address, parse_host_port
from moat_gateway.errors import TlsFailed

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

FILES = {"ca.pem": 0o644, "cert.pem": 0o644, "key.pem": 0o600}
MAX_DAYS = 3650


@dataclass(frozen=True)
class Made:
    """What was written."""

    folder: Path
    names: tuple[str, ...]
    not_after: datetime


def self_signed(folder: Path, names: Sequence[str], *, days: int = 825, now: datetime | None = None) -> Made:
    """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` (mode 0600) into ``folder``.

    Args:
        folder: made if it is not there; none of the three files may be in it.
        names: host names and IP addresses that the server is reached by; the first is the subject.
        days: for which the certificate counts.
        now: the clock; a day earlier is the beginning, so that a slow clock does not refuse it.

    Raises:
        TlsFailed: a file is in the way, a name cannot be used, or the folder cannot be written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not 1 <= days <= MAX_DAYS:
        raise TlsFailed("the certificate's days cannot be used", found=str(days), expected=f"1 to {MAX_DAYS}")
    alternatives = _alternatives(names)
    for name in FILES:
        if (folder / name).exists() or (folder / name).is_symlink():
            raise TlsFailed(
                f"{name} is there already", hint="keep it, or move the three files away first", path=str(folder / name)
            )
    now = now if now is not None else datetime.now(UTC)
    begin, end = now - timedelta(days=1), now + timedelta(days=days)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = _name(f"Moat local authority for {names[0]}")
    ca = (
        _builder(ca_name, ca_name, ca_key, ca_key, begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    cert = (
        _builder(_name(names[0]), ca_name, key, ca_key, begin, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    _write(
        folder,
        {
            "ca.pem": ca.public_bytes(pem),
            "cert.pem": cert.public_bytes(pem) + ca.public_bytes(pem),
            "key.pem": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        },
    )
    return Made(folder, tuple(names), end)


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    from cryptography import x509

    if not names:
        raise TlsFailed("no name was given", expected="at least one --name or --ip")
    out: list[x509.GeneralName] = []
    for name in names:
        address = as_address(name)
        if address is not None:
            out.append(x509.IPAddress(ipaddress.ip_address(str(address))))
            continue
        try:
            if parse_host_port(name).port is not None:
                raise NotADestination(name)
        except NotADestination:
            raise TlsFailed(
                "a name cannot be used", found=repr(name), expected="a host name or an IP address"
            ) from None
        out.append(x509.DNSName(name))
    return out


def _name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text[:64])])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    from cryptography import x509

    # Python 3.13 checks strictly by default: both key identifiers must be there (RFC 5280, 4.2.1.1).
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            # O_EXCL: a file that appeared since the check is not overwritten.
            fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILES[name])
            with os.fdopen(fd, "wb") as f:
                f.write(content)
                os.fchmod(f.fileno(), FILES[name])
                f.flush()
                os.fsync(f.fileno())
    except OSError as e:
        raise TlsFailed("the files cannot be written", found=e.strerror or str(e), path=str(folder)) from e
