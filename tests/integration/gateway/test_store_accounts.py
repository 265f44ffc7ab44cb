# SPDX-License-Identifier: Apache-2.0
"""Proves `moat-gateway store accounts` against a real MinIO: made once, least privilege, rotation without a gap.

Every "may not" is asked of the server itself, as the account, with the request that would do the damage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.harness import Site, free_port
from tests.integration.gateway.isolated import stop_process
from tests.integration.gateway.stores import Asker
from tests.integration.gateway.test_store import Store

from moat.build.cache import Cache


class Accounts:
    """The running store, its secrets as the site has them, and requests as each account."""

    def __init__(self, folder: Path, site: Site, store: Store) -> None:
        self.folder, self.site, self.store = folder, site, store
        self._asker = Asker(site.python, store.port)
        self.ask, self.admin, self.close = self._asker.ask, self._asker.admin, self._asker.close
        self.values = {"store_root_user": store.access, "store_root_password": store.secret}
        self.new("reader")
        self.new("writer")

    def new(self, role: str) -> None:
        """Make new keys, as the site does at a rotation."""
        self.values[f"store_{role}_access_key"] = f"moat-{role}-{secrets.token_urlsafe(32)}"
        self.values[f"store_{role}_secret_key"] = secrets.token_urlsafe(32)
        self.folder.mkdir(exist_ok=True)
        for name, value in self.values.items():
            (self.folder / name).write_text(value + "\n")

    def run(self, *more: str) -> dict[str, Any]:
        """Run the command; its output never holds a secret."""
        done = self.site.command(
            "store", "accounts", "--json", "--secrets", str(self.folder), "--bucket", "moat-config", "--bucket",
            "moat-audit", "--endpoint", f"127.0.0.1:{self.store.port}", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shown = done.stdout + done.stderr
        assert not [v for v in self.values.values() if v in shown]
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def keys(self, role: str) -> tuple[str, str]:
        return self.values[f"store_{role}_access_key"], self.values[f"store_{role}_secret_key"]


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Iterator[Accounts]:
    built = sorted(Cache().root.glob("built/program-minio-*/minio"), key=lambda p: p.stat().st_mtime)
    if not built:
        pytest.skip("no MinIO is built yet; `make demo` builds it")
    folder = tmp_path_factory.mktemp("accounts")
    store = Store(folder, free_port(), "moat-root-" + secrets.token_hex(8), secrets.token_urlsafe(32), built[-1])
    process = store.start()
    try:
        made = Accounts(folder / "secrets", Site(folder / "site", python), store)
        try:
            (made.site.folder / "tmp").mkdir(parents=True)
            assert made.run()["changed"]
            yield made
        finally:
            made.close()
    finally:
        stop_process(process)


def test_a_second_run_changes_nothing_and_either_way_in_is_the_same(accounts: Accounts) -> None:
    again = accounts.run()
    assert (again["changed"], again["changes"]) == (False, [])


def test_the_writer_writes_and_reads_and_nothing_more(accounts: Accounts) -> None:
    root, writer = (accounts.store.access, accounts.store.secret), accounts.keys("writer")
    put = accounts.ask(writer, "put_object", Bucket="moat-config", Key="a", Body="one")
    assert put["ok"]
    assert accounts.ask(writer, "get_object", Bucket="moat-config", Key="a")["body"] == "one"
    assert accounts.ask(writer, "list_object_versions", Bucket="moat-config")["ok"]
    for call, args in (
        ("delete_object", {"Bucket": "moat-config", "Key": "a"}),
        ("delete_object", {"Bucket": "moat-config", "Key": "a", "VersionId": put["version"]}),
        ("put_bucket_versioning", {"Bucket": "moat-config", "VersioningConfiguration": {"Status": "Suspended"}}),
        ("delete_bucket", {"Bucket": "moat-config"}),
        ("create_bucket", {"Bucket": "another-bucket"}),
        ("list_buckets", {}),
    ):
        answer = accounts.ask(writer, call, **args)
        # MinIO answers list_buckets to everyone, with the buckets that he may see.
        assert answer.get("code") == "AccessDenied" or call == "list_buckets", (call, answer)
    # The control: the same request is possible at all.
    assert accounts.ask(root, "delete_object", Bucket="moat-config", Key="a", VersionId=put["version"])["ok"]


def test_a_reader_reads_and_nothing_more(accounts: Accounts) -> None:
    writer, reader = accounts.keys("writer"), accounts.keys("reader")
    assert accounts.ask(writer, "put_object", Bucket="moat-audit", Key="b", Body="two")["ok"]
    assert accounts.ask(reader, "get_object", Bucket="moat-audit", Key="b")["body"] == "two"
    assert accounts.ask(reader, "list_objects_v2", Bucket="moat-audit")["ok"]
    for call, args in (
        ("put_object", {"Bucket": "moat-audit", "Key": "b", "Body": "three"}),
        ("delete_object", {"Bucket": "moat-audit", "Key": "b"}),
        ("put_object_tagging", {"Bucket": "moat-audit", "Key": "b", "Tagging": {"TagSet": []}}),
        ("get_bucket_policy", {"Bucket": "moat-audit"}),
    ):
        assert accounts.ask(reader, call, **args).get("code") == "AccessDenied", call


def test_a_reader_reports_its_node_and_the_writer_removes_that(accounts: Accounts) -> None:
    writer, reader = accounts.keys("writer"), accounts.keys("reader")
    put = accounts.ask(reader, "put_object", Bucket="moat-status", Key="nodes/n1.json", Body="{}")
    # Reports come every few seconds: the bucket keeps no versions of them, the one of revisions does.
    assert (put["ok"], put["version"]) == (True, None)
    assert accounts.ask(writer, "put_object", Bucket="moat-config", Key="v", Body="x")["version"] is not None
    assert accounts.ask(reader, "get_object", Bucket="moat-status", Key="nodes/n1.json")["body"] == "{}"
    for call, key in (("put_object", "elsewhere"), ("delete_object", "nodes/n1.json")):
        answer = accounts.ask(reader, call, Bucket="moat-status", Key=key)
        assert answer.get("code") == "AccessDenied", (call, answer)
    assert accounts.ask(writer, "put_object", Bucket="moat-status", Key="elsewhere", Body="x")["code"] == "AccessDenied"
    assert accounts.ask(writer, "delete_object", Bucket="moat-status", Key="nodes/n1.json")["ok"]
    assert accounts.ask(writer, "get_object", Bucket="moat-status", Key="nodes/n1.json")["code"] == "NoSuchKey"


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_neither_reaches_the_administration_nor_keeps_a_key_of_its_own(accounts: Accounts, role: str) -> None:
    keys = accounts.keys(role)
    tries: tuple[tuple[str, str, dict[str, str], dict[str, str] | None], ...] = (
        ("GET", "list-users", {}, None),
        ("GET", "info", {}, None),
        ("PUT", "set-user-status", {"accessKey": keys[0], "status": "disabled"}, None),
        # MinIO lets a user do these two by default; a stolen key would outlive its rotation.
        ("PUT", "add-user", {"accessKey": keys[0]}, {"secretKey": "of-the-thief-0123456789", "status": "enabled"}),
        ("PUT", "add-service-account", {}, {"accessKey": "thief-account", "secretKey": "of-the-thief-0123456789"}),
    )
    for method, path, query, body in tries:
        answer = accounts.admin(keys, method, path, query, body)
        assert answer == {"ok": False, "code": "HTTP 403 AccessDenied"}, path
    assert accounts.run()["changes"] == []


def test_new_keys_work_beside_the_old_ones_until_those_are_removed(accounts: Accounts) -> None:
    old = accounts.keys("reader")
    accounts.new("reader")
    changes = accounts.run()["changes"]
    assert changes == ["reader made", "reader given the policy moat-reader alone"]
    for keys in (old, accounts.keys("reader")):
        assert accounts.ask(keys, "list_objects_v2", Bucket="moat-config")["ok"]
    assert accounts.run("--prune")["changes"] == ["an account of earlier keys removed"]
    assert accounts.ask(old, "list_objects_v2", Bucket="moat-config")["code"] == "InvalidAccessKeyId"
    assert accounts.ask(accounts.keys("reader"), "list_objects_v2", Bucket="moat-config")["ok"]
    assert accounts.run("--prune")["changed"] is False


def test_what_somebody_changed_by_hand_is_set_right(accounts: Accounts) -> None:
    root, reader = (accounts.store.access, accounts.store.secret), accounts.keys("reader")
    wrong = {"secretKey": "another-secret-0123456789", "status": "enabled"}
    assert accounts.admin(root, "PUT", "add-user", {"accessKey": reader[0]}, wrong)["ok"]
    assert accounts.admin(
        root, "POST", "idp/builtin/policy/attach", {}, {"policies": ["readwrite"], "user": reader[0]}
    )["ok"]
    assert accounts.run()["changes"] == ["reader set", "reader given the policy moat-reader alone"]
    assert accounts.ask(reader, "put_object", Bucket="moat-config", Key="c", Body="x")["code"] == "AccessDenied"
    assert accounts.run()["changed"] is False


def test_wrong_root_credentials_are_refused_and_not_shown(accounts: Accounts, tmp_path: Path) -> None:
    right = accounts.values["store_root_password"]
    (accounts.folder / "store_root_password").write_text("wrong-password-canary\n")
    try:
        done = accounts.site.command(
            "store", "accounts", "--secrets", str(accounts.folder), "--endpoint", f"127.0.0.1:{accounts.store.port}"
        )
    finally:
        (accounts.folder / "store_root_password").write_text(right + "\n")
    assert done.returncode == 17
    assert "canary" not in done.stdout + done.stderr


class Hesitant:
    """A way to the store on which every other connection is told 503, as MinIO does while it starts."""

    def __init__(self, port: int) -> None:
        self._store = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.refused = 0
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count():
                client, _ = self._listener.accept()
                if number % 2 == 0:
                    self.refused += 1
                    with client:
                        client.recv(65536)
                        client.sendall(b"HTTP/1.1 503 Not Yet\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    continue
                store = socket.create_connection(("127.0.0.1", self._store))
                self._ends += [client, store]
                for a, b in ((client, store), (store, client)):
                    threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for end in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_a_store_that_cannot_do_it_yet_is_asked_again(accounts: Accounts) -> None:
    way = Hesitant(accounts.store.port)
    try:
        value = accounts.run("--endpoint", f"127.0.0.1:{way.port}", "--bucket", "moat-new")
    finally:
        way.close()
    assert "bucket moat-new made" in value["changes"]
    # The bucket's client, the reports' client and the administration each had to ask twice.
    assert way.refused >= 3
