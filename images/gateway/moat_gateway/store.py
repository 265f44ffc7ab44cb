# SPDX-License-Identifier: Apache-2.0
"""``moat-gateway store``: the bucket of configuration revisions in any S3 store: make it, or see that it is right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moat_gateway import secretfiles
from moat_gateway.allowlist import NotADestination, parse_host_port
from moat_gateway.deadline import Deadline, Unfinished
from moat_gateway.errors import StoreFailed
from moat_gateway.settings import Settings

REGION = "us-east-1"  # S3's word for "no region"; MinIO and others take it
_REQUEST = 60.0  # seconds for one request of an administrator


@dataclass(frozen=True)
class Credentials:
    """An access key and its secret key."""

    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class BucketState:
    """What was found, and done.

    Attributes:
        bucket: its name.
        endpoint: ``host:port``.
        created: the bucket was made now.
        versioning_enabled: versioning was turned on now.
    """

    bucket: str
    endpoint: str
    created: bool
    versioning_enabled: bool


def endpoint_url(text: str) -> str:
    """Return the URL of an endpoint given as ``HOST:PORT`` or with a scheme.

    Raises:
        StoreFailed: it is neither.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    try:
        if scheme not in ("http", "https"):
            raise NotADestination(text)
        return f"{scheme}://{parse_host_port(rest.rstrip('/'))}"
    except NotADestination:
        raise StoreFailed(
            "the store's endpoint cannot be used",
            found=repr(text),
            expected="HOST:PORT",
            hint="set MOAT_STORE_ENDPOINT or give --endpoint",
        ) from None


def init(
    settings: Settings,
    sleep: Callable[[float], None] = time.sleep,
    *,
    bucket: str | None = None,
    credentials: Credentials | None = None,
) -> BucketState:
    """Make the bucket if it is missing and turn versioning on; running it again changes nothing.

    Args:
        settings: of the store.
        sleep: between attempts.
        bucket: another one than the settings name.
        credentials: others than those of the settings' key files.

    Raises:
        StoreFailed: the store does not answer within ``store_timeout`` seconds, or refuses.
        UnreadableSecret: a key file cannot be read.
    """
    if bucket is not None:
        settings = replace(settings, store_bucket=bucket)
    client = connect(settings, credentials)
    bucket = settings.store_bucket
    deadline = time.monotonic() + settings.store_timeout
    there = _wait(lambda: _exists(client, bucket), settings, deadline, sleep)
    if not there:
        call(
            settings,
            "make the bucket",
            lambda: client.create_bucket(Bucket=bucket),
            ignore=("BucketAlreadyOwnedByYou",),
        )
    enabled = _versioning(settings, client) == "Enabled"
    if not enabled:
        call(
            settings,
            "turn versioning on",
            lambda: client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"}),
        )
        if _versioning(settings, client) != "Enabled":
            raise StoreFailed(f"the bucket {bucket} keeps no versions", expected="a store with bucket versioning")
    return BucketState(bucket, settings.store_endpoint, not there, not enabled)


def init_status(settings: Settings, *, credentials: Credentials | None = None) -> bool:
    """Make the bucket of the nodes' reports if it is missing; it keeps no versions. Return whether it was made.

    Raises:
        StoreFailed: the store does not answer, or refuses.
        UnreadableSecret: a key file cannot be read.
    """
    client, bucket = connect(settings, credentials), settings.store_status_bucket
    if call(settings, "look for the bucket of reports", lambda: _exists(client, bucket)):
        return False
    made = call(
        settings,
        "make the bucket of reports",
        lambda: client.create_bucket(Bucket=bucket),
        ignore=("BucketAlreadyOwnedByYou",),
    )
    return made is not None


