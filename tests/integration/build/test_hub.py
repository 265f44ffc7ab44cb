# SPDX-License-Identifier: Apache-2.0
"""Files of a model hub, through the real huggingface-hub library, against a stand-in hub on loopback.

Proved: the file is asked for at the pinned commit and nowhere else; its bytes are the locked ones or the fetch stops;
a file that the hub has no longer is named with what to do; a pin that is a branch is refused before any request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.integration.build.standin import StandIn

from moat.build import definitions, hub
from moat.build.cache import Cache
from moat.build.definitions import HubFile
from moat.errors import FetchFailed, HashMismatch, LockFailed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BODY = json.dumps({"model": {"type": "BPE"}}).encode()
FILE = HubFile("tokenizer", "owner/name", COMMIT, "sub/tokenizer.json", "Apache-2.0", ("image:gateway",))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as s:
        path = f"/owner/name/resolve/{COMMIT}/sub/tokenizer.json"
        s.files[path] = BODY

        def answer(method: str, asked: str) -> tuple[int, dict[str, str], bytes] | None:
            content = s.files.get(asked)
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            headers["Content-Length"] = str(len(content))
            return 200, headers, b"" if method == "HEAD" else content

        s.dynamic = answer
        monkeypatch.setenv("HF_ENDPOINT", s.url)
        yield s


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_a_file_is_locked_by_commit_and_sha256_and_fetched_again(server: StandIn, cache: Cache, tmp_path: Path) -> None:
    entry = hub.resolve(FILE, cache)
    assert entry.sha256 == hashlib.sha256(BODY).hexdigest()
    assert (entry.size, entry.filename, entry.kind) == (len(BODY), "tokenizer.json", "tokenizer")
    assert entry.source == f"hf:owner/name@{COMMIT}/sub/tokenizer.json"
    other = Cache(tmp_path / "other")
    hub.fetch(entry, other)
    assert other.require(entry).read_bytes() == BODY
    assert all(COMMIT in path for _, path, _ in server.asked)
    asked = len(server.asked)
    hub.fetch(entry, other)
    assert len(server.asked) == asked, "what the cache holds is not asked for"


def test_other_bytes_under_the_same_commit_are_refused(server: StandIn, cache: Cache, tmp_path: Path) -> None:
    entry = hub.resolve(FILE, cache)
    server.files[f"/owner/name/resolve/{COMMIT}/sub/tokenizer.json"] = BODY.replace(b"BPE", b"XXX")
    other = Cache(tmp_path / "other")
    with pytest.raises(HashMismatch):
        hub.fetch(entry, other)
    assert not other.has(entry.sha256)
    assert not list(other.root.glob("files/*/*"))


def test_a_file_that_is_gone_is_named(server: StandIn, cache: Cache) -> None:
    entry = hub.resolve(FILE, cache)
    server.files.clear()
    with pytest.raises(FetchFailed) as failed:
        hub.fetch(replace(entry, sha256="0" * 64), cache)
    assert "sub/tokenizer.json of owner/name" in failed.value.message
    assert COMMIT in (failed.value.expected or "")
    assert "HF_ENDPOINT" in (failed.value.hint or "")


@pytest.mark.parametrize("source", ["hf:owner/name@main/x", f"hf:owner/name@{COMMIT}/../x", "pypi:x"])
def test_a_lock_without_a_commit_is_not_asked_for(server: StandIn, cache: Cache, source: str) -> None:
    entry = hub.resolve(FILE, cache)
    asked = len(server.asked)
    with pytest.raises(FetchFailed, match="no usable source"):
        hub.fetch(replace(entry, sha256="0" * 64, source=source), cache)
    assert len(server.asked) == asked


def test_a_definition_with_a_branch_is_refused(tmp_path: Path) -> None:
    raw = yaml.safe_load(definitions.COMPONENTS.read_text("utf-8"))
    raw["hub"] = [{**vars(FILE), "uses": ["image:gateway"], "revision": "main"}]
    path = tmp_path / "components.yaml"
    path.write_text(yaml.safe_dump(raw), "utf-8")
    with pytest.raises(LockFailed) as refused:
        definitions.read_components(path)
    assert "main" in (refused.value.found or "")
