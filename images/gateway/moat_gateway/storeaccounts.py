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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from moat_gateway import revstore, sealed, secretfiles, store
from moat_gateway.errors import StoreFailed, UnreadableSecret
from moat_gateway.settings import Settings

#: Names of the secrets, as files of one folder or fields of one JSON object.
NAMES = (
    "store_root_user", "store_root_password", "store_writer_access_key", "store_writer_secret_key",
    "store_reader_access_key", "store_reader_secret_key",
)  # fmt: skip
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_READ_BUCKET = ("s3:GetBucketLocation", "s3:GetBucketVersioning", "s3:ListBucket", "s3:ListBucketVersions")
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
    """Return the secrets from the files of a folder."""
    return {name: secretfiles.read_value(folder / name) for name in NAMES}


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
    return {n: raw[n] for n in NAMES}


def policies(buckets: Sequence[str], status_bucket: str) -> dict[str, dict[str, Any]]:
    """Return the two policies for a list of buckets, and the bucket of the nodes' reports."""
    whole = [f"arn:aws:s3:::{b}" for b in (*buckets, status_bucket)]
    inside = [f"arn:aws:s3:::{b}/*" for b in (*buckets, status_bucket)]
    written = [f"arn:aws:s3:::{b}/*" for b in buckets]
    reports = [f"arn:aws:s3:::{status_bucket}/{revstore.NODES}*"]

    def allow(actions: Sequence[str], resources: Sequence[str]) -> dict[str, Any]:
        return {"Effect": "Allow", "Action": list(actions), "Resource": list(resources)}

    def statements(*each: dict[str, Any]) -> dict[str, Any]:
        return {"Version": "2012-10-17", "Statement": list(each)}

    no_admin = {"Effect": "Deny", "Action": ["admin:*"]}
    read = [allow(_READ_BUCKET, whole), allow(_READ_OBJECT, inside)]
    return {
        "moat-reader": statements(*read, allow(("s3:PutObject",), reports), no_admin),
        "moat-writer": statements(
            *read,
            allow(("s3:PutObject",), written),
            allow(("s3:PutObject", "s3:DeleteObject"), reports),
            no_admin,
        ),
    }


def apply(settings: Settings, secrets: Mapping[str, str], buckets: Sequence[str], *, prune: bool = False) -> Outcome:
    """Make what is missing, set right what differs, and with ``prune`` remove accounts of earlier secrets.

    Raises:
        StoreFailed: the store does not answer, refuses, or is not MinIO.
    """
    status_bucket = settings.store_status_bucket
    for bucket in (*buckets, status_bucket):
        if not _BUCKET.fullmatch(bucket):
            raise StoreFailed(f"{bucket!r} cannot be a bucket's name", expected="3 to 63 of a-z, 0-9, - and .")
    accounts = [
        Account(role, secrets[f"store_{role}_access_key"], secrets[f"store_{role}_secret_key"])
        for role in ("reader", "writer")
    ]
    for account in accounts:
        if not account.access_key.startswith(account.policy + "-"):
            raise StoreFailed(
                f"the access key of the {account.role} does not begin with {account.policy}-",
                expected="a key made by this site: by its beginning an account of Moat is known",
                hint=f"restore store_{account.role}_access_key, or have both of its secrets made anew: "
                f"moat-site rotate_secrets -e rotate=store_{account.role}",
            )
    root = store.Credentials(secrets["store_root_user"], secrets["store_root_password"])
    changes: list[str] = []
    for bucket in buckets:
        state = store.init(settings, bucket=bucket, credentials=root)
        changes += [f"bucket {bucket} made"] if state.created else []
        changes += [f"versioning of {bucket} turned on"] if state.versioning_enabled else []
    if store.init_status(settings, credentials=root):
        changes.append(f"bucket {status_bucket} made")
    admin = Admin(settings, root)
    changes += _policies(admin, policies(buckets, status_bucket))
    changes += _users(admin, settings, accounts, buckets)
    if prune:
        changes += _prune(admin, accounts)
    return Outcome(settings.store_endpoint, (*buckets, status_bucket), tuple(changes))


def _policies(admin: Admin, wanted: Mapping[str, Any]) -> list[str]:
    there, changes = json.loads(admin.call("GET", "list-canned-policies")), []
    for name, policy in wanted.items():
        if name not in there or _sorted(there[name]) != _sorted(policy):
            admin.call("PUT", "add-canned-policy", {"name": name}, json.dumps(policy).encode())
            changes.append(f"policy {name} {'set' if name in there else 'made'}")
    return changes


def _users(admin: Admin, settings: Settings, accounts: Sequence[Account], buckets: Sequence[str]) -> list[str]:
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
            and store.accepts(settings, account.access_key, account.secret_key, buckets[0])
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


class Admin:
    """MinIO's admin interface, version 3: signed requests, secrets in envelopes."""

    def __init__(self, settings: Settings, root: store.Credentials) -> None:
        from botocore.httpsession import URLLib3Session

        self._settings = settings
        self._root = root
        self._session = URLLib3Session(verify=settings.store_ca_file or True, proxies={}, timeout=(5, 30))

    def users(self) -> dict[str, dict[str, Any]]:
        """Return every user by access key."""
        try:
            content = sealed.unseal(self._root.secret_key, self.call("GET", "list-users"))
        except sealed.NotSealed as e:
            raise StoreFailed("the store's list of users cannot be opened", found=str(e), expected="MinIO") from e
        users: dict[str, dict[str, Any]] = json.loads(content)
        return users

    def call_sealed(self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any]) -> None:
        """Make a request whose body holds a secret."""
        self.call(method, path, query, sealed.seal(self._root.secret_key, json.dumps(body).encode()))

    def call(self, method: str, path: str, query: Mapping[str, str] | None = None, body: bytes = b"") -> bytes:
        """Make a request and return the answer's body.

        Raises:
            StoreFailed: no answer, or a refusal.
        """
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials
        from botocore.exceptions import BotoCoreError, HTTPClientError

        where = f"{store.endpoint_url(self._settings.store_endpoint)}/minio/admin/v3/{path}"
        # MinIO refuses a body that some parser may have read as a form.
        headers = {"content-type": "application/octet-stream"} if body else {}
        url = f"{where}?{urlencode(query)}" if query else where
        request = AWSRequest(method, url, headers, data=body)
        S3SigV4Auth(Credentials(self._root.access_key, self._root.secret_key), "s3", store.REGION).add_auth(request)
        try:
            answer = self._session.send(request.prepare())
        except (BotoCoreError, HTTPClientError) as e:
            raise StoreFailed(
                f"cannot reach the administration of {self._settings.store_endpoint}", found=type(e).__name__
            ) from e
        content: bytes = answer.content
        if answer.status_code not in (200, 204):
            try:
                code = str(json.loads(content).get("Code", ""))
            except (ValueError, AttributeError):
                code = ""
            raise StoreFailed(
                f"the store refused {path}",
                found=f"HTTP {answer.status_code} {code}".strip(),
                expected="MinIO, and its root credentials",
                hint="check store_root_user and store_root_password",
            )
        return content
