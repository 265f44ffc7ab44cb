# SPDX-License-Identifier: Apache-2.0
"""Proves that no bad revision gets past the real sidecar, with a folder as source and real signatures.

Each leaves the revision in force, byte for byte, is named in ``sync.json`` and in the log with its kind, and is healed
by the next good push.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
from tests.integration.hotreload.craft import archive, member
from tests.integration.sync.drive import Drive, config, content
from tests.integration.sync.sidecar import Sidecar

from moat_gateway.sitekey import SigningKey

BOMB = "x-a: &a [z, z, z, z, z, z, z, z, z]\n" + "".join(
    f"x-{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)


def yaml(more: str) -> Callable[[Drive], int]:
    return lambda drive: drive.push(content(more=more))


def router(name: str, data: bytes, digest: str | None = None) -> Callable[[Drive], int]:
    index = f"models:\n  - {{file: {name}, sha256: {digest or hashlib.sha256(data).hexdigest()}}}\n"

    def push(drive: Drive) -> int:
        return drive.push({**content(), f"routers/{name}": data, "routers/index.yaml": index.encode()})

    return push


def outside(drive: Drive) -> int:
    text = config().replace("http://127.0.0.1:9/v1", "http://198.51.100.7/v1")
    return drive.push({**content(), "config.yaml": text.encode()})


def unresolved(drive: Drive) -> int:
    return drive.push({**content(), "config.yaml": config(reference="NO").encode()})


def endless(drive: Drive) -> int:
    lines = config().splitlines(keepends=True)
    many = "".join(lines[1].replace("small", f"many{i}") for i in range(6000))
    return drive.push({**content(), "config.yaml": ("model_list:\n" + many).encode()})


def stored(change: Callable[[bytes], bytes]) -> Callable[[Drive], int]:
    """What lies in the source is not what the pointer means."""

    def push(drive: Drive) -> int:
        number = drive.last + 1
        raw = archive(content(), number, drive.key)
        drive.publish(number, raw, change(raw))
        return number

    return push


def crafted(**how: Any) -> Callable[[Drive], int]:
    """The archive itself is wrong, and the pointer is right."""
    return lambda drive: drive.push(content(), **how)


def larger(drive: Drive) -> int:
    return drive.push({**content(), "routers/x.txt": bytes(2 << 20)})


def missing(drive: Drive) -> int:
    number = drive.push(content())
    (drive.folder / "revisions" / str(number)).unlink()
    return number


def replayed(drive: Drive) -> int:
    number = drive.pointed() - 1
    drive.publish(number, (drive.folder / "revisions" / str(number)).read_bytes())
    return number


def same_number(drive: Drive) -> int:
    return drive.push(content("another"), number=drive.last)


def linked(drive: Drive) -> int:
    number = drive.push(content())
    path = drive.folder / "revisions" / str(number)
    path.rename(drive.folder / "elsewhere")
    path.symlink_to(drive.folder / "elsewhere")
    return number


def no_pointer(drive: Drive) -> None:
    drive.move(b'{"format":1,"revision":')


def stranger(drive: Drive) -> int:
    return drive.push(content(), key=SigningKey.generate())


def path(name: str) -> Callable[[Drive], int]:
    return lambda drive: drive.push({**content(), name: b"x"})


def link(kind: bytes) -> Callable[[Drive], int]:
    return crafted(swap={"config.yaml": member("config.yaml", kind, "/etc/passwd")})


WRONG: dict[str, tuple[str, Callable[[Drive], int | None]]] = {
    "broken YAML": ("bad-config", yaml("router_settings: {num_retries: [1\n")),
    "a key twice": ("bad-config", yaml("router_settings: {num_retries: 1, num_retries: 2}\n")),
    "a YAML tag": ("bad-config", yaml("router_settings: !!python/object/apply:os.system ['true']\n")),
    "an alias bomb": ("bad-config", yaml(BOMB)),
    "an unknown strategy": ("bad-config", yaml("router_settings: {routing_strategy: fastest-first}\n")),
    "an unknown model": ("bad-config", yaml("router_settings: {fallbacks: [{small: [nobody]}]}\n")),
    "an unresolved secret": ("unset-secret", unresolved),
    "an outside endpoint": ("endpoint-refused", outside),
    "keys that are none": ("bad-keys", lambda d: d.push(content(**{"keys.yaml": "teams: [x]\n"}))),
    "a truncated archive": ("bad-revision", lambda d: d.publish_archive(lambda raw: raw[:-512])),
    "an archive cut in the source": ("bad-revision", stored(lambda raw: raw[:2000])),
    "an archive changed in the source": ("bad-revision", stored(lambda raw: raw.replace(b"small", b"smell"))),
    "an over-large archive": ("bad-revision", larger),
    "an archive larger than told": ("bad-revision", stored(lambda raw: raw + bytes(2 << 20))),
    "a symbolic link in the archive": ("bad-revision", link(tarfile.SYMTYPE)),
    "a hard link in the archive": ("bad-revision", link(tarfile.LNKTYPE)),
    "a device in the archive": ("bad-revision", link(tarfile.CHRTYPE)),
    "a path upwards": ("bad-revision", path("../../outside.yaml")),
    "an absolute path": ("bad-revision", path("/etc/moat/outside.yaml")),
    "an archive that is a link": ("bad-revision", linked),
    "a wrong signer": ("bad-signature", stranger),
    "a signature of another revision": ("bad-signature", crafted(comment="moat-config revision=1")),
    "a replayed older revision": ("older-revision", replayed),
    "another content of the same number": ("bad-revision", same_number),
    "a pointer to a missing object": ("bad-revision", missing),
    "a pointer that is none": ("bad-revision", no_pointer),
    "a router model of another hash": ("bad-revision", router("m.safetensors", b"weights", "ab" * 32)),
    "a router model that is a pickle": ("bad-revision", router("m.pkl", b"\x80\x04.")),
    "a router that takes for ever": ("dry-run-failed", endless),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_revision_changes_nothing_is_named_and_healed(shared: Sidecar, name: str) -> None:
    kind, put = WRONG[name]
    node, drive = shared.node, shared.node.drive
    serving = drive.push()
    shared.wait_current(serving)
    note = (node.sync_dir / "current.json").read_bytes()
    total = shared.state().refused_total

    number = put(drive)
    state = shared.wait_refused(number, kind)
    assert (state.revision, state.refused_total) == (serving, total + 1)
    assert state.last_refused is not None
    assert state.last_refused.reason
    assert shared.said("sync.refused")[-1]["message"] == state.last_refused.reason
    assert (node.sync_dir / "current.json").read_bytes() == note
    assert node.check_whole() == serving

    healed = drive.push(number=drive.last + 1)
    shared.wait_current(healed)
    state = shared.wait("the healed state", lambda: s if (s := shared.state()).revision == healed else None)
    assert state.last_refused is None
    assert not (node.folder.parent / "outside.yaml").exists()
