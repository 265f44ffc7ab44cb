# SPDX-License-Identifier: Apache-2.0
"""Proves one contract of three stores (MinIO, SeaweedFS, a folder): a push is atomic, whatever dies, is cut, collides.

The stores are real servers; pushes are made by real processes, which are killed at each step or lose their connection.
"""

from __future__ import annotations

import base64
import http.server
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway.stores import Backend, Driver, Place, Refused, Scissors, eventually, running
from tests.integration.hotreload.traffic import Busy

from moat_gateway import revision, sitekey, tls

S3 = ("minio", "seaweedfs")
ROUNDS = 25
#: For the tests of a dozen commands, each of which loads LiteLLM: one kind of store a run.
COMMANDS = pytest.mark.parametrize(
    "backend", ["minio", pytest.param("directory", marks=pytest.mark.long)], indirect=True, scope="module"
)


@pytest.fixture(scope="module", params=[*S3, "directory"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture
def place(backend: Backend, tmp_path: Path, python: Path) -> Iterator[Place]:
    made = Place(backend, tmp_path / "place", python).prepare()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def place_of_commands(place: Place) -> Place:
    if place.backend.kind == "seaweedfs":
        pytest.skip("the commands use a store as the drivers do, which prove the contract; one S3 store is enough here")
    return place


@pytest.fixture
def s3_place(place: Place) -> Place:
    if not place.backend.port:
        pytest.skip("a folder has no connection")
    return place


def encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def refused(driver: Driver, op: str, **arguments: Any) -> Refused:
    with pytest.raises(Refused) as e:
        driver.ask(op, **arguments)
    return e.value


# --- what a push makes ---


def test_a_push_is_signed_numbered_and_found_by_its_pointer(place: Place) -> None:
    admin, node = place.driver(), place.driver()
    assert refused(node, "pointer").error == "NoRevision"
    first = admin.ask("push", text="one")
    assert (first["revision"], first["previous"], first["changed"]) == (1, 0, True)
    pointer = node.ask("pointer")
    assert (pointer["revision"], pointer["object"], pointer["author"]) == (1, "revisions/1", "tester")
    assert node.ask("pointer", etag=pointer["etag"]) is None
    assert node.ask("content") == "one"
    opened = revision.open_archive(
        base64.b64decode(node.ask("get", number=1)),
        sitekey.read_trusted(place.folder / "site-keys"),
        limit=1 << 20,
    )
    assert (opened.sha256, opened.message) == (first["sha256"], "says one")
    second = admin.ask("push", text="two")
    assert (second["revision"], second["previous"]) == (2, 1)
    assert node.ask("pointer", etag=pointer["etag"])["revision"] == 2
    assert node.ask("list") == [1, 2]


def test_the_same_content_makes_no_new_revision(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="one")
    again = admin.ask("push", text="one")
    assert (again["revision"], again["changed"]) == (1, False)
    assert admin.ask("list") == [1]


def test_an_archive_is_never_overwritten(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="one")
    before = admin.ask("get", number=1)
    assert refused(admin, "upload", number=1, raw=encoded(b"other")).error == "Taken"
    assert admin.ask("get", number=1) == before


# --- two at once ---


def test_of_two_administrators_at_once_exactly_one_wins_and_the_other_is_told(place: Place) -> None:
    one, two = place.driver(), place.driver()
    one.ask("push", text="start")
    wins = {"one": 0, "two": 0}
    for n in range(ROUNDS):
        before = one.ask("pointer")["revision"]
        for name, driver in (("one", one), ("two", two)):
            driver.send("push", text=f"{name} {n}", author=name, gate="list")
        for driver in (one, two):
            driver.gate()  # both have read the pointer
        for driver in (one, two) if n % 2 else (two, one):
            driver.line()
        results: dict[str, Any] = {}
        for name, driver in (("one", one), ("two", two)):
            try:
                results[name] = driver.end()
            except Refused as e:
                results[name] = e
        losers = [n for n, r in results.items() if isinstance(r, Refused)]
        assert len(losers) == 1, results
        winner = "one" if losers == ["two"] else "two"
        wins[winner] += 1
        lost = results[losers[0]]
        assert (lost.error, lost.exit) == ("PushConflict", 22)
        assert f"revision {results[winner]['revision']} by {winner}" in lost.text
        pointer = one.ask("pointer")
        assert pointer["revision"] == results[winner]["revision"] > before
        assert one.ask("content") == f"{winner} {n}"
    assert sum(wins.values()) == ROUNDS


def test_who_began_before_another_s_push_is_told_even_long_after_it(place: Place) -> None:
    slow, fast = place.driver(), place.driver()
    for text in ("first", "second"):  # on nothing, and on a revision
        slow.ask("begin")
        done = fast.ask("push", text=text, author="fast")
        lost = refused(slow, "push", text="mine", base=True)
        assert (lost.error, lost.exit) == ("PushConflict", 22)
        assert f"revision {done['revision']} by fast" in lost.text
        # Both wanted the same: nobody's change is lost.
        assert slow.ask("push", text=text, base=True)["changed"] is False
        assert fast.ask("content") == text
    assert slow.ask("list") == [1, 2]
    slow.ask("begin")
    assert slow.ask("push", text="mine", base=True)["revision"] == 3


# --- what dies ---

STEPS = ["before upload", "after upload", "before move"]


@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_is_killed_leaves_the_old_revision_and_the_next_one_works(place: Place, step: str) -> None:
    admin = place.driver()
    admin.ask("push", text="old")
    pointer = admin.ask("pointer")
    dying = place.driver()
    dying.send("push", text="dies", die_at=step)
    assert dying.killed()
    assert admin.ask("pointer") == pointer
    assert admin.ask("content") == "old"
    orphan = step != "before upload"
    assert admin.ask("list") == ([1, 2] if orphan else [1])
    after = admin.ask("push", text="next")
    assert (after["revision"], after["previous"]) == (3 if orphan else 2, 1)
    assert admin.ask("content") == "next"


def test_a_push_that_is_killed_after_its_last_step_is_in_force(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="old")
    dying = place.driver()
    dying.send("push", text="new", die_at="after move")
    assert dying.killed()
    assert admin.ask("content") == "new"


@pytest.mark.parametrize("after", [0, 1000, 300_000])
def test_a_connection_cut_in_an_upload_leaves_the_old_revision(s3_place: Place, after: int) -> None:
    place = s3_place
    scissors = Scissors(place.backend.port)
    admin, through = place.driver(), place.driver(MOAT_STORE_ENDPOINT=f"127.0.0.1:{scissors.port}")
    admin.ask("push", text="old")
    pointer = admin.ask("pointer")
    scissors.cut(r"PUT /[^ ]+/revisions/", "body", after)
    lost = refused(through, "push", text="cut", size=1 << 20)
    assert (lost.error, lost.exit, scissors.cuts) == ("StoreFailed", 17, 1)
    assert "upload revisions/2" in lost.text
    assert admin.ask("pointer") == pointer
    # Whatever the store kept of it, it is no archive that anybody is led to.
    assert admin.ask("content") == "old"
    assert through.ask("push", text="again", size=1 << 20)["previous"] == 1
    assert admin.ask("content") == "again"
    scissors.close()


def test_a_connection_cut_between_upload_and_pointer_leaves_the_old_revision(s3_place: Place) -> None:
    place = s3_place
    scissors = Scissors(place.backend.port)
    admin, through = place.driver(), place.driver(MOAT_STORE_ENDPOINT=f"127.0.0.1:{scissors.port}")
    admin.ask("push", text="old")
    pointer = admin.ask("pointer")
    scissors.cut(r"PUT /[^ ]+/current", "request")
    lost = refused(through, "push", text="cut")
    assert (lost.error, scissors.cuts) == ("StoreFailed", 1)
    assert admin.ask("pointer") == pointer
    assert admin.ask("list") == [1, 2]
    assert through.ask("push", text="again")["revision"] == 3
    scissors.close()


def test_a_lost_answer_to_the_last_step_is_looked_up(s3_place: Place) -> None:
    place = s3_place
    scissors = Scissors(place.backend.port)
    admin, through = place.driver(), place.driver(MOAT_STORE_ENDPOINT=f"127.0.0.1:{scissors.port}")
    admin.ask("push", text="old")
    scissors.cut(r"PUT /[^ ]+/current", "answer")
    done = through.ask("push", text="new")
    assert (done["revision"], scissors.cuts) == (2, 1)
    assert admin.ask("content") == "new"
    scissors.close()


# --- what is bad in the store ---


def test_a_missing_archive_is_said_and_the_next_push_heals_it(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="one")
    admin.ask("plant", name="revisions/1", raw=None)
    lost = refused(admin, "content")
    assert (lost.error, lost.exit) == ("BadRevision", 19)
    assert "revisions/1 is missing" in lost.text
    assert admin.ask("push", text="one")["revision"] == 2
    assert admin.ask("content") == "one"


def test_an_archive_larger_than_allowed_is_not_read(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="one", size=300_000)
    lost = refused(admin, "content", limit=100_000)
    assert (lost.error, "is too large" in lost.text) == ("BadRevision", True)
    # The pointer promises less than there is: what is beyond is not read either.
    pointer = admin.ask("pointer")
    small = {k: v for k, v in pointer.items() if k != "etag"} | {"size": 1000, "format": 1}
    admin.ask("plant", name="current", raw=encoded(json.dumps(small).encode()))
    assert "is too large" in refused(admin, "content").text
    more = small | {"size": 10_000_000}
    admin.ask("plant", name="current", raw=encoded(json.dumps(more).encode()))
    assert "is not the one that the pointer means" in refused(admin, "content").text


def test_another_archive_than_the_pointer_means_is_refused(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="one")
    raw = base64.b64decode(admin.ask("get", number=1))
    admin.ask("plant", name="revisions/1", raw=encoded(raw[:-1] + b"x"))
    assert "is not the one that the pointer means" in refused(admin, "content").text


GARBAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"x" * 100_000, b"[" * 3000, b'{"format": 1}']


def test_garbage_in_the_pointer_is_refused_and_the_next_push_heals_it(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="first")
    for n, raw in enumerate(GARBAGE, 2):
        admin.ask("plant", name="current", raw=encoded(raw))
        lost = refused(admin, "pointer")
        assert (lost.error, lost.exit) == ("BadPointer", 19), raw
        assert admin.ask("push", text=f"after {n}")["revision"] == n
        assert admin.ask("content") == f"after {n}"


def test_a_pointer_far_ahead_does_not_use_up_the_numbers(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="one")
    fields = {k: v for k, v in admin.ask("pointer").items() if k != "etag"} | {"format": 1}
    far = 2**53 - 1
    forged = fields | {"revision": far, "object": f"revisions/{far}"}
    admin.ask("plant", name=f"revisions/{far}", raw=encoded(b"x"))
    admin.ask("plant", name="current", raw=encoded(json.dumps(forged).encode()))
    assert admin.ask("push", text="two")["revision"] == 2
    assert admin.ask("content") == "two"


def test_links_in_a_folder_are_refused(place: Place, tmp_path: Path) -> None:
    if place.backend.kind != "directory":
        pytest.skip("object stores have no links")
    admin, source = place.driver(), place.folder / "source"
    admin.ask("push", text="one")
    (source / "current").rename(tmp_path / "elsewhere")
    (source / "current").symlink_to(tmp_path / "elsewhere")
    assert "is a link or a special file" in refused(admin, "pointer").text
    (source / "current").unlink()
    (tmp_path / "elsewhere").rename(source / "current")
    assert admin.ask("content") == "one"
    (source / "revisions").rename(tmp_path / "aside")
    (source / "revisions").symlink_to(tmp_path / "aside")
    assert "is a link or a special file" in refused(admin, "content").text


# --- a store that does not answer ---


def test_wrong_credentials_are_said_and_right_ones_are_taken_up_at_once(s3_place: Place) -> None:
    place = s3_place
    node = place.driver()
    place.driver().ask("push", text="one")
    assert node.ask("content") == "one"
    place.write("store_secret_key", "wrong-canary-0123456789")
    lost = refused(node, "pointer")
    assert (lost.error, lost.exit) == ("StoreFailed", 17)
    assert "check the two key files" in lost.text
    assert "canary" not in lost.text
    place.write("store_secret_key", place.backend.secret)
    assert node.ask("content") == "one"


def test_a_store_that_is_down_is_said_and_found_again(s3_place: Place) -> None:
    place = s3_place
    node = place.driver()
    place.driver().ask("push", text="one")
    place.backend.stop()
    assert refused(node, "pointer").error == "StoreFailed"
    assert refused(node, "push", text="two").error == "StoreFailed"
    place.backend.start()
    assert eventually("the store answers", 180, lambda: node.ask("content")) == "one"


def test_a_store_that_hangs_is_noticed(s3_place: Place) -> None:
    place = s3_place
    node = place.driver()
    place.driver().ask("push", text="one")
    assert node.ask("pointer")["revision"] == 1
    assert place.backend.program is not None
    place.backend.program.signal(signal.SIGSTOP)
    try:
        with Busy() as busy:
            begun = time.monotonic()
            lost = refused(node, "pointer")
            # Two seconds.
            assert time.monotonic() - begun < 15 * busy.since(begun)
    finally:
        place.backend.program.signal(signal.SIGCONT)
    assert lost.error == "StoreFailed"
    assert eventually("the store answers", 180, lambda: node.ask("content")) == "one"


def test_a_folder_that_is_not_there_is_said_and_found_again(place: Place) -> None:
    if place.backend.kind != "directory":
        pytest.skip("of a folder")
    node = place.driver()
    node.ask("push", text="one")
    (place.folder / "source").rename(place.folder / "unplugged")
    lost = refused(node, "pointer")
    assert (lost.error, "plug the drive in" in lost.text) == ("StoreFailed", True)
    (place.folder / "unplugged").rename(place.folder / "source")
    assert node.ask("content") == "one"


@pytest.mark.parametrize("shift", ["31536000", "-31536000"])
def test_a_host_whose_clock_is_a_year_off_is_served(s3_place: Place, shift: str) -> None:
    place = s3_place
    place.driver().ask("push", text="one")
    wrong = Path(__file__).resolve().parents[1] / "hotreload/wrongclock"
    environment = place.environment()
    node = place.driver(PYTHONPATH=f"{wrong}:{environment['PYTHONPATH']}", TEST_CLOCK_SHIFT=shift)
    assert node.ask("content") == "one"
    assert node.ask("push", text="two")["revision"] == 2


class _Careless(http.server.BaseHTTPRequestHandler):
    """A store that takes every write, whatever its condition."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(200, b"")

    def do_GET(self) -> None:
        self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("etag", '"00000000000000000000000000000001"')
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_store_without_conditional_writes_is_refused_before_anything_is_written(s3_place: Place) -> None:
    if s3_place.backend.kind != "minio":
        pytest.skip("needs no second store")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Careless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        admin = s3_place.driver(MOAT_STORE_ENDPOINT=f"127.0.0.1:{server.server_address[1]}")
        lost = refused(admin, "push", text="one")
    finally:
        server.shutdown()
        server.server_close()
    assert lost.error == "StoreFailed"
    assert "does not hold to conditions of a write" in lost.text


# --- reports, replicas, restored stores ---


def served(number: int) -> dict[str, Any]:
    """Return a node's report."""
    source = {"kind": "s3", "where": "w", "reachable": True, "why": None}
    sync = {"revision": number, "pointer": number, "source": source, "last_refused": None, "degraded": []}
    return {"format": 1, "node": "pc1", "sync": sync, "gateways": []}


def test_reports_of_nodes_are_read_with_their_age_and_forgotten(place: Place) -> None:
    node, admin = place.driver(), place.driver()
    assert admin.ask("reports") == {}
    node.ask("report", node="pc1", value={"n": 1})
    node.ask("report", node="pc2", value={"n": 2})
    found = admin.ask("reports")
    assert {n: r["value"]["n"] for n, r in found.items()} == {"pc1": 1, "pc2": 2}
    assert all(0 <= r["age"] < 60 for r in found.values())
    node.ask("report", node="pc1", value={"n": 3})
    assert admin.ask("reports")["pc1"]["value"] == {"n": 3}
    # Its age is the store's own: it grows without anybody's clock.
    first = admin.ask("reports")["pc2"]["age"]
    assert eventually("the report ages", 180, lambda: admin.ask("reports")["pc2"]["age"] >= first + 1)
    assert admin.ask("forget", node="pc2") is True
    assert admin.ask("forget", node="pc2") is False
    assert list(admin.ask("reports")) == ["pc1"]


def test_a_store_that_is_older_than_its_nodes_is_healed_with_a_number_above_theirs(place: Place) -> None:
    admin = place.driver()
    admin.ask("push", text="restored")
    admin.ask("report", node="pc1", value=served(9))
    lost = refused(admin, "push", text="next")
    assert (lost.error, lost.exit) == ("OlderRevision", 21)
    assert "--revision 10" in lost.text
    assert admin.ask("push", text="next", number=10)["revision"] == 10
    admin.ask("report", node="pc1", value=served(10))
    assert admin.ask("push", text="after")["revision"] == 11
    assert refused(admin, "push", text="back", number=11).error == "OlderRevision"


def test_a_copy_of_another_site_s_store_takes_no_push(s3_place: Place) -> None:
    admin = s3_place.driver()
    admin.ask("push", text="one")
    admin.ask("plant", name="replica", raw=encoded(b"site-a\n"))
    lost = refused(admin, "push", text="two")
    assert (lost.error, "only receives the revisions of site-a" in lost.text) == ("StoreFailed", True)
    admin.ask("plant", name="replica", raw=None)
    assert admin.ask("push", text="two")["revision"] == 2


def test_a_revision_that_was_signed_elsewhere_keeps_its_number(
    place: Place, backend: Backend, tmp_path: Path, python: Path
) -> None:
    home = Place(backend, tmp_path / "home", python).prepare()
    (place.folder / "site-keys/home.pub").write_bytes(home.key.public.to_bytes())
    try:
        there = home.driver()
        for text in ("a", "b", "c"):
            there.ask("push", text=text)
        third, second = there.ask("get", number=3), there.ask("get", number=2)
    finally:
        home.close()
    here = place.driver()
    done = here.ask("carry", raw=third)
    assert (done["revision"], done["previous"], done["author"]) == (3, 0, "carrier")
    assert here.ask("content") == "c"
    assert here.ask("carry", raw=third)["changed"] is False
    assert refused(here, "carry", raw=second).error == "OlderRevision"
    (place.folder / "site-keys/home.pub").unlink()
    assert refused(here, "carry", raw=third).error == "BadSignature"


# --- the commands ---


@COMMANDS
def test_the_commands_from_init_to_rollback(place: Place) -> None:
    folder = str(place.folder / "content")

    def run(*words: str, code: int = 0) -> Any:
        done = place.command("config", *words, "--json")
        assert done.returncode == code, (words, done.stdout, done.stderr)
        assert not [s for s in (place.backend.secret, place.backend.access) if s in done.stdout + done.stderr]
        value = json.loads(done.stdout)
        assert (value["ok"], value["exit"]) == (code == 0, code)
        return value

    assert run("init", folder)["files"] == ["config.yaml", "keys.yaml"]
    assert run("status")["store"]["revision"] is None
    assert {f["change"] for f in run("diff", folder)["files"]} == {"added"}
    assert run("diff", code=19)["problems"][0]["kind"] == "bad-revision"
    first = run("push", folder, "-m", "first", "--author", "alice")
    assert (first["revision"], first["models"]) == (1, ["chat-small"])
    assert run("push", folder)["changed"] is False
    config = place.folder / "content/config.yaml"
    text = config.read_text()
    config.write_text(text.replace("timeout: 600 #", "timeout: 300 #"))
    assert [f["path"] for f in run("diff", folder)["files"]] == ["config.yaml"]
    assert run("push", folder)["revision"] == 2
    config.write_text(text.replace("chat-small #", "chat-small: #"))
    bad = run("push", folder, code=7)
    assert (bad["problems"][0]["file"], bad["problems"][0]["line"]) == ("config.yaml", 8)
    assert run("status")["store"]["revision"] == 2
    back = run("rollback", "1")
    assert (back["revision"], back["content"]) == (3, first["content"])
    rows = run("history")["revisions"]
    assert [(r["revision"], r["content_of"], r["in_force"]) for r in rows] == [
        (3, 1, True),
        (2, None, True),
        (1, None, True),
    ]
    assert rows[2]["author"] == "alice"
    assert run("diff", "1", "3")["same"] is True
    silent = run("push", folder.replace("content", "nowhere"), code=7)
    assert "cannot be read" in silent["problems"][0]["message"]


@COMMANDS
def test_a_drive_brings_what_was_signed_elsewhere(place: Place, tmp_path: Path, python: Path) -> None:
    home = Place(Backend("directory", tmp_path), tmp_path / "home", python)
    drive, content = home.folder / "source", str(home.folder / "content")
    for words in (("init", content), ("push", content, "--author", "alice", "-m", "signed at home")):
        done = home.command("config", *words)
        assert done.returncode == 0, done.stderr
    take = ("config", "push", "--signed-from", str(drive), "--json")
    # The site has no secret key, and does not trust the home's key yet.
    (place.folder / "secrets/site_key").unlink()
    refused_ = place.command(*take)
    assert (refused_.returncode, json.loads(refused_.stdout)["problems"][0]["kind"]) == (20, "bad-signature")
    (place.folder / "site-keys/home.pub").write_bytes(home.key.public.to_bytes())
    done = place.command(*take)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["revision"], json.loads(done.stdout)["message"]) == (1, "signed at home")
    assert json.loads(place.command(*take).stdout)["changed"] is False
    # What this site's own rules refuse is refused here, however well it is signed.
    config = home.folder / "content/config.yaml"
    config.write_text(config.read_text().replace("model:8081", "198.51.100.7:80"))
    assert home.command("config", "push", content, MOAT_EGRESS_ALLOW="198.51.100.7:80").returncode == 0
    outside = place.command(*take)
    assert (outside.returncode, json.loads(outside.stdout)["problems"][0]["kind"]) == (8, "endpoint-refused")
    assert json.loads(place.command("config", "status", "--json").stdout)["store"]["revision"] == 1


