# SPDX-License-Identifier: Apache-2.0
"""Makes what an operator brings: an authority, the entrance's certificate with its key, and a second pair of these.

One JSON object on stdout: file names and their text. Nothing of it is used anywhere but on a test host.
"""

import datetime
import ipaddress
import json
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NAMES = ("gate.alternative.example", "localhost", "127.0.0.1", "::1")


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_text(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode("ascii")


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=90))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def main() -> int:
    """Make them and print them."""
    authority = ec.generate_private_key(ec.SECP256R1())
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    ca = _builder("Authority of the operator", "Authority of the operator", authority).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = ca.add_extension(usage, critical=True)
    pem = serialization.Encoding.PEM
    files = {"ca.pem": ca.sign(authority, hashes.SHA256()).public_bytes(pem).decode("ascii")}
    for file in ("entrance", "second"):
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = _builder(f"{file} of the operator", "Authority of the operator", key)
        leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        leaf = leaf.add_extension(x509.SubjectAlternativeName([_general(n) for n in NAMES]), critical=False)
        leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        leaf = leaf.add_extension(signer, critical=False)
        files[f"{file}.pem"] = leaf.sign(authority, hashes.SHA256()).public_bytes(pem).decode("ascii")
        files[f"{file}.key"] = _key_text(key)
    print(json.dumps(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
