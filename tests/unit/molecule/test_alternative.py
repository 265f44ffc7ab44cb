# SPDX-License-Identifier: Apache-2.0
"""Proves that the scenario `alternative` changes every variable there is, and looks at the effect of each.

Without this, a new variable would be tested with its default alone, and nobody would notice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ANSIBLE = ROOT / "ansible"
SCENARIO = ROOT / "molecule" / "alternative"

#: Not in vars.yml, each with the reason.
LEFT_OUT = {
    "moat_root": "install.sh, moat-site and uninstall.yml know this place: it is the same on every host",
    "moat_site_dir": "install.sh and moat-site know this place: it is where vars.yml itself lies",
    "moat_trusted_keys_dir": "install.sh knows this place: it pins the key before there are variables",
    "moat_medium": "install.sh and moat-site give it: the copied folder of this scenario, then the release",
    "nginx_tls_cert": "beside base_tls_certificate one of the two could not be seen: test_3_operations.py flips it",
    "nginx_tls_key": "goes with nginx_tls_cert",
    "nginx_members_down": "drain.yml keeps it: test_3_operations.py drains a gateway and brings it back",
    "config_sync_source_dir": "a folder instead of the store: tests/unit/ansible/test_gateway_templates.py",
    "no_egress_state": "its other value is the removal: test_4_removed.py",
}
#: In vars.yml, so that an installation is seen to work with it, but no effect can be seen on one host; with the reason.
NOT_SEEN = {
    "preflight_bundle_max_age_days": "counts in a first installation: molecule/hostile/tests/test_1_refused.py",
    "bundle_parts": "install.sh stages the whole medium on the control host; other nodes get these (multinode)",
    "base_certificate_renew_days": "counts 380 days from now: tests/unit/ansible/test_certificate.py",
    "gateway_probe_model": "what is asked after a restart: tests/unit/ansible/test_gateway_modules.py",
    "config_sync_wait": "how long a run waits for gateways that are late; here none is",
    "minio_allow_older": "counts after a rollback: tests/unit/ansible/test_store_release.py, molecule/upgrade",
    "gateway_settle": "a pause between two gateways, on one host a second at most; no test measures it",
    "nginx_fail_timeout": "for gateways on other hosts: tests/unit/ansible/test_gateway_templates.py",
    "nginx_close_seconds": "a pause before a reload; no test measures it",
    "no_egress_rollback_seconds": "the way back needs SSH: tests/integration/ansible/test_no_egress_ssh.py",
    "no_egress_gateway_ports": "of other nodes: tests/unit/ansible/test_no_egress_rules.py",
    "no_egress_store_ports": "of other nodes: tests/unit/ansible/test_no_egress_rules.py",
    "no_egress_counters_ports": "of other nodes: tests/unit/ansible/test_no_egress_rules.py",
    "evidence_copies": "copies come from other nodes (multinode)",
}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8")) or {}


def defaults() -> dict[str, Any]:
    """Return every variable with its default."""
    found = load(ANSIBLE / "group_vars/all.yml")
    for file in sorted(ANSIBLE.glob("roles/*/defaults/main.yml")):
        found |= load(file)
    return found


DEFAULTS = defaults()
CHANGED = load(SCENARIO / "vars.yml")


def problems(known: dict[str, Any], changed: dict[str, Any], left_out: dict[str, str]) -> list[str]:
    """Return what is wrong with the scenario's variables."""
    wrong = [f"{n}: not changed, and no reason is given" for n in sorted(set(known) - set(changed) - set(left_out))]
    wrong += [f"{n}: there is no such variable" for n in sorted((set(changed) | set(left_out)) - set(known))]
    wrong += [f"{n}: changed, and left out" for n in sorted(set(changed) & set(left_out))]
    wrong += [f"{n}: has its default" for n in sorted(set(known) & set(changed)) if changed[n] == known[n]]
    return wrong


def test_every_variable_is_changed_or_left_out_for_a_reason() -> None:
    assert len(DEFAULTS) > 60
    assert problems(DEFAULTS, CHANGED, LEFT_OUT) == []


def test_the_comparison_finds_planted_problems() -> None:
    known = {"a": 1, "b": 2}
    assert problems(known, {"a": 2, "b": 3}, {}) == []
    assert problems(known, {"a": 2}, {}) == ["b: not changed, and no reason is given"]
    assert problems(known, {"a": 1, "b": 3}, {}) == ["a: has its default"]
    assert problems(known, {"a": 2}, {"b": "", "c": ""}) == ["c: there is no such variable"]
    assert problems(known, {"a": 2, "b": 3}, {"b": ""}) == ["b: changed, and left out"]


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_the_effect_of_each_is_looked_at(name: str) -> None:
    tests = "\n".join(f.read_text("utf-8") for f in sorted(SCENARIO.glob("tests/test_*.py")))
    looked = f'V["{name}"]' in tests or f"V['{name}']" in tests
    if name in NOT_SEEN:
        assert not looked, f"{name} is looked at: take it out of NOT_SEEN"
    else:
        assert looked, f"no test of the scenario looks at {name}"


def test_the_reasons_name_what_there_is() -> None:
    assert set(NOT_SEEN) <= set(CHANGED)
    for reason in (*LEFT_OUT.values(), *NOT_SEEN.values()):
        for file in re.findall(r"[a-z0-9_/]+\.(?:py|sh|yml)\b", reason):
            if file == "vars.yml":
                continue
            places = [ROOT / file, ANSIBLE / file, SCENARIO / "tests" / file]
            assert any(p.is_file() for p in places), reason


@pytest.mark.parametrize(
    ("name", "constant"), [("moat_root", "STORE"), ("moat_site_dir", "SITE"), ("moat_trusted_keys_dir", "TRUSTED")]
)
def test_the_fixed_places_are_those_that_install_sh_knows(name: str, constant: str) -> None:
    text = (ANSIBLE / "install.sh").read_text("utf-8")
    assert f"\n{constant}={DEFAULTS[name]}\n" in text
    assert name in LEFT_OUT


def test_the_values_are_of_the_kind_that_the_roles_describe() -> None:
    kinds = {
        "int": int,
        "float": (int, float),
        "bool": bool,
        "list": list,
        "dict": dict,
        "str": (str, int),
        "path": str,
    }
    for file in ANSIBLE.glob("roles/*/meta/argument_specs.yml"):
        options = load(file)["argument_specs"]["main"].get("options", {})
        for name in set(options) & set(CHANGED):
            value, option = CHANGED[name], options[name]
            assert isinstance(value, kinds.get(option["type"], object)), name
            assert option["type"] == "bool" or not isinstance(value, bool), name
            assert value in option.get("choices", [value]), name
