# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway store accounts``: the buckets of a MinIO store, and the least accounts that can use them.

The writer may read, list and put, but neither delete nor reach the administration; the readers may read and list.
In the bucket of the nodes' reports, which keeps no versions, the readers (the nodes) may put reports as well, and the
writer may remove those of a node that is gone.
Both are explicitly denied everything of the admin interface, because MinIO otherwise lets every user change its own
secret and make further keys that outlive a rotation.

Running it again changes nothing. It is MinIO's own interface; with another store make the accounts with its tools.
"""

from __future__ import annotations

import json
import os
import re
import secrets as random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moat_gateway import revstore, secretfiles, store
from moat_gateway.errors import StoreFailed, UnreadableSecret
from moat_gateway.minioadmin import Admin
from moat_gateway.settings import Settings

#: Names of the secrets, as files of one folder or fields of one JSON object.
NAMES = (
    "store_root_user", "store_root_password", "store_writer_access_key", "store_writer_secret_key",
    "store_reader_access_key", "store_reader_secret_key",
)  # fmt: skip
#: Of the account with which another site's store writes here; only a receiving site has it.
REPLICATOR_KEYS = ("store_replicator_access_key", "store_replicator_secret_key")
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_READ_BUCKET = ("s3:GetBucketLocation", "s3:GetBucketVersioning", "s3:ListBucket", "s3:ListBucketVersions")
#: Without the first two MinIO does not take the target, without the last two it copies nothing; by the others it sees
#: what is there already when it tries again.
_REPLICATE_BUCKET = ("s3:GetBucketVersioning", "s3:ListBucket")
_REPLICATE_OBJECT = ("s3:GetObject", "s3:GetObjectVersion", "s3:PutObject", "s3:ReplicateObject")
_READ_OBJECT = ("s3:GetObject", "s3:GetObjectVersion")


@dataclass(frozen=True)
class Account:
    """One user of the store; its name is its access key."""

    role: str
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def policy(self) -> str:
        """The name of its policy, which is also the prefix of the access keys that this program makes."""
        return f"moat-{self.role}"


@dataclass(frozen=True)
class Outcome:
    """What was changed; empty lists are a store that was right."""

    endpoint: str
    buckets: tuple[str, ...]
    changes: tuple[str, ...]


def read_folder(folder: Path) -> dict[str, str]:
    """Return the secrets from the files of a folder; those of the replication only if they are there."""
    names = [*NAMES, *(n for n in REPLICATOR_KEYS if (folder / n).exists())]
    return {name: secretfiles.read_value(folder / name) for name in names}


def make_replicator_keys(folder: Path) -> bool:
    """Make the keys of the replication's account, if there are none; return whether they were made.

    Raises:
        UnreadableSecret: they cannot be written.
    """
    values = {
        REPLICATOR_KEYS[0]: f"moat-replicator-{random.token_urlsafe(24)}",
        REPLICATOR_KEYS[1]: random.token_urlsafe(32),
    }
    if all((folder / name).exists() for name in values):
        return False
    for name, value in values.items():
        path = folder / name
        try:
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "w", encoding="ascii") as f:
                f.write(value + "\n")
        except OSError as e:
            raise UnreadableSecret("the secret cannot be written", found=e.strerror or str(e), path=str(path)) from e
    return True


def read_json(text: str) -> dict[str, str]:
    """Return the secrets from one JSON object.

    Raises:
        UnreadableSecret: it is none, or lacks one.
    """
    try:
        raw = json.loads(text)
    except ValueError:
        raw = None
    if not isinstance(raw, dict) or any(not isinstance(raw.get(n), str) or not raw[n] for n in NAMES):
        missing = [n for n in NAMES if not isinstance(raw, dict) or not raw.get(n)]
        raise UnreadableSecret(
            "standard input does not hold the store's secrets",
            found=f"without {', '.join(missing)}" if missing else "a value that is no text",
            expected="one JSON object with " + ", ".join(NAMES),
        )
    return {n: raw[n] for n in (*NAMES, *REPLICATOR_KEYS) if isinstance(raw.get(n), str) and raw[n]}


def policies(buckets: Sequence[str], status_bucket: str, copy: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the policies.

    Args:
        buckets: that the writer writes.
        status_bucket: of the nodes' reports.
        copy: the one of the buckets that only receives another site's revisions, or ``None``.
    """
    whole = [f"arn:aws:s3:::{b}" for b in (*buckets, status_bucket)]
    inside = [f"arn:aws:s3:::{b}/*" for b in (*buckets, status_bucket)]
    written = [f"arn:aws:s3:::{b}/*" for b in buckets if b != copy]
    reports = [f"arn:aws:s3:::{status_bucket}/{revstore.NODES}*"]

    def allow(actions: Sequence[str], resources: Sequence[str]) -> dict[str, Any]:
        return {"Effect": "Allow", "Action": list(actions), "Resource": list(resources)}

    def statements(*each: dict[str, Any]) -> dict[str, Any]:
        return {"Version": "2012-10-17", "Statement": list(each)}

    no_admin = {"Effect": "Deny", "Action": ["admin:*"]}
    read = [allow(_READ_BUCKET, whole), allow(_READ_OBJECT, inside)]
    put = [allow(("s3:PutObject",), written)] if written else []
    made = {
        "moat-reader": statements(*read, allow(("s3:PutObject",), reports), no_admin),
        "moat-writer": statements(*read, *put, allow(("s3:PutObject", "s3:DeleteObject"), reports), no_admin),
    }
    if copy is not None:
        copied = [f"arn:aws:s3:::{copy}/{name}" for name in (f"{revstore.PREFIX}*", revstore.POINTER)]
        made["moat-replicator"] = statements(
            allow(_REPLICATE_BUCKET, [f"arn:aws:s3:::{copy}"]), allow(_REPLICATE_OBJECT, copied), no_admin
        )
    return made


