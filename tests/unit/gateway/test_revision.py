# SPDX-License-Identifier: Apache-2.0
"""Proves that only the archive that was signed is accepted, byte for byte, and that every other one is named.

The attacker here holds the archive and may change anything; in the second half he even holds a key that is trusted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moat_gateway import revision, ustar
from moat_gateway.errors import BadRevision, BadSignature, GatewayError
from moat_gateway.sitekey import SigningKey

KEY = SigningKey.generate()
TRUSTED = [KEY.public]
FILES = {
    "config.yaml": b"model_list: []\n" * 50,
    "keys.yaml": b"keys: []\n",
    "routers/index.yaml": b"",
    "routers/m.onnx": bytes(range(256)) * 4,
}
LIMIT = 1 << 20


def build(files: dict[str, bytes] | None = None, **more: Any) -> bytes:
    values: dict[str, Any] = {
        "number": 7, "previous": 6, "author": "Ada", "message": "why\nnot", "created_at": "2027-01-31T12:00:00Z",
        "content_of": None, "key": KEY, **more,
    }  # fmt: skip
    return revision.build(FILES if files is None else files, **values)


RAW = build()


def opened(raw: bytes, limit: int = LIMIT) -> revision.Revision:
    return revision.open_archive(raw, TRUSTED, limit=limit)


def refused(raw: bytes, words: str, kind: type[GatewayError] = BadRevision) -> GatewayError:
    with pytest.raises(kind, match=words) as caught:
        opened(raw)
    assert caught.value.hint
    return caught.value


# --- what is accepted ---


def test_a_revision_comes_back_as_it_was_built() -> None:
    r = opened(RAW)
    assert (r.number, r.previous, r.author, r.message, r.content_of) == (7, 6, "Ada", "why\nnot", None)
    assert dict(r.files) == FILES
    assert r.content == revision.content_sha256(FILES)
    assert r.sha256 == hashlib.sha256(r.manifest).hexdigest()
    assert r.key_id == KEY.public.key_id
    assert json.loads(r.manifest)["files"][0]["path"] == "config.yaml"


def test_the_same_content_gives_the_same_bytes() -> None:
    assert build() == RAW
    assert opened(build(dict(reversed(FILES.items())))).manifest == opened(RAW).manifest


def test_the_manifest_is_as_documented() -> None:
    fields = json.loads(opened(RAW).manifest)
    lines = "".join(sorted(f"{hashlib.sha256(d).hexdigest()}  {p}\n" for p, d in FILES.items()))
    assert fields["content"] == hashlib.sha256(lines.encode()).hexdigest()
    assert set(fields) == {
        "format", "revision", "previous", "created_at", "author", "message", "content_of", "content", "files",
    }  # fmt: skip


def test_other_programs_read_the_archive() -> None:
    with tarfile.open(fileobj=io.BytesIO(RAW)) as archive:
        assert archive.getnames() == ["revision.json", "revision.json.minisig", *sorted(FILES)]
        for m in archive:
            assert (m.mode, m.uid, m.gid, m.mtime, m.isreg()) == (0o644, 0, 0, 0, True)
        member = archive.extractfile("routers/m.onnx")
        assert member is not None
        assert member.read() == FILES["routers/m.onnx"]
    assert len(RAW) % 10240 == 0


def test_a_brought_back_revision_names_its_origin() -> None:
    assert opened(build(content_of=3)).content_of == 3


# --- changed archives ---


@hypothesis_settings(max_examples=600, deadline=None)
@given(at=st.integers(0, len(RAW) - 1), bits=st.integers(1, 255))
def test_no_changed_byte_is_accepted(at: int, bits: int) -> None:
    changed = bytearray(RAW)
    changed[at] ^= bits
    with pytest.raises((BadRevision, BadSignature)):
        opened(bytes(changed))


@hypothesis_settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_cut_grown_or_spliced_archive_is_accepted(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(RAW)))
    to = data.draw(st.integers(at, len(RAW)))
    put = data.draw(st.one_of(st.binary(max_size=2000), st.just(RAW[at:to] * 2), st.just(bytes(512))))
    changed = RAW[:at] + put + RAW[to:]
    if changed == RAW:
        return
    with pytest.raises((BadRevision, BadSignature)):
        opened(changed)


@hypothesis_settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=3000))
def test_nothing_else_is_an_archive(raw: bytes) -> None:
    with pytest.raises(BadRevision):
        opened(raw)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, len(RAW) // 2, len(RAW) - 512, len(RAW) - 1])
def test_a_truncated_archive_is_named(size: int) -> None:
    refused(RAW[:size], "cut short|missing|not a ustar")


def test_an_over_large_archive_is_refused_before_it_is_looked_at() -> None:
    with pytest.raises(BadRevision, match="too large"):
        revision.open_archive(b"not even an archive" * 100, TRUSTED, limit=1000)
    assert opened(RAW, limit=len(RAW)).number == 7
    with pytest.raises(BadRevision, match="too large"):
        opened(RAW, limit=len(RAW) - 1)


def test_an_over_large_manifest_is_refused_before_its_signature() -> None:
    raw = ustar.build([("revision.json", bytes((1 << 20) + 1))])
    with pytest.raises(BadRevision, match=r"revision\.json is too large"):
        revision.open_archive(raw, TRUSTED, limit=1 << 22)


def test_trailing_bytes_are_named() -> None:
    refused(RAW + bytes(10240), "follow the end")
    refused(RAW + b"x", "follow the end")
    refused(RAW[:-1] + b"x", "follow the end")


def test_bytes_between_files_are_named() -> None:
    at = RAW.index(FILES["keys.yaml"]) + len(FILES["keys.yaml"]) + 5
    refused(RAW[:at] + b"x" + RAW[at + 1 :], "hide behind keys.yaml")


def test_a_changed_file_is_named() -> None:
    at = RAW.index(FILES["routers/m.onnx"]) + 9
    problem = refused(RAW[:at] + b"x" + RAW[at + 1 :], "routers/m.onnx is not the file that was signed")
    assert problem.found != problem.expected


def members() -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(RAW)) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]


def test_another_order_a_missing_and_an_unlisted_file_are_named() -> None:
    first, second, *rest = members()
    refused(ustar.build([first, second, *reversed(rest)]), "not the one that belongs here")
    refused(ustar.build([second, first, *rest]), "not the one that belongs here")
    refused(ustar.build([first, second, *rest[:-1]]), "is missing")
    refused(ustar.build([first, second, rest[0], rest[0], *rest[1:]]), "not the one that belongs here")
    problem = refused(ustar.build([first, second, *rest, ("routers/z.txt", b"")]), "more than is listed")
    assert "routers/z.txt" in str(problem.found)


def test_a_manifest_of_another_revision_is_a_bad_signature() -> None:
    other = opened(build(number=8, previous=7))
    _, signature, *rest = members()
    refused(ustar.build([("revision.json", other.manifest), signature, *rest]), "does not match", BadSignature)


def test_another_signer_is_a_bad_signature() -> None:
    refused(build(key=SigningKey.generate()), "not trusted", BadSignature)


def test_a_signature_of_another_number_is_refused() -> None:
    manifest = opened(RAW).manifest
    _, _, *rest = members()
    signature = ("revision.json.minisig", KEY.sign(manifest, "moat-config revision=8"))
    refused(ustar.build([("revision.json", manifest), signature, *rest]), "not of this revision", BadSignature)
    release = ("revision.json.minisig", KEY.sign(manifest, "moat bundle"))
    refused(ustar.build([("revision.json", manifest), release, *rest]), "not of this revision", BadSignature)


def test_nothing_is_parsed_before_the_signature_was_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    real = json.loads

    def loads(raw: bytes, **more: Any) -> Any:
        calls.append(raw)
        return real(raw, **more)

    monkeypatch.setattr(json, "loads", loads)
    with pytest.raises(BadSignature):
        opened(build(key=SigningKey.generate()))
    assert calls == []
    opened(RAW)
    assert len(calls) == 1


# --- members of other kinds, made by Python's tarfile ---


def with_member(change: Callable[[tarfile.TarInfo], None], format_: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return the archive with the last file's header as ``change`` leaves it."""
    name, data = members()[-1]
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    change(info)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return RAW[: RAW.index(name.encode() + b"\0")] + out.getvalue()


