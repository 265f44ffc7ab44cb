# SPDX-License-Identifier: Apache-2.0
"""Proves that the order of trust cannot be walked out of order: no step answers before the one before it has held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.site.bundles import Made, make_bundle

from moat.errors import BadSignature, UnknownKey
from moat.manifest import MANIFEST_NAME, SIGNATURE_NAME
from moat.minisign import PublicKey
from moat.site.trust import Digest, Entry, EntryType, Stage, TrustedBundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("trust")
    return make_bundle(folder / "bundle", folder / "keys")


def entries_of(made: Made) -> list[Entry]:
    """Return what an honest walk finds."""
    found = []
    for p in made.path.rglob("*"):
        kind = EntryType.FOLDER if p.is_dir() else EntryType.FILE
        found.append(Entry(p.relative_to(made.path).as_posix(), kind, size=p.stat().st_size))
    return found


def steps(made: Made, trust: TrustedBundle) -> list[tuple[Stage, Callable[[], object]]]:
    data, signature = ((made.path / n).read_bytes() for n in (MANIFEST_NAME, SIGNATURE_NAME))
    return [
        (Stage.SIGNED, lambda: trust.check_signature(data, signature)),
        (Stage.PARSED, trust.parse),
        (Stage.ACCEPTED, lambda: trust.accept(target=None, installed=None)),
        (Stage.LISTED, lambda: trust.check_entries(entries_of(made))),
        (Stage.COUNTED, lambda: trust.count({}, [])),
    ]


def test_the_stages_come_in_order(made: Made) -> None:
    trust = TrustedBundle([made.secret.public_key])
    for stage, step in steps(made, trust):
        assert trust.stage is Stage(stage - 1)
        step()
        assert trust.stage is stage


@pytest.mark.parametrize("done", range(5))
def test_no_step_can_be_left_out_or_taken_twice(made: Made, done: int) -> None:
    for wrong in range(5):
        if wrong == done:
            continue
        trust = TrustedBundle([made.secret.public_key])
        walk = steps(made, trust)
        for _, step in walk[:done]:
            step()
        with pytest.raises(AssertionError):
            walk[wrong][1]()
        assert trust.stage is Stage(done)


def test_nothing_is_shown_of_an_unsigned_manifest(made: Made) -> None:
    trust = TrustedBundle([made.secret.public_key])
    with pytest.raises(BadSignature):
        trust.check_signature(
            (made.path / MANIFEST_NAME).read_bytes() + b" ", (made.path / SIGNATURE_NAME).read_bytes()
        )
    assert trust.stage is Stage.UNTRUSTED
    for read in (lambda: trust.manifest, lambda: trust.key, trust.parse):
        with pytest.raises(AssertionError):
            read()


def test_a_key_id_alone_proves_nothing(made: Made) -> None:
    """Two trusted keys may share an id: each is tried; a stranger's key with a trusted id does not verify."""
    ours = made.secret.public_key
    other = PublicKey(ours.key_id, bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"))
    data, signature = ((made.path / n).read_bytes() for n in (MANIFEST_NAME, SIGNATURE_NAME))
    both = TrustedBundle([other, ours])
    both.check_signature(data, signature)
    assert both.key == ours
    with pytest.raises(BadSignature):
        TrustedBundle([other]).check_signature(data, signature)
    with pytest.raises(UnknownKey):
        TrustedBundle([]).check_signature(data, signature)


def test_a_file_that_was_not_read_never_counts(made: Made) -> None:
    trust = TrustedBundle([made.secret.public_key])
    wanted = []
    for stage, step in steps(made, trust)[:4]:
        result = step()
        if stage is Stage.LISTED:
            problems, wanted = result  # type: ignore[misc]
            assert problems == []
    with pytest.raises(KeyError):
        trust.count({wanted[0].path: Digest(sha256=wanted[0].sha256)}, wanted)


def test_a_lost_folder_below_a_link_is_one_row(made: Made) -> None:
    trust = TrustedBundle([made.secret.public_key])
    for _, step in steps(made, trust)[:3]:
        step()
    entries = [e for e in entries_of(made) if not e.path.startswith("wheels")]
    problems, _ = trust.check_entries([*entries, Entry("wheels", EntryType.LINK)])
    assert [(p.kind, p.path) for p in problems] == [("unsafe-path", "wheels")]
