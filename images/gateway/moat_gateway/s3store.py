# SPDX-License-Identifier: Apache-2.0
"""Revisions in any S3 store, through boto3: conditional reads of the pointer, conditional writes, short time-outs.

Key files and the CA's file are looked at before each request and read again when they changed. A host whose clock is
wrong is refused by S3's signatures; the store's own clock, which every answer names, is then used to sign.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from moat_gateway import revstore, store
from moat_gateway.deadline import Deadline
from moat_gateway.errors import BadRevision, StoreFailed
from moat_gateway.revstore import NodeReport, Pointer, Stored
from moat_gateway.settings import Settings

POINTER_TIMEOUT = 2.0  # seconds to connect, and without a byte: a store that is gone is noticed at once
_POINTER_DEADLINE = 8.0  # seconds for a whole small answer: a store that trickles is not waited for
_ARCHIVE_TIMEOUT = 30.0  # seconds without a byte
ARCHIVE_DEADLINE = 300.0  # seconds for a whole archive
_PAGES = 200  # of a list, of a thousand names each: a store that always has one more is not followed
_SKEW = timedelta(seconds=60)  # below this, S3 does not mind
_LISTED = {"Key", "Size", "ETag", "LastModified"}  # what each entry of a list must have
_YEARS = range(2020, 2200)  # a store that names another year has no clock that could be followed
_SIGNER = "moat-v4"
_OFFSET = "moat_offset"
_CHUNK = 1 << 18  # bytes
#: Seconds after which the pointer is read whole although it may be unchanged. What MinIO could not replicate to another
#: site while the link was cut, it tries again when somebody reads it, else only minutes or hours later.
_NUDGE = 15.0
_PROBE = "probe"
_NO_SUCH_ETAG = '"00000000000000000000000000000000"'


class S3Store:
    """A bucket as source and store.

    Args:
        settings: of the store.
    """

    kind = "s3"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._short = _Connection(settings, POINTER_TIMEOUT, POINTER_TIMEOUT, _POINTER_DEADLINE)
        self._long = _Connection(settings, 5.0, _ARCHIVE_TIMEOUT, ARCHIVE_DEADLINE)
        self._nudged = time.monotonic()
        self._seen: dict[str, tuple[str, bytes]] = {}  # reports by name: etag and bytes

    def describe(self) -> str:
        """Say where this is."""
        return f"bucket {self._settings.store_bucket} at {self._settings.store_endpoint}"

    def pointer(self, etag: str | None = None) -> Pointer | None:
        """See :class:`revstore.Source`."""
        # See _NUDGE: a conditional read is none in this respect.
        whole = time.monotonic() - self._nudged >= _NUDGE
        extra = {"IfNoneMatch": etag} if etag and not whole else {}
        answer = self._short.ask("get_object", Bucket=self._settings.store_bucket, Key=revstore.POINTER, **extra)
        if answer.status == 304:
            return None
        if answer.code == "NoSuchKey" or (answer.status == 404 and answer.code != "NoSuchBucket"):
            raise revstore.no_revision(self.describe())
        fields = answer.take(self._settings, "read the pointer")
        found = str(fields.get("ETag", ""))
        try:
            raw = self._body(self._short, fields, revstore.MAX_POINTER, revstore.POINTER)
        except BadRevision:  # too large for one
            raw = b""
        if whole:
            self._nudged = time.monotonic()
        if found == etag:
            self._nudge(raw)
            return None
        return revstore.parse_pointer(raw, found, self.describe())

    def _nudge(self, raw: bytes) -> None:
        """Look at the current archive as well, for the same reason; what comes of it does not matter."""
        with contextlib.suppress(BadRevision):
            name = revstore.parse_pointer(raw, "", self.describe()).object
            self._short.ask("head_object", Bucket=self._settings.store_bucket, Key=name)

    def fetch(self, pointer: Pointer, limit_bytes: int) -> bytes:
        """See :class:`revstore.Source`."""
        if pointer.size > limit_bytes:
            raise revstore.too_large(self.describe(), pointer.object, pointer.size, limit_bytes)
        raw = self._archive(pointer.object, pointer.size, revstore.PUSH_AGAIN)
        revstore.check(raw, pointer, self.describe())
        return raw

    def get(self, number: int) -> bytes:
        """See :class:`revstore.Store`."""
        return self._archive(revstore.object_name(number), self._settings.revision_max << 20)

    def _archive(self, name: str, limit: int, *hint: str) -> bytes:
        answer = self._long.ask("get_object", Bucket=self._settings.store_bucket, Key=name)
        if answer.code == "NoSuchKey":
            raise revstore.missing(self.describe(), name, *hint)
        fields = answer.take(self._settings, f"read {name}")
        return self._body(self._long, fields, limit, name)

    def _body(self, connection: _Connection, fields: Mapping[str, Any], limit: int, name: str) -> bytes:
        """Read an answer's body: not beyond ``limit`` bytes, and not beyond the connection's deadline."""
        from botocore.exceptions import BotoCoreError, HTTPClientError

        length = int(fields.get("ContentLength", 0))
        body, out, read = fields["Body"], [], 0
        deadline = connection.deadline
        try:
            with contextlib.closing(body):
                if length > limit:
                    raise revstore.too_large(self.describe(), name, length, limit)
                while chunk := body.read(_CHUNK):
                    out.append(chunk)
                    read += len(chunk)
                    if read > limit:
                        raise revstore.too_large(self.describe(), name, read, limit)
            if deadline.over:
                raise HTTPClientError(error=deadline.late())
        except (BotoCoreError, OSError, ValueError) as e:
            cause = HTTPClientError(error=deadline.late()) if deadline.over else e
            raise store.failed(self._settings, f"read all of {name}", cause) from e
        finally:
            deadline.end()
        return b"".join(out)

    def list(self) -> list[Stored]:
        """See :class:`revstore.Store`."""
        found = []
        for entry in self._list(self._settings.store_bucket, revstore.PREFIX)[0]:
            number = revstore.number_of(entry["Key"].removeprefix(revstore.PREFIX))
            if number is not None:
                found.append(Stored(number, int(entry["Size"]), entry["LastModified"].timestamp()))
        return sorted(found, key=lambda s: s.number)

    def _list(self, bucket: str, prefix: str) -> tuple[Sequence[Mapping[str, Any]], datetime]:
        """Return the objects below a prefix, and the store's own time."""
        found: Any = []
        more: dict[str, str] = {}
        for _ in range(_PAGES):
            answer = self._short.ask("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            fields = answer.take(self._settings, f"list {prefix} of {bucket}")
            found += [e for e in fields.get("Contents", []) if e.keys() >= _LISTED]
            if not fields.get("IsTruncated"):
                return found, answer.date or datetime.now(UTC)
            token = fields.get("NextContinuationToken")
            if not token or token == more.get("ContinuationToken"):
                break
            more = {"ContinuationToken": token}
        raise StoreFailed(
            f"the list of {prefix} at {self._settings.store_endpoint} has no end",
            found=f"{len(found)} names and more to come",
            expected=f"a list of at most {_PAGES * 1000} names",
            hint="see what else is written to the bucket, and the store's log",
            path=f"bucket {bucket}",
        )

    def probe(self) -> None:
        """See :class:`revstore.Store`; nothing but the object ``probe`` is touched."""
        bucket = self._settings.store_bucket
        first = self._short.ask("put_object", Bucket=bucket, Key=_PROBE, Body=b"", IfNoneMatch="*")
        if first.status != 412:
            first.take(self._settings, "try a conditional write")
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": _NO_SUCH_ETAG}):
            answer = self._short.ask("put_object", Bucket=bucket, Key=_PROBE, Body=b"", **condition)
            if answer.status != 412:
                if answer.status != 200 and answer.status != 501:
                    answer.take(self._settings, "try a conditional write")
                raise StoreFailed(
                    f"the store at {self._settings.store_endpoint} does not hold to conditions of a write",
                    found=f"HTTP {answer.status} for a write with {next(iter(condition))} that must be refused",
                    expected="HTTP 412",
                    hint="use a store with conditional writes; without them two administrators overwrite each other",
                )

    def upload(self, number: int, raw: bytes) -> None:
        """See :class:`revstore.Store`."""
        name = revstore.object_name(number)
        digest = base64.b64encode(hashlib.md5(raw, usedforsecurity=False).digest()).decode()
        answer = self._long.ask(
            "put_object",
            Bucket=self._settings.store_bucket,
            Key=name,
            Body=raw,
            IfNoneMatch="*",
            # So that the store itself refuses what was cut or changed on the way.
            ContentMD5=digest,
            ContentType="application/x-tar",
        )
        if answer.status in (409, 412):
            raise revstore.taken(self.describe(), number)
        answer.take(self._settings, f"upload {name}")

    def move(self, pointer: Pointer, etag: str | None) -> Pointer:
        """See :class:`revstore.Store`."""
        raw = pointer.to_bytes()
        condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        answer = self._short.ask(
            "put_object",
            Bucket=self._settings.store_bucket,
            Key=revstore.POINTER,
            Body=raw,
            ContentType="application/json",
            CacheControl="no-store",
            **condition,
        )
        if answer.status == 200:
            return revstore.parse_pointer(raw, str(answer.fields.get("ETag", "")), self.describe())
        if answer.error is not None and (not answer.status or answer.status >= 500):
            # A proxy's 504, or a store that failed after it had written, is no answer to the question either.
            return self._moved(pointer, etag, answer)
        # 404: a condition on an object that is gone.
        if answer.status in (409, 412) or answer.code == "NoSuchKey":
            raise revstore.conflict(self.describe(), self._now())
        answer.take(self._settings, "move the pointer")
        raise AssertionError("unreachable")

    def _moved(self, pointer: Pointer, etag: str | None, answer: _Answer) -> Pointer:
        """The answer to a move was lost, or is none: look what became of it."""
        try:
            now = self._now()
        except StoreFailed as e:
            raise StoreFailed(
                f"whether revision {pointer.revision} is in force is not known: no answer came, or that of a failure, "
                "while the pointer was moved",
                found=e.found,
                expected=f"revision {pointer.revision}",
                hint="look at `moat-gateway config status` when the store answers again; pushing again does no harm",
            ) from e
        if now is not None and now.to_bytes() == pointer.to_bytes():
            return now
        if (now.etag if now else None) != etag:
            raise revstore.conflict(self.describe(), now)
        answer.take(self._settings, "move the pointer")
        raise AssertionError("unreachable")

    def _now(self) -> Pointer | None:
        with contextlib.suppress(BadRevision):
            return self.pointer()
        return None

    def report(self, node: str, raw: bytes) -> None:
        """See :class:`revstore.Store`."""
        answer = self._short.ask(
            "put_object",
            Bucket=self._settings.store_status_bucket,
            Key=f"{revstore.NODES}{node}.json",
            Body=raw,
            ContentType="application/json",
        )
        answer.take(self._settings, "report this node", self._settings.store_status_bucket)

    def reports(self) -> Mapping[str, NodeReport]:
        """See :class:`revstore.Store`; only what changed since the last call is fetched."""
        bucket, found, seen = self._settings.store_status_bucket, {}, {}
        entries, now = self._list(bucket, revstore.NODES)
        for entry in entries:
            key, etag = entry["Key"], entry["ETag"]
            node = revstore.node_of(key.removeprefix(revstore.NODES))
            if node is None:
                continue
            age = max(0.0, (now - entry["LastModified"]).total_seconds())
            if int(entry["Size"]) > revstore.MAX_REPORT:
                found[node] = NodeReport(revstore.UNREADABLE, age)
                continue
            old = self._seen.get(key)
            if old is None or old[0] != etag:
                answer = self._short.ask("get_object", Bucket=bucket, Key=key)
                if answer.code == "NoSuchKey":
                    continue
                fields = answer.take(self._settings, f"read {key}", bucket)
                old = str(fields.get("ETag", "")), self._body(self._short, fields, revstore.MAX_REPORT, key)
            seen[key] = old
            found[node] = NodeReport(old[1], age)
        self._seen = seen
        return found

    def forget(self, node: str) -> bool:
        """See :class:`revstore.Store`."""
        bucket, key = self._settings.store_status_bucket, f"{revstore.NODES}{node}.json"
        there = any(e["Key"] == key for e in self._list(bucket, key)[0])
        if there:
            answer = self._short.ask("delete_object", Bucket=bucket, Key=key)
            answer.take(self._settings, f"remove {key}", bucket)
        return there

    def replica_of(self) -> str | None:
        """See :class:`revstore.Store`."""
        answer = self._short.ask("get_object", Bucket=self._settings.store_bucket, Key=revstore.REPLICA)
        if answer.code in ("NoSuchKey", "NoSuchBucket"):
            return None
        fields = answer.take(self._settings, "look whether this is another site's copy")
        raw = self._body(self._short, fields, revstore.MAX_POINTER, revstore.REPLICA)
        text = raw.decode("utf-8", "replace").strip()
        return text if text and text.isprintable() else "another site"


class _Answer:
    """What came of one request: the fields, or the status and code of a refusal, or no answer at all."""

    def __init__(self, fields: Mapping[str, Any], error: Exception | None = None) -> None:
        self.fields = fields
        self.error = error
        meta = fields.get("ResponseMetadata", {})
        #: HTTP status; 0 without an answer.
        self.status = int(meta.get("HTTPStatusCode", 0))
        self.code = str(fields.get("Error", {}).get("Code", "")) if error is not None else ""
        self.date: datetime | None = None
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            found = parsedate_to_datetime(meta.get("HTTPHeaders", {}).get("date", ""))
            # Without a zone (`-0000`) it is UTC as well.
            found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
            self.date = found if found.year in _YEARS else None

    def take(self, settings: Settings, what: str, bucket: str | None = None) -> Mapping[str, Any]:
        """Return the fields.

        Raises:
            StoreFailed: it was no success.
        """
        if self.error is None:
            return self.fields
        raise store.failed(settings, what, self.error, bucket) from self.error


class _Connection:
    """A client that follows its key files, and the store's clock where this host's is wrong."""

    def __init__(self, settings: Settings, connect_timeout: float, read_timeout: float, seconds: float) -> None:
        self._settings = settings
        self._timeouts = connect_timeout, read_timeout
        #: Of each request, with the body of its answer.
        self.deadline = Deadline(seconds)
        self._client: Any = None
        self._state: tuple[object, ...] = ()
        self._offset = timedelta()

    def ask(self, operation: str, **arguments: Any) -> _Answer:
        """Make one request; after a refusal that new key files or the store's clock may heal, once more."""
        self._refresh()
        answer = self._once(operation, arguments)
        if answer.status == 403 and (self._follow_clock(answer) | self._refresh()):
            answer = self._once(operation, arguments)
        return answer

    def _once(self, operation: str, arguments: Mapping[str, Any]) -> _Answer:
        from botocore.exceptions import ClientError

        try:
            return _Answer(getattr(self._client, operation)(**arguments))
        except ClientError as e:
            return _Answer(e.response, e)
        except Exception as e:
            # Also what boto3 was not made for: the next answer may be right, and this one costs nobody the client.
            return _Answer({}, e)

    def _refresh(self) -> bool:
        """Make the client if there is none, or if a file of its changed; say whether it is a new one."""
        s = self._settings
        paths = [s.store_access_key_file, s.store_secret_key_file]
        paths += [Path(s.store_ca_file)] if s.store_ca_file else []
        state = tuple(_state_of(path) for path in paths)
        if self._client is not None and state == self._state:
            return False
        client = store.connect(
            s, connect_timeout=self._timeouts[0], read_timeout=self._timeouts[1], deadline=self.deadline
        )
        _make_signer()
        client.meta.events.register("choose-signer.s3", lambda **_: _SIGNER)
        client.meta.events.register("before-sign.s3", self._shift)
        if self._client is not None:
            self._client.close()
        self._client, self._state = client, state
        return True

    def _shift(self, request: Any, **_: Any) -> None:
        request.context[_OFFSET] = self._offset

    def _follow_clock(self, answer: _Answer) -> bool:
        if answer.date is None:
            return False
        offset = answer.date - datetime.now(UTC)
        if abs(offset - self._offset) < _SKEW:
            return False
        self._offset = offset
        return True


def _make_signer() -> None:
    """Make boto3 know a way to sign: with this host's time plus the offset of the request.

    One for all clients: what boto3 knows it never forgets, nor what that refers to.
    """
    from botocore.auth import AUTH_TYPE_MAPS, SIGV4_TIMESTAMP, S3SigV4Auth

    if _SIGNER in AUTH_TYPE_MAPS:
        return

    class ShiftedAuth(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
        """Signature version 4, by the store's clock."""

        def _modify_request_before_signing(self, request: Any) -> None:
            offset = request.context.get(_OFFSET)
            if offset:
                request.context["timestamp"] = (datetime.now(UTC) + offset).strftime(SIGV4_TIMESTAMP)
            super()._modify_request_before_signing(request)

    AUTH_TYPE_MAPS[_SIGNER] = ShiftedAuth


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino
