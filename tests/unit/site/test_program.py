# SPDX-License-Identifier: Apache-2.0
"""Proves that `moat program` hands out exactly the file that the manifest's image id leads to, and nothing on the way:

real image archives written by the build's own code, and archives that somebody with a plausible story changed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.site.bundles import SMALL, Made, entry, make_bundle, manifest_of, run_moat, write_signed

from moat.manifest import ImageEntry

PROGRAM = b"\x7fELF a program " * 1000


def tar_of(files: dict[str, bytes | str], *, link: int | None = None) -> bytes:
    """Return a tar; a text is the target of a symbolic link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def archive(layers: list[dict[str, bytes | str]], entry_point: list[str] | None, swap: dict[int, bytes] | None = None):  # type: ignore[no-untyped-def]
    """Return an image archive and its id; ``swap`` replaces the bytes of layers after their hashes were taken."""
    tars = [tar_of(layer) for layer in layers]
    config: dict[str, Any] = {
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest(t)}" for t in tars]},
        "config": {},
    }
    if entry_point:
        config["config"]["Entrypoint"] = entry_point
    raw = json.dumps(config).encode()
    blobs = [gzip.compress((swap or {}).get(i, t), mtime=0) for i, t in enumerate(tars)]
    names = [f"blobs/sha256/{digest(b)}" for b in blobs]
    listing = json.dumps([{"Config": f"blobs/sha256/{digest(raw)}", "Layers": names, "RepoTags": []}]).encode()
    members: dict[str, bytes | str] = {f"blobs/sha256/{digest(raw)}": raw, "manifest.json": listing}
    members |= dict(zip(names, blobs, strict=True))
    return tar_of(members), f"sha256:{digest(raw)}"


def bundle_with(tmp_path: Path, data: bytes, image_id: str, unpacked: int = 10**6) -> Made:
    made = make_bundle(tmp_path / "medium", tmp_path / "keys", {**SMALL, "images/minio.tar": data})
    files = {p.relative_to(made.path).as_posix(): p.read_bytes() for p in made.path.rglob("*") if p.is_file()}
    files = {p: b for p, b in files.items() if not p.startswith("manifest.json")}
    image = ImageEntry("minio", "moat/minio:0.1.0", image_id, "images/minio.tar", unpacked)
    write_signed(made.path, manifest_of(files, images=[image]), made.secret)
    assert entry("images/minio.tar", data).sha256 == digest(data)
    return made


def take(made: Made, to: Path, *more: str) -> Any:
    done = run_moat("program", str(made.path), "minio", "--to", str(to), "--json", "--key", str(made.public),
                    "--state-dir", str(to.parent / "state"), *more)  # fmt: skip
    return json.loads(done.stdout)


def test_the_program_comes_out_once_and_stays(tmp_path: Path) -> None:
    data, image_id = archive([{"etc/x": b"1"}, {"usr/bin/minio": PROGRAM, "usr/bin/other": b"2"}], ["/usr/bin/minio"])
    made, to = bundle_with(tmp_path, data, image_id), tmp_path / "bin/minio"
    result = take(made, to)
    assert result["changed"] is True, result
    assert to.read_bytes() == PROGRAM
    assert result["sha256"] == digest(PROGRAM)
    assert to.stat().st_mode & 0o7777 == 0o755
    assert take(made, to)["changed"] is False
    to.write_bytes(b"changed")
    assert take(made, to)["changed"] is True
    assert to.read_bytes() == PROGRAM
    assert take(made, tmp_path / "x", "--path", "etc/x")["bytes"] == 1
    assert [p.name for p in to.parent.iterdir()] == ["minio"]


def test_the_uppermost_layer_counts(tmp_path: Path) -> None:
    data, image_id = archive([{"p": b"old"}, {"q": b""}, {"p": b"new"}], ["p"])
    take(bundle_with(tmp_path, data, image_id), tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == b"new"


NO_ID = "sha256:" + "0" * 64
GOOD = tar_of({"p": b"good"})
CASES: list[tuple[str, Callable[[], tuple[bytes, str]], str]] = [
    ("another layer", lambda: archive([{"p": b"good"}], ["p"], {0: tar_of({"p": b"evil"})}), "changed"),
    ("bytes after the layer's tar", lambda: archive([{"p": b"good"}], ["p"], {0: GOOD + b"x" * 512}), "changed"),
    ("another configuration", lambda: (archive([{"p": b"good"}], ["p"])[0], NO_ID), "changed"),
    ("a link in the program's place", lambda: archive([{"p": "/bin/sh"}], ["p"]), "stage-failed"),
    ("no such path", lambda: archive([{"q": b""}], ["p"]), "missing"),
    ("an image that starts nothing", lambda: archive([{"q": b""}], None), "stage-failed"),
    ("no archive at all", lambda: (b"not a tar" * 100, NO_ID), "changed"),
    ("an archive without an image", lambda: (tar_of({"manifest.json": b"[]"}), NO_ID), "changed"),
]


@pytest.mark.parametrize(("make", "kind"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_chain_with_a_broken_link_writes_nothing(
    make: Callable[[], tuple[bytes, str]], kind: str, tmp_path: Path
) -> None:
    """Even signed: the archive's own hash is right in each of these, so only the chain can tell."""
    result = take(bundle_with(tmp_path, *make()), tmp_path / "bin/p")
    assert result["problems"][0]["kind"] == kind, result
    assert not (tmp_path / "bin/p").exists()
    assert not list((tmp_path / "bin").glob(".*")) if (tmp_path / "bin").exists() else True


def test_a_layer_that_unpacks_to_more_than_the_manifest_says_is_stopped(tmp_path: Path) -> None:
    data, image_id = archive([{"p": bytes(80 * 1024 * 1024)}], ["p"])
    assert len(data) < 1024 * 1024
    result = take(bundle_with(tmp_path, data, image_id, unpacked=1000), tmp_path / "p")
    assert "unpacks to more" in result["problems"][0]["found"]
    assert not (tmp_path / "p").exists()


def test_an_archive_that_was_changed_on_the_medium_is_refused_first(tmp_path: Path) -> None:
    data, image_id = archive([{"p": PROGRAM}], ["p"])
    made = bundle_with(tmp_path, data, image_id)
    target = made.path / "images/minio.tar"
    target.write_bytes(data[:-1] + b"x")
    assert take(made, tmp_path / "p")["problems"][0]["kind"] == "changed"
    assert not (tmp_path / "p").exists()
