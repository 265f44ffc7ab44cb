#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_certificate``: an authority of the site and one certificate for each host.

It runs on the control host with the control environment's Python, whose ``cryptography`` makes the keys: no private
key is ever an argument of a program. The choices are those of ``moat-gateway tls self-signed`` (the Compose
deployment): ECDSA P-256, both key identifiers, names as alternative names. Other than there the authority's key is
kept, in ``ca.key`` on the control host alone: further hosts and renewals must not make every client trust anew.

``ca.pem`` begins with the authority that signs now; while one is being replaced the one before follows it. It is never
absent: what it becomes lies beside it until the new key is in place.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.moat_common import Refused, write

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    HAVE = True
except ImportError:
    HAVE = False

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

DOCUMENTATION = r"""
module: moat_certificate
short_description: Make the authority and the certificates of a site
description:
  - Makes the authority (ca.pem, ca.key) and NAME.pem, NAME.key in one folder of the control host.
  - A certificate is made again if its names differ, if it ends within renew_days, or if the authority changed.
  - Needs cryptography, which every control environment has because ansible-core needs it.
options:
  path: {description: The folder (mode 0700)., type: path, required: true}
  state:
    description:
      - C(authority) makes the authority if there is none.
      - C(authority_rotated) makes a new one and keeps the one before in ca.pem, so that both are trusted.
      - C(authority_settled) drops the one before from ca.pem.
      - C(signed) makes the certificate of NAME.
      - C(given) checks the operator's own pair and writes it as NAME.
    type: str
    choices: [authority, authority_rotated, authority_settled, signed, given]
    required: true
  name: {description: Begin of the two files' names; may hold one folder., type: str}
  names: {description: Host names and addresses that clients call it by., type: list, elements: str, default: []}
  days: {description: For how many days it counts., type: int, default: 825}
  renew_days: {description: Made again when fewer days remain., type: int, default: 30}
  force: {description: Make the certificate again in any case., type: bool, default: false}
  certificate: {description: For C(given) the operator's PEM file with its chain., type: path}
  key: {description: For C(given) its private key in PEM without a passphrase., type: path}
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Make the certificate of a host
  moat_certificate: {path: /etc/moat/site/pki, state: signed, name: node1, names: [node1, 192.0.2.11]}
  delegate_to: localhost
  vars: {ansible_python_interpreter: "{{ ansible_playbook_python }}"}
"""

RETURN = r"""
reason: {description: Why it was made; empty if nothing changed., type: str, returned: always}
not_after: {description: When it ends (UTC)., type: str, returned: always}
"""

