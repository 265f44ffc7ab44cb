# SPDX-License-Identifier: Apache-2.0
"""Revisions made by hand, right and wrong ones, and a store's client of its own to put them there.

What belongs into a right one is spelled out here once more, independently of the product's builder; headers and
signatures are made with the product's functions, because a wrong revision that is signed with the right key is the
point.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moat_gateway import ustar
from moat_gateway.sitekey import SigningKey

Fields = dict[str, Any]


def canonical(value: Any) -> bytes:
    """Return JSON in its one spelling."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


def manifest(files: Mapping[str, bytes], number: int, previous: int) -> Fields:
    """Return the fields of ``revision.json``."""
    hashes = {p: hashlib.sha256(d).hexdigest() for p, d in files.items()}
    return {
        "format": 1,
        "revision": number,
        "previous": previous,
        "created_at": "2027-01-31T12:00:00Z",
        "author": "craft",
        "message": f"revision {number}",
        "content_of": None,
        "content": hashlib.sha256("".join(sorted(f"{h}  {p}\n" for p, h in hashes.items())).encode()).hexdigest(),
        "files": [{"path": p, "size": len(files[p]), "sha256": hashes[p]} for p in sorted(files)],
    }


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """Return the header of a member as revisions have it."""
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.linkname = 0o644, kind, link
    return info


def archive(
    files: Mapping[str, bytes],
    number: int,
    key: SigningKey,
    *,
    previous: int | None = None,
    comment: str | None = None,
    swap: Mapping[str, tarfile.TarInfo] | None = None,
) -> bytes:
    """Return a signed archive.

    Args:
        files: the content by path.
        number: of the revision.
        key: what signs.
        previous: number of the one before; ``number - 1``.
        comment: another trusted comment than the right one.
        swap: headers to write instead of those of a path: what the manifest says of it stays.
    """
    listed = canonical(manifest(files, number, number - 1 if previous is None else previous))
    signature = key.sign(listed, comment or f"moat-config revision={number}")
    out = b""
    for name, data in [("revision.json", listed), ("revision.json.minisig", signature), *sorted(files.items())]:
        if swap and name in swap:
            # What a link or a folder brings has no data; its header is written by Python's tarfile.
            out += swap[name].tobuf(tarfile.USTAR_FORMAT)
        else:
            out += ustar.build([(name, data)])[: 512 + len(data) + -len(data) % 512]
    return out + bytes(1024 + -(len(out) + 1024) % 10240)


def pointer(number: int, raw: bytes, **other: Any) -> bytes:
    """Return the pointer to an archive; ``other`` replaces fields."""
    fields = {
        "format": 1,
        "revision": number,
        "object": f"revisions/{number}",
        "sha256": hashlib.sha256(raw).hexdigest(),
        "size": len(raw),
        "pushed_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "author": "craft",
    }
    return canonical({**fields, **other})


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 store on the loopback, by signature version 4."""

    port: int
    access: str
    secret: str
    name: str = "moat-config"

    def put(self, key: str, data: bytes) -> None:
        status, body = self.call("PUT", key, data)
        assert status == 200, (status, body)

    def get(self, key: str) -> bytes:
        status, body = self.call("GET", key)
        assert status == 200, (status, body)
        return body

    def delete(self, key: str) -> None:
        status, body = self.call("DELETE", key)
        assert status == 204, (status, body)

    def current(self) -> Fields:
        """Return the pointer; number 0 if there is none that can be read."""
        status, body = self.call("GET", "current")
        try:
            return dict(json.loads(body)) if status == 200 else {"revision": 0}
        except ValueError:
            return {"revision": 0}

    def call(self, method: str, key: str, data: bytes = b"") -> tuple[int, bytes]:
        now = datetime.now(UTC)
        day, moment = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
        path, host, digest = f"/{self.name}/{quote(key)}", f"127.0.0.1:{self.port}", hashlib.sha256(data).hexdigest()
        headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": moment}
        names = ";".join(sorted(headers))
        asked = "\n".join([method, path, "", *(f"{n}:{headers[n]}" for n in sorted(headers)), "", names, digest])
        scope = f"{day}/us-east-1/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(asked.encode()).hexdigest()}"
        secret = b"AWS4" + self.secret.encode()
        for part in scope.split("/"):
            secret = hmac.digest(secret, part.encode(), "sha256")
        signature = hmac.new(secret, text.encode(), "sha256").hexdigest()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.access}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@dataclass(frozen=True)
class Hand:
    """Puts revisions into the store past every check of ``config push``, in milliseconds."""

    bucket: Bucket
    key_file: Path

    @property
    def key(self) -> SigningKey:
        return SigningKey.read(self.key_file)

    def next(self) -> int:
        """Return the first number that is free above the pointer's."""
        number = int(self.bucket.current()["revision"]) + 1
        while self.bucket.call("HEAD", f"revisions/{number}")[0] == 200:
            number += 1
        return number

    def put(self, files: Mapping[str, str | bytes], **how: Any) -> tuple[int, float]:
        """Publish a revision; return its number and the moment (CLOCK_MONOTONIC) at which the pointer had moved."""
        number = self.next()
        plain = {p: d.encode() if isinstance(d, str) else d for p, d in files.items()}
        return self.publish(number, archive(plain, number, how.pop("key", None) or self.key, **how))

    def publish(
        self, number: int, raw: bytes, change: Callable[[bytes], bytes] = lambda x: x, **other: Any
    ) -> tuple[int, float]:
        """Put an archive (``change``\\ d after the pointer was made of it) and move the pointer."""
        self.bucket.put(f"revisions/{number}", change(raw))
        self.bucket.put("current", pointer(number, raw, **other))
        return number, time.monotonic()
