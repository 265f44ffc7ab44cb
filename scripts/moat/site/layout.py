# SPDX-License-Identifier: Apache-2.0
"""What is in the deployment folder, as one table (docs/architecture.md, section 6).

compose.yaml .env moat.pyz moat-firewall.service     managed: as the bundle and the options say
nginx/ valkey/ health/                               managed, except nginx/upstream.conf
config/   config.yaml gateway.yaml keys.yaml         kept: the operator's
secrets/<service>/<name>                             made once, mode 0600, owned by the service's user
site-keys/<id>.pub                                   the public halves of the keys that may sign revisions
tls/      cert.pem key.pem ca.pem                    made here, or the site's own
          before/ switch/                            for replacing them (deployment.write_pair)
client/   ca.pem, and the operator's client keys     for `docker compose run client`
state/    prepared.json
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets as _random
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from moat import ed25519, minisign
from moat.errors import KeyProblem, PrepareFailed
from moat.site.certificate import Pair
from moat.site.deployment import GATEWAY, MINIO, NGINX, SWITCH, VALKEY, Item, Kind, read_existing
from moat.site.verify import VerifiedBundle

PROFILES: Final = ("demo", "site")
HTTPS_PORT: Final = 8443
HTTP_PORT: Final = 8080
BIND: Final = "0.0.0.0"  # noqa: S104 - the service is for the site's network; --bind narrows it
#: Names that are always in a certificate made here: this host, and nginx as the containers on the edge call it.
OWN_NAMES: Final = ("localhost", "127.0.0.1", "nginx")

BUNDLE_FOLDER: Final = "compose/"
PYZ: Final = "moat.pyz"
RECORD: Final = "state/prepared.json"
CA: Final = "tls/ca.pem"
#: Names at the top of a deployment folder; installed.json's folder is state/ too.
TOP_LEVEL: Final = frozenset(
    {
        "compose.yaml", ".env", PYZ, "moat-firewall.service", "nginx", "valkey", "health", "config", "secrets",
        "site-keys", "tls", "client", "state",
    }
)  # fmt: skip
#: Files that every bundle must bring, by their path below compose/ (moat.pyz by its own).
NEEDED: Final = frozenset(
    {
        "compose.yaml", "moat-firewall.service", PYZ, "health/ready.py", "health/sync.py", "valkey/valkey.conf",
        "nginx/nginx.conf", "nginx/upstream.conf", "config/keys.yaml", "config/demo.yaml", "config/demo.gateway.yaml",
        "config/site.yaml", "config/site.gateway.yaml",
    }
)  # fmt: skip


def images_of(profile: str) -> tuple[str, ...]:
    """Return the names of the images that a profile runs."""
    return ("gateway", "minio", "nginx", "valkey", *(("model",) if profile == "demo" else ()))


@dataclass(frozen=True)
class Options:
    """What the operator chose; ``names`` are those of a certificate made here."""

    profile: str
    names: tuple[str, ...]
    https_port: int
    http_port: int
    bind: str


@dataclass(frozen=True)
class Record(Options):
    """``state/prepared.json``: the options of the last finished run, and the bundle that it came from.

    ``tls`` is ``made`` or ``given``.
    """

    version: str
    target: str
    manifest_sha256: str
    tls: str


def read_record(root: Path) -> Record | None:
    """Return the record of the last finished run, or ``None`` before the first.

    Raises:
        PrepareFailed: it is there but damaged.
    """
    data = read_existing(root / RECORD)
    if data is None:
        return None
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict) or set(raw) != {f.name for f in fields(Record)}:
            raise ValueError("other fields than this version of moat writes")
        raw["names"] = tuple(str(n) for n in raw["names"])
        for name, kind in (("profile", str), ("https_port", int), ("http_port", int), ("bind", str), ("tls", str)):
            if type(raw[name]) is not kind:
                raise ValueError(f"{name} is of another type")
        return Record(**raw)
    except (ValueError, TypeError) as e:
        raise PrepareFailed(
            f"{root / RECORD} cannot be understood",
            found=str(e),
            expected="the record that `moat prepare` wrote",
            hint="restore it from a backup, or remove it: the options must then be given again",
            path=str(root / RECORD),
        ) from e


@dataclass(frozen=True)
class Secrets:
    """The deployment's own secrets: read where they exist, else made now (kept out of ``repr``)."""

    values: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self.values)})"

    #: Where each lives; every other file that holds it is written from there.
    HOMES = {  # noqa: RUF012 - a constant of the class
        "master_key": "secrets/gateway/master_key",
        "valkey_password": "secrets/gateway/valkey_password",
        "store_user": "secrets/minio/root_user",
        "store_password": "secrets/minio/root_password",
        "reader_access_key": "secrets/config-sync/store_access_key",
        "reader_secret_key": "secrets/config-sync/store_secret_key",
        "writer_access_key": "secrets/admin/store_access_key",
        "writer_secret_key": "secrets/admin/store_secret_key",
        "site_key": "secrets/admin/site_key",
    }

    @classmethod
    def read_or_make(cls, root: Path) -> Secrets:
        """Read what is there and make what is not; nothing is written yet.

        Raises:
            PrepareFailed: one is there but empty, or is no ordinary file.
        """
        values: dict[str, str] = {}
        for name, home in cls.HOMES.items():
            data = read_existing(root / home)
            if data is None:
                values[name] = _make_secret(name)
                continue
            text = data.decode("utf-8", "replace").strip()
            if not text:
                raise PrepareFailed(
                    f"the secret {home} is empty",
                    expected="a value",
                    hint="restore it from a backup; or remove the file, and a new secret is made",
                    path=str(root / home),
                )
            values[name] = text
        return cls(values)

    def site_public_key(self, root: Path) -> minisign.PublicKey:
        """Return the public half of the site key.

        Raises:
            PrepareFailed: the site's own key in that file is none, or has a passphrase.
        """
        try:
            return minisign.parse_secret_key(self.values["site_key"].encode() + b"\n", None).public_key
        except KeyProblem as e:
            raise PrepareFailed(
                f"{self.HOMES['site_key']} cannot be used: {e.message}",
                found=e.found,
                expected="a secret key of minisign without a passphrase: nobody is there to type it",
                hint="restore it from a backup; or remove the file, and a new key is made",
                path=str(root / self.HOMES["site_key"]),
            ) from e


