# SPDX-License-Identifier: Apache-2.0
"""An attacker's simulator: everything that somebody who holds the medium, or has stolen a copy, may do to a bundle.

Each :class:`Attack` changes a signed bundle on disk and names the one kind of refusal (and exit code) it must meet.
Those of the second list need the release key: they show what stands between a careless or bribed build host and a site.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.unit.site.bundles import SMALL, Made, entry, image, make_bundle, manifest_of, write_signed

from moat.build.sign import make_signature
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from moat.minisign import SecretKey, parse_signature


@dataclass(frozen=True)
class Attack:
    """One deed. ``kind`` and ``code`` are what ``moat verify`` must answer; ``path`` the file it must name."""

    name: str
    kind: str
    code: int
    do: Callable[[Made, random.Random], None]
    path: str | None = None


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def _flip_file(made: Made, rng: random.Random) -> None:
    target = made.path / "images/gateway.tar"
    flip(target, rng.randrange(target.stat().st_size), rng.randrange(8))


def _flip_first(made: Made, rng: random.Random) -> None:
    flip(made.path / "images/gateway.tar", 0, 0)


def _flip_last(made: Made, rng: random.Random) -> None:
    flip(made.path / "images/gateway.tar", -1, 7)


def _flip_manifest(made: Made, rng: random.Random) -> None:
    target = made.path / MANIFEST_NAME
    flip(target, rng.randrange(target.stat().st_size), rng.randrange(8))


def _flip_pyz(made: Made, rng: random.Random) -> None:
    flip(made.path / "moat.pyz", 100, 1)


def _truncate(name: str, size: int) -> Callable[[Made, random.Random], None]:
    return lambda made, rng: os.truncate(made.path / name, size)


def _append(name: str, data: bytes) -> Callable[[Made, random.Random], None]:
    def do(made: Made, rng: random.Random) -> None:
        with (made.path / name).open("ab") as f:
            f.write(data)

    return do


def _remove(name: str) -> Callable[[Made, random.Random], None]:
    return lambda made, rng: (made.path / name).unlink()


def _swap(made: Made, rng: random.Random) -> None:
    a, b = made.path / "wheels/a-1.0-py3-none-any.whl", made.path / "wheels/b-1.0-py3-none-any.whl"
    first, second = a.read_bytes(), b.read_bytes()
    assert len(first) == len(second), "a swap that sizes alone would show is no test of the hashes"
    a.write_bytes(second)
    b.write_bytes(first)


def _extra(name: bytes, content: bytes = b"x") -> Callable[[Made, random.Random], None]:
    def do(made: Made, rng: random.Random) -> None:
        place = os.fsencode(made.path) + b"/" + name
        os.makedirs(os.path.dirname(place), exist_ok=True)  # noqa: PTH103, PTH120 (a name that is not text)
        with open(place, "wb") as f:  # noqa: PTH123
            f.write(content)

    return do


def _extra_folder(made: Made, rng: random.Random) -> None:
    (made.path / "wheels" / "later").mkdir()


def _outside(made: Made, name: str) -> Path:
    """Move a file out of the bundle and return where it went: same bytes, other place."""
    outside = made.path.parent / ("outside-" + Path(name).name)
    shutil.move(made.path / name, outside)
    return outside


def _symlink(name: str) -> Callable[[Made, random.Random], None]:
    def do(made: Made, rng: random.Random) -> None:
        (made.path / name).symlink_to(_outside(made, name))

    return do


def _extra_symlink(made: Made, rng: random.Random) -> None:
    (made.path / "wheels" / "shadow").symlink_to("/etc/shadow")


def _symlink_loop(made: Made, rng: random.Random) -> None:
    (made.path / "wheels" / "loop").symlink_to("..")


def _hard_link(made: Made, rng: random.Random) -> None:
    os.link(made.path / "images/nginx.tar", made.path.parent / "second-name")


def _hard_link_of_manifest(made: Made, rng: random.Random) -> None:
    os.link(made.path / MANIFEST_NAME, made.path.parent / "second-manifest")


def _fifo(made: Made, rng: random.Random) -> None:
    (made.path / "README.txt").unlink()
    os.mkfifo(made.path / "README.txt")


def _fifo_as_manifest(made: Made, rng: random.Random) -> None:
    (made.path / MANIFEST_NAME).unlink()
    os.mkfifo(made.path / MANIFEST_NAME)


def _socket(made: Made, rng: random.Random) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        folder = os.open(made.path, os.O_RDONLY)
        try:
            s.bind(f"/proc/self/fd/{folder}/sock")  # the real path may be longer than a socket's name can be
        finally:
            os.close(folder)


def _folder_to_file(made: Made, rng: random.Random) -> None:
    shutil.rmtree(made.path / "wheels")
    (made.path / "wheels").write_bytes(b"not a folder")


def _file_to_folder(made: Made, rng: random.Random) -> None:
    (made.path / "README.txt").unlink()
    (made.path / "README.txt").mkdir()


def _huge_manifest(made: Made, rng: random.Random) -> None:
    os.truncate(made.path / MANIFEST_NAME, 8 * 1024**3)  # sparse: reading it whole would show


def _huge_signature(made: Made, rng: random.Random) -> None:
    os.truncate(made.path / SIGNATURE_NAME, 8 * 1024**3)


def _other_bundle(made: Made, **changed: str) -> Made:
    """Make another bundle with the same key, as a thief of an old medium has it."""
    files = {**SMALL, "README.txt": b"Another release.\n"}
    return make_bundle(made.path.parent / "other", made.keys, files, version=changed.get("version", "0.1.0"))


def _manifest_alone_of_another(made: Made, rng: random.Random) -> None:
    shutil.copy(_other_bundle(made).path / MANIFEST_NAME, made.path)


def _signature_of_another(made: Made, rng: random.Random) -> None:
    shutil.copy(_other_bundle(made).path / SIGNATURE_NAME, made.path)


def _manifest_and_signature_of_another(made: Made, rng: random.Random) -> None:
    other = _other_bundle(made)
    shutil.copy(other.path / MANIFEST_NAME, made.path)
    shutil.copy(other.path / SIGNATURE_NAME, made.path)


def _other_key(made: Made, rng: random.Random) -> None:
    theirs = make_bundle(made.path.parent / "theirs", made.path.parent / "their-keys", {"evil.txt": b"evil"})
    shutil.rmtree(made.path)
    shutil.copytree(theirs.path, made.path)


def _other_key_with_our_id(made: Made, rng: random.Random) -> None:
    theirs = make_bundle(made.path.parent / "theirs", made.path.parent / "their-keys", {"evil.txt": b"evil"})
    shutil.rmtree(made.path)
    shutil.copytree(theirs.path, made.path)
    signature = parse_signature((made.path / SIGNATURE_NAME).read_bytes())
    (made.path / SIGNATURE_NAME).write_bytes(replace(signature, key_id=made.secret.key_id).to_bytes())


def _trusted_comment(made: Made, rng: random.Random) -> None:
    signature = parse_signature((made.path / SIGNATURE_NAME).read_bytes())
    comment = signature.trusted_comment.replace("0.1.0", "9.9.9")
    (made.path / SIGNATURE_NAME).write_bytes(replace(signature, trusted_comment=comment).to_bytes())


def _untrusted_comment(made: Made, rng: random.Random) -> None:
    path = made.path / SIGNATURE_NAME
    path.write_bytes(path.read_bytes().replace(b"untrusted comment: ", b"untrusted comment: verified by security, "))


def _signature_newline(made: Made, rng: random.Random) -> None:
    path = made.path / SIGNATURE_NAME
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


#: What somebody can do who holds the medium, but no key.
WITHOUT_KEY = [
    Attack("a bit flipped anywhere in a file", "changed", 6, _flip_file, "images/gateway.tar"),
    Attack("the first bit of a file flipped", "changed", 6, _flip_first, "images/gateway.tar"),
    Attack("the last bit of a file flipped", "changed", 6, _flip_last, "images/gateway.tar"),
    Attack("a bit flipped in moat.pyz", "changed", 6, _flip_pyz, "moat.pyz"),
    Attack("a bit flipped anywhere in the manifest", "bad-signature", 3, _flip_manifest, MANIFEST_NAME),
    Attack("a file cut short", "changed", 6, _truncate("images/nginx.tar", 100), "images/nginx.tar"),
    Attack("a file emptied", "changed", 6, _truncate("images/nginx.tar", 0), "images/nginx.tar"),
    Attack("a byte added to a file", "changed", 6, _append("images/nginx.tar", b"\0"), "images/nginx.tar"),
    Attack("a byte added to an empty file", "changed", 6, _append("empty.txt", b"\0"), "empty.txt"),
    Attack("the manifest cut short", "bad-signature", 3, _truncate(MANIFEST_NAME, 200), MANIFEST_NAME),
    Attack("the manifest emptied", "bad-signature", 3, _truncate(MANIFEST_NAME, 0), MANIFEST_NAME),
    Attack("a line end added to the manifest", "bad-signature", 3, _append(MANIFEST_NAME, b"\n"), MANIFEST_NAME),
    Attack("the manifest removed", "bad-manifest", 9, _remove(MANIFEST_NAME), MANIFEST_NAME),
    Attack("the signature cut short", "bad-signature", 3, _truncate(SIGNATURE_NAME, 100)),
    Attack("the signature emptied", "bad-signature", 3, _truncate(SIGNATURE_NAME, 0)),
    Attack("the signature removed", "bad-signature", 3, _remove(SIGNATURE_NAME), SIGNATURE_NAME),
    Attack("a line added to the signature", "bad-signature", 3, _append(SIGNATURE_NAME, b"x\n")),
    Attack("other line ends in the signature", "bad-signature", 3, _signature_newline, SIGNATURE_NAME),
    Attack("the trusted comment altered", "bad-signature", 3, _trusted_comment),
    Attack("the untrusted comment altered", "bad-signature", 3, _untrusted_comment, SIGNATURE_NAME),
    Attack("two files of one size swapped", "changed", 6, _swap),
    Attack("a file removed", "missing", 5, _remove("wheels/a-1.0-py3-none-any.whl"), "wheels/a-1.0-py3-none-any.whl"),
    Attack(
        "an extra file", "extra", 7, _extra(b"wheels/evil-1.0-py3-none-any.whl"), "wheels/evil-1.0-py3-none-any.whl"
    ),
    Attack("an extra file at the top", "extra", 7, _extra(b"setup.sh"), "setup.sh"),
    Attack("an extra hidden file", "extra", 7, _extra(b".profile"), ".profile"),
    Attack("an extra empty file", "extra", 7, _extra(b"wheels/x", b""), "wheels/x"),
    Attack("an extra file in an extra folder", "extra", 7, _extra(b"a/b/c/d"), "a/b/c/d"),
    Attack("an extra empty folder", "extra", 7, _extra_folder, "wheels/later/"),
    Attack("a twin by case on the medium", "unsafe-path", 8, _extra(b"readme.TXT"), "readme.TXT"),
    Attack("a twin of the manifest by case", "unsafe-path", 8, _extra(b"Manifest.json"), "Manifest.json"),
    Attack("a twin of a folder's file by case", "unsafe-path", 8, _extra(b"Images/nginx.tar"), "Images/nginx.tar"),
    Attack("a name that is not UTF-8", "unsafe-path", 8, _extra(b"wheels/\xff\xfe")),
    Attack("a symlink to the same bytes", "unsafe-path", 8, _symlink("images/nginx.tar"), "images/nginx.tar"),
    Attack("a folder symlinked to the same files", "unsafe-path", 8, _symlink("wheels"), "wheels"),
    Attack("the manifest symlinked", "unsafe-path", 8, _symlink(MANIFEST_NAME), MANIFEST_NAME),
    Attack("the signature symlinked", "unsafe-path", 8, _symlink(SIGNATURE_NAME), SIGNATURE_NAME),
    Attack("an extra symlink to a secret", "unsafe-path", 8, _extra_symlink, "wheels/shadow"),
    Attack("a symlink that leads back", "unsafe-path", 8, _symlink_loop, "wheels/loop"),
    Attack("a hard link", "unsafe-path", 8, _hard_link, "images/nginx.tar"),
    Attack("a hard link of the manifest", "unsafe-path", 8, _hard_link_of_manifest, MANIFEST_NAME),
    Attack("a pipe instead of a file", "unsafe-path", 8, _fifo, "README.txt"),
    Attack("a pipe instead of the manifest", "unsafe-path", 8, _fifo_as_manifest, MANIFEST_NAME),
    Attack("a socket", "unsafe-path", 8, _socket, "sock"),
    Attack("a folder replaced by a file", "missing", 5, _folder_to_file),
    Attack("a file replaced by a folder", "missing", 5, _file_to_folder, "README.txt"),
    Attack("a manifest of 8 GiB", "bad-manifest", 9, _huge_manifest, MANIFEST_NAME),
    Attack("a signature of 8 GiB", "bad-signature", 3, _huge_signature, SIGNATURE_NAME),
    Attack("the manifest of another bundle", "bad-signature", 3, _manifest_alone_of_another, MANIFEST_NAME),
    Attack("the signature of another bundle", "bad-signature", 3, _signature_of_another, MANIFEST_NAME),
    Attack("manifest and signature of another bundle", "changed", 6, _manifest_and_signature_of_another, "README.txt"),
    Attack("a bundle signed by another key", "unknown-key", 4, _other_key, SIGNATURE_NAME),
    Attack("another key under our key's id", "bad-signature", 3, _other_key_with_our_id, MANIFEST_NAME),
]


def _resigned(change: Callable[[Manifest], Manifest]) -> Callable[[Made, random.Random], None]:
    def do(made: Made, rng: random.Random) -> None:
        files = {p: (made.path / p).read_bytes() for p in [*SMALL, "moat.pyz"]}
        write_signed(made.path, change(manifest_of(files)), made.secret)

    return do


def _with_path(*paths: str) -> Callable[[Made, random.Random], None]:
    return _resigned(lambda m: replace(m, files=(*m.files, *(entry(p, b"evil") for p in paths))))


def sign_raw(made: Made, data: bytes, secret: SecretKey | None = None) -> None:
    """Sign arbitrary bytes as the manifest."""
    (made.path / MANIFEST_NAME).write_bytes(data)
    comment = "moat version=0.1.0 profile=demo target=debian13-amd64"
    (made.path / SIGNATURE_NAME).write_bytes(make_signature(secret or made.secret, data, comment).to_bytes())


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Made, random.Random], None]:
    return lambda made, rng: sign_raw(made, change((made.path / MANIFEST_NAME).read_bytes()))


def _edited(change: Callable[[dict[str, object]], object]) -> Callable[[Made, random.Random], None]:
    def edit(data: bytes) -> bytes:
        document = json.loads(data)
        change(document)
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"

    return _raw(edit)


def _other_comment(made: Made, rng: random.Random) -> None:
    data = (made.path / MANIFEST_NAME).read_bytes()
    signature = make_signature(made.secret, data, "moat version=0.2.0 profile=demo target=debian13-amd64")
    (made.path / SIGNATURE_NAME).write_bytes(signature.to_bytes())


#: What somebody can do who has the key, or a build host that errs.
WITH_KEY = [
    Attack("a path that climbs out", "unsafe-path", 8, _with_path("../evil"), "../evil"),
    Attack("a path that climbs out from a folder", "unsafe-path", 8, _with_path("a/../../evil"), "a/../../evil"),
    Attack("an absolute path", "unsafe-path", 8, _with_path("/etc/cron.d/evil"), "/etc/cron.d/evil"),
    Attack("a path of Windows", "unsafe-path", 8, _with_path("..\\evil"), "..\\evil"),
    Attack("a drive of Windows", "unsafe-path", 8, _with_path("C:evil"), "C:evil"),
    Attack("a dot segment", "unsafe-path", 8, _with_path("wheels/./evil"), "wheels/./evil"),
    Attack("an empty segment", "unsafe-path", 8, _with_path("wheels//evil"), "wheels//evil"),
    Attack("a path with NUL", "unsafe-path", 8, _with_path("evil\0.txt"), "evil\0.txt"),
    Attack("a path with an escape sequence", "unsafe-path", 8, _with_path("e\x1b[2Jvil"), "e\x1b[2Jvil"),
    Attack("a path that reads right to left", "unsafe-path", 8, _with_path("evil\u202egnp.exe"), "evil\u202egnp.exe"),
    Attack("twins by case", "unsafe-path", 8, _with_path("readme.txt"), "readme.txt"),
    Attack("twins by folded letters", "unsafe-path", 8, _with_path("stra\u00dfe", "strasse"), "stra\u00dfe"),
    Attack("twins by case of a folder", "unsafe-path", 8, _with_path("Wheels/c"), "wheels/a-1.0-py3-none-any.whl"),
    Attack("a decomposed name", "unsafe-path", 8, _with_path("cafe\u0301.txt"), "cafe\u0301.txt"),
    Attack("twins by Unicode form", "unsafe-path", 8, _with_path("\u00b5", "\u03bc"), "\u03bc"),
    Attack("a file that is a folder", "unsafe-path", 8, _with_path("wheels"), "wheels"),
    Attack("the manifest listed in itself", "unsafe-path", 8, _with_path("manifest.json"), "manifest.json"),
    Attack("another format", "bad-manifest", 9, _edited(lambda d: d.update(format="moat-bundle/2")), MANIFEST_NAME),
    Attack("an unknown part", "bad-manifest", 9, _edited(lambda d: d.update(run="evil.sh")), MANIFEST_NAME),
    Attack("a part missing", "bad-manifest", 9, _edited(lambda d: d.pop("images")), MANIFEST_NAME),
    Attack("not canonical", "bad-manifest", 9, _raw(lambda d: d[:-1]), MANIFEST_NAME),
    Attack("a key twice", "bad-manifest", 9, _raw(lambda d: d.replace(b"{", b'{"format":"x",', 1)), MANIFEST_NAME),
    Attack("deep nesting", "bad-manifest", 9, _raw(lambda d: b"[" * 2_000_000), MANIFEST_NAME),
    Attack("not JSON", "bad-manifest", 9, _raw(lambda d: b"\xff\x00"), MANIFEST_NAME),
    Attack("the comment of another version", "bad-signature", 3, _other_comment, SIGNATURE_NAME),
    Attack(
        "an image whose archive is not listed", "bad-manifest", 9,
        _resigned(lambda m: replace(m, images=(*m.images, image("zzz", "images/zzz.tar")))), MANIFEST_NAME,
    ),
]  # fmt: skip
