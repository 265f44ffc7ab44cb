# SPDX-License-Identifier: Apache-2.0
"""Proves: the deployment folder is compared before it is changed, changed once, and kept where it is the operator's.

Runs the real files of compose/ through the real plan and writer, in a temporary folder.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moat import ed25519, minisign
from moat.errors import PrepareFailed
from moat.manifest import BundleInfo, ImageEntry, Manifest
from moat.minisign import PublicKey
from moat.site import certificate, deployment, layout
from moat.site.deployment import Item, Kind
from moat.site.layout import Options, Secrets
from moat.site.verify import VerifiedBundle

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = Options("demo", ("localhost",), 8443, 8080, "127.0.0.1")


def no_chown(what: int | Path, uid: int, gid: int) -> None:
    """Tests need no root: the owners that were asked for are checked in the acceptance tests."""


def files() -> dict[str, bytes]:
    found = {p.relative_to(ROOT / "compose").as_posix(): p for p in (ROOT / "compose").rglob("*") if p.is_file()}
    return {**{name: p.read_bytes() for name, p in found.items() if p.suffix != ".pyc"}, "moat.pyz": b"pyz"}


def bundle(version: str = "0.1.0") -> VerifiedBundle:
    images = tuple(
        ImageEntry(n, f"moat/{n}:{version}-aaaaaaaaaaaa", "sha256:" + "a" * 64, f"images/{n}.tar", 1)
        for n in ("gateway", "minio", "model", "nginx", "valkey")
    )
    manifest = Manifest(BundleInfo(version, "demo", "debian13-amd64", 1), (), images)
    return VerifiedBundle(Path("/medium"), manifest, b"", "0" * 64, PublicKey(b"12345678", b"k" * 32), 0, 0)


def everything(root: Path, options: Options = OPTIONS, version: str = "0.1.0") -> list[Item]:
    made = layout.items(root, files(), bundle(version), options, Secrets.read_or_make(root), None)
    me = os.geteuid()
    return [replace(i, uid=me) for i in made]  # owners need root; see no_chown


def prepare(root: Path, options: Options = OPTIONS, version: str = "0.1.0") -> list[str]:
    changes = deployment.plan(root, everything(root, options, version))
    deployment.apply(root, changes, no_chown)
    return [f"{c.action} {c.item.path}" for c in changes]


def snapshot(root: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        p.relative_to(root).as_posix(): (
            p.stat().st_mode,
            p.stat().st_mtime_ns,
            p.read_bytes() if p.is_file() else b"",
        )
        for p in root.rglob("*")
    }


def test_the_plan_touches_nothing_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "moat"
    deployment.plan(root, everything(root))
    assert not root.exists()
    assert len(prepare(root)) > 20
    before = snapshot(root)
    assert prepare(root) == []
    assert snapshot(root) == before


def test_every_secret_is_0600_random_and_in_no_other_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(one)
    prepare(two)
    secrets = [p for p in (one / "secrets").rglob("*") if p.is_file()]
    assert len(secrets) == 16
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes() != (two / path.relative_to(one)).read_bytes()
    for folder in (one / "secrets").iterdir():
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    values = {p.read_text().strip().splitlines()[-1] for p in secrets if p.suffix != ".acl"}
    for path in one.rglob("*"):
        if path.is_file() and (one / "secrets") not in path.parents:
            assert not any(v.encode() in path.read_bytes() for v in values), path
    # Valkey is told the hash of its password, not the password.
    password = (one / "secrets/gateway/valkey_password").read_text().strip()
    acl = (one / "secrets/valkey/users.acl").read_text()
    assert hashlib.sha256(password.encode()).hexdigest() in acl
    assert password not in acl
    for copy, home in (
        ("root_user", "minio/root_user"), ("root_password", "minio/root_password"),
        ("reader_access_key", "config-sync/store_access_key"), ("reader_secret_key", "config-sync/store_secret_key"),
        ("writer_access_key", "admin/store_access_key"), ("writer_secret_key", "admin/store_secret_key"),
    ):  # fmt: skip
        path = one / "secrets/minio-init" / f"store_{copy}"
        assert path.read_bytes() == (one / "secrets" / home).read_bytes()


def test_no_secret_is_in_the_plan_or_in_a_repr(tmp_path: Path) -> None:
    secrets = Secrets.read_or_make(tmp_path)
    items = layout.items(tmp_path, files(), bundle(), OPTIONS, secrets, None)
    shown = repr(secrets) + "".join(c.text for c in deployment.plan(tmp_path, items))
    for value in secrets.values.values():
        assert len(value) >= 16
        assert value not in shown


def test_what_is_the_operators_stays_and_what_is_the_bundles_follows_it(tmp_path: Path) -> None:
    root = tmp_path / "moat"
    prepare(root)
    kept = ("config/config.yaml", "config/gateway.yaml", "config/keys.yaml", "nginx/upstream.conf")
    for name in (*kept, "nginx/nginx.conf", "compose.yaml"):
        (root / name).write_bytes((root / name).read_bytes() + b"# edited\n")
    master = (root / "secrets/gateway/master_key").read_bytes()
    changed = prepare(root, version="0.2.0")
    assert set(changed) == {
        "replace .env",
        "replace nginx/nginx.conf",
        "replace compose.yaml",
        "replace state/prepared.json",
    }
    for name in kept:
        assert (root / name).read_bytes().endswith(b"# edited\n")
    assert (root / "secrets/gateway/master_key").read_bytes() == master
    assert "0.2.0" in (root / ".env").read_text()


def test_a_lost_secret_is_made_anew_with_all_its_copies(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "secrets/minio/root_password").unlink()
    assert prepare(tmp_path) == ["make secrets/minio/root_password", "replace secrets/minio-init/store_root_password"]
    assert prepare(tmp_path) == []


def site_keys(root: Path) -> set[str]:
    return {p.name for p in (root / "site-keys").iterdir()}


def test_the_site_key_is_minisigns_and_its_public_half_lies_beside(tmp_path: Path) -> None:
    prepare(tmp_path)
    key = minisign.parse_secret_key((tmp_path / "secrets/admin/site_key").read_bytes(), None)
    (name,) = site_keys(tmp_path)
    public = minisign.parse_public_key_file((tmp_path / "site-keys" / name).read_bytes(), name)
    assert name == f"{key.key_id[::-1].hex().upper()}.pub"
    assert public == key.public_key
    # The two halves belong together: another implementation signs with the seed, and ours checks.
    signature = Ed25519PrivateKey.from_private_bytes(key.seed).sign(b"revision")
    assert ed25519.verify(public.key, b"revision", signature)
    assert key.seed.hex() not in repr(Secrets.read_or_make(tmp_path))


def test_a_new_site_key_leaves_the_public_half_of_the_one_before(tmp_path: Path) -> None:
    """What the old key signed must still be read after a restart, until the operator says otherwise."""
    prepare(tmp_path)
    before = site_keys(tmp_path)
    (tmp_path / "secrets/admin/site_key").unlink()
    changes = prepare(tmp_path)
    after = site_keys(tmp_path)
    assert before < after
    assert len(after) == 2
    assert changes == ["make secrets/admin/site_key", f"make site-keys/{(after - before).pop()}"]


def test_a_site_key_with_a_passphrase_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path)
    path = tmp_path / "secrets/admin/site_key"
    key = minisign.parse_secret_key(path.read_bytes(), None)
    # Only the head is looked at; a real one would take a second and a gibibyte to make.
    lines = minisign.serialise_secret_key(key, passphrase=None, salt=b"").decode().split("\n")
    raw = bytearray(base64.b64decode(lines[1]))
    raw[2:4] = b"Sc"
    path.write_text(f"{lines[0]}\n{base64.b64encode(bytes(raw)).decode()}\n")
    with pytest.raises(PrepareFailed, match="passphrase"):
        prepare(tmp_path)


def test_a_folder_of_an_earlier_release_gets_what_it_lacks_and_keeps_the_rest(tmp_path: Path) -> None:
    prepare(tmp_path)
    for name in ("secrets/config-sync", "secrets/admin", "site-keys"):
        shutil.rmtree(tmp_path / name)
    for path in (tmp_path / "secrets/minio-init").iterdir():
        path.unlink()
    root = (tmp_path / "secrets/minio/root_password").read_bytes()
    (tmp_path / "secrets/minio-init/store_secret_key").write_bytes(root)  # as it was called then
    before = snapshot(tmp_path)
    assert {c.split(" ")[0] for c in prepare(tmp_path)} == {"make"}
    assert {k: v for k, v in snapshot(tmp_path).items() if k in before and v[2]} == {
        k: v for k, v in before.items() if v[2]
    }
    assert prepare(tmp_path) == []


def test_a_secret_that_was_opened_to_others_is_closed_again(tmp_path: Path) -> None:
    prepare(tmp_path)
    path = tmp_path / "secrets/gateway/master_key"
    before = path.read_bytes()
    path.chmod(0o644)
    assert prepare(tmp_path) == ["set owner and mode secrets/gateway/master_key"]
    assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (0o600, before)


def test_links_in_the_folder_are_refused_and_not_followed(tmp_path: Path) -> None:
    root, victim = tmp_path / "moat", tmp_path / "victim"
    prepare(root)
    victim.write_text("precious")
    for name in ("compose.yaml", "secrets/gateway/master_key"):
        (root / name).unlink()
        (root / name).symlink_to(victim)
        with pytest.raises(PrepareFailed) as refused:
            prepare(root)
        assert "symbolic link" in (refused.value.found or "")
        (root / name).unlink()
        prepare(root)
    assert victim.read_text() == "precious"


def test_an_empty_secret_is_refused_not_replaced(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "secrets/gateway/master_key").write_bytes(b"\n")
    with pytest.raises(PrepareFailed, match="empty"):
        prepare(tmp_path)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"profile": 1}'])
def test_a_damaged_record_is_refused(tmp_path: Path, record: str) -> None:
    prepare(tmp_path)
    (tmp_path / layout.RECORD).write_text(record)
    with pytest.raises(PrepareFailed, match="cannot be understood"):
        layout.read_record(tmp_path)


def test_the_record_holds_the_options(tmp_path: Path) -> None:
    prepare(tmp_path, replace(OPTIONS, https_port=9443, names=("gw.example",)))
    record = layout.read_record(tmp_path)
    assert record is not None
    assert (record.https_port, record.names, record.tls) == (9443, ("gw.example",), "made")
    assert "default 9443;" in (tmp_path / "nginx/site.conf").read_text()
    assert "MOAT_HTTPS_PORT=9443" in (tmp_path / ".env").read_text()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    def full(what: int | Path, uid: int, gid: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    item = Item("config.yaml", Kind.MANAGED, 0o644, os.geteuid(), b"x" * 100)
    with pytest.raises(PrepareFailed) as refused:
        deployment.apply(tmp_path, deployment.plan(tmp_path, [item]), full)
    assert refused.value.found == "the disk is full"
    assert "make room" in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []


# --- the site's own certificate ---


def openssl(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"]
    argv += ["-subj", f"/CN={name}", "-keyout", str(key), "-out", str(cert), *(more or ("-nodes",))]
    subprocess.run(argv, check=True, capture_output=True)
    return cert, key


def test_a_sites_own_pair_is_taken_and_replaces_the_one_made_here(tmp_path: Path) -> None:
    cert, key = openssl(tmp_path, "site")
    pair = certificate.given(cert, key, None)
    assert pair.ca == pair.cert == cert.read_bytes()
    assert key.read_bytes() == pair.key
    assert "PRIVATE" not in repr(pair)
    items = layout.items(tmp_path / "moat", files(), bundle(), OPTIONS, Secrets.read_or_make(tmp_path), pair)
    by_path = {i.path: i for i in items}
    assert (by_path["tls/key.pem"].mode, by_path["tls/key.pem"].uid) == (0o600, deployment.NGINX)


def test_certificate_and_key_are_renamed_only_when_both_are_written(tmp_path: Path) -> None:
    """What nginx reads at a handshake in between: the pair before, never one file of each."""
    prepare(tmp_path)
    me, seen = os.geteuid(), []
    for name in sorted(deployment.PAIR):
        (tmp_path / name).write_bytes(b"before")

    def look(what: int | Path, uid: int, gid: int) -> None:
        seen.append({(tmp_path / name).read_bytes() for name in deployment.PAIR})

    items = [Item(name, Kind.MANAGED, 0o600, me, b"after") for name in sorted(deployment.PAIR)]
    deployment.apply(tmp_path, deployment.plan(tmp_path, items), look)
    assert set(map(frozenset, seen)) == {frozenset({b"before"})}
    assert {(tmp_path / name).read_bytes() for name in deployment.PAIR} == {b"after"}
    assert [p.name for p in (tmp_path / "tls").rglob("*") if p.name.endswith(".tmp")] == []
    assert (tmp_path / deployment.SWITCH).resolve() == tmp_path / "tls/switch/now"
    assert list((tmp_path / deployment.BEFORE).iterdir()) == []  # no old key is left


def test_a_replacement_that_was_cut_short_serves_the_pair_before_and_is_ended_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    names = sorted(deployment.PAIR)
    for name in names:
        (tmp_path / name).write_bytes(b"before")

    def cut(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moat.site.deployment.time.sleep", cut)
    files = [(tmp_path / name, b"after", 0o600, os.geteuid()) for name in names]
    with pytest.raises(KeyboardInterrupt):
        deployment.write_pair(tmp_path, files, no_chown)
    assert (tmp_path / deployment.SWITCH).resolve() == tmp_path / "tls/switch/before"
    assert {p.read_bytes() for p in (tmp_path / deployment.BEFORE).iterdir()} == {b"before"}
    monkeypatch.undo()
    changes = prepare(tmp_path)
    assert f"replace {deployment.SWITCH}" in changes
    assert (tmp_path / deployment.SWITCH).resolve() == tmp_path / "tls/switch/now"
    assert prepare(tmp_path) == []


def test_a_switch_that_is_no_link_is_refused(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / deployment.SWITCH).unlink()
    (tmp_path / deployment.SWITCH).mkdir()
    with pytest.raises(PrepareFailed):
        prepare(tmp_path)


def test_pairs_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    cert, key = openssl(tmp_path, "one")
    other, _ = openssl(tmp_path, "two")
    locked, locked_key = openssl(tmp_path, "locked", "-passout", "pass:secret")
    noise = tmp_path / "noise"
    noise.write_bytes(b"\0" * 100)
    for pair, words in (
        ((other, key), "do not belong together"),
        ((locked, locked_key), "asks for a passphrase"),
        ((noise, key), "is not PEM"),
        ((cert, tmp_path / "absent"), "cannot be read"),
        ((key, key), "cannot be used"),
    ):
        with pytest.raises(PrepareFailed, match=words):
            certificate.given(*pair, None)


def test_a_certificate_is_made_when_there_is_none_and_when_the_names_change(tmp_path: Path) -> None:
    assert certificate.to_make(tmp_path, ("a",), None)
    prepare(tmp_path, replace(OPTIONS, names=("a",)))
    for name in ("tls/cert.pem", "tls/key.pem", "tls/ca.pem", "client/ca.pem"):
        (tmp_path / name).write_text("x")
    before = layout.read_record(tmp_path)
    assert before is not None
    assert not certificate.to_make(tmp_path, ("a",), before)
    assert certificate.to_make(tmp_path, ("b",), before)
    # A certificate that the site gave is never replaced by one of ours.
    assert not certificate.to_make(tmp_path, ("b",), replace(before, tls="given"))
