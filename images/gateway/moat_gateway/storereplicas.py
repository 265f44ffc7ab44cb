# SPDX-License-Identifier: Apache-2.0
"""Two sites: MinIO at the main site copies its revisions to MinIO at another one, and who may push then.

One direction, one writer. The **main** site's store has the pointer that administrators move; the **receiving** site's
store is a copy that its own nodes follow, so that they go on, restart and report while the link is down.

- The receiving store says so itself: the object ``replica`` names the main site, its writer account may not write
  revisions any more, and `config push` there is refused. Only the account of the replication writes: ``revisions/*``
  and ``current``, which the nodes verify as ever; it can neither delete nor read anything else.
- Link down: the receiving site keeps the last revision that arrived. Nothing is lost; when the link is back, the newest
  pointer and its archive follow by themselves (``_NUDGE`` in :mod:`moat_gateway.s3store`), older ones later. A pointer
  that arrives before its archive is refused by the nodes for that moment and tried again.
- Main site lost: `moat-gateway store promote` at the receiving site removes the object, closes the account of the
  replication, and lets the writer write. From then on it is the main site. The lost one, if it comes back, must be made
  a receiving one (`store accounts --replica-of`) **before** anybody pushes there.
- Both pushed (split brain): each site's nodes keep their own; a number that both used for different contents is refused
  by the nodes of the other (its manifest has another sha256), so neither site changes silently. Choose one as the main
  site, make the other a receiving one, and push once with `--revision N` above both.

The sites' own reports (``moat-status``) stay at each site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moat_gateway import revstore, store
from moat_gateway.errors import StoreFailed
from moat_gateway.minioadmin import Admin
from moat_gateway.settings import Settings
from moat_gateway.storeaccounts import REPLICATOR_KEYS

_RULES = {"moat-revisions": revstore.PREFIX, "moat-pointer": revstore.POINTER}


#: What MinIO says of a target that it does not take, and what to do.
_HINTS = {
    "RemoteConnection": "see that this store reaches it, trusts its certificate, and has the keys that "
    "`moat-gateway store accounts --replica-of SITE` made there",
    "RemoteTargetNotFound": "run `moat-gateway store accounts --replica-of SITE` there, or give --to-bucket",
    "NotVersioned": "run `moat-gateway store accounts --replica-of SITE` there",
}


@dataclass(frozen=True)
class Target:
    """Where the revisions are copied to.

    Attributes:
        endpoint: ``HOST:PORT``, or with a scheme; as this store reaches it.
        bucket: there.
    """

    endpoint: str
    bucket: str

    @property
    def host(self) -> str:
        """``HOST:PORT``."""
        return store.endpoint_url(self.endpoint).partition("://")[2]

    @property
    def secure(self) -> bool:
        """With TLS."""
        return store.endpoint_url(self.endpoint).startswith("https")


@dataclass(frozen=True)
class Replication:
    """How the copying is.

    Attributes:
        endpoint: this store.
        bucket: of this store.
        target: ``HOST:PORT`` of the other one; empty if there is none.
        target_bucket: there.
        online: this store reaches it; ``None`` without one.
        revision: in force here, or ``None``.
        pointer: ``COMPLETED``, ``PENDING``, ``FAILED``, or empty if it was never to be copied.
        archive: the same for its archive.
        changes: what was done now.
    """

    endpoint: str
    bucket: str
    target: str
    target_bucket: str
    online: bool | None
    revision: int | None
    pointer: str
    archive: str
    changes: tuple[str, ...] = ()


def replicate(settings: Settings, secrets: Mapping[str, str], target: Target) -> Replication:
    """Have this store copy its revisions to another one; running it again changes nothing.

    Args:
        settings: of this store.
        secrets: its root credentials, and the keys of the other site's replication account.
        target: the other one.

    Raises:
        StoreFailed: a store does not answer, refuses, keeps no versions, is not MinIO, or is a copy itself.
    """
    root = _root(secrets)
    store.check(settings, credentials=root)
    _not_a_copy(settings, root)
    admin, changes = Admin(settings, root), []
    arn, change = _target(admin, settings, secrets, target)
    changes += [change] if change else []
    client = store.connect(settings, root)
    if _rules(settings, client) != _wanted(arn):
        configuration = {"Role": arn, "Rules": [_rule(name, arn, i) for i, name in enumerate(_RULES, 1)]}
        store.call(
            settings,
            "set up the replication",
            lambda: client.put_bucket_replication(Bucket=settings.store_bucket, ReplicationConfiguration=configuration),
        )
        changes.append("rules of the replication set")
    if changes:
        # What was there before is copied as well.
        admin.s3("PUT", settings.store_bucket, {"replication-reset": "", "arn": arn})
    return replace(_state(settings, root), changes=tuple(changes))


def remove(settings: Settings, secrets: Mapping[str, str]) -> Replication:
    """End the copying; what was copied stays."""
    root = _root(secrets)
    client, admin, bucket = store.connect(settings, root), Admin(settings, root), settings.store_bucket
    there = admin.targets(bucket)
    if _rules(settings, client):
        store.call(settings, "end the replication", lambda: client.delete_bucket_replication(Bucket=bucket))
    # MinIO removes the targets of rules with them, but not one that was left without rules.
    for found in admin.targets(bucket):
        admin.call("DELETE", "remove-remote-target", {"bucket": bucket, "arn": found["arn"]})
    changes = [f"copying to {t['endpoint']} ended" for t in there]
    return replace(_state(settings, root), changes=tuple(changes))


def state(settings: Settings, secrets: Mapping[str, str]) -> Replication:
    """Return how the copying is.

    Raises:
        StoreFailed: the store does not answer, or refuses.
    """
    return _state(settings, _root(secrets))


def _state(settings: Settings, root: store.Credentials) -> Replication:
    client = store.connect(settings, root)
    targets = Admin(settings, root).targets(settings.store_bucket)
    found: Mapping[str, Any] = targets[0] if targets else {}
    number = None
    pointer = _head(settings, client, revstore.POINTER) if found else ""
    archive = ""
    if found and pointer is not None:
        answer = store.call(
            settings,
            "read the pointer",
            lambda: client.get_object(Bucket=settings.store_bucket, Key=revstore.POINTER)["Body"].read(
                revstore.MAX_POINTER
            ),
        )
        named = revstore.parse_pointer(answer, "", settings.store_endpoint)
        number = named.revision
        archive = _head(settings, client, named.object) or ""
    return Replication(
        endpoint=settings.store_endpoint,
        bucket=settings.store_bucket,
        target=str(found.get("endpoint", "")),
        target_bucket=str(found.get("targetbucket", "")),
        online=bool(found["isOnline"]) if "isOnline" in found else None,
        revision=number,
        pointer=pointer or "",
        archive=archive,
    )


def _root(secrets: Mapping[str, str]) -> store.Credentials:
    return store.Credentials(secrets["store_root_user"], secrets["store_root_password"])


def _not_a_copy(settings: Settings, root: store.Credentials) -> None:
    origin = store.read_small(settings, revstore.REPLICA, root)
    if origin is not None:
        raise StoreFailed(
            f"this store is a copy of {origin}: its revisions are not copied further",
            found=f"the object {revstore.REPLICA} in bucket {settings.store_bucket}",
            expected="the main site's store",
            hint="run this at the main site; if that site is lost, `moat-gateway store promote` first",
        )


def _target(admin: Admin, settings: Settings, secrets: Mapping[str, str], target: Target) -> tuple[str, str]:
    """Return the ARN of the target, and what was changed."""
    access, secret = (secrets[name] for name in REPLICATOR_KEYS)
    there = admin.targets(settings.store_bucket)
    other = [t for t in there if (t["endpoint"], t["targetbucket"]) != (target.host, target.bucket)]
    if other:
        raise StoreFailed(
            "the revisions are copied to another place already",
            found=f"{other[0]['endpoint']}, bucket {other[0]['targetbucket']}",
            expected=f"{target.host}, bucket {target.bucket}",
            hint="end that first: `moat-gateway store replicate --remove`",
        )
    wanted = {
        "sourcebucket": settings.store_bucket,
        "endpoint": target.host,
        "credentials": {"accessKey": access, "secretKey": secret},
        "targetbucket": target.bucket,
        "secure": target.secure,
        "path": "on",
        "api": "s3v4",
        "type": "replication",
        "region": store.REGION,
        "replicationSync": False,
        # A miss here is a miss; it is not asked of the other site.
        "disableProxy": True,
    }
    query = {"bucket": settings.store_bucket}
    if there:
        same = there[0]["credentials"].get("accessKey") == access and there[0]["secure"] == target.secure
        if same:
            return str(there[0]["arn"]), ""
        query |= {"update": "true", "creds": "true"}
        wanted["arn"] = there[0]["arn"]
    try:
        answer = admin.call_sealed("PUT", "set-remote-target", query, wanted)
    except StoreFailed as e:
        hint = next((text for code, text in _HINTS.items() if code in (e.found or "")), None)
        if hint is None:
            raise
        raise StoreFailed(
            f"the store at {target.host} cannot be the target",
            found=e.found,
            expected=f"MinIO with the bucket {target.bucket}, which keeps versions, and the account of the replication",
            hint=hint,
        ) from e
    return str(json.loads(answer)), f"target {target.host} {'given other keys' if there else 'made'}"


def _rule(name: str, arn: str, priority: int) -> dict[str, Any]:
    return {
        "ID": name,
        "Priority": priority,
        "Status": "Enabled",
        "Filter": {"Prefix": _RULES[name]},
        "Destination": {"Bucket": arn},
        "DeleteMarkerReplication": {"Status": "Disabled"},
        "ExistingObjectReplication": {"Status": "Enabled"},
    }


def _wanted(arn: str) -> list[tuple[str, str, str, str]]:
    return sorted((name, prefix, "Enabled", arn) for name, prefix in _RULES.items())


def _rules(settings: Settings, client: Any) -> list[tuple[str, str, str, str]]:
    answer = store.call(
        settings,
        "read the replication",
        lambda: client.get_bucket_replication(Bucket=settings.store_bucket),
        ignore=("ReplicationConfigurationNotFoundError",),
    )
    rules: Sequence[Mapping[str, Any]] = answer["ReplicationConfiguration"]["Rules"] if answer else ()
    return sorted(
        (r["ID"], r.get("Filter", {}).get("Prefix", ""), r["Status"], r["Destination"]["Bucket"]) for r in rules
    )


def _head(settings: Settings, client: Any, name: str) -> str | None:
    """Return an object's replication status; ``None`` if it is not there."""
    answer = store.call(
        settings, f"look at {name}", lambda: client.head_object(Bucket=settings.store_bucket, Key=name), ignore=("404",)
    )
    return str(answer.get("ReplicationStatus", "")) if answer else None
