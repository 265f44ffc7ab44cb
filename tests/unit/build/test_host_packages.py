# SPDX-License-Identifier: Apache-2.0
"""Proves that what the role apt_offline installs is on every target's list, as Ansible itself reads its variables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moat.build.definitions import read_components
from moat.build.locks import LOCKS, ROOT, TARGETS, Target, debs_lock_name, read_lock

ROLE = ROOT / "ansible" / "roles" / "apt_offline"
GROUPS = ("moat_gateways", "moat_edge", "moat_store", "moat_counters")


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_what_a_role_installs_is_locked_for_the_host(target: Target, tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.ini"
    inventory.write_text("".join(f"[{g}]\nlocalhost ansible_connection=local\n" for g in GROUPS), "utf-8")
    facts = {"ansible_facts": {"distribution_major_version": target.distro.removeprefix("debian-")}}
    argv = [str(Path(sys.executable).parent / "ansible"), "localhost", "-i", str(inventory)]
    argv += ["-m", "ansible.builtin.debug", "-a", "var=_apt_offline_packages", "-e", json.dumps(facts)]
    argv += [x for part in ("vars", "defaults") for x in ("-e", f"@{ROLE / part / 'main.yml'}")]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    installs = set(json.loads(done.stdout.partition("=>")[2])["_apt_offline_packages"])
    assert {"nginx", "nftables", "openssl"} <= installs
    (hosts,) = [s for s in read_components().debian if s.use == "host" and s.target == target.name]
    assert installs <= set(hosts.packages), "name them in bundles/components.yaml"
    assert installs <= {e.name for e in read_lock(LOCKS / debs_lock_name(target)) if "host" in e.uses}