def test_a_store_s_new_authority_is_taken_up_without_a_restart(tmp_path: Path, python: Path) -> None:
    certificates = tmp_path / "minio/certs"
    certificates.mkdir(parents=True)
    backend = Backend("minio", tmp_path / "minio")
    assert backend.program is not None
    backend.program.argv += ["--certs-dir", str(certificates)]

    def certify(name: str) -> bytes:
        made = tls.self_signed(tmp_path / name, ["127.0.0.1"], days=2).folder
        (certificates / "public.crt").write_bytes((made / "cert.pem").read_bytes())
        (certificates / "private.key").write_bytes((made / "key.pem").read_bytes())
        return (made / "ca.pem").read_bytes()

    place = Place(backend, tmp_path / "place", python)
    authority = place.folder / "ca.pem"
    authority.write_bytes(certify("first"))
    over_tls = {"MOAT_STORE_ENDPOINT": f"https://127.0.0.1:{backend.port}", "MOAT_STORE_CA_FILE": str(authority)}
    try:
        backend.start()
        done = place.command("store", "init", **over_tls)
        assert done.returncode == 0, done.stderr
        node = place.driver(**over_tls)
        node.ask("push", text="one")
        backend.stop()
        second = certify("second")
        backend.start()
        eventually(
            "it is not trusted", 180, lambda: "no trusted connection; found TLS" in refused(node, "content").text
        )
        authority.write_bytes(second)
        assert eventually("the store answers", 180, lambda: node.ask("content")) == "one"
    finally:
        place.close()
        backend.stop()