def apply(
    settings: Settings,
    secrets: Mapping[str, str],
    buckets: Sequence[str],
    *,
    prune: bool = False,
    replica_of: str | None = None,
) -> Outcome:
    """Make what is missing, set right what differs, and with ``prune`` remove accounts of earlier secrets.

    Args:
        settings: of the store.
        secrets: by the names in :data:`NAMES`, and :data:`REPLICATOR_KEYS` at a receiving site.
        buckets: of revisions and what else the writer writes.
        prune: remove accounts of earlier keys.
        replica_of: make this a receiving site of the site of this name; a store that is one stays one.

    Raises:
        StoreFailed: the store does not answer, refuses, or is not MinIO.
    """
    status_bucket = settings.store_status_bucket
    for bucket in (*buckets, status_bucket):
        if not _BUCKET.fullmatch(bucket):
            raise StoreFailed(f"{bucket!r} cannot be a bucket's name", expected="3 to 63 of a-z, 0-9, - and .")
    if replica_of is not None and not _SITE.fullmatch(replica_of):
        raise StoreFailed(f"{replica_of!r} cannot be a site's name", expected="letters, digits, '.', '_' and '-'")
    accounts = _accounts(secrets, ("reader", "writer"))
    root = store.Credentials(secrets["store_root_user"], secrets["store_root_password"])
    changes: list[str] = []
    for bucket in buckets:
        state = store.init(settings, bucket=bucket, credentials=root)
        changes += [f"bucket {bucket} made"] if state.created else []
        changes += [f"versioning of {bucket} turned on"] if state.versioning_enabled else []
    if store.init_status(settings, credentials=root):
        changes.append(f"bucket {status_bucket} made")
    origin = store.read_small(settings, revstore.REPLICA, root)
    if replica_of is not None and origin != replica_of:
        store.put_small(settings, revstore.REPLICA, replica_of, root)
        changes.append(f"bucket {settings.store_bucket} made a copy of {replica_of}")
    copy = settings.store_bucket if replica_of is not None or origin is not None else None
    if copy is not None and all(name in secrets for name in REPLICATOR_KEYS):
        accounts += _accounts(secrets, ("replicator",))
    admin = Admin(settings, root)
    changes += _policies(admin, policies(buckets, status_bucket, copy))
    changes += _users(admin, settings, accounts)
    if prune:
        changes += _prune(admin, accounts)
    return Outcome(settings.store_endpoint, (*buckets, status_bucket), tuple(changes))