def kind(type_: bytes, linkname: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = type_, linkname, 0

    return change


def rename(name: str) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, "name", name)


def pax(info: tarfile.TarInfo) -> None:
    info.pax_headers = {"path": "/etc/passwd"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (with_member(kind(tarfile.SYMTYPE, "/etc/shadow")), "a symbolic link"),
        (with_member(kind(tarfile.LNKTYPE, "config.yaml")), "a hard link"),
        (with_member(kind(tarfile.CHRTYPE)), "a character device"),
        (with_member(kind(tarfile.BLKTYPE)), "a block device"),
        (with_member(kind(tarfile.FIFOTYPE)), "a named pipe"),
        (with_member(kind(tarfile.DIRTYPE)), "a folder"),
        (with_member(kind(tarfile.CONTTYPE)), "a contiguous file"),
        (with_member(kind(tarfile.GNUTYPE_SPARSE)), "a GNU sparse file"),
        (with_member(pax, tarfile.PAX_FORMAT), "a pax header"),
        (with_member(rename("r" * 150), tarfile.GNU_FORMAT), "a GNU long name"),
        (with_member(rename("a" * 90 + "/" + "b" * 60)), "not the one that belongs here"),
        (with_member(rename("../../etc/passwd")), "not the one that belongs here"),
        (with_member(rename("/etc/passwd")), "not the one that belongs here"),
        (with_member(rename("routers/../m.onnx")), "not the one that belongs here"),
        (with_member(lambda info: setattr(info, "mode", 0o4755)), "one spelling"),
        (with_member(lambda info: setattr(info, "uid", 1000)), "one spelling"),
        (with_member(lambda info: setattr(info, "mtime", 1)), "one spelling"),
        (with_member(lambda info: setattr(info, "uname", "root")), "one spelling"),
        (with_member(lambda info: None, tarfile.GNU_FORMAT), "one spelling"),
    ],
)
def test_a_member_of_another_kind_is_named(raw: bytes, words: str) -> None:
    refused(raw, words)