def check(settings: Settings, *, credentials: Credentials | None = None) -> BucketState:
    """See that the bucket is there and keeps versions; change nothing.

    Raises:
        StoreFailed: it does not, or the store does not answer.
        UnreadableSecret: a key file cannot be read.
    """
    client = connect(settings, credentials)
    if not call(settings, "look for the bucket", lambda: _exists(client, settings.store_bucket)):
        raise StoreFailed(f"there is no bucket {settings.store_bucket}", hint="run `moat-gateway store init`")
    found = _versioning(settings, client)
    if found != "Enabled":
        raise StoreFailed(
            f"the bucket {settings.store_bucket} keeps no versions",
            found=found or "off",
            expected="Enabled",
            hint="run `moat-gateway store init`",
        )
    return BucketState(settings.store_bucket, settings.store_endpoint, False, False)


def read_small(settings: Settings, name: str, credentials: Credentials) -> str | None:
    """Return the one line of a small object; ``None`` if there is none.

    Raises:
        StoreFailed: the store does not answer, or refuses.
    """
    client = connect(settings, credentials)
    raw = call(
        settings,
        f"read {name}",
        lambda: client.get_object(Bucket=settings.store_bucket, Key=name)["Body"].read(4096),
        ignore=("NoSuchKey", "NoSuchBucket"),
    )
    return None if raw is None else raw.decode("utf-8", "replace").strip() or "another site"


def put_small(settings: Settings, name: str, text: str, credentials: Credentials) -> None:
    """Write a small object; the errors are those of :func:`read_small`."""
    client, body = connect(settings, credentials), f"{text}\n".encode()
    call(settings, f"write {name}", lambda: client.put_object(Bucket=settings.store_bucket, Key=name, Body=body))


def remove(settings: Settings, name: str, credentials: Credentials) -> None:
    """Remove an object; the errors are those of :func:`read_small`."""
    client = connect(settings, credentials)
    call(settings, f"remove {name}", lambda: client.delete_object(Bucket=settings.store_bucket, Key=name))


def accepts(settings: Settings, access_key: str, secret_key: str, bucket: str) -> bool:
    """Say whether the store takes these credentials for a bucket that they may list."""
    client = connect(settings, Credentials(access_key, secret_key))
    # A HEAD has no body: its code is the status.
    answer = call(settings, "look for the bucket", lambda: client.head_bucket(Bucket=bucket), ignore=("401", "403"))
    return answer is not None


def read_credentials(settings: Settings) -> Credentials:
    """Return the credentials in the settings' key files.

    Raises:
        UnreadableSecret: one cannot be read.
    """
    return Credentials(
        secretfiles.read_value(settings.store_access_key_file), secretfiles.read_value(settings.store_secret_key_file)
    )


def connect(
    settings: Settings,
    credentials: Credentials | None = None,
    *,
    connect_timeout: float = 5,
    read_timeout: float = 10,
    deadline: Deadline | None = None,
) -> Any:
    """Return an S3 client that tries each request once; for one thread.

    Args:
        settings: of the store.
        credentials: others than those of the settings' key files.
        connect_timeout: seconds.
        read_timeout: seconds without a byte.
        deadline: of each request with its answer.

    Raises:
        StoreFailed: the endpoint cannot be used, or boto3 is not installed.
        UnreadableSecret: a key file cannot be read.
    """
    url = endpoint_url(settings.store_endpoint)
    credentials = credentials or read_credentials(settings)
    try:
        import boto3
        from botocore.config import Config

        from moat_gateway.s3http import Session
    except ImportError as e:
        raise StoreFailed("boto3 is not installed", found=str(e), hint="install the bundle's wheels") from e
    config = Config(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        # A conditional write that is repeated after a lost answer would meet itself.
        retries={"total_max_attempts": 1, "mode": "standard"},
        # The checksums that newer SDKs add by default are refused by other implementations of S3.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"},
        proxies={},
    )
    ca: bool | str = str(Path(settings.store_ca_file)) if settings.store_ca_file else True
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
        config=config,
        verify=ca,
    )
    # boto3 takes no other HTTP by an argument.
    client._endpoint.http_session = Session(
        deadline or Deadline(_REQUEST), verify=ca, timeout=(connect_timeout, read_timeout), proxies={}
    )
    return client


