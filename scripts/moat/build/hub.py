# SPDX-License-Identifier: Apache-2.0
"""Files of a model hub, through ``huggingface-hub``, pinned by the repository's commit and by sha256.

Branches and tags move; a commit does not. The hub's address is the library's own setting (``HF_ENDPOINT``), a token its
own too (``HF_TOKEN`` or its token file): neither is read or kept here.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from moat.build.cache import Cache, sha256_file
from moat.build.definitions import HubFile
from moat.build.locks import LockedFile
from moat.errors import FetchFailed


def _download(repo: str, revision: str, file: str, folder: Path) -> Path:
    try:
        # local_dir: a plain copy below our folder, no links into a cache of the library's own.
        endpoint = os.environ.get("HF_ENDPOINT")  # the library reads it at import alone
        return Path(
            hf_hub_download(repo_id=repo, filename=file, revision=revision, local_dir=folder, endpoint=endpoint)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise FetchFailed(
            f"{file} of {repo} could not be downloaded from the hub",
            found=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}",
            expected=f"revision {revision}",
            hint="check the network, HF_ENDPOINT and, for a gated repository, HF_TOKEN",
            path=file,
        ) from e


def _scratch(cache: Cache) -> Path:
    folder = cache.root / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="moat-hub-", dir=folder))


def resolve(file: HubFile, cache: Cache) -> LockedFile:
    """Download one file of the definitions and return its lock entry.

    Raises:
        FetchFailed: the hub does not serve it.
    """
    scratch = _scratch(cache)
    try:
        path = _download(file.repo, file.revision, file.file, scratch)
        sha256, size = sha256_file(path), path.stat().st_size
        cache.adopt(path, sha256=sha256, size=size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return LockedFile(
        kind=file.kind,
        name=file.repo,
        version=file.revision,
        filename=file.file.rsplit("/", 1)[-1],
        sha256=sha256,
        size=size,
        license=file.license,
        source=f"hf:{file.repo}@{file.revision}/{file.file}",
        uses=tuple(sorted(file.uses)),
    )


def fetch(entry: LockedFile, cache: Cache) -> None:
    """Have a locked file of a hub in the cache.

    Raises:
        FetchFailed: the hub does not serve it, or the lock's ``source`` is malformed.
        HashMismatch: the hub serves other bytes.
    """
    if cache.has_entry(entry):
        return
    found = re.fullmatch(r"hf:([^@\s]+)@([0-9a-f]{40})/(\S+)", entry.source)
    if found is None or ".." in found[3].split("/"):
        raise FetchFailed(f"{entry.filename} has no usable source", found=entry.source, path=entry.filename)
    scratch = _scratch(cache)
    try:
        cache.adopt(_download(found[1], found[2], found[3], scratch), sha256=entry.sha256, size=entry.size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
