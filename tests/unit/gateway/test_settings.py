# SPDX-License-Identifier: Apache-2.0
"""Proves that the one table of settings drives parsing, precedence, errors and the reference page."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moat_gateway import settings
from moat_gateway.errors import BadSetting
from moat_gateway.settings import SETTINGS, Kind, Settings, load

ROOT = Path(__file__).resolve().parents[3]


def test_each_field_is_a_setting_with_a_sentence_and_a_usable_default() -> None:
    assert [s.name for s in SETTINGS] == [f.name for f in fields(Settings)]
    for s in SETTINGS:
        assert s.description.endswith("."), s.name
        if s.kind in (Kind.INTEGER, Kind.SECONDS):
            assert s.minimum is not None
            assert s.maximum is not None
            assert s.minimum <= s.default <= s.maximum


def test_the_defaults_parse_to_themselves() -> None:
    environ = {s.env: s.default_text for s in SETTINGS if s.kind is not Kind.DESTINATIONS}
    assert load(environ)[0] == Settings()


def test_the_reference_page_is_the_table() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text("utf-8")
    assert page == settings.markdown(), "re-make it: moat-gateway settings --markdown > docs/reference/settings.md"


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 1001\ninstance: from-file\nlog_level: warning\n")
    environ = {"MOAT_SETTINGS_FILE": str(file), "MOAT_PORT": "1002", "MOAT_INSTANCE": "from-env"}
    values, unknown = load(environ, {"port": "1003"})
    assert (values.port, values.instance, values.log_level) == (1003, "from-env", "warning")
    assert values.keys == Settings().keys
    assert unknown == ()


def test_an_option_exists_for_each_setting_and_only_given_ones_count() -> None:
    parser = argparse.ArgumentParser()
    settings.add_options(parser)
    args = parser.parse_args(["--keys-poll", "2", "--config", "/x/y.yaml"])
    assert settings.overrides(args) == {"keys_poll": "2", "config": "/x/y.yaml"}
    text = " ".join(parser.format_help().split())
    for s in SETTINGS:
        assert s.option in text
        assert s.env in text


def test_a_misspelt_variable_is_reported() -> None:
    assert load({"MOAT_EGRES_ALLOW": "x", "MOAT_PORT": "1"})[1] == ("MOAT_EGRES_ALLOW",)


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("MOAT_PORT", "http", "a whole number from 0 to 65535"),
        ("MOAT_PORT", "65536", "a whole number"),
        ("MOAT_PORT", "8.5", "a whole number"),
        ("MOAT_KEYS_POLL", "nan", "a number from 0.1 to 60 (s)"),
        ("MOAT_KEYS_POLL", "0", "a number from 0.1"),
        ("MOAT_HOST", "localhost", "an IPv4 or IPv6 address"),
        ("MOAT_LOG_LEVEL", "verbose", "debug or info or warning or error"),
        ("MOAT_EGRESS_ALLOW", "model:8081, http://x", "'http://x' is none"),
        ("MOAT_CONFIG", "", "a path"),
        ("MOAT_INSTANCE", "a\nb", "one line"),
    ],
)
def test_a_bad_value_names_the_setting_what_was_found_and_what_is_expected(
    variable: str, value: str, part: str
) -> None:
    with pytest.raises(BadSetting) as e:
        load({variable: value})
    line = e.value.one_line()
    assert variable in line
    assert repr(value) in line
    assert part in line
    assert "\n" not in line


def test_the_file_refuses_unknown_keys_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 4001\nprot: 4002\n")
    with pytest.raises(BadSetting, match="unknown setting 'prot'") as e:
        load({"MOAT_SETTINGS_FILE": str(file)})
    assert e.value.line == 2


def test_a_named_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="cannot be read"):
        load({"MOAT_SETTINGS_FILE": str(tmp_path / "none.yaml")})


def test_lists_take_commas_blanks_and_yaml(tmp_path: Path) -> None:
    want = ("model:8081", "10.0.0.0/8", "[2001:db8::1]:443")
    assert load({"MOAT_EGRESS_ALLOW": "model:8081,10.0.0.0/8  [2001:db8::1]:443"})[0].egress_allow == want
    file = tmp_path / "gateway.yaml"
    file.write_text('egress_allow: ["model:8081", "10.0.0.0/8", "[2001:db8::1]:443"]\n')
    assert load({"MOAT_SETTINGS_FILE": str(file)})[0].egress_allow == want
    assert load({"MOAT_EGRESS_ALLOW": ""})[0].egress_allow == ()


@given(st.sampled_from(SETTINGS), st.text(max_size=40))
def test_any_text_either_parses_or_is_a_clean_refusal(setting: settings.Setting, text: str) -> None:
    said = setting.env
    try:
        load({setting.env: text})
    except BadSetting as e:
        said = e.one_line()
    assert setting.env in said
