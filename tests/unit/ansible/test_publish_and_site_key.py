# SPDX-License-Identifier: Apache-2.0
"""Proves that the control host makes keys that the nodes' own code trusts, and publishes when and only when it should.

Keys and digests are held against the gateway's own code, which is the other side of the contract. What ``moat-gateway``
answers is played by a program that keeps its state in a file; with the real one molecule's scenarios prove it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ansible.modules import module

from moat_gateway import errors, revision, sitekey

keys, publish = module("moat_site_key"), module("moat_publish")


# --- moat_site_key ---


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    folder, trusted = tmp_path / "secrets", tmp_path / "site-keys"
    folder.mkdir()
    return folder, trusted


def ids(trusted: Path) -> set[str]:
    return {k.key_id for k in sitekey.read_trusted(trusted)}


def test_what_the_key_signs_is_trusted_by_a_node(places: tuple[Path, Path]) -> None:
    folder, trusted = places
    made, changed = keys.apply(folder, trusted, "present")
    assert changed
    signing = sitekey.SigningKey.read(folder / "site_key")
    assert signing.public.key_id == made
    verified = sitekey.verify(
        b"content", signing.sign(b"content", "moat-config revision=1"), sitekey.read_trusted(trusted)
    )
    assert verified.key_id == made
    assert stat.S_IMODE((folder / "site_key").stat().st_mode) == 0o600
    assert signing.to_bytes() == (folder / "site_key").read_bytes()
    assert keys.apply(folder, trusted, "present") == ("", False)


def test_a_key_is_replaced_with_an_overlap_and_a_run_that_was_cut_short_goes_on(places: tuple[Path, Path]) -> None:
    folder, trusted = places
    old, _ = keys.apply(folder, trusted, "present")
    new, changed = keys.apply(folder, trusted, "next")
    assert changed
    assert new != old
    assert ids(trusted) == {old, new}
    # Cut short here, and run again: the same key goes on.
    assert keys.apply(folder, trusted, "next") == ("", False)
    assert sitekey.SigningKey.read(folder / "site_key").public.key_id == old
    assert keys.apply(folder, trusted, "settled") == ("", True)
    assert sitekey.SigningKey.read(folder / "site_key").public.key_id == new
    assert keys.apply(folder, trusted, "settled") == ("", False)
    assert ids(trusted) == {old, new}
    office = sitekey.SigningKey.generate().public
    (trusted / "office.pub").write_bytes(office.to_bytes())
    assert keys.apply(folder, trusted, "alone") == ("", True)
    assert ids(trusted) == {new, office.key_id}
    assert keys.apply(folder, trusted, "alone") == ("", False)


def test_a_file_that_is_no_key_is_refused_and_kept(places: tuple[Path, Path]) -> None:
    folder, trusted = places
    (folder / "site_key").write_text("something else\n")
    with pytest.raises(keys.Refused, match="no secret key of minisign"):
        keys.apply(folder, trusted, "present")
    assert (folder / "site_key").read_text() == "something else\n"


def test_a_dry_run_makes_nothing(places: tuple[Path, Path]) -> None:
    folder, trusted = places
    assert keys.apply(folder, trusted, "present", dry=True)[1]
    assert list(folder.iterdir()) == []
    assert not trusted.exists()


# --- moat_publish ---

#: Answers as `moat-gateway config` does; its state, and what it was asked, are in a file beside it.
PROGRAM = """#!/usr/bin/env python3
import json, os, pathlib, sys
file = pathlib.Path(__file__).with_name("state.json")
state = json.loads(file.read_text())
words = sys.argv[2:]
state["asked"].append(words)
if words[0] == "status":
    gateways = [{"revision": n} for n in state["nodes"]]
    store = {"revision": state["held"] or None, "reachable": state["reachable"], "why": "stopped"}
    answer, code = {"ok": True, "store": store, "nodes": [], "gateways": gateways}, 0
elif state["refuse"]:
    problem = {"message": "planted", "path": "config.yaml", "line": 3, "hint": "mend it"}
    answer, code = {"ok": False, "problems": [problem]}, state["refuse"]
else:
    changed = "--force" in words or state["content"] != state["folder"]
    number = int(words[words.index("--revision") + 1]) if "--revision" in words else state["held"] + 1
    state["held"] = number if changed else state["held"]
    state["content"] = state["folder"]
    state["key"] = os.environ["MOAT_SITE_KEY_FILE"]
    answer = {"ok": True, "revision": state["held"], "changed": changed, "content": state["content"]}
    answer, code = {**answer, "gateways": [1, 2]}, 0
