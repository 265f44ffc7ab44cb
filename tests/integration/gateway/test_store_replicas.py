# SPDX-License-Identifier: Apache-2.0
"""Proves two sites: one MinIO copies its revisions to another, the link breaks and heals, a lost main site is replaced.

Two real MinIO servers with a relay between them; everything is done with the product's own commands, and what may not
be done is asked of the server itself, as the account that would do it.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.stores import Asker, Backend, Driver, Place, Refused, eventually
from tests.integration.hotreload.programs import Relay

ARRIVES = 120.0  # seconds; it takes one, after a cut up to fifteen, on a busy machine more


class Party:
    """One site: a MinIO with its accounts, an administrator and a node."""

    def __init__(self, name: str, folder: Path, python: Path) -> None:
        (folder / "store").mkdir(parents=True)
        self.backend = Backend("minio", folder / "store")
        self.place = Place(self.backend, folder / "place", python)
        self.name, self.folder = name, self.place.folder / "secrets"
        self.place.write("store_root_user", self.backend.access)
        self.place.write("store_root_password", self.backend.secret)
        for role in ("reader", "writer"):
            self.place.write(f"store_{role}_access_key", f"moat-{role}-{secrets.token_hex(4)}")
            self.place.write(f"store_{role}_secret_key", secrets.token_hex(20))
        self.place.bucket = "moat-config"
        self.asker = Asker(python, self.backend.port)
        self.ask = self.asker.ask

    def keys(self, role: str) -> tuple[str, str]:
        return (
            (self.folder / f"store_{role}_access_key").read_text().strip(),
            (self.folder / f"store_{role}_secret_key").read_text().strip(),
        )

    def store(self, *words: str) -> dict[str, Any]:
        """Run a command of `store` with all the secrets; its output never holds one."""
        done = self.place.command("store", *words, "--secrets", str(self.folder), "--json")
        assert done.returncode == 0, done.stderr
        for path in self.folder.glob("store_*"):
            assert path.read_text().strip() not in done.stdout + done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def driver(self, role: str) -> Driver:
        return self.place.driver(
            MOAT_STORE_ACCESS_KEY_FILE=str(self.folder / f"store_{role}_access_key"),
            MOAT_STORE_SECRET_KEY_FILE=str(self.folder / f"store_{role}_secret_key"),
        )

    def admin(self, keys: tuple[str, str], path: str) -> dict[str, Any]:
        return self.asker.admin(keys, "GET", path, {})

    def close(self) -> None:
        self.place.close()
        self.asker.close()
        self.backend.stop()


class Sites:
    """A main and a receiving site with a link between their stores."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.main, self.copy = Party("site-a", folder / "a", python), Party("site-b", folder / "b", python)
        self.link = Relay(self.copy.backend.port)
        # The receiving site's nodes trust the main site's key.
        (self.copy.place.folder / "site-keys/main.pub").write_bytes(self.main.place.key.public.to_bytes())

    def set_up(self) -> None:
        """Make accounts and the first revision of the main site."""
        for party in (self.main, self.copy):
            party.backend.start()
        self.main.store("accounts")
        self.pusher = self.main.driver("writer")
        self.node = self.main.driver("reader")
        self.pusher.ask("push", text="before")
        self.receive()
        self.follower = self.copy.driver("reader")

    @property
    def to(self) -> str:
        return f"127.0.0.1:{self.link.port}"

    def receive(self) -> dict[str, Any]:
        """Make the receiving site one, and bring the keys of the replication to the main site."""
        done = self.copy.store("accounts", "--replica-of", "site-a")
        self.bring()
        return done

    def bring(self) -> None:
        for name in ("store_replicator_access_key", "store_replicator_secret_key"):
            self.main.place.write(name, (self.copy.folder / name).read_text().strip())

    def arrived(self, text: str) -> None:
        eventually(f"{text} arrives", ARRIVES, lambda: self.follower.ask("content") == text)

    def close(self) -> None:
        self.main.close()
        self.copy.close()
        self.link.close()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Iterator[Sites]:
    made = Sites(tmp_path_factory.mktemp("sites"), python)
    try:
        made.set_up()
        yield made
    finally:
        made.close()