def promote(settings: Settings, secrets: Mapping[str, str], buckets: Sequence[str]) -> Outcome:
    """Make a receiving site's store a main one: the other site may not write here any more, the writer may.

    Raises:
        StoreFailed: the store does not answer, refuses, is not MinIO, or is no copy.
    """
    root = store.Credentials(secrets["store_root_user"], secrets["store_root_password"])
    origin = store.read_small(settings, revstore.REPLICA, root)
    if origin is None:
        raise StoreFailed(
            f"bucket {settings.store_bucket} is no copy of another site's",
            found="no object " + revstore.REPLICA,
            hint="nothing is to be done: `moat-gateway config push` works here",
        )
    admin = Admin(settings, root)
    # In this order: nobody writes while the two could both.
    names = sorted(n for n in admin.users() if n.startswith("moat-replicator-"))
    for name in names:
        admin.call("DELETE", "remove-user", {"accessKey": name})
    store.remove(settings, revstore.REPLICA, root)
    done = apply(settings, secrets, buckets)
    first = [f"{len(names)} account{'' if len(names) == 1 else 's'} of the replication from {origin} removed"]
    return replace(done, changes=(*first, f"bucket {settings.store_bucket} is a main one", *done.changes))


def _accounts(secrets: Mapping[str, str], roles: Sequence[str]) -> list[Account]:
    accounts = [Account(r, secrets[f"store_{r}_access_key"], secrets[f"store_{r}_secret_key"]) for r in roles]
    for account in accounts:
        if not account.access_key.startswith(account.policy + "-"):
            raise StoreFailed(
                f"the access key of the {account.role} does not begin with {account.policy}-",
                expected="a key made by this site: by its beginning an account of Moat is known",
                hint=f"restore store_{account.role}_access_key, or have both of its secrets made anew: "
                f"moat-site rotate_secrets -e rotate=store_{account.role}",
            )
    return accounts


def _policies(admin: Admin, wanted: Mapping[str, Any]) -> list[str]:
    there, changes = json.loads(admin.call("GET", "list-canned-policies")), []
    for name, policy in wanted.items():
        if name not in there or _sorted(there[name]) != _sorted(policy):
            admin.call("PUT", "add-canned-policy", {"name": name}, json.dumps(policy).encode())
            changes.append(f"policy {name} {'set' if name in there else 'made'}")
    return changes


def _users(admin: Admin, settings: Settings, accounts: Sequence[Account]) -> list[str]:
    there, changes = admin.users(), []
    for account in accounts:
        user = there.get(account.access_key)
        held = [p for p in (user or {}).get("policyName", "").split(",") if p]
        # The store tells nobody a secret; whether it is ours is seen by using it.
        # Without its policy even the right secret is refused: then it is set anew.
        right = (
            user is not None
            and user.get("status") == "enabled"
            and account.policy in held
            and store.accepts(settings, account.access_key, account.secret_key, settings.store_bucket)
        )
        if not right:
            admin.call_sealed(
                "PUT",
                "add-user",
                {"accessKey": account.access_key},
                {"secretKey": account.secret_key, "status": "enabled"},
            )
            changes.append(f"{account.role} {'set' if user else 'made'}")
        if held != [account.policy]:
            wrong = [p for p in held if p != account.policy]
            if wrong:
                admin.call_sealed(
                    "POST", "idp/builtin/policy/detach", {}, {"policies": wrong, "user": account.access_key}
                )
            if account.policy not in held:
                admin.call_sealed(
                    "POST", "idp/builtin/policy/attach", {}, {"policies": [account.policy], "user": account.access_key}
                )
            changes.append(f"{account.role} given the policy {account.policy} alone")
    return changes


def _prune(admin: Admin, accounts: Sequence[Account]) -> list[str]:
    mine = {a.access_key for a in accounts}
    prefixes = tuple(a.policy + "-" for a in accounts)
    old = sorted(name for name in admin.users() if name.startswith(prefixes) and name not in mine)
    for name in old:
        admin.call("DELETE", "remove-user", {"accessKey": name})
    return ["an account of earlier keys removed"] * len(old)


def _sorted(value: Any) -> Any:
    """Return a policy in one order: MinIO gives lists of actions and resources back in its own."""
    if isinstance(value, dict):
        return {k: _sorted(v) for k, v in value.items()}
    if isinstance(value, list):
        return sorted((_sorted(v) for v in value), key=lambda v: json.dumps(v, sort_keys=True))
    return value
