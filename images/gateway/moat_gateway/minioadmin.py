# SPDX-License-Identifier: Apache-2.0
"""MinIO's own interface, beside S3: users, policies, replication targets; by its root credentials."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from moat_gateway import sealed, store
from moat_gateway.errors import StoreFailed
from moat_gateway.settings import Settings


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

    def targets(self, bucket: str) -> list[dict[str, Any]]:
        """Return the places that a bucket is copied to."""
        found = json.loads(self.call("GET", "list-remote-targets", {"bucket": bucket, "type": "replication"}))
        return list(found or [])

    def call_sealed(self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any]) -> bytes:
        """Make a request whose body holds a secret, and return the answer's body."""
        return self.call(method, path, query, sealed.seal(self._root.secret_key, json.dumps(body).encode()))

    def call(self, method: str, path: str, query: Mapping[str, str] | None = None, body: bytes = b"") -> bytes:
        """Make a request and return the answer's body.

        Raises:
            StoreFailed: no answer, or a refusal.
        """
        return self._send(method, f"/minio/admin/v3/{path}", path, query, body)

    def s3(self, method: str, bucket: str, query: Mapping[str, str]) -> bytes:
        """Make one of MinIO's own requests on a bucket, which no S3 client knows; the errors are those of ``call``."""
        return self._send(method, f"/{bucket}", next(iter(query)), query, b"")

    def _send(self, method: str, where: str, what: str, query: Mapping[str, str] | None, body: bytes) -> bytes:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials
        from botocore.exceptions import BotoCoreError, HTTPClientError

        where = store.endpoint_url(self._settings.store_endpoint) + where
        # MinIO refuses a body that some parser may have read as a form.
        headers = {"content-type": "application/octet-stream"} if body else {}
        url = f"{where}?{urlencode(query)}" if query else where
        signer = S3SigV4Auth(Credentials(self._root.access_key, self._root.secret_key), "s3", store.REGION)
        deadline = time.monotonic() + self._settings.store_timeout
        while True:
            request = AWSRequest(method, url, headers, data=body)
            signer.add_auth(request)
            try:
                answer = self._session.send(request.prepare())
            except (BotoCoreError, HTTPClientError) as e:
                raise StoreFailed(
                    f"cannot reach the administration of {self._settings.store_endpoint}", found=type(e).__name__
                ) from e
            # MinIO serves S3 before its users and policies are loaded, and says 503 until then.
            if answer.status_code != 503 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        content: bytes = answer.content
        if answer.status_code not in (200, 204):
            try:
                code = str(json.loads(content).get("Code", ""))
            except (ValueError, AttributeError):
                code = ""
            raise StoreFailed(
                f"the store refused {what}",
                found=f"HTTP {answer.status_code} {code}".strip(),
                expected="MinIO, and its root credentials",
                hint="check store_root_user and store_root_password",
            )
        return content