@COMMANDS
def test_a_push_that_waits_for_nobody_says_so(place: Place) -> None:
    folder = str(place.folder / "content")
    assert place.command("config", "init", folder).returncode == 0
    record = place.folder / "published.json"
    done = place.command("config", "push", folder, "--wait", "1", "--json", "--record", str(record))
    assert done.returncode == 23, done.stderr
    value = json.loads(done.stdout)
    assert (value["ok"], value["revision"], value["converged"]) == (False, 1, False)
    # It is in force all the same, and noted.
    assert json.loads(record.read_text()) == {"revision": 1, "content": value["content"]}
    assert "no gateway reports" in value["problems"][0]["message"]


def test_status_without_the_store_shows_what_this_node_knows(s3_place: Place, place_of_commands: Place) -> None:
    done = s3_place.command("config", "status", "--json", MOAT_STORE_ENDPOINT="127.0.0.1:1")
    assert done.returncode == 17
    sync, reports = s3_place.folder / "sync", s3_place.folder / "reports"
    sync.mkdir()
    reports.mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    state = served(4)["sync"] | {
        "format": 1, "node": "pc1", "pid": 7, "boot_id": boot, "checked_boottime": now, "checked_at": None,
        "interval": 1.0, "refused_total": 0, "turn": None,
    }  # fmt: skip
    state["source"] = {"kind": "s3", "where": "w", "reachable": False, "why": "gone"}
    (sync / "sync.json").write_text(json.dumps(state))
    report = {
        "format": 1, "name": "gateway-1", "pid": 8, "boot_id": boot, "beat_boottime": now, "revision": 4,
        "sha256": "0" * 64, "applied_at": None, "ready": True, "draining": False, "degraded": [], "last_refused": None,
        "needs_restart": [], "started_at": "x",
    }  # fmt: skip
    (reports / "gateway-1.json").write_text(json.dumps(report))
    folders = {"MOAT_SYNC_DIR": str(sync), "MOAT_REPORTS_DIR": str(reports)}
    done = s3_place.command("config", "status", "--json", MOAT_STORE_ENDPOINT="127.0.0.1:1", **folders)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (value["store"]["reachable"], value["this_node_only"]) == (False, True)
    assert [(g["name"], g["revision"]) for g in value["gateways"]] == [("gateway-1", 4)]
    shown = s3_place.command("config", "status", MOAT_STORE_ENDPOINT="127.0.0.1:1", **folders).stdout
    assert "NOT REACHED" in shown
    assert "gateway-1  revision 4" in shown
