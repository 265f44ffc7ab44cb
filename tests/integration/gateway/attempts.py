# SPDX-License-Identifier: Apache-2.0
"""Tries many ways out from Python, with the egress guard or without, and prints what became of each (JSON).

Run inside an isolated namespace only; everything aims at documentation addresses and reserved names.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

OUTSIDE, OUTSIDE6, NAME = "198.51.100.7", "2001:db8::7", "way-out.example"


def tcp() -> None:
    socket.create_connection((OUTSIDE, 443), timeout=2)


def tcp6() -> None:
    socket.create_connection((OUTSIDE6, 443), timeout=2)


def connect_ex() -> None:
    with socket.socket() as s:
        code = s.connect_ex((OUTSIDE, 443))
        raise OSError(code, "connect_ex")


def mapped() -> None:
    with socket.socket(socket.AF_INET6) as s:
        s.connect(("::ffff:" + OUTSIDE, 443))


def udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", (OUTSIDE, 53))


def udp_flags() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", 0, (OUTSIDE, 53))


def udp_message() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendmsg([b"x"], [], 0, (OUTSIDE, 53))


def name() -> None:
    socket.getaddrinfo(NAME, 443)


def name_in_connect() -> None:
    with socket.socket() as s:
        s.connect((NAME, 443))


def name_in_sendto() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", (NAME, 53))


def reverse() -> None:
    socket.gethostbyaddr(OUTSIDE)


def urllib_() -> None:
    urllib.request.urlopen(f"http://{OUTSIDE}/", timeout=2)


def requests_() -> None:
    import requests

    requests.get(f"http://{NAME}/", timeout=2)


def httpx_() -> None:
    import httpx

    httpx.get(f"http://{OUTSIDE}/", timeout=2)


def httpx_async() -> None:
    import httpx

    async def run() -> None:
        async with httpx.AsyncClient(timeout=2) as client:
            await client.get(f"http://{NAME}/")

    asyncio.run(run())


def aiohttp_(host: str) -> Callable[[], None]:
    def attempt() -> None:
        import aiohttp

        async def run() -> None:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:
                await session.get(f"http://{host}/")

        asyncio.run(run())

    return attempt


def asyncio_datagram() -> None:
    async def run() -> None:
        await asyncio.get_running_loop().create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=(OUTSIDE, 53))

    asyncio.run(run())


def boto() -> None:
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=1, retries={"total_max_attempts": 1})
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y"}
    url = f"http://{NAME}"
    boto3.client("s3", region_name="us-east-1", endpoint_url=url, config=config, **keys).list_buckets()


def loopback() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname(), timeout=2) as s:
            s.sendall(b"x")


ATTEMPTS: dict[str, Callable[[], Any]] = {
    "tcp": tcp, "tcp6": tcp6, "connect_ex": connect_ex, "mapped": mapped, "udp": udp, "udp_flags": udp_flags,
    "udp_message": udp_message, "name": name, "name_in_connect": name_in_connect, "name_in_sendto": name_in_sendto,
    "reverse": reverse, "urllib": urllib_, "requests": requests_, "httpx": httpx_, "httpx_async": httpx_async,
    "aiohttp": aiohttp_(OUTSIDE), "aiohttp_name": aiohttp_(NAME), "asyncio_datagram": asyncio_datagram, "boto": boto,
    "loopback": loopback,
}  # fmt: skip


def main(mode: str) -> None:
    results: dict[str, dict[str, Any]] = {}
    guard = None
    if mode == "guarded":
        from moat_gateway.allowlist import AllowList
        from moat_gateway.egress import EgressGuard

        guard = EgressGuard(AllowList.parse(["model:8081"]), lambda *_: None)
        guard.install()
    for label, attempt in ATTEMPTS.items():
        before = guard.denied_total if guard else 0
        try:
            attempt()
            outcome = "worked"
        except Exception as e:
            chain: list[str] = []
            error: BaseException | None = e
            while error is not None and len(chain) < 12:
                chain.append(f"{type(error).__name__}: {error}")
                error = error.__cause__ or error.__context__
            outcome = " | ".join(chain)
        results[label] = {"outcome": outcome, "denied": (guard.denied_total if guard else 0) - before}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