# --- a signer who signs nonsense ---


def signed(manifest: bytes, number: int = 7, files: dict[str, bytes] | None = None) -> bytes:
    signature = KEY.sign(manifest, f"moat-config revision={number}")
    rest = sorted((FILES if files is None else files).items())
    return ustar.build([("revision.json", manifest), ("revision.json.minisig", signature), *rest])


def canonical(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, sort_keys=True, separators=(",", ":")) + "\n").encode()


def changed(**more: Any) -> bytes:
    return signed(canonical({**json.loads(opened(RAW).manifest), **more}))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"format": 2}, "unknown format"),
        ({"format": True}, "unknown format"),
        ({"revision": 0}, "number cannot be used"),
        ({"revision": -1}, "number cannot be used"),
        ({"revision": True}, "number cannot be used"),
        ({"revision": "7"}, "number cannot be used"),
        ({"revision": 2**60}, "number cannot be used"),
        ({"previous": 7}, "previous"),
        ({"previous": -1}, "previous"),
        ({"content_of": 7}, "content_of"),
        ({"content_of": 0}, "content_of"),
        ({"author": 5}, "author"),
        ({"author": "a\nb"}, "author"),
        ({"author": "x\x1b[2J"}, "author"),
        ({"author": "a" * 201}, "author"),
        ({"message": "\u202e"}, "message"),
        ({"message": "\ud800"}, "message"),
        ({"message": None}, "message"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"created_at": "2027-02-30T12:00:00Z"}, "created_at"),
        ({"created_at": "2027-1-31T12:00:00Z"}, "created_at"),
        ({"created_at": 5}, "created_at"),
        ({"content": "0" * 64}, "content is not"),
        ({"content": None}, "content is not"),
        ({"files": []}, "not a list of files"),
        ({"files": {}}, "not a list of files"),
        ({"files": [5]}, "entry of files is malformed"),
        ({"extra": 1}, "fields of a revision"),
    ],
)
def test_a_signed_manifest_with_a_wrong_field_is_named(more: dict[str, Any], words: str) -> None:
    refused(changed(**more), words)


def entry(**more: Any) -> dict[str, Any]:
    return {"path": "config.yaml", "size": 1, "sha256": "0" * 64, **more}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry(path="../x")], "a path"),
        ([entry(path="/etc/passwd")], "a path"),
        ([entry(path="a/../b")], "a path"),
        ([entry(path="a//b")], "a path"),
        ([entry(path="a/")], "a path"),
        ([entry(path="./a")], "a path"),
        ([entry(path="")], "a path"),
        ([entry(path=".")], "a path"),
        ([entry(path="a\0b")], "a path"),
        ([entry(path="a\nb")], "a path"),
        ([entry(path="a b")], "a path"),
        ([entry(path="\u00fc")], "a path"),
        ([entry(path="a\\b")], "a path"),
        ([entry(path="a" * 101)], "a path"),
        ([entry(path=5)], "a path"),
        ([entry(path="revision.json")], "a path"),
        ([entry(path="prepared.json")], "a path"),
        ([entry(size=-1)], "size"),
        ([entry(size=True)], "size"),
        ([entry(size="1")], "size"),
        ([entry(sha256="0" * 63)], "sha256"),
        ([entry(sha256="A" * 64)], "sha256"),
        ([entry(), entry()], "twice"),
        ([entry(path="b"), entry(path="a")], "sorted"),
        ([entry(path="a"), entry(path="a/b")], "file and a folder"),
        ([entry(mode=1)], "malformed"),
        ([entry(path=f"f{i}") for i in range(3000)], "not a list of files"),
    ],
)
def test_a_signed_manifest_with_a_wrong_entry_is_named(entries: list[Any], words: str) -> None:
    refused(changed(files=entries), words)