#: By their beginning the store's accounts are known as ours (`moat-gateway store accounts`).
_NAMES: Final = {"store_user": "moat-", "reader_access_key": "moat-reader-", "writer_access_key": "moat-writer-"}


def _make_secret(name: str) -> str:
    # 256 random bits each; the prefix lets scanners for leaked keys know ours.
    if name == "master_key":
        return "sk-moat-admin-" + _random.token_urlsafe(32)
    if name in _NAMES:
        return _NAMES[name] + _random.token_hex(8)
    if name == "site_key":
        seed = _random.token_bytes(32)
        key = minisign.SecretKey(_random.token_bytes(8), seed, ed25519.public_of(seed))
        return minisign.serialise_secret_key(key, passphrase=None, salt=b"").decode("ascii").strip()
    return _random.token_urlsafe(32)


def _line(text: str) -> bytes:
    return text.encode("utf-8") + b"\n"


def items(
    root: Path,
    files: Mapping[str, bytes],
    bundle: VerifiedBundle,
    options: Options,
    secrets: Secrets,
    pair: Pair | None,
) -> list[Item]:
    """Return everything that should be in the folder, folders first, the record last.

    Args:
        root: the deployment folder.
        files: the bundle's files by their path below ``compose/``.
        bundle: for the image references and the record.
        options: in force.
        secrets: read or new.
        pair: the site's own certificate, or ``None`` for one that is made here.
    """
    return [
        *_folders(),
        *_managed(root, files, bundle, options),
        *_kept(files, options),
        *_secret_files(secrets),
        _site_public_key(root, secrets),
        *_certificate(root, pair),
        Item(SWITCH, Kind.LINK, 0o777, 0, b"now"),
        _record(root, bundle, options, pair),
    ]


