# SPDX-License-Identifier: Apache-2.0
"""Proves the reading of keys.yaml, who a secret belongs to, and that commands change the file safely."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moat_gateway import keyfile, keys
from moat_gateway.errors import BadKeys
from moat_gateway.keys import Identity, Verdict

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
SECRET = "sk-moat-test-secret-of-this-file-only"
HASH = keys.hash_secret(SECRET)
FILE = f"""\
# teams of the site
teams:
  - id: physics   # the first
    models: ["small", "big"]
    rpm: 60
keys:
  # made by hand
  - id: one
    team: physics
    sha256: {HASH}
    not_after: 2026-12-31
    models: ["small"]

# the end
"""


def parse(text: str) -> keys.KeySet:
    return keys.parse(text.encode(), "keys.yaml")


def test_a_key_belongs_to_its_team() -> None:
    who = parse(FILE).identify(SECRET, NOW)
    assert isinstance(who, Identity)
    assert (who.team, who.key, who.models, who.admin) == ("physics", "one", ("small",), False)
    assert who.record is not None
    assert who.record.rpm == 60


@pytest.mark.parametrize("wrong", ["", "x", SECRET[:-1], SECRET + " ", SECRET.upper(), HASH, "sk-moat-\udce9"])
def test_anything_else_is_unknown(wrong: str) -> None:
    assert parse(FILE).identify(wrong, NOW) is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("not_after", "last_good", "first_bad"),
    [
        ("2026-12-31", "2026-12-31T23:59:59+00:00", "2027-01-01T00:00:00+00:00"),
        ("2026-12-31T12:00:00+02:00", "2026-12-31T09:59:59+00:00", "2026-12-31T10:00:00+00:00"),
        ("'2026-12-31T10:00:00Z'", "2026-12-31T09:59:59+00:00", "2026-12-31T10:00:00+00:00"),
    ],
)
def test_expiry_to_the_second(not_after: str, last_good: str, first_bad: str) -> None:
    found = parse(FILE.replace("not_after: 2026-12-31", f"not_after: {not_after}"))
    assert isinstance(found.identify(SECRET, datetime.fromisoformat(last_good)), Identity)
    assert found.identify(SECRET, datetime.fromisoformat(first_bad)) is Verdict.EXPIRED


@pytest.mark.parametrize(
    ("old", "new", "line", "part"),
    [
        ('["small", "big"]', "[]", 4, "not a list of model names"),
        ('    models: ["small", "big"]\n', "", 3, "has no models"),
        ('["small", "big"]', "small", 4, "not a list of model names"),
        ('["small", "big"]', '["all-proxy-models"]', 4, "word of LiteLLM's own"),
        ("rpm: 60", "rpm: 0", 5, "not a count"),
        ("rpm: 60", "rpm: true", 5, "not a count"),
        ("rpm: 60", "rmp: 60", 5, "unknown field"),
        ("rpm: 60", "budget: -1", 5, "not an amount"),
        ("team: physics", "team: chemistry", 9, "a team that is not there"),
        (HASH, "abc", 10, "not a sha256"),
        (HASH, SECRET, 10, "not a sha256"),
        ("2026-12-31", "tomorrow", 11, "not a moment"),
        ("2026-12-31", "2026-12-31T10:00:00", 11, "not a moment"),
        ('models: ["small"]', 'models: ["small", "huge"]', 12, "more than its team"),
        ("id: one", "id: 'a b'", 8, "no usable id"),
        ("keys:", "kyes:", 6, "unknown field"),
        ("# the end", f"  - {{id: one, team: physics, sha256: {'a' * 64}}}", 14, "same id"),
        ("# the end", f"  - {{id: two, team: physics, sha256: {HASH}}}", 14, "same sha256"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_without_what_may_be_a_secret(
    old: str, new: str, line: int, part: str
) -> None:
    text = FILE.replace(old, new, 1)
    assert text != FILE
    with pytest.raises(BadKeys) as e:
        parse(text)
    assert part in e.value.message
    assert e.value.line == line
    assert SECRET not in e.value.one_line()


@pytest.mark.parametrize("text", ["", "\n", "[]", "x", "teams"])
def test_an_empty_file_is_refused(text: str) -> None:
    with pytest.raises(BadKeys, match="empty or not a mapping"):
        parse(text)


def test_a_key_without_models_has_those_of_its_team_and_a_star_is_all() -> None:
    text = FILE.replace('    models: ["small"]\n', "").replace('["small", "big"]', '["small", "*"]')
    who = parse(text).identify(SECRET, NOW)
    assert isinstance(who, Identity)
    assert who.models == ("*",)


def test_secrets_are_256_random_bits_with_the_prefix() -> None:
    made = {keys.new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(s.startswith("sk-moat-") and len(s) == len("sk-moat-") + 43 for s in made)


# --- changing the file ---


def test_a_new_key_keeps_comments_mode_and_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    path.chmod(0o604)
    secret = keyfile.new_key(path, "two", "physics", models=["big"], not_after="2027-06-30")
    text = path.read_text()
    assert secret not in text
    for comment in ("# teams of the site", "# the first", "# made by hand", "# the end"):
        assert comment in text
    assert path.stat().st_mode & 0o777 == 0o604
    who = keys.read(path).identify(secret, NOW)
    assert isinstance(who, Identity)
    assert (who.key, who.models, who.not_after) == ("two", ("big",), datetime(2027, 7, 1, tzinfo=UTC))
    assert isinstance(keys.read(path).identify(SECRET, NOW), Identity)
    assert [p.name for p in tmp_path.iterdir()] == ["keys.yaml"]


def test_a_new_file_is_made_with_its_team(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(BadKeys, match="the team t is not there"):
        keyfile.new_key(path, "one", "t")
    assert not path.exists()
    secret = keyfile.new_key(path, "one", "t", create_team=True)
    assert path.stat().st_mode & 0o777 == 0o640
    assert isinstance(keys.read(path).identify(secret, NOW), Identity)


@pytest.mark.parametrize(
    "text",
    [
        "teams:\n  - id: t\n    models: ['*']\nkeys: []\n",
        "teams:\n- id: t\n  models: ['*']\nkeys:\n",
        "keys: []   # none yet\nteams:\n- {id: t, models: ['*']}\n",
        "teams: [{id: t, models: ['*']}]",
        "{teams: [{id: t, models: ['*']}], keys: []}",
        f"teams:\n- id: t\n  models:\n  - '*'\nkeys:\n- id: x\n  team: t\n  sha256: {HASH}",
        f"keys:\n    - sha256: {HASH}\n      team: t\n      id: x\n\nteams:\n    - id: t\n      models: ['*']\n",
    ],
)
def test_every_way_to_write_the_file_can_be_changed(text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    before = {k.id for k in keys.read(path).keys}
    secret = keyfile.new_key(path, "new", "t")
    assert {k.id for k in keys.read(path).keys} == before | {"new"}
    assert isinstance(keys.read(path).identify(secret, NOW), Identity)
    for key_id in sorted(before | {"new"}):
        keyfile.revoke(path, key_id)
    assert keys.read(path).keys == ()
    assert list(keys.read(path).teams) == ["t"]


def test_revoking_keeps_the_others_and_their_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    keyfile.new_key(path, "two", "physics")
    keyfile.revoke(path, "one")
    assert [k.id for k in keys.read(path).keys] == ["two"]
    assert "# the first" in path.read_text()
    with pytest.raises(BadKeys, match="there is no key one"):
        keyfile.revoke(path, "one")


def test_an_id_is_used_once_and_a_bad_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    with pytest.raises(BadKeys, match="is there already"):
        keyfile.new_key(path, "one", "physics")
    with pytest.raises(BadKeys, match="more than its team"):
        keyfile.new_key(path, "two", "physics", models=["huge"])
    with pytest.raises(BadKeys, match="no usable id"):
        keyfile.new_key(path, "a b", "physics")
    assert path.read_text() == FILE
    path.write_text("teams: [")
    with pytest.raises(BadKeys):
        keyfile.new_key(path, "two", "physics")
    assert path.read_text() == "teams: ["


def test_commands_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    threads = [threading.Thread(target=keyfile.new_key, args=(path, f"k{i}", "physics")) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {k.id for k in keys.read(path).keys} == {"one", *(f"k{i}" for i in range(12))}


def test_a_folder_that_may_not_be_written_is_said() -> None:
    # Nobody, root included, makes files there.
    with pytest.raises(BadKeys, match="cannot be written"):
        keyfile.new_key(Path("/proc/self/keys.yaml"), "one", "t", create_team=True)


ids = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True)


@given(st.lists(ids, unique=True, min_size=1, max_size=6), st.data())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_making_and_revoking_in_any_order_ends_where_it_should(
    tmp_path: Path, names: list[str], data: st.DataObject
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("# kept\nteams:\n  - id: t\n    models: ['*']\nkeys: []\n")
    for name in names:
        keyfile.new_key(path, name, "t")
    gone = data.draw(st.sets(st.sampled_from(names)))
    for name in sorted(gone):
        keyfile.revoke(path, name)
    assert [k.id for k in keys.read(path).keys] == [n for n in names if n not in gone]
    assert path.read_text().startswith("# kept\n")
    assert yaml.safe_load(path.read_text())["teams"] == [{"id": "t", "models": ["*"]}]


def test_dates_beyond_the_calendar_are_refused_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    for text in ("9999-12-31", "0001-01-01T00:00:00+10:00"):
        with pytest.raises(BadKeys, match="not a moment"):
            keyfile.new_key(path, "x", "physics", not_after=text)


def test_a_rotated_key_has_a_new_secret_and_the_old_one_ends(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    done = keyfile.rotate(path, "one", timedelta(hours=24), now=NOW)
    text, found = path.read_text(), keys.read(path)
    assert "# made by hand" in text
    assert text.endswith("# the end\n")
    assert [k.id for k in found.keys] == ["one", "one.old"]
    later = NOW + timedelta(hours=23, minutes=59)
    for secret, key_id in ((done.secret, "one"), (SECRET, "one.old")):
        who = found.identify(secret, later)
        assert isinstance(who, Identity)
        assert (who.key, who.team, who.models) == (key_id, "physics", ("small",))
    assert found.identify(SECRET, NOW + timedelta(hours=24)) is Verdict.EXPIRED
    # The new secret ends when the key did.
    assert found.keys[0].not_after == keys.parse_not_after("2026-12-31")
    assert done.secret not in text
    assert done.secret not in repr(done)


def test_a_second_rotation_in_the_overlap_keeps_all_three(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    first = keyfile.rotate(path, "one", timedelta(days=7), now=NOW)
    second = keyfile.rotate(path, "one", timedelta(0), now=NOW, not_after="2027-01-01T00:00:00Z")
    found = keys.read(path)
    assert {k.id for k in found.keys} == {"one", "one.old", "one.old2"}
    assert second.old_id == "one.old2"
    # No overlap: the secret in between ends now, the oldest one as it was told.
    assert found.identify(first.secret, NOW) is Verdict.EXPIRED
    assert isinstance(found.identify(SECRET, NOW + timedelta(days=6)), Identity)
    who = found.identify(second.secret, NOW)
    assert isinstance(who, Identity)
    assert who.not_after == datetime(2027, 1, 1, tzinfo=UTC)


def test_revoking_a_rotated_key_leaves_none_of_its_secrets_valid(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    keyfile.new_key(path, "one.oldest", "physics")
    first = keyfile.rotate(path, "one", timedelta(days=7), now=NOW)
    second = keyfile.rotate(path, "one", timedelta(days=7), now=NOW)
    keyfile.rotate(path, "one.old", timedelta(days=1), now=NOW)
    assert keyfile.revoke(path, "one") == ("one.old2", "one.old", "one.old.old")
    found = keys.read(path)
    # A name that only begins alike is a key of its own.
    assert [k.id for k in found.keys] == ["one.oldest"]
    assert {found.identify(s, NOW) for s in (SECRET, first.secret, second.secret)} == {Verdict.UNKNOWN}
    assert "# the first" in path.read_text()


def test_an_old_secret_can_be_revoked_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    keyfile.rotate(path, "one", timedelta(days=7), now=NOW)
    assert keyfile.revoke(path, "one.old") == ()
    assert [k.id for k in keys.read(path).keys] == ["one"]


def test_an_overlap_never_lengthens_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    done = keyfile.rotate(path, "one", timedelta(days=300), now=NOW)
    assert done.old_ends == keys.parse_not_after("2026-12-31")


def test_what_cannot_be_rotated_is_said_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    with pytest.raises(BadKeys, match="there is no key two"):
        keyfile.rotate(path, "two", timedelta(hours=1), now=NOW)
    with pytest.raises(BadKeys, match="has ended"):
        keyfile.rotate(path, "one", timedelta(hours=1), now=datetime(2027, 6, 1, tzinfo=UTC))
    assert path.read_text() == FILE


@pytest.mark.parametrize("text", ["", "24", "1y", "-1h", "1.5h", "24 h", "366d", "9999999d", "h"])
def test_an_overlap_is_a_length_of_time(text: str) -> None:
    with pytest.raises(BadKeys, match="no length of time"):
        keyfile.parse_overlap(text)


def test_lengths_of_time() -> None:
    wanted = {"0": 0, "90s": 90, "30m": 1800, "24h": 86400, "365d": 31536000}
    assert {t: keyfile.parse_overlap(t).total_seconds() for t in wanted} == wanted
