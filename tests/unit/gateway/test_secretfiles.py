# SPDX-License-Identifier: Apache-2.0
"""Proves the reading of secret files and the refusal of weak master keys, without ever showing a value."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moat_gateway import secretfiles
from moat_gateway.errors import BadMasterKey, GatewayError, UnreadableSecret


@pytest.mark.parametrize(
    "weak",
    [
        "sk-1234", "1234", "SK-1234", "changeme", "litellm-master-key", "short-but-not-known-0123456789a",
        "x" * 64, "ab" * 30,
        "sk-" + "1234567890 abcdefghijklmnopqrstuvw",
    ],
)  # fmt: skip
def test_weak_master_keys(weak: str, tmp_path: Path) -> None:
    path = tmp_path / "master_key"
    path.write_text(weak + "\n")
    with pytest.raises(BadMasterKey) as e:
        secretfiles.read_master_key(path)
    assert weak not in e.value.message + (e.value.found or "")


def test_a_missing_master_key_is_its_own_refusal(tmp_path: Path) -> None:
    with pytest.raises(BadMasterKey, match="there is no master key"):
        secretfiles.read_master_key(tmp_path / "none")


def test_a_good_master_key(tmp_path: Path) -> None:
    path = tmp_path / "master_key"
    for good in (secrets.token_hex(32), "sk-" + secrets.token_urlsafe(32)):
        path.write_text(good + "\n")
        assert secretfiles.read_master_key(path) == good


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"a\0b", b"x" * 70000])
def test_what_is_no_secret(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(content)
    with pytest.raises(UnreadableSecret):
        secretfiles.read_value(path)


def test_a_folder_and_a_dangling_link_are_unreadable_not_missing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "link"):
        found = secretfiles.find(tmp_path, name)
        assert found is not None
        with pytest.raises(UnreadableSecret):
            secretfiles.read_value(found)
    with pytest.raises(UnreadableSecret):
        secretfiles.read_master_key(tmp_path / "link")
    assert secretfiles.find(tmp_path, "none") is None


def test_only_the_last_newline_is_not_part_of_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for content, want in ((b"a b\n", "a b"), (b" a\r\n", " a"), (b"a\n\n", "a\n"), (b"a", "a")):
        path.write_bytes(content)
        assert secretfiles.read_value(path) == want


@given(st.binary(max_size=60))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_refusal_shows_the_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"CANARY" + content)
    said = ""
    try:
        secretfiles.read_master_key(path)
    except GatewayError as e:
        said = e.one_line()
    assert "CANARY" not in said
