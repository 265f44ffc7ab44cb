# SPDX-License-Identifier: Apache-2.0
"""A process that makes one request of a store after the other, as any account: one JSON object a line, in and out.

Run by the gateway's Python, which has boto3. ``call`` is a method of boto3's client and ``args`` its arguments;
``path`` is a request of MinIO's admin interface, with ``sealed`` as its body. The answer says what came of it.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from moat_gateway import settings, store, storeaccounts
from moat_gateway.errors import StoreFailed


def main() -> None:
    """Answer questions until the input ends."""
    for line in sys.stdin:
        question = json.loads(line)
        answer = administer(question) if "path" in question else ask(question)
        print(json.dumps(answer), flush=True)


@functools.cache
def client(url: str, access: str, secret: str) -> Any:
    config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    return boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        config=config,
        aws_access_key_id=access,
        aws_secret_access_key=secret,
    )


def ask(question: dict[str, Any]) -> dict[str, Any]:
    account = client(question["url"], question["access"], question["secret"])
    try:
        answer = getattr(account, question["call"])(**question["args"])
    except ClientError as e:
        return {"ok": False, "code": e.response["Error"]["Code"]}
    body = answer.get("Body")
    return {"ok": True, "version": answer.get("VersionId"), "body": body.read().decode() if body else None}


def administer(question: dict[str, Any]) -> dict[str, Any]:
    values, _ = settings.load({}, {"store_endpoint": question["url"]})
    admin = storeaccounts.Admin(values, store.Credentials(question["access"], question["secret"]))
    method, path, query, sealed = (question[k] for k in ("method", "path", "query", "sealed"))
    try:
        if sealed is None:
            admin.call(method, path, query, b"")
        else:
            admin.call_sealed(method, path, query, sealed)
    except StoreFailed as e:
        return {"ok": False, "code": e.found}
    return {"ok": True}


if __name__ == "__main__":
    main()