file.write_text(json.dumps(state))
print(json.dumps(answer))
sys.exit(code)
"""


class Site:
    """A control host: the folder, the program, and a run of the module's work."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.record = root, root / "config", root / "published.json"
        (self.folder / "routers").mkdir(parents=True)
        self.write("config.yaml", "model_list: []\n")
        self.write("keys.yaml", "keys: []\n")
        self.program = root / "moat-gateway"
        self.program.write_text(PROGRAM, "utf-8")
        self.program.chmod(0o755)
        (root / "publish.env").write_text("# settings\nMOAT_SITE_KEY_FILE='/keys/site_key'\n")
        self.state(held=0, nodes=[], reachable=True, refuse=0, content="", asked=[])
        self.warnings: list[str] = []

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, "utf-8")

    def state(self, **values: Any) -> dict[str, Any]:
        file = self.root / "state.json"
        now: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        now |= values
        file.write_text(json.dumps(now))
        return now

    def run(self, **more: Any) -> Mapping[str, Any]:
        self.state(folder=publish.content_of(self.folder), asked=[])
        p = {
            "program": str(self.program), "folder": str(self.folder), "environment": str(self.root / "publish.env"),
            "record": str(self.record), "policy": "changed", "site_key": None, "wait": 5.0, "message": "", **more,
        }  # fmt: skip
        done: Mapping[str, Any] = publish.publish(p, self.warnings.append, dry=False)
        return done

    def pushed(self) -> list[str]:
        return next((words for words in self.state()["asked"] if words[0] == "push"), [])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_digest_of_a_folder_is_that_of_a_revision(site: Site) -> None:
    site.write("routers/index.yaml", "models: []\n")
    site.write("gateway.yaml", "keys_poll: 2\n")
    names = ("config.yaml", "keys.yaml", "routers/index.yaml")
    # Many contents: the order of the digests is that of the names by chance only.
    for number in range(20):
        site.write("keys.yaml", f"keys: []  # {number}\n")
        files = {name: (site.folder / name).read_bytes() for name in names}
        assert publish.content_of(site.folder) == revision.content_sha256(files)


def test_the_first_run_publishes_and_the_second_does_not(site: Site) -> None:
    assert site.run()["changed"] is True
    assert site.pushed()[:3] == ["push", str(site.folder), "--wait=5"]
    assert site.run()["changed"] is False
    assert site.pushed() == []
    assert stat.S_IMODE(site.record.stat().st_mode) == 0o600


def test_a_rollback_is_left_alone_until_the_folder_changes_or_it_is_asked_for(site: Site) -> None:
    site.run()
    site.state(held=2, nodes=[2, 2], content="what was rolled back to")
    assert site.run() == {"changed": False, "revision": 2, "text": "revision 2 is in force; the folder was not changed"}
    site.write("keys.yaml", "keys: [{}]\n")
    assert site.run()["revision"] == 3
    assert "not published from" in site.warnings[0]
    site.state(held=4, nodes=[4], content="what was rolled back to")
    assert site.run(policy="always")["revision"] == 5


def test_a_store_that_lost_revisions_gets_one_above_those_of_its_nodes(site: Site) -> None:
    site.run()
    site.state(held=0, nodes=[7, 6])
    assert site.run()["revision"] == 8
    assert site.pushed()[-4:] == ["--force", "--revision", "8", "--json"]


def test_a_new_site_key_signs_the_same_content_anew(site: Site) -> None:
    site.run()
    assert site.run(site_key="/keys/site_key.next")["changed"] is True
    assert site.state()["key"] == "/keys/site_key.next"
    assert "--force" in site.pushed()


def test_a_refusal_names_file_and_line_and_is_tried_again(site: Site) -> None:
    site.state(refuse=7)
    with pytest.raises(publish.Refused, match=r"(?s)code 7.*config.yaml line 3: planted. Do: mend it"):
        site.run()
    assert not site.record.exists()
    site.state(refuse=errors.NotConverged.exit_code)
    with pytest.raises(publish.NotServed):
        site.run()
    assert not site.record.exists()
    site.state(refuse=0)
    assert site.run()["changed"] is True


def test_a_store_that_does_not_answer_is_said(site: Site) -> None:
    site.state(reachable=False)
    with pytest.raises(publish.Refused, match="does not answer: stopped"):
        site.run()
