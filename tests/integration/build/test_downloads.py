# SPDX-License-Identifier: Apache-2.0
"""Downloads against a real server on loopback that cuts connections, refuses ranges, lies and loses files.

Proved here: a cut download continues where it stopped (in the same run and in the next), wrong bytes never reach the
cache's ``files/``, a passing failure is retried, a lasting one is named with what to do, and two runs share one cache.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.integration.build.standin import StandIn

from moat.build.cache import Cache
from moat.build.downloads import Download, Downloader
from moat.console import Console
from moat.errors import FetchFailed, HashMismatch

BODY = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as s:
        s.files["/f"] = BODY
        yield s


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def downloader(cache: Cache) -> Iterator[Downloader]:
    with httpx.Client() as client:
        yield Downloader(cache, client, Console(quiet=True, err=io.StringIO()), jobs=2, sleep=lambda _: None)


def wanted(*urls: str, body: bytes = BODY, name: str = "f.whl") -> Download:
    return Download(name, hashlib.sha256(body).hexdigest(), len(body), urls)


def test_a_cut_download_continues_where_it_stopped(server: StandIn, cache: Cache, downloader: Downloader) -> None:
    server.cut_after = [700_000, 300_000]
    assert downloader.all([wanted(f"{server.url}/f")], "x") == []
    assert cache.path(SHA256).read_bytes() == BODY
    ranges = [r for _, _, r in server.asked]
    assert len(ranges) == 3
    assert ranges[0] is None
    # What arrived before each cut was not asked for again.
    starts = [int((r or "").removeprefix("bytes=").rstrip("-")) for r in ranges[1:]]
    assert 0 < starts[0] <= 700_000
    assert starts[0] < starts[1] <= 1_000_000
    assert not list((cache.root / "partial").iterdir())


def test_the_next_run_continues_what_this_one_could_not_finish(
    server: StandIn, cache: Cache, downloader: Downloader
) -> None:
    server.cut_after = [400_000, 1, 1, 1, 1]
    with pytest.raises(FetchFailed) as failed:
        downloader.all([wanted(f"{server.url}/f")], "x")
    assert "f.whl" in failed.value.message
    assert "127.0.0.1" in (failed.value.found or "")
    assert "continues" in (failed.value.hint or "")
    assert not cache.has(SHA256)
    server.asked.clear()
    assert downloader.all([wanted(f"{server.url}/f")], "x") == []
    assert int((server.asked[0][2] or "bytes=0-").removeprefix("bytes=").rstrip("-")) > 300_000


def test_a_server_without_ranges_is_read_from_the_start(server: StandIn, cache: Cache, downloader: Downloader) -> None:
    server.cut_after, server.ranges = [500_000], False
    assert downloader.all([wanted(f"{server.url}/f")], "x") == []
    assert cache.path(SHA256).read_bytes() == BODY


@pytest.mark.parametrize("body", [b"x" + BODY[1:], BODY[:-1], BODY + b"x", b""])
def test_other_bytes_never_reach_the_cache(server: StandIn, cache: Cache, downloader: Downloader, body: bytes) -> None:
    server.files["/f"] = body
    with pytest.raises(HashMismatch) as refused:
        downloader.all([wanted(f"{server.url}/f")], "x")
    assert refused.value.exit_code == 34
    assert len(server.asked) == 1, "asking again would not help"
    assert not cache.has(SHA256)
    assert not list(cache.root.glob("files/*/*"))


def test_a_spoilt_partial_file_is_thrown_away_and_fetched_again(
    server: StandIn, cache: Cache, downloader: Downloader
) -> None:
    partial = cache.partial(SHA256)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\0" * 1000)
    assert downloader.all([wanted(f"{server.url}/f")], "x") == []
    assert cache.path(SHA256).read_bytes() == BODY


@pytest.mark.parametrize("length", [len(BODY), len(BODY) + 5])
def test_a_partial_file_that_is_full_or_too_long(
    server: StandIn, cache: Cache, downloader: Downloader, length: int
) -> None:
    partial = cache.partial(SHA256)
    partial.parent.mkdir(parents=True)
    partial.write_bytes((BODY + b"12345")[:length])
    assert downloader.all([wanted(f"{server.url}/f")], "x") == []
    assert cache.path(SHA256).read_bytes() == BODY


def test_a_passing_failure_is_retried(server: StandIn, cache: Cache, downloader: Downloader) -> None:
    server.statuses["/f"] = [503, 500, 429]
    assert downloader.all([wanted(f"{server.url}/f")], "x") == []
    assert len(server.asked) == 4


def test_the_second_place_serves_what_the_first_has_lost(server: StandIn, cache: Cache, downloader: Downloader) -> None:
    assert downloader.all([wanted(f"{server.url}/gone", f"{server.url}/f")], "x") == []
    assert cache.has(SHA256)


def test_what_is_nowhere_is_returned_and_the_rest_is_fetched(
    server: StandIn, cache: Cache, downloader: Downloader
) -> None:
    other = wanted(f"{server.url}/a", f"{server.url}/b", body=b"other", name="lost.deb")
    gone = downloader.all([other, wanted(f"{server.url}/f")], "x")
    assert [g.download.filename for g in gone] == ["lost.deb"]
    assert cache.has(SHA256)


def test_an_unreachable_place_is_no_proof_that_a_file_is_gone(server: StandIn, downloader: Downloader) -> None:
    dead = "http://127.0.0.1:1/f"  # nothing listens on port 1
    with pytest.raises(FetchFailed, match=r"lost\.deb"):
        downloader.all([wanted(f"{server.url}/a", dead, body=b"other", name="lost.deb")], "x")


def test_a_file_of_this_machine_is_a_place_too(tmp_path: Path, cache: Cache, downloader: Downloader) -> None:
    source = tmp_path / "a file"
    source.write_bytes(BODY)
    assert downloader.all([wanted(f"file://{tmp_path}/a%20file")], "x") == []
    assert cache.has(SHA256)
    assert source.exists()


def test_two_runs_share_one_cache(server: StandIn, cache: Cache) -> None:
    problems: list[BaseException] = []

    def fetch() -> None:
        try:
            with httpx.Client() as client:
                quiet = Console(quiet=True, err=io.StringIO())
                Downloader(cache, client, quiet, jobs=2, sleep=lambda _: None).all([wanted(f"{server.url}/f")], "x")
        except BaseException as e:
            problems.append(e)

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert problems == []
    assert cache.path(SHA256).read_bytes() == BODY
    assert not list((cache.root / "partial").iterdir())