def test_a_copy_is_set_up_once_and_what_was_there_arrives(sites: Sites) -> None:
    assert sites.main.store("replicate")["target"] == ""
    done = sites.main.store("replicate", "--to", sites.to)
    assert done["changes"] == [f"target {sites.to} made", "rules of the replication set"]
    sites.arrived("before")
    again = sites.main.store("replicate", "--to", sites.to)
    assert (again["changed"], again["target"], again["online"]) == (False, sites.to, True)
    assert sites.copy.store("accounts")["changes"] == []


def test_a_push_at_the_main_site_arrives_at_the_other(sites: Sites) -> None:
    number = sites.pusher.ask("push", text="one")["revision"]
    sites.arrived("one")
    assert sites.follower.ask("pointer")["revision"] == number
    state = eventually(
        "the copy is known to be complete",
        ARRIVES,
        lambda: (s := sites.main.store("replicate"))["pointer"] == "COMPLETED" and s,
    )
    assert (state["revision"], state["archive"]) == (number, "COMPLETED")


def test_a_push_at_the_receiving_site_is_refused_by_the_command_and_by_its_store(sites: Sites) -> None:
    with pytest.raises(Refused, match="only receives the revisions of site-a") as e:
        sites.copy.driver("writer").ask("push", text="here")
    assert e.value.exit == 17
    writer = sites.copy.keys("writer")
    for key in ("current", "revisions/99", "replica"):
        answer = sites.copy.ask(writer, "put_object", Bucket="moat-config", Key=key, Body="x")
        assert answer.get("code") == "AccessDenied", key
    # The control: the same request is possible at the main site.
    assert sites.main.ask(sites.main.keys("writer"), "put_object", Bucket="moat-config", Key="control", Body="x")["ok"]


def test_the_account_of_the_replication_can_do_nothing_else(sites: Sites) -> None:
    keys = sites.copy.keys("replicator")
    assert sites.copy.ask(keys, "get_object", Bucket="moat-config", Key="current")["ok"]
    for call, args in (
        ("put_object", {"Bucket": "moat-config", "Key": "replica", "Body": "x"}),
        ("put_object", {"Bucket": "moat-config", "Key": "probe", "Body": "x"}),
        ("put_object", {"Bucket": "moat-status", "Key": "nodes/pc1.json", "Body": "x"}),
        ("delete_object", {"Bucket": "moat-config", "Key": "current"}),
        ("get_object", {"Bucket": "moat-config", "Key": "replica"}),
        ("list_objects_v2", {"Bucket": "moat-status"}),
        ("put_bucket_versioning", {"Bucket": "moat-config", "VersioningConfiguration": {"Status": "Suspended"}}),
        ("get_bucket_replication", {"Bucket": "moat-config"}),
    ):
        answer = sites.copy.ask(keys, call, **args)
        assert answer.get("code") == "AccessDenied", (call, args, answer)
    assert sites.copy.admin(keys, "list-users") == {"ok": False, "code": "HTTP 403 AccessDenied"}


def test_nothing_but_revisions_and_the_pointer_is_copied(sites: Sites) -> None:
    root = sites.copy.backend.access, sites.copy.backend.secret
    # `probe` and `control` are at the main site, `replica` only here.
    assert sites.main.ask(sites.main.keys("writer"), "get_object", Bucket="moat-config", Key="probe")["ok"]
    for key, there in (("probe", False), ("control", False), ("replica", True)):
        assert sites.copy.ask(root, "get_object", Bucket="moat-config", Key=key)["ok"] is there, key


