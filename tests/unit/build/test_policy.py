# SPDX-License-Identifier: Apache-2.0
"""Each supply-chain rule refuses an input made for it, names itself and the file, and lets the ordinary case pass.

The rules are the committed ``bundles/policy.yaml``; only where a rule needs an exception that the file does not hold is
a copy of it changed.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moat.build import policy as policies
from moat.build.locks import LockedFile
from moat.build.policy import Exception_, Policy, read_policy
from moat.errors import LockFailed, PolicyRefused

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return read_policy()


def entry(kind: str, name: str, license_: str, source: str = "pypi:x") -> LockedFile:
    return LockedFile(kind, name, "1.0", f"{name.rsplit('/', 1)[-1]}-1.0", "0" * 64, 1, license_, source)


@pytest.mark.parametrize("version", ["1.82.7", "1.82.8", "1.107.0", "1.107.3", "1.107.1rc1"])
def test_malicious_litellm_is_refused_with_reason_and_reference(policy: Policy, version: str) -> None:
    with pytest.raises(PolicyRefused) as refused:
        policy.check_denied("wheel", "LiteLLM", version, f"litellm-{version}-py3-none-any.whl")
    assert "rule deny" in refused.value.message
    assert f"litellm-{version}-py3-none-any.whl" in refused.value.message
    assert refused.value.exit_code == 30
    assert "[" in (refused.value.found or "")


@pytest.mark.parametrize("version", ["1.82.6", "1.82.9", "1.106.2", "1.108.0", "1.109.1"])
def test_other_litellm_versions_pass(policy: Policy, version: str) -> None:
    policy.check_denied("wheel", "litellm", version, "x.whl")


@pytest.mark.parametrize("name", ["litellm-enterprise", "litellm_enterprise", "LiteLLM.Enterprise"])
def test_litellm_enterprise_is_refused_in_every_version_and_spelling(policy: Policy, name: str) -> None:
    with pytest.raises(PolicyRefused, match="litellm"):
        policy.check_denied("wheel", name, "0.1.2", "litellm_enterprise-0.1.2-py3-none-any.whl")


def test_a_release_of_source_archives_alone_is_refused(policy: Policy) -> None:
    with pytest.raises(PolicyRefused, match=r"rule sdist: thing 1\.0 .*thing-1\.0\.tar\.gz"):
        policy.check_sdist("thing", "1.0", ["thing-1.0.tar.gz"])
    policy.check_sdist("thing", "1.0", ["thing-1.0.tar.gz", "thing-1.0-py3-none-any.whl"])


@pytest.mark.parametrize(
    "member",
    [
        "evil.pth",
        "EVIL.PTH",
        "boot.start",
        "sitecustomize.py",
        "usercustomize.py",
        "sitecustomize/__init__.py",
        "sitecustomize.cpython-313-x86_64-linux-gnu.so",
        "thing-1.0.data/purelib/evil.pth",
        "thing-1.0.data/platlib/usercustomize.py",
        "thing-1.0.data/data/lib/python3.13/site-packages/evil.pth",
    ],
)
def test_a_startup_hook_is_refused_wherever_a_wheel_can_put_it(policy: Policy, member: str) -> None:
    with pytest.raises(PolicyRefused) as refused:
        policy.check_startup_hooks("thing", "thing-1.0-py3-none-any.whl", ["thing/__init__.py", member])
    assert "rule startup-hook" in refused.value.message
    assert member in refused.value.message
    assert refused.value.path == "thing-1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    "member", ["thing/weights.pth", "thing/sitecustomize.py", "thing/data/x.start", "thing-1.0.dist-info/RECORD"]
)
def test_the_same_names_deeper_in_a_package_are_no_hooks(policy: Policy, member: str) -> None:
    policy.check_startup_hooks("thing", "thing-1.0-py3-none-any.whl", [member])


def test_a_named_hook_passes_and_its_neighbour_does_not(policy: Policy) -> None:
    named = replace(policy, hooks_allowed=(Exception_("thing", "read on a day", file="thing.pth"),))
    named.check_startup_hooks("Thing", "thing-1.0-py3-none-any.whl", ["thing.pth"])
    with pytest.raises(PolicyRefused):
        named.check_startup_hooks("thing", "thing-1.0-py3-none-any.whl", ["thing.pth", "other.pth"])
    with pytest.raises(PolicyRefused):
        named.check_startup_hooks("other", "other-1.0-py3-none-any.whl", ["thing.pth"])


def test_a_fresh_upload_is_refused_until_the_minimum_age(policy: Policy) -> None:
    age = timedelta(days=policy.minimum_age_days)
    with pytest.raises(PolicyRefused, match=r"rule minimum-age: thing-1\.whl"):
        policy.check_age("thing", "1", "thing-1.whl", NOW - age + timedelta(seconds=1), NOW)
    assert policy.check_age("thing", "1", "thing-1.whl", NOW - age, NOW)


def test_an_index_without_upload_times_is_reported_and_not_refused(policy: Policy) -> None:
    assert policy.check_age("thing", "1", "thing-1.whl", None, NOW) is False


def test_an_exempt_version_is_taken_at_once_and_only_that_version(policy: Policy) -> None:
    exempt = replace(policy, age_exempt=(Exception_("thing", "security fix", version="2"),))
    assert exempt.check_age("thing", "2", "thing-2.whl", NOW, NOW)
    with pytest.raises(PolicyRefused):
        exempt.check_age("thing", "3", "thing-3.whl", NOW, NOW)


@pytest.mark.parametrize(
    "expression", ["MIT", "MIT OR GPL-2.0-only", "MIT AND (GPL-3.0-only OR BSD-3-Clause)", "((ISC))"]
)
def test_allowed_licences_pass(policy: Policy, expression: str) -> None:
    policy.check_license(entry("wheel", "thing", expression))


@pytest.mark.parametrize(
    "expression",
    [
        "NOASSERTION",
        "GPL-3.0-only",
        "AGPL-3.0-only",
        "MIT AND GPL-3.0-only",
        "MIT AND (GPL-3.0-only OR SSPL-1.0)",
        "(MIT AND GPL-3.0-only) OR SSPL-1.0",
        "LicenseRef-Proprietary",
        "",
    ],
)
def test_other_licences_are_refused_for_wheels_and_modules(policy: Policy, expression: str) -> None:
    for kind in ("wheel", "go-module"):
        with pytest.raises(PolicyRefused, match=r"rule license: thing-1\.0"):
            policy.check_license(entry(kind, "thing", expression))


def test_agpl_passes_for_the_named_component_alone(policy: Policy) -> None:
    policy.check_license(entry("go-module", "github.com/minio/minio", "AGPL-3.0-only"))
    with pytest.raises(PolicyRefused):
        policy.check_license(entry("go-module", "github.com/minio/minio", "SSPL-1.0"))
    with pytest.raises(PolicyRefused):
        policy.check_license(entry("go-module", "github.com/minio/other", "AGPL-3.0-only"))
    with pytest.raises(PolicyRefused):
        policy.check_license(entry("wheel", "github.com/minio/minio", "AGPL-3.0-only"))


def test_debian_main_is_allowed_and_non_free_is_not(policy: Policy) -> None:
    for source in (
        "debian:trixie/main/pool/main/t/t.deb",
        "debian-security:trixie-security/main/pool/updates/main/t/t.deb",
    ):
        policy.check_license(entry("deb", "thing", "NOASSERTION", source))
    with pytest.raises(PolicyRefused):
        policy.check_license(entry("deb", "thing", "NOASSERTION", "debian:trixie/non-free/pool/non-free/t/t.deb"))


def test_several_refused_licences_are_told_at_once(policy: Policy) -> None:
    refused = [entry("wheel", "one", "SSPL-1.0"), entry("wheel", "fine", "MIT"), entry("wheel", "two", "NOASSERTION")]
    with pytest.raises(PolicyRefused) as caught:
        policy.check_licenses(refused)
    assert "2 files" in caught.value.message
    assert "one-1.0" in (caught.value.found or "")
    assert "two-1.0" in (caught.value.found or "")


def test_an_override_replaces_unusable_metadata(policy: Policy) -> None:
    assert policy.license_of("go-module", "github.com/minio/csvparser", "v1.0.0", "NOASSERTION") == "BSD-3-Clause"
    assert policy.license_of("deb", "python3.13-minimal", "3.13.5-2", "NOASSERTION") == "PSF-2.0"
    assert policy.license_of("wheel", "thing", "1.0", "MIT") == "MIT"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sdist: refuse", "sdist: perhaps"),
        ("sdist: refuse", "sdist: refuse\nnew_rule: yes"),
        ("days: 7", "days: soon"),
        ('versions: ["==1.107.*"]', 'versions: ["not a specifier"]'),
        ("startup_hooks:", "startup_hook:"),
    ],
)
def test_a_rule_that_cannot_be_read_stops_everything(tmp_path: Path, old: str, new: str) -> None:
    text = policies.POLICY.read_text("utf-8")
    assert old in text
    broken = tmp_path / "policy.yaml"
    broken.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(LockFailed, match="cannot read the rules"):
        read_policy(broken)