def _exists(client: Any, bucket: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as e:
        if e.response["ResponseMetadata"].get("HTTPStatusCode") == 404:
            return False
        raise
    return True


def _versioning(settings: Settings, client: Any) -> str | None:
    answer = call(settings, "read versioning", lambda: client.get_bucket_versioning(Bucket=settings.store_bucket))
    status = answer.get("Status")
    return str(status) if status else None


def _wait(step: Callable[[], bool], settings: Settings, deadline: float, sleep: Callable[[float], None]) -> bool:
    """Run a step until the store answers; a refusal of the credentials is not waited for."""
    from botocore.exceptions import BotoCoreError, ClientError

    pause = 0.2
    while True:
        try:
            return step()
        except ClientError as e:
            # 5xx: the store is there and still starting.
            if e.response["ResponseMetadata"].get("HTTPStatusCode", 0) < 500 or time.monotonic() > deadline:
                raise failed(settings, "look for the bucket", e) from e
        except BotoCoreError as e:
            if time.monotonic() > deadline:
                raise failed(settings, "reach the store", e) from e
        sleep(pause)
        pause = min(2.0, pause * 1.5)


def call(settings: Settings, what: str, step: Callable[[], Any], ignore: tuple[str, ...] = ()) -> Any:
    """Return what a request gives; ``None`` for a refusal with a code of ``ignore``.

    A store that says 503 is asked again for ``store_timeout`` seconds: MinIO does that for a moment after it has said
    that it is ready, and on a busy machine for seconds.

    Raises:
        StoreFailed: any other refusal, or no answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + settings.store_timeout
    while True:
        try:
            return step()
        except ClientError as e:
            if e.response.get("Error", {}).get("Code") in ignore:
                return None
            if e.response["ResponseMetadata"].get("HTTPStatusCode") != 503 or time.monotonic() > deadline:
                raise failed(settings, what, e) from e
        except BotoCoreError as e:
            raise failed(settings, what, e) from e
        time.sleep(0.5)


def failed(settings: Settings, what: str, e: Exception, bucket: str | None = None) -> StoreFailed:
    """Return the refusal for an exception of boto3, without the secrets that may stand in it."""
    # The answer's code and status say enough; its message may repeat the access key.
    answer = getattr(e, "response", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        found = f"HTTP {status} {answer.get('Error', {}).get('Code', '')}".strip()
        hint = "check the two key files" if status in (401, 403) else "see the store's log"
        if answer.get("Error", {}).get("Code") == "NoSuchBucket":
            hint = "run `moat-gateway store init`"
    else:
        found, hint = type(e).__name__, "start the store, or correct MOAT_STORE_ENDPOINT"
        cause = getattr(e, "kwargs", {}).get("error")
        if isinstance(cause, Unfinished):
            found, hint = str(cause), "look at the network between here and the store, and at the store's log"
        elif type(e).__name__ == "SSLError":
            return _no_trust(settings, what, cause)
    return StoreFailed(
        f"cannot {what} at {settings.store_endpoint}",
        found=found,
        expected=f"bucket {bucket or settings.store_bucket}",
        hint=hint,
    )


def _no_trust(settings: Settings, what: str, cause: Any) -> StoreFailed:
    """Return the refusal for a store that answers, and whose certificate is not taken."""
    # urllib3 wraps what `ssl` said, and that names no secret.
    while isinstance(cause, Exception) and cause.args and isinstance(cause.args[0], Exception):
        cause = cause.args[0]
    found = getattr(cause, "verify_message", None) or getattr(cause, "reason", None) or str(cause)
    authority = f"the authority in {settings.store_ca_file}" if settings.store_ca_file else "an authority of this host"
    return StoreFailed(
        f"cannot {what} at {settings.store_endpoint}: no trusted connection",
        found=f"TLS: {found}",
        expected=f"a certificate for this name, from {authority}, that holds by this host's clock "
        f"({datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ})",
        hint="compare the store's certificate (names, dates) with MOAT_STORE_ENDPOINT, MOAT_STORE_CA_FILE and this "
        "host's clock, and correct the one that is wrong",
    )