_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
#: What ca.pem becomes, as long as the key that belongs to it is being put in place.
NEXT = "ca.pem.next"
#: No certificate counts longer than the authority that signed it, and every client has to be given another one in time.
WARN_DAYS = 365
#: In this order: before the new authority is there, the ended one is refused by every run that needs it.
RENEW = (
    "moat-site rotate_secrets -e rotate=authority, give every client the new ca.pem, then moat-site rotate_secrets -e "
    "rotate=certificates"
)
_FILE = re.compile(r"([a-z]+/)?[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


@dataclass(frozen=True)
class Result:
    """What was done: why (empty for nothing), until when the certificate counts, and what the operator should know."""

    reason: str
    not_after: datetime
    warning: str = ""


@dataclass(frozen=True)
class Authority:
    """The site's authority; ``chain`` is ca.pem whole."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]


# --- the authority ---


def authority(folder: Path, state: str, now: datetime, dry: bool) -> Result:
    """Make, replace or settle the authority."""
    path = folder / "ca.pem"
    if not dry:
        finish(folder)
    there = path.exists() and (folder / "ca.key").exists()
    if state == "authority_settled":
        chain = x509.load_pem_x509_certificates(path.read_bytes())
        if len(chain) > 1 and not dry:
            write(path, pem(chain[:1]), 0o644)
        return Result("the one before is dropped" if len(chain) > 1 else "", chain[0].not_valid_after_utc)
    if there and state == "authority":
        mine = read_authority(folder)
        end = mine.cert.not_valid_after_utc
        if end <= now:
            raise Refused(f"the authority {path} has ended on {end:%Y-%m-%d}. Do: {RENEW}")
        return Result("", end, warning(path, end, now))
    if path.exists() and not there:
        raise Refused(
            f"{folder / 'ca.key'} is missing beside ca.pem. Do: restore it from the backup of the site directory; or "
            "move ca.pem away and run again: a new authority is made, and every client must be given the new ca.pem"
        )
    if there and len(x509.load_pem_x509_certificates(path.read_bytes())) > 1:
        return Result("", now)  # begun by a run before this one
    end = now + timedelta(days=3650)
    reason = "it is replaced" if there else "there was none"
    if dry:
        return Result(reason, end)
    before = read_authority(folder).chain[:1] if there else ()
    key = ec.generate_private_key(ec.SECP256R1())
    name = named(f"Moat site authority {now:%Y-%m-%d}")
    cert = (
        builder(name, name, key, key, now - timedelta(days=1), end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Cut short before the key is there, the authority before goes on; after that, the next run has all that is missing.
    write(folder / NEXT, pem([cert, *before]), 0o644)
    write(folder / "ca.key", private(key), 0o600)
    finish(folder)
    return Result(reason, end)


def begun(folder: Path) -> bool:
    """Say whether the key of the next authority is in place already, and ca.pem is still to be replaced."""
    try:
        chain = x509.load_pem_x509_certificates((folder / NEXT).read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError):
        return False
    return public(key) == public_of(chain[0])


def finish(folder: Path) -> None:
    """Put the next authority in place if its key is, or forget it: the one before still has its own."""
    if begun(folder):
        (folder / NEXT).replace(folder / "ca.pem")
    else:
        (folder / NEXT).unlink(missing_ok=True)


def warning(path: Path, end: datetime, now: datetime) -> str:
    """Return what to say of an authority that ends within the year: time to bring the next one to every client."""
    days = (end - now).days
    if days >= WARN_DAYS:
        return ""
    ends = f"ends in {days} days, on {end:%Y-%m-%d}"
    return f"the site's authority {path} {ends}, and every certificate with it. Do: {RENEW}"


def read_authority(folder: Path) -> Authority:
    """Read ca.pem and ca.key.

    Raises:
        Refused: one cannot be read, or they do not belong together.
    """
    name = NEXT if begun(folder) else "ca.pem"  # in check mode nothing is finished
    try:
        chain = tuple(x509.load_pem_x509_certificates((folder / name).read_bytes()))
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as e:
        raise Refused(f"the authority in {folder} cannot be read: {e}. Do: restore it from the backup") from e
    if not isinstance(key, ec.EllipticCurvePrivateKey) or public(key) != public_of(chain[0]):
        raise Refused(f"{folder}/ca.key is not the key of ca.pem. Do: restore both from one backup")
    return Authority(chain[0], key, chain)


# --- certificates of hosts ---


def signed(
    folder: Path, name: str, names: Sequence[str], days: int, renew: int, now: datetime, *, force: bool, dry: bool
) -> Result:
    """Make the certificate of a host if it has to be made."""
    wanted = alternatives(names)
    if dry and not (folder / "ca.pem").exists():
        return Result("there was none", now + timedelta(days=days))
    mine = read_authority(folder)
    latest = min(now + timedelta(days=days), mine.cert.not_valid_after_utc)
    reason, end = why(folder, name, wanted, renew, mine.chain, now, latest)
    if force and not reason:
        reason = "it was asked for"
    if not reason:
        return Result("", end)
    end = latest
    if dry:
        return Result(reason, end)
    key = ec.generate_private_key(ec.SECP256R1())
    cert = (
        builder(named(names[0]), mine.cert.subject, key, mine.key, now - timedelta(days=1), end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .sign(mine.key, hashes.SHA256())
    )
    place(folder, name, pem([cert, mine.cert]), private(key))
    return Result(reason, end)


def why(
    folder: Path,
    name: str,
    wanted: Sequence[x509.GeneralName],
    renew: int,
    trusted: Sequence[x509.Certificate],
    now: datetime,
    latest: datetime,
) -> tuple[str, datetime]:
    """Return why a certificate has to be made (empty if it need not) and when the present one ends.

    ``latest`` is when a new one would end: with the authority at the latest, and then a new one is no better.
    """
    try:
        cert = x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / f"{name}.key").read_bytes(), None)
    except FileNotFoundError:
        return "there was none", now
    except (ValueError, TypeError):
        return "it could not be read", now
    end = cert.not_valid_after_utc
    if public_of(cert) != public(key):
        return "certificate and key did not belong together", end
    # While the authority is replaced, one of the authority before still counts: it is replaced as the last step.
    if not any(issued(cert, ca) for ca in trusted):
        return "another authority signed it", end
    if set(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) != set(wanted):
        return "its names were others", end
    if end - now < timedelta(days=renew) and latest > end:
        return "it ends soon", end
    return "", end


def issued(cert: x509.Certificate, ca: x509.Certificate) -> bool:
    """Say whether an authority signed a certificate."""
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def given(folder: Path, name: str, certificate: Path, key: Path, now: datetime, dry: bool) -> Result:
    """Check the operator's own pair and write it under the host's name.

    Raises:
        Refused: it cannot be read, does not belong together, or has ended.
    """
    try:
        chain, secret = certificate.read_bytes(), key.read_bytes()
        cert = x509.load_pem_x509_certificates(chain)[0]
        loaded = serialization.load_pem_private_key(secret, None)
    except (OSError, ValueError, TypeError) as e:
        raise Refused(
            f"{certificate} or {key} cannot be used: {e}; expected PEM, the chain after the certificate, and a key "
            "without a passphrase"
        ) from e
    if public_of(cert) != public(loaded):
        raise Refused(f"{certificate} and {key} do not belong together. Do: give the pair that was made together")
    if cert.not_valid_after_utc <= now:
        raise Refused(f"{certificate} has ended on {cert.not_valid_after_utc:%Y-%m-%d}. Do: give one that counts")
    same = all(
        (folder / f"{name}{end}").exists() and (folder / f"{name}{end}").read_bytes() == data
        for end, data in ((".pem", chain), (".key", secret))
    )
    if not same and not dry:
        place(folder, name, chain, secret)
    return Result("" if same else "another pair was given", cert.not_valid_after_utc)


# --- parts ---


def alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    """Return names and addresses as alternative names, each once.

    Raises:
        Refused: there is none, or one is neither a host name nor an address.
    """
    if not names:
        raise Refused("no name was given for a certificate; expected at least one host name or address")
    out: list[x509.GeneralName] = []
    for name in names:
        try:
            entry: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            if not _HOST.fullmatch(name.lower()):
                raise Refused(f"{name!r} is neither a host name nor an address") from None
            entry = x509.DNSName(name.lower())
        if entry not in out:
            out.append(entry)
    return out


def named(text: str) -> x509.Name:
    """Return a subject with one common name."""
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text[:64])])


def builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    """Return what every certificate has; Python 3.13 wants both key identifiers (RFC 5280, 4.2.1.1)."""
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


def usage(*, authority: bool) -> x509.KeyUsage:
    """Return the key usage of an authority or of a server."""
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


def pem(certs: Sequence[x509.Certificate]) -> bytes:
    """Return certificates as PEM."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certs)


def private(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public(key: PrivateKeyTypes) -> bytes:
    """Return the public half of a private key."""
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_of(cert: x509.Certificate) -> bytes:
    """Return the public key of a certificate."""
    return cert.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def place(folder: Path, name: str, chain: bytes, key: bytes) -> None:
    """Write a pair. Cut short between the two, they do not belong together, and the next run makes them again."""
    (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write(folder / f"{name}.key", key, 0o600)
    write(folder / f"{name}.pem", chain, 0o644)


def run(p: dict[str, Any], now: datetime, dry: bool) -> Result:
    """Do what the parameters ask for."""
    folder = Path(p["path"])
    if p["state"].startswith("authority"):
        return authority(folder, p["state"], now, dry)
    if not p["name"] or not _FILE.fullmatch(p["name"]) or p["name"] == "ca":
        raise Refused(f"{p['name']!r} cannot be the name of a certificate's files")
    if p["state"] == "given":
        return given(folder, p["name"], Path(p["certificate"]), Path(p["key"]), now, dry)
    return signed(folder, p["name"], p["names"], p["days"], p["renew_days"], now, force=p["force"], dry=dry)


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "state": {
                "type": "str",
                "choices": ["authority", "authority_rotated", "authority_settled", "signed", "given"],
                "required": True,
            },
            "name": {"type": "str"},
            "names": {"type": "list", "elements": "str", "default": []},
            "days": {"type": "int", "default": 825},
            "renew_days": {"type": "int", "default": 30},
            "force": {"type": "bool", "default": False},
            "certificate": {"type": "path"},
            "key": {"type": "path", "no_log": False},
        },
        required_if=[("state", "signed", ["name", "names"]), ("state", "given", ["name", "certificate", "key"])],
        supports_check_mode=True,
    )
    if not HAVE:
        module.fail_json(msg=missing_required_lib("cryptography"))
    try:
        result = run(module.params, datetime.now(UTC), module.check_mode)
    except Refused as e:
        module.fail_json(msg=str(e))
    except OSError as e:
        module.fail_json(msg=f"{e.filename} cannot be used: {e.strerror}. Do: make room or run as root, then again")
    else:
        if result.warning:
            module.warn(result.warning)
        module.exit_json(
            changed=bool(result.reason), reason=result.reason, not_after=f"{result.not_after:%Y-%m-%dT%H:%M:%SZ}"
        )


if __name__ == "__main__":
    main()
