# SPDX-License-Identifier: Apache-2.0
"""Proves the envelope of MinIO's admin interface: content comes back, and no cut, swap, change or other key passes.

Also what the accounts that are made through it may do, and which secrets are refused.
That MinIO itself opens what is sealed here, and the reverse: tests/integration/gateway/test_store_accounts.py.
"""

from __future__ import annotations

import pytest

from moat_gateway import sealed, storeaccounts
from moat_gateway.errors import StoreFailed, UnreadableSecret
from moat_gateway.settings import Settings

KEY = "the-secret-key-of-root"
F = sealed.FRAGMENT


@pytest.mark.parametrize("size", [0, 1, F - 1, F, F + 1, 3 * F, 3 * F + 7])
def test_content_of_every_length_comes_back(size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    envelope = sealed.seal(KEY, content)
    assert sealed.unseal(KEY, envelope) == content
    assert len(envelope) == 41 + size + 16 * max(1, -(-size // F))


def test_each_envelope_has_its_own_salt_and_nonce() -> None:
    assert sealed.seal(KEY, b"x")[:41] != sealed.seal(KEY, b"x")[:41]


def test_nothing_that_was_tampered_with_opens() -> None:
    envelope = sealed.seal(KEY, bytes(2 * F + 5))
    head, a, b, c = envelope[:41], envelope[41 : 57 + F], envelope[57 + F : 73 + 2 * F], envelope[73 + 2 * F :]
    assert head + a + b + c == envelope
    flipped = bytes([envelope[50] ^ 1])
    for wrong in (
        head + a + b,  # the end is missing
        head + a + c,  # a fragment is missing
        head + b + a + c,  # two are swapped
        head + a + b + c + c,  # one came twice
        envelope[:50] + flipped + envelope[51:],
        bytes([envelope[0] ^ 1]) + envelope[1:],  # the salt
        envelope[:32] + b"\x07" + envelope[33:],  # an unknown algorithm
        envelope[:30],
        b"",
    ):
        with pytest.raises(sealed.NotSealed):
            sealed.unseal(KEY, wrong)
    with pytest.raises(sealed.NotSealed):
        sealed.unseal(KEY + "x", envelope)


def test_the_policies_allow_what_each_needs_and_deny_the_administration() -> None:
    made = storeaccounts.policies(["one", "two"], "reports")
    assert set(made) == {"moat-reader", "moat-writer"}
    revisions, nodes = {"arn:aws:s3:::one/*", "arn:aws:s3:::two/*"}, {"arn:aws:s3:::reports/nodes/*"}
    for name, policy in made.items():
        allowed = [s for s in policy["Statement"] if s["Effect"] == "Allow"]
        actions = {a for s in allowed for a in s["Action"]}
        assert not [a for a in actions if "*" in a or not a.startswith("s3:")]
        may: dict[str, set[str]] = {}
        for statement in allowed:
            for action in statement["Action"]:
                may.setdefault(action, set()).update(statement["Resource"])
        # Nobody deletes a revision; a node's report may be removed by the writer alone.
        assert may["s3:PutObject"] == (revisions | nodes if name == "moat-writer" else nodes)
        assert may.get("s3:DeleteObject", set()) == (nodes if name == "moat-writer" else set())
        assert {a for a in may if "Put" in a or "Delete" in a} <= {"s3:PutObject", "s3:DeleteObject"}
        assert {"Effect": "Deny", "Action": ["admin:*"]} in policy["Statement"]
        resources = {r for s in allowed for r in s["Resource"]} - nodes
        assert resources == {f"arn:aws:s3:::{b}{e}" for b in ("one", "two", "reports") for e in ("", "/*")}


def test_in_a_copy_of_another_site_s_revisions_only_the_replication_writes_them() -> None:
    made = storeaccounts.policies(["one", "two"], "reports", copy="one")
    may = {
        name: {(a, r) for s in p["Statement"] if s["Effect"] == "Allow" for a in s["Action"] for r in s["Resource"]}
        for name, p in made.items()
    }
    writes = ("s3:PutObject", "s3:ReplicateObject")
    assert ("s3:PutObject", "arn:aws:s3:::two/*") in may["moat-writer"]
    assert not [r for a, r in may["moat-writer"] if a in writes and ":one/" in r]
    targets = {r for a, r in may["moat-replicator"] if a in writes}
    assert targets == {"arn:aws:s3:::one/revisions/*", "arn:aws:s3:::one/current"}
    assert not [a for a, _ in may["moat-replicator"] if "Delete" in a]
    assert {"Effect": "Deny", "Action": ["admin:*"]} in made["moat-replicator"]["Statement"]
    # With one bucket alone the writer has nothing left to write; a statement about nothing would be refused.
    alone = storeaccounts.policies(["one"], "reports", copy="one")["moat-writer"]
    assert all(s.get("Resource", ["x"]) for s in alone["Statement"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"store_root_user": "x"}', '{"store_root_user": 1}'])
def test_secrets_from_standard_input_are_whole_or_refused(text: str) -> None:
    with pytest.raises(UnreadableSecret):
        storeaccounts.read_json(text)


@pytest.mark.parametrize("access_key", ["moat-writer-x", "moat-readerx", "somebody"])
def test_an_access_key_that_is_not_the_role_s_is_refused_before_the_store_is_asked(access_key: str) -> None:
    secrets = dict.fromkeys(storeaccounts.NAMES, "s3cret") | {"store_reader_access_key": access_key}
    with pytest.raises(StoreFailed) as refused:
        storeaccounts.apply(Settings(), secrets, ["moat-config"])
    assert "of the reader does not begin with moat-reader-" in refused.value.message
    assert "rotate_secrets -e rotate=store_reader" in (refused.value.hint or "")
    assert access_key not in str(refused.value)
