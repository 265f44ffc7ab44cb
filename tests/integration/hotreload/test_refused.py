# SPDX-License-Identifier: Apache-2.0
"""Proves that no bad revision takes effect: put into a real MinIO past every check of `push`, signed with the real key.

For each: the old revision goes on serving, the bad one is named in `config status`, in a gateway's status, in the
sidecar's log and in a metric, and the next good revision heals it. What `push` itself can see, it refuses, too.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from tests.integration.hotreload import content, craft
from tests.integration.hotreload.craft import Hand
from tests.integration.hotreload.programs import until
from tests.integration.hotreload.site import Site

from moat_gateway.sitekey import SigningKey

Files = dict[str, str | bytes]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with closing(Site()) as made:
        made.node(gateways=1, MOAT_REVISION_MAX="4", MOAT_DRY_RUN_TIMEOUT="10", MOAT_RESTART_POLICY="report")
        made.start(nginx=False)
        serve(made)
        yield made


def serve(site: Site) -> int:
    """Publish a good revision and wait until it answers; return its number."""
    number = site.hand.next()
    assert site.hand.put(good(site, number))[0] == number
    site.wait_serving(number)
    assert site.gateways[0].marker("m0", site.key) == f"r{number}"
    return number


def good(site: Site, number: int) -> Files:
    return {"config.yaml": site.config(f"r{number}"), "keys.yaml": site.keys()}


@dataclass(frozen=True)
class Wrong:
    """Content that must not take effect.

    Attributes:
        kind: of the refusal.
        change: makes wrong content of the good one.
        pushed: whether `config push` is tried as well (a dry run takes it seconds).
    """

    kind: str
    change: Callable[[Site, Files], None]
    pushed: bool = True


def added(text: str) -> Callable[[Site, Files], None]:
    def change(_site: Site, files: Files) -> None:
        files["config.yaml"] = str(files["config.yaml"]) + text

    return change


def entry(text: str) -> Callable[[Site, Files], None]:
    """One more deployment."""

    def change(site: Site, files: Files) -> None:
        line = text.replace("BASE", site.base("r0"))
        files["config.yaml"] = str(files["config.yaml"]) + f"  - {line}\n"

    return change


def router(name: str, data: bytes, digest: str | None = None) -> Callable[[Site, Files], None]:
    def change(_site: Site, files: Files) -> None:
        files[f"routers/{name}"] = data
        said = digest or hashlib.sha256(data).hexdigest()
        files["routers/index.yaml"] = f"models:\n  - {{file: {name}, sha256: {said}}}\n"

    return change


def keys(text: str) -> Callable[[Site, Files], None]:
    def change(_site: Site, files: Files) -> None:
        files["keys.yaml"] = text

    return change


def without(name: str) -> Callable[[Site, Files], None]:
    def change(_site: Site, files: Files) -> None:
        del files[name]

    return change


def endless(site: Site, files: Files) -> None:
    files["config.yaml"] = content.config({f"many{i}": site.base("r0") for i in range(9000)})


BOMB = "x-a: &a [z, z, z, z, z, z, z, z, z]\n" + "".join(
    f"x-{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)
CONTENT: dict[str, Wrong] = {
    "broken YAML": Wrong("bad-config", added("router_settings: {num_retries: [1\n")),
    "a key twice": Wrong("bad-config", added("router_settings: {num_retries: 1, num_retries: 2}\n")),
    "a YAML tag": Wrong("bad-config", added("router_settings: !!python/object/apply:os.system ['true']\n")),
    "an alias bomb": Wrong("bad-config", added(BOMB)),
    "an unknown strategy": Wrong("bad-config", added("router_settings: {routing_strategy: fastest-first}\n")),
    "an unknown model": Wrong("bad-config", added("router_settings: {fallbacks: [{m0: [nobody]}]}\n")),
    "an unresolved secret": Wrong(
        "unset-secret",
        entry("{model_name: s, litellm_params: {model: openai/s, api_base: BASE, api_key: os.environ/NOT_THERE}}"),
    ),
    "an outside endpoint": Wrong(
        "endpoint-refused",
        entry("{model_name: o, litellm_params: {model: openai/o, api_base: 'http://198.51.100.7/v1', api_key: x}}"),
    ),
    "keys that are none": Wrong("bad-keys", keys("teams: []\nkeys:\n  - {id: a, team: nobody, sha256: 12}\n")),
    "no keys.yaml": Wrong("bad-config", without("keys.yaml")),
    "a router model of another hash": Wrong("bad-revision", router("m.safetensors", b"weights", "ab" * 32)),
    "a router model that is a pickle": Wrong("bad-revision", router("m.pkl", b"\x80\x04.")),
    "a router that takes for ever": Wrong("dry-run-failed", endless, pushed=False),
}


def other_key(hand: Hand, files: dict[str, bytes], number: int) -> None:
    hand.publish(number, craft.archive(files, number, SigningKey.generate()))


def truncated(hand: Hand, files: dict[str, bytes], number: int) -> None:
    raw = craft.archive(files, number, hand.key)[:3000]
    hand.publish(number, raw)


def cut_in_the_store(hand: Hand, files: dict[str, bytes], number: int) -> None:
    raw = craft.archive(files, number, hand.key)
    hand.publish(number, raw, lambda x: x[:2000])


def over_large(hand: Hand, files: dict[str, bytes], number: int) -> None:
    hand.publish(number, craft.archive({**files, "routers/big.txt": bytes(5 << 20)}, number, hand.key))


def larger_than_told(hand: Hand, files: dict[str, bytes], number: int) -> None:
    raw = craft.archive(files, number, hand.key)
    hand.publish(number, raw, lambda x: x + bytes(6 << 20))


def link(hand: Hand, files: dict[str, bytes], number: int) -> None:
    swap = {"config.yaml": craft.member("config.yaml", tarfile.SYMTYPE, "/etc/passwd")}
    hand.publish(number, craft.archive(files, number, hand.key, swap=swap))


def upwards(hand: Hand, files: dict[str, bytes], number: int) -> None:
    hand.publish(number, craft.archive({**files, "../../outside.yaml": b"x"}, number, hand.key))


def absolute(hand: Hand, files: dict[str, bytes], number: int) -> None:
    hand.publish(number, craft.archive({**files, "/etc/moat/outside.yaml": b"x"}, number, hand.key))


def other_number(hand: Hand, files: dict[str, bytes], number: int) -> None:
    # A good revision, signed, under a number that is not its own: an older one in new clothes.
    hand.publish(number, hand.bucket.get(f"revisions/{number - 1}"))


def replayed(hand: Hand, files: dict[str, bytes], number: int) -> None:
    older = number - 2
    hand.bucket.put("current", craft.pointer(older, hand.bucket.get(f"revisions/{older}")))


def same_number(hand: Hand, files: dict[str, bytes], number: int) -> None:
    # Two administrations that know nothing of each other gave the same number to two contents.
    current = number - 1
    raw = craft.archive({**files, "config.yaml": files["config.yaml"] + b"# other\n"}, current, hand.key)
    hand.bucket.put(f"revisions/{current}", raw)
    hand.bucket.put("current", craft.pointer(current, raw))


def missing(hand: Hand, files: dict[str, bytes], number: int) -> None:
    hand.bucket.put("current", craft.pointer(number, b"nothing"))


def no_pointer(hand: Hand, files: dict[str, bytes], number: int) -> None:
    hand.bucket.put("current", b'{"format":1,"revision":')


def elsewhere(hand: Hand, files: dict[str, bytes], number: int) -> None:
    hand.publish(number, craft.archive(files, number, hand.key), object="../other-bucket/revisions/1")


#: What is done to archive and pointer, the kind of the refusal, and the number that is named (counted from the next).
STORED: dict[str, tuple[Callable[[Hand, dict[str, bytes], int], None], str, int | None]] = {
    "a wrong signer": (other_key, "bad-signature", 0),
    "a truncated archive": (truncated, "bad-revision", 0),
    "an archive cut in the store": (cut_in_the_store, "bad-revision", 0),
    "an over-large archive": (over_large, "bad-revision", 0),
    "an archive larger than told": (larger_than_told, "bad-revision", 0),
    "a link in the archive": (link, "bad-revision", 0),
    "a path upwards": (upwards, "bad-revision", 0),
    "an absolute path": (absolute, "bad-revision", 0),
    "an archive of another number": (other_number, "bad-revision", 0),
    "a replayed older revision": (replayed, "older-revision", -2),
    "another content of the same number": (same_number, "bad-revision", -1),
    "a pointer to a missing object": (missing, "bad-revision", 0),
    "a pointer that is none": (no_pointer, "bad-revision", None),
    "a pointer that leads elsewhere": (elsewhere, "bad-revision", None),
}


#: What `config status` was asked about: kind, and whether it had no number. The command takes seconds.
TOLD: set[tuple[str, bool]] = set()


def refused(site: Site, serving: int, number: int | None, kind: str, before: dict[str, float]) -> None:
    """The revision is refused, everybody says so, and the old one serves."""
    node, gateway = site.nodes[0], site.gateways[0]

    def last() -> dict[str, Any]:
        found = node.sync_state().get("last_refused") or {}
        return found if found.get("kind") == kind and found.get("revision") == number else {}

    until(lambda: f"{kind} of {number} is refused\n{node.describe()}", 180, last)
    assert last()["reason"]
    assert gateway.marker("m0", site.key) == f"r{serving}"
    assert node.accepted() == serving
    status = until("the gateway says so", 120, lambda: names(gateway.status(), number))
    assert status["config"]["revision"] == serving
    assert status["ready"]
    assert any(e.get("kind") == kind and e.get("revision") == number for e in node.sidecar.events())
    name = "moat_config_sync_refused_total"
    until("the metric counts it", 120, lambda: gateway.metrics()[name] > before[name])
    if (kind, number is None) not in TOLD:
        until("config status names it", 120, lambda: names(site.admin.status()["nodes"][0], number), 0.5)
        TOLD.add((kind, number is None))


def names(status: dict[str, Any], number: int | None) -> dict[str, Any]:
    """Return the status if it names the refused revision."""
    inner = status.get("config") or status.get("sync") or status
    found = inner.get("last_refused") or {}
    return status if found and found.get("revision") == number else {}


@pytest.mark.parametrize("name", CONTENT)
def test_wrong_content_never_takes_effect(site: Site, name: str) -> None:
    wrong, before, serving = CONTENT[name], site.gateways[0].metrics(), site.nodes[0].accepted()
    files = good(site, serving + 1)
    wrong.change(site, files)
    if wrong.pushed:
        # First the front door: `push` refuses and leaves the store as it was.
        there = site.hand.bucket.current()
        folder = content.write(site.folder / "wrong" / name.replace(" ", "-"), files)
        pushed = site.admin.push(folder=folder)
        assert pushed.code != 0
        assert pushed.said["problems"][0]["kind"] == wrong.kind, pushed.said
        assert site.hand.bucket.current() == there
    number, _ = site.hand.put(files)
    refused(site, serving, number, wrong.kind, before)
    assert serve(site) > number


@pytest.mark.parametrize("name", STORED)
def test_a_wrong_archive_or_pointer_never_takes_effect(site: Site, name: str) -> None:
    put, kind, which = STORED[name]
    # An older one is only older where two good ones are there.
    serving = serve(site) if put is replayed else site.nodes[0].accepted()
    before = site.gateways[0].metrics()
    number = site.hand.next()
    files = {p: str(d).encode() for p, d in good(site, number).items()}
    put(site.hand, files, number)
    refused(site, serving, None if which is None else number + which, kind, before)
    if name in ("a replayed older revision", "a pointer to a missing object", "a pointer that is none"):
        # The pointer itself is wrong: the administrator's own command mends it.
        next_one = number + 1
        site.admin.write(f"r{next_one}")
        pushed = site.admin.push("--revision", str(next_one))
        site.wait_serving(pushed.revision)
        assert site.gateways[0].marker("m0", site.key) == f"r{next_one}"
    else:
        serve(site)


def test_a_secret_that_comes_later_heals_the_revision_without_a_push(site: Site) -> None:
    serving = site.nodes[0].accepted()
    number = site.hand.next()
    files = good(site, number)
    CONTENT["an unresolved secret"].change(site, files)
    assert site.hand.put(files)[0] == number
    node = site.nodes[0]
    until("it is refused", 180, lambda: (node.sync_state().get("last_refused") or {}).get("revision") == number)
    assert site.gateways[0].marker("m0", site.key) == f"r{serving}"
    (site.nodes[0].folder / "secrets/not_there").write_text("a-secret-canary-that-came-later\n")
    site.wait_serving(number)
    assert site.gateways[0].marker("s", site.key) == "r0"
    assert "secret-canary" not in site.gateways[0].text() + site.nodes[0].sidecar.text()


def test_what_needs_a_restart_is_only_named_if_the_site_says_so(site: Site) -> None:
    gateway, serving = site.gateways[0], serve(site)
    pid, number = gateway.pid, site.hand.next()
    text = site.config(f"r{number}", content.NEEDS_RESTART)
    site.hand.put({"config.yaml": text, "keys.yaml": site.keys()})
    status = until("it is named", 180, lambda: (s := gateway.status())["config"]["needs_restart"] and s)
    assert any("success_callback" in x for x in status["config"]["needs_restart"])
    assert status["config"]["revision"] == serving
    assert gateway.metrics()['moat_config_reload_total{result="restart"}'] >= 1
    assert gateway.marker("m0", site.key) == f"r{serving}"
    assert gateway.pid == pid
    assert gateway.running()
    # The administrator restarts it by hand.
    assert gateway.stop() == 0
    gateway.start()
    gateway.wait_ready()
    site.wait_serving(number)
    assert gateway.marker("m0", site.key) == f"r{number}"
