# SPDX-License-Identifier: Apache-2.0
"""Downloads into the cache: parallel, continued after a cut, checked, atomic.

A download is named by its sha256 before it starts. It grows in ``partial/<sha256>``; after a cut the next try,
or the next run, asks for the rest with a Range request. Only a file whose hash and size are the expected ones is
renamed into ``files/``.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import httpx

from moat.build.cache import Cache
from moat.console import Console, Progress
from moat.errors import FetchFailed, HashMismatch

_BLOCK = 1 << 18
_TRIES = 5


@dataclass(frozen=True)
class Download:
    """One file to have.

    Attributes:
        filename: for messages.
        sha256: expected.
        size: expected, in bytes.
        urls: places, tried in order; ``http``, ``https`` or ``file``.
    """

    filename: str
    sha256: str
    size: int
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Gone:
    """A file that every place answered for, and none has (404 or 410).

    Attributes:
        download: what was wanted.
    """

    download: Download


class _NotThere(Exception):
    """This place says that it has no such file."""


class _Retry(Exception):
    """This try failed in a way that may pass."""


def _host(url: str) -> str:
    return urlsplit(url).hostname or "this machine"


class Downloader:
    """Downloads many files at once.

    Args:
        cache: where they go.
        client: shared by all threads.
        console: for progress and warnings.
        jobs: downloads at the same time.
        sleep: waits between tries, in seconds (a parameter so that tests do not wait).
    """

    def __init__(
        self,
        cache: Cache,
        client: httpx.Client,
        console: Console,
        *,
        jobs: int = 8,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cache = cache
        self._client = client
        self._console = console
        self._jobs = jobs
        self._sleep = sleep
        self._stop = threading.Event()

    def all(self, downloads: Iterable[Download], label: str) -> list[Gone]:
        """Have every file in the cache; return those that no place has any more.

        Raises:
            FetchFailed: a place could not be reached, or went on failing.
            HashMismatch: a place served other bytes.
        """
        self._stop.clear()
        by_hash = {d.sha256: d for d in downloads}
        wanted = [d for d in by_hash.values() if not self._cache.has(d.sha256)]
        if not wanted:
            return []
        gone: list[Gone] = []
        # The largest first: a big file that starts last would run alone at the end.
        wanted.sort(key=lambda d: (-d.size, d.filename))
        with (
            self._console.progress(label, sum(d.size for d in wanted)) as progress,
            ThreadPoolExecutor(max_workers=self._jobs) as pool,
        ):
            futures = [pool.submit(self._one, d, progress) for d in wanted]
            try:
                for future in futures:
                    result = future.result()
                    if result is not None:
                        gone.append(result)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return gone

    def _one(self, download: Download, progress: Progress) -> Gone | None:
        reasons: list[str] = []
        for url in download.urls:
            try:
                self._from(download, url, progress)
                return None
            except _NotThere:
                reasons.append(f"{_host(url)}: not there")
            except _Retry as e:
                reasons.append(f"{_host(url)}: {e}")
        if all(r.endswith(": not there") for r in reasons):
            return Gone(download)
        raise FetchFailed(
            f"{download.filename} could not be downloaded",
            found="; ".join(reasons),
            expected=f"sha256 {download.sha256}, {download.size} bytes",
            hint="check the network, the proxy and the mirror, then run the same command again: it continues",
            path=download.filename,
        )

    def _from(self, download: Download, url: str, progress: Progress) -> None:
        """Fetch from one place, with retries."""
        last = ""
        for attempt in range(_TRIES):
            if self._stop.is_set():
                raise _Retry("stopped, because another download failed")
            if attempt:
                # Jitter keeps eight threads from coming back at the same moment.
                self._sleep(0.5 * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311
            try:
                self._try(download, url, progress)
                return
            except _Retry as e:
                last = str(e)
        raise _Retry(f"{last} ({_TRIES} tries)")

    def _try(self, download: Download, url: str, progress: Progress) -> None:
        partial = self._cache.partial(download.sha256)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as f:
            # Another moat may be fetching the same file into the same cache: wait for it.
            fcntl.flock(f, fcntl.LOCK_EX)
            if self._cache.has(download.sha256):
                partial.unlink(missing_ok=True)  # opening it has made it anew
                progress.add(download.size)
                return
            if not partial.exists() or partial.stat().st_ino != os.fstat(f.fileno()).st_ino:
                raise _Retry("another process moved the partial file")
            start = os.fstat(f.fileno()).st_size
            if start > download.size:
                f.truncate(0)
                start = 0
            resumed = start > 0
            counted = 0

            def count(n: int) -> None:
                nonlocal counted
                counted += n
                progress.add(n)

            count(start)
            try:
                if start < download.size:
                    if url.startswith("file:"):
                        _copy(url, f, count, start)
                    else:
                        resumed = self._stream(url, f, count, start, download.size) and resumed
                f.flush()
                try:
                    self._cache.adopt(partial, sha256=download.sha256, size=download.size)
                except HashMismatch as e:
                    if resumed:  # the part that was there may be the bad one: once more, from the start
                        raise _Retry("a continued download had the wrong hash") from e
                    raise HashMismatch(
                        f"{download.filename} from {_host(url)} is not the locked file",
                        found=e.found,
                        expected=e.expected,
                        hint=e.hint,
                        path=download.filename,
                    ) from e
            except BaseException:
                progress.add(-counted)
                raise

    def _stream(self, url: str, f: BinaryIO, count: Callable[[int], None], start: int, size: int) -> bool:
        """Append the rest of a file; return whether the server continued where we were."""
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                if response.status_code in (404, 410):
                    raise _NotThere
                continued = response.status_code == 206 and _range_start(response) == start
                if response.status_code == 416 or (response.status_code == 206 and not continued):
                    f.truncate(0)
                    raise _Retry(f"the server cannot continue at byte {start}")
                if response.status_code not in (200, 206):
                    raise _Retry(f"HTTP {response.status_code}")
                if not continued:
                    f.truncate(0)
                    count(-start)
                done = start if continued else 0
                # As it arrives: what a larger buffer held would be lost when the connection is cut.
                for block in response.iter_bytes():
                    done += len(block)
                    if done > size:
                        f.truncate(0)
                        raise _wrong_size(url, f"over {size} bytes", size)
                    f.write(block)
                    count(len(block))
                    if self._stop.is_set():
                        raise _Retry("stopped, because another download failed")
        except httpx.HTTPError as e:
            raise _Retry(f"{type(e).__name__}: {e}") from e
        if done < size and "content-length" in response.headers:
            # The answer came whole (httpx raises when one is cut short), so the file there is another one.
            f.truncate(0)
            raise _wrong_size(url, f"{done} bytes", size)
        if done < size:
            raise _Retry(f"the connection ended after {done} of {size} bytes")
        return continued


def _wrong_size(url: str, found: str, size: int) -> HashMismatch:
    name = unquote(urlsplit(url).path.rsplit("/", 1)[-1])
    return HashMismatch(
        f"{name} from {_host(url)} is not the locked file",
        found=found,
        expected=f"{size} bytes",
        hint="the mirror or the lock is wrong: see docs/locks-and-policy.md",
        path=name,
    )


def _range_start(response: httpx.Response) -> int:
    found = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    return int(found[1]) if found else -1


def _copy(url: str, f: BinaryIO, count: Callable[[int], None], start: int) -> None:
    """Append the rest of a file of this machine (an apt mirror on a disk)."""
    source = Path(unquote(urlsplit(url).path))
    if not source.is_file():
        raise _NotThere
    with source.open("rb") as g:
        g.seek(start)
        shutil.copyfileobj(g, f, _BLOCK)
        count(g.tell() - start)


def names(gone: Sequence[Gone]) -> str:
    """Return the file names of vanished files, for a message."""
    return ", ".join(sorted(g.download.filename for g in gone))