def test_a_signed_entry_larger_than_the_archive_is_named() -> None:
    entries = [entry(size=2**40)]
    content = hashlib.sha256(f"{'0' * 64}  config.yaml\n".encode()).hexdigest()
    refused(changed(files=entries, content=content), "too large|cut short|one spelling")


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]\n",
        b"null\n",
        b"{}\n",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000,
        opened(RAW).manifest.replace(b'"revision":7', b'"revision":7.0'),
        opened(RAW).manifest.replace(b'"revision":7', b'"revision":7e0'),
        opened(RAW).manifest.replace(b'"revision":7', b'"revision":NaN'),
        opened(RAW).manifest.replace(b'"revision":7', b'"revision":Infinity'),
        opened(RAW).manifest.replace(b'"revision":7', b'"revision":' + b"9" * 5000),
        opened(RAW).manifest.replace(b'"revision":7', b'"revision":7,"revision":7'),
        opened(RAW).manifest.replace(b",", b", "),
        opened(RAW).manifest.replace(b"Ada", b"\\u0041da"),
        opened(RAW).manifest[:-1],
        opened(RAW).manifest + b"\n",
        b"\xff\xfe",
        "\ufeff".encode() + opened(RAW).manifest,
        opened(RAW).manifest.decode().encode("utf-16"),
        canonical({**json.loads(opened(RAW).manifest), "message": "x" * (1 << 19)}),
    ],
    ids=range(20),
)
def test_a_signed_manifest_of_another_spelling_is_refused(manifest: bytes) -> None:
    refused(signed(manifest), "revision.json|fields of a revision|number cannot be used|message")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
NAMES = sorted(json.loads(opened(RAW).manifest))


@hypothesis_settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), value=json_values)
def test_no_signed_value_raises_anything_else(name: str, value: Any) -> None:
    try:
        r = opened(changed(**{name: value}))
    except (BadRevision, BadSignature):
        return
    assert dict(r.files) == FILES
    assert r.number == 7


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"number": 0}, "number"),
        ({"previous": 7}, "previous"),
        ({"author": "a\tb"}, "author"),
        ({"message": "x" * 5000}, "message"),
        ({"created_at": "now"}, "created_at"),
        ({"files": {}}, "list of files"),
        ({"files": {"../x": b""}}, "a path"),
    ],
)
def test_build_refuses_what_no_reader_would_take(more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRevision, match=words):
        build(**more)


# --- the kept folder ---


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    r = opened(RAW)
    for path, data in {**r.files, "revision.json": r.manifest, "revision.json.minisig": r.signature}.items():
        place = tmp_path / "7" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    (tmp_path / "7" / "prepared.json").write_bytes(b"{}")
    return tmp_path / "7"


def test_a_kept_revision_is_verified_again(kept: Path) -> None:
    assert revision.read_folder(kept, TRUSTED) == opened(RAW)
    with pytest.raises(BadSignature):
        revision.read_folder(kept, [SigningKey.generate().public])
    assert revision.read_folder(kept, None).sha256 == opened(RAW).sha256


@pytest.mark.parametrize("path", ["revision.json", "revision.json.minisig", "config.yaml", "routers/m.onnx"])
@pytest.mark.parametrize("how", ["missing", "changed", "grown", "link", "folder", "pipe"])
def test_a_damaged_kept_revision_is_refused(kept: Path, path: str, how: str) -> None:
    place = kept / path
    data = place.read_bytes()
    place.unlink()
    if how == "changed":
        place.write_bytes(data[:-2] + b"x" + data[-1:])
    elif how == "grown":
        place.write_bytes(data + b"x")
    elif how == "link":
        (kept.parent / "elsewhere").write_bytes(data)
        place.symlink_to(kept.parent / "elsewhere")
    elif how == "folder":
        place.mkdir()
    elif how == "pipe":
        os.mkfifo(place)
    with pytest.raises((BadRevision, BadSignature)) as caught:
        revision.read_folder(kept, TRUSTED)
    assert caught.value.hint


def test_a_file_that_does_not_belong_is_refused(kept: Path) -> None:
    (kept / "routers/extra.txt").write_bytes(b"")
    with pytest.raises(BadRevision, match="not listed"):
        revision.read_folder(kept, TRUSTED)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRevision, match="cannot be read"):
        revision.read_folder(tmp_path / "8", TRUSTED)