def _folders() -> list[Item]:
    def folder(path: str, mode: int, uid: int = 0) -> Item:
        return Item(path, Kind.FOLDER, mode, uid)

    return [
        *(folder(p, 0o755) for p in ("nginx", "valkey", "health")),
        # The gateway's user may write here, because `moat-gateway keys` runs as it; the gateways mount it read-only.
        folder("config", 0o750, GATEWAY),
        folder("secrets", 0o700),
        folder("secrets/gateway", 0o700, GATEWAY),
        folder("secrets/minio", 0o700, MINIO),
        folder("secrets/minio-init", 0o700, GATEWAY),
        folder("secrets/valkey", 0o700, VALKEY),
        folder("secrets/config-sync", 0o700, GATEWAY),
        folder("secrets/admin", 0o700, GATEWAY),
        folder("site-keys", 0o755),
        *(folder(p, 0o755) for p in ("tls", "tls/before", "tls/switch", "tls/switch/now", "tls/switch/before")),
        folder("client", 0o700, GATEWAY),
        folder("state", 0o755),
    ]


def _managed(root: Path, files: Mapping[str, bytes], bundle: VerifiedBundle, options: Options) -> list[Item]:
    managed = {
        name: data
        for name, data in files.items()
        if name in ("compose.yaml", PYZ) or name.startswith(("nginx/", "valkey/", "health/"))
    }
    del managed["nginx/upstream.conf"]  # kept: the operator marks members there
    managed["nginx/site.conf"] = _site_conf(options)
    managed["moat-firewall.service"] = files["moat-firewall.service"].replace(b"@DIR@", str(root).encode())
    managed[".env"] = _env(root, bundle, options)
    return [Item(name, Kind.MANAGED, 0o644, 0, data) for name, data in sorted(managed.items())]


def _site_conf(options: Options) -> bytes:
    return (
        "# SPDX-License-Identifier: Apache-2.0\n"
        "# Written by `moat prepare` from its options; edits are overwritten.\n"
        f"map $host $moat_https_port {{\n    default {options.https_port};\n}}\n"
    ).encode()


def _env(root: Path, bundle: VerifiedBundle, options: Options) -> bytes:
    images = {i.name: i.reference for i in bundle.manifest.images}
    lines = [
        "# Written by `moat prepare`; edits are overwritten. Change ports with its options. No secrets in here.",
        f"MOAT_VERSION={bundle.manifest.bundle.version}",
        f"COMPOSE_PROFILES={'demo' if options.profile == 'demo' else ''}",
        *(f"MOAT_IMAGE_{n.upper()}={images[n]}" for n in images_of(options.profile)),
        f"MOAT_DIR={root}",
        f"MOAT_NODE={_node()}",
        f"MOAT_BIND={options.bind}",
        f"MOAT_HTTPS_PORT={options.https_port}",
        f"MOAT_HTTP_PORT={options.http_port}",
    ]
    return "\n".join(lines).encode() + b"\n"


