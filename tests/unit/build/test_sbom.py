# SPDX-License-Identifier: Apache-2.0
"""Proves that SBOMs are valid CycloneDX 1.6 and the same each time, and that notices hold every text once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from moat.build.components import Component, license_field, notices, purl
from moat.build.sbom import document

ZLIB = purl("deb", "debian/zlib1g", "1:1.3.1-1+b1", {"arch": "amd64"})
PARTS = [
    Component("deb", "zlib1g", "1:1.3.1-1+b1", "Zlib", ZLIB, "a" * 64),
    Component("wheel", "regex", "2026.1", "Apache-2.0 AND CNRI-Python", purl("pypi", "regex", "2026.1"), "b" * 64),
    Component("go-module", "std", "1.24.4", "BSD-3-Clause", purl("golang", "std", "1.24.4"), ""),
    Component("model", "weights", "1", "NOASSERTION", purl("pypi", "weights", "1"), "c" * 64),
]


def make(parts: list[Component], epoch: int = 1_700_000_000) -> bytes:
    return document(
        name="moat/x", version="1", kind="container", sha256="d" * 64, components=parts, source_date_epoch=epoch
    )


def test_it_is_valid_by_the_schema() -> None:
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(make(PARTS).decode())
    assert problem is None, problem


def test_the_validator_catches_a_broken_document() -> None:
    broken: dict[str, Any] = json.loads(make(PARTS))
    broken["components"][0]["type"] = "no such type"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(broken)) is not None


def test_it_is_the_same_each_time_and_its_serial_number_follows_the_content() -> None:
    assert make(PARTS) == make(list(reversed(PARTS)) + PARTS)
    assert json.loads(make(PARTS))["serialNumber"] != json.loads(make(PARTS[1:]))["serialNumber"]


def test_every_component_has_purl_licence_and_hash() -> None:
    document_ = json.loads(make(PARTS))
    by_name = {c["name"]: c for c in document_["components"]}
    assert set(by_name) == {p.name for p in PARTS}
    assert by_name["zlib1g"]["purl"] == "pkg:deb/debian/zlib1g@1%3A1.3.1-1%2Bb1?arch=amd64"
    assert by_name["zlib1g"]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert by_name["regex"]["licenses"] == [{"expression": "Apache-2.0 AND CNRI-Python"}]
    assert all(c["licenses"] for c in document_["components"])


@pytest.mark.parametrize("value", ["MIT", "LicenseRef-x", "A OR B", "NOASSERTION", ""])
def test_each_kind_of_licence_has_a_valid_form(value: str) -> None:
    parts = [Component("wheel", "a", "1", value.replace("A OR B", "MIT OR Apache-2.0"), purl("pypi", "a", "1"), "")]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(make(parts).decode()) is None
    assert license_field(value)


def test_notices_hold_each_text_once_and_point_to_it() -> None:
    parts = [
        Component("wheel", "a", "1", "MIT", "pkg:pypi/a@1", "", (("LICENSE", "the same text\n"),)),
        Component("wheel", "b", "2", "MIT", "pkg:pypi/b@2", "", (("LICENSE", "the same text\n"),)),
        Component("wheel", "c", "3", "ISC", "pkg:pypi/c@3", ""),
    ]
    text = notices([*parts, parts[0]])
    assert text.count("the same text") == 1
    assert "a 1: MIT; texts: 1" in text
    assert "b 2: MIT; texts: 1" in text
    assert "c 3: ISC; texts: none shipped by upstream" in text
    assert text == notices(reversed(parts))