@pytest.mark.parametrize("how", ["cut", pytest.param("refuse", marks=pytest.mark.long)])
def test_a_broken_link_heals_by_itself_while_a_node_follows_the_main_store(sites: Sites, how: str) -> None:
    before = sites.follower.ask("content")
    getattr(sites.link, how)()
    try:
        for n in (1, 2):
            sites.pusher.ask("push", text=f"{how} {n}")
        state = eventually(
            "the main store knows", ARRIVES, lambda: (s := sites.main.store("replicate"))["online"] is False and s
        )
        assert "COMPLETED" not in (state["pointer"], state["archive"])
        assert sites.follower.ask("content") == before
    finally:
        sites.link.heal()
    # What a node's config-sync does anyway: it is by reading that MinIO tries again.
    ended = threading.Event()

    def follow() -> None:
        etag = None
        while not ended.wait(0.25):
            found = sites.node.ask("pointer", etag=etag)
            etag = found["etag"] if found else etag

    node = threading.Thread(target=follow)
    node.start()
    try:
        sites.arrived(f"{how} 2")
    finally:
        ended.set()
        node.join()


def test_the_keys_of_the_replication_are_renewed_without_a_gap(sites: Sites) -> None:
    for name in ("store_replicator_access_key", "store_replicator_secret_key"):
        (sites.copy.folder / name).unlink()
    assert "replicator made" in sites.receive()["changes"]
    done = sites.main.store("replicate", "--to", sites.to)
    assert done["changes"] == [f"target {sites.to} given other keys"]
    assert sites.copy.store("accounts", "--prune")["changes"] == ["an account of earlier keys removed"]
    sites.pusher.ask("push", text="renewed")
    sites.arrived("renewed")


def test_a_copy_is_not_copied_further(sites: Sites) -> None:
    sites.bring()
    words = ("replicate", "--to", f"127.0.0.1:{sites.main.backend.port}", "--secrets", str(sites.copy.folder))
    done = sites.copy.place.command("store", *words)
    assert done.returncode == 17
    assert "is a copy of site-a" in done.stderr


def test_a_second_target_and_a_bucket_without_versions_are_refused(sites: Sites) -> None:
    secrets_of_main = ("--secrets", str(sites.main.folder))
    done = sites.main.place.command("store", "replicate", "--to", "127.0.0.1:1", *secrets_of_main)
    assert done.returncode == 17
    assert "to another place already" in done.stderr
    root = sites.main.backend.access, sites.main.backend.secret
    assert sites.main.ask(root, "create_bucket", Bucket="plain")["ok"]
    done = sites.main.place.command("store", "replicate", "--bucket", "plain", "--to", sites.to, *secrets_of_main)
    assert done.returncode == 17
    assert "keeps no versions" in done.stderr


def test_a_lost_main_site_is_replaced_and_cannot_write_here_any_more(sites: Sites) -> None:
    done = sites.copy.store("promote")
    assert done["changes"][:2] == [
        "1 account of the replication from site-a removed",
        "bucket moat-config is a main one",
    ]
    here = sites.copy.driver("writer")
    mine = here.ask("push", text="of the new main site")
    # The old one comes back, does not know it, and pushes.
    theirs = sites.pusher.ask("push", text="of the old main site")
    assert theirs["revision"] == mine["revision"]
    eventually("its store tried", ARRIVES, lambda: sites.main.store("replicate")["pointer"] == "FAILED")
    assert sites.follower.ask("content") == "of the new main site"
    assert here.ask("push", text="next")["revision"] == mine["revision"] + 1
    again = sites.copy.place.command("store", "promote", "--secrets", str(sites.copy.folder))
    assert (again.returncode, "is no copy" in again.stderr) == (17, True)
    # As the rules say: the copying is ended there, and that site becomes a receiving one.
    removed = sites.main.store("replicate", "--remove")
    assert removed["changes"] == [f"copying to {sites.to} ended"]
    assert sites.main.store("replicate", "--remove")["changed"] is False
    sites.main.store("accounts", "--replica-of", "site-b")
    with pytest.raises(Refused, match="only receives the revisions of site-b"):
        sites.main.driver("writer").ask("push", text="again")