def _node() -> str:
    """Return the name of this host as `config status` shows it."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname()).strip("-.")
    return name or "node"


def _kept(files: Mapping[str, bytes], options: Options) -> list[Item]:
    return [
        Item("nginx/upstream.conf", Kind.KEPT, 0o644, 0, files["nginx/upstream.conf"]),
        Item("config/config.yaml", Kind.KEPT, 0o640, GATEWAY, files[f"config/{options.profile}.yaml"]),
        Item("config/gateway.yaml", Kind.KEPT, 0o640, GATEWAY, files[f"config/{options.profile}.gateway.yaml"]),
        Item("config/keys.yaml", Kind.KEPT, 0o640, GATEWAY, files["config/keys.yaml"]),
    ]


def _secret_files(secrets: Secrets) -> list[Item]:
    v = secrets.values
    digest = hashlib.sha256(v["valkey_password"].encode()).hexdigest()
    acl = (
        # For the health check: may say PING, and nothing else.
        "user default on nopass resetkeys resetchannels -@all +ping\n"
        f"user moat on #{digest} ~* resetchannels &* +@all -@admin -@dangerous +info\n"
    )
    homes = [
        Item(Secrets.HOMES["master_key"], Kind.SECRET, 0o600, GATEWAY, _line(v["master_key"])),
        Item(Secrets.HOMES["valkey_password"], Kind.SECRET, 0o600, GATEWAY, _line(v["valkey_password"])),
        Item(Secrets.HOMES["store_user"], Kind.SECRET, 0o600, MINIO, _line(v["store_user"])),
        Item(Secrets.HOMES["store_password"], Kind.SECRET, 0o600, MINIO, _line(v["store_password"])),
        *(
            Item(Secrets.HOMES[name], Kind.SECRET, 0o600, GATEWAY, _line(v[name]))
            for name in (
                "reader_access_key", "reader_secret_key", "writer_access_key", "writer_secret_key", "site_key",
            )
        ),
    ]  # fmt: skip
    # The same values for other users: they follow the homes above, so they count as managed.
    return [
        *homes,
        *(
            Item(f"secrets/minio-init/{name}", Kind.MANAGED, 0o600, GATEWAY, _line(v[source]))
            for name, source in (
                ("store_root_user", "store_user"),
                ("store_root_password", "store_password"),
                ("store_reader_access_key", "reader_access_key"),
                ("store_reader_secret_key", "reader_secret_key"),
                ("store_writer_access_key", "writer_access_key"),
                ("store_writer_secret_key", "writer_secret_key"),
            )
        ),
        Item("secrets/valkey/users.acl", Kind.MANAGED, 0o600, VALKEY, acl.encode()),
    ]


def _site_public_key(root: Path, secrets: Secrets) -> Item:
    # A name of its own for each key: an earlier one goes on counting until its file is removed, and what it signed
    # can still be read after a restart.
    public = secrets.site_public_key(root)
    return Item(f"site-keys/{public.id_text}.pub", Kind.KEPT, 0o644, 0, public.to_bytes())


def _certificate(root: Path, pair: Pair | None) -> list[Item]:
    if pair is not None:
        return [
            Item("tls/cert.pem", Kind.MANAGED, 0o644, 0, pair.cert),
            Item("tls/key.pem", Kind.MANAGED, 0o600, NGINX, pair.key),
            Item(CA, Kind.MANAGED, 0o644, 0, pair.ca),
            Item("client/ca.pem", Kind.MANAGED, 0o644, 0, pair.ca),
        ]
    # One that was made here: owner and mode are looked after, the content is certificate.make's.
    present = (("tls/cert.pem", 0o644, 0), ("tls/key.pem", 0o600, NGINX), (CA, 0o644, 0), ("client/ca.pem", 0o644, 0))
    return [Item(path, Kind.KEPT, mode, uid) for path, mode, uid in present if (root / path).exists()]


def _record(root: Path, bundle: VerifiedBundle, options: Options, pair: Pair | None) -> Item:
    before = read_record(root)
    b = bundle.manifest.bundle
    tls = "given" if pair is not None or (before is not None and before.tls == "given") else "made"
    record = Record(
        **asdict(options), version=b.version, target=b.target, manifest_sha256=bundle.manifest_sha256, tls=tls
    )
    text = json.dumps(asdict(record), sort_keys=True, indent=2) + "\n"
    return Item(RECORD, Kind.MANAGED, 0o644, 0, text.encode())
