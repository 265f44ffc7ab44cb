# SPDX-License-Identifier: Apache-2.0
"""Proves what shows only in a further run: how many are kept, what is refused and what is let pass.

Each run is one of ``moat-site`` with the kept variables; ``-e`` is the control, by which the same run ends otherwise.
"""

from __future__ import annotations

import json

from .test_1_effects import HTTPS, V


def moat_site(node, *words: str, environment: dict[str, str] | None = None):
    """Run a playbook as the operator does."""
    set_ = [f"{k}={v}" for k, v in (environment or {}).items()]
    return node.run("env", *set_, "/usr/local/sbin/moat-site", *words, timeout=900)


def text_of(done) -> str:
    """Return what a run said, on one line."""
    return " ".join((done.stdout + done.stderr).split())


def test_a_host_that_does_not_fit_is_refused_by_the_figures_of_the_variables(node) -> None:
    assert V["preflight_var_mib"] == 512
    done = moat_site(node, "site", "--tags", "preflight", "-e", "preflight_var_mib=99999999")
    assert done.returncode != 0
    assert "disk of" in text_of(done)


def test_a_host_that_would_be_cut_off_is_refused_unless_the_operator_said_otherwise(node, planted) -> None:
    """A control connection to another port than those of ``no_egress_ssh_ports``, and an address from DHCP."""
    pair = ["ip", "link", "add", "moat-t2", "type", "veth", "peer", "name", "moat-t3"]
    planted(pair, ["ip", "link", "delete", "moat-t2"])
    node.ok("ip", "address", "add", "192.0.2.77/24", "dev", "moat-t2", "valid_lft", "3600", "preferred_lft", "3600")
    ssh = {"SSH_CONNECTION": "198.51.100.7 40000 192.0.2.9 22"}
    assert (V["no_egress_check_ssh"], V["no_egress_dhcp_client"]) == (False, True)
    done = moat_site(node, "site", "--tags", "preflight", environment=ssh)
    assert done.returncode == 0, text_of(done)[-2000:]
    done = moat_site(node, "site", "--tags", "preflight", "-e", '{"no_egress_check_ssh": true}', environment=ssh)
    assert done.returncode != 0
    assert f"no_egress_ssh_ports {V['no_egress_ssh_ports']}" in text_of(done)
    done = moat_site(node, "site", "--tags", "preflight", "-e", '{"no_egress_dhcp_client": false}', environment=ssh)
    assert done.returncode != 0
    assert "192.0.2.77 on moat-t2" in text_of(done)
    assert "do: set no_egress_dhcp_client: true" in text_of(done)


def test_older_releases_go_and_an_older_bundle_is_taken(node) -> None:
    node.ok("sh", "-c", "cd /opt/moat/releases && for n in 1 2 3; do mkdir -p 0.0.$n-00000000000$n/bundle; done")
    record = json.loads(node.ok("cat", "/var/lib/moat/installed.json"))
    node.ok("sh", "-c", "cat >/var/lib/moat/installed.json", stdin=json.dumps(record | {"version": "9.9.9"}))
    done = moat_site(node, "site", "--tags", "bundle", "-e", '{"bundle_allow_older": false}')
    assert done.returncode != 0
    assert "9.9.9" in text_of(done)
    assert V["bundle_allow_older"] is True
    done = moat_site(node, "site", "--tags", "bundle")
    assert done.returncode == 0, text_of(done)[-2000:]
    assert len(node.ok("ls", "/opt/moat/releases").split()) == V["bundle_keep"]
    assert json.loads(node.ok("cat", "/var/lib/moat/installed.json"))["version"] == record["version"]


def test_a_rolled_back_revision_is_published_again_by_a_run_of_the_site_only_as_asked_for(node) -> None:
    """``config_sync_publish``: always what the folder says; the control is a run with ``changed``."""
    assert V["config_sync_publish"] == "always"
    node.new_key("rolled-back")
    newest = node.revision()
    node.ok("moat-site", "config", "rollback", str(newest - 1), "--wait=120")
    done = moat_site(node, "site", "--tags", "config_sync", "-e", "config_sync_publish=changed")
    assert done.returncode == 0, text_of(done)[-2000:]
    assert node.revision() == newest + 1
    done = moat_site(node, "site", "--tags", "config_sync")
    assert done.returncode == 0, text_of(done)[-2000:]
    assert node.revision() == newest + 2
    assert node.chat("/run/rolled-back.key", url=HTTPS, max_tokens=2).status == 200


def test_as_many_versions_of_the_configuration_are_kept_as_asked_for(node) -> None:
    for name in ("first", "second"):
        keys = ["moat-gateway", "keys", "new", name, "--team", "default", "--keys", "/etc/moat/site/config/keys.yaml"]
        node.ok(*keys, "--out", f"/run/{name}.key")
        done = moat_site(node, "config")
        assert done.returncode == 0, text_of(done)[-2000:]
    # The installation brought the first version, so there have been three at least.
    assert len(node.ok("ls", "/var/lib/moat/config").split()) == V["config_sync_keep"]
    for name in ("third", "fourth"):
        node.new_key(name)
    status = json.loads(node.ok("moat-gateway", "config", "status", "--json"))
    newest = status["store"]["revision"]
    assert newest > V["config_sync_revisions_keep"]
    kept = {int(n) for n in node.ok("ls", "/var/lib/moat/sync/revisions").split()}
    assert kept == set(range(newest - V["config_sync_revisions_keep"] + 1, newest + 1))
    assert node.chat("/run/second.key", url=HTTPS, max_tokens=2).status == 200
