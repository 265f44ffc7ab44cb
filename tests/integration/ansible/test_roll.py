# SPDX-License-Identifier: Apache-2.0
"""Proves what several nodes do when the gateways of one do not come to a release: all return, one node after the other.

The real tasks of the role ``gateway`` by the real Ansible, on hosts that are names for this one. What stands in for
``moat_instances`` writes down what it was asked for, and when; what it does itself: test_instances_return.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ANSIBLE = Path(__file__).resolve().parents[3] / "ansible"
MODULE = """\
import json, pathlib, time
from ansible.module_utils.basic import AnsibleModule
names = ("release", "count", "root", "address", "base_port", "settle", "probe", "inputs", "only")
module = AnsibleModule({n: {"type": "raw"} for n in names}, supports_check_mode=True)
host, begun = pathlib.Path(module.params["root"]), time.monotonic()
time.sleep(0.5)
asked = {"host": host.name, "release": module.params["release"], "check": module.check_mode}
with (host.parent / "asked").open("a") as f:
    f.write(json.dumps({**asked, "begun": begun, "ended": time.monotonic()}) + "\\n")
if host.name == "b":
    module.fail_json(msg="it does not start", before="A")
module.exit_json(changed=False, before="A", started=[], restarted=[], stopped=[], seconds=0)
"""
PLAYS = [
    {"hosts": "moat_gateways", "gather_facts": False, **({"serial": 1} if part == "roll" else {}),
     "tasks": [{"ansible.builtin.import_role": {"name": "gateway", "tasks_from": part}}]}
    for part in ("roll", "outcome")
]  # fmt: skip


def test_all_nodes_return_one_after_the_other_also_one_that_was_not_reached(tmp_path: Path) -> None:
    """The run before may have been cut short on it: what it had moved there would stay on the release that failed."""
    tree = tmp_path / "ansible"
    shutil.copytree(ANSIBLE, tree, ignore=shutil.ignore_patterns(".ansible-lint", "__pycache__"))
    (tree / "library/moat_instances.py").write_text(MODULE)
    (tree / "plays.yml").write_text(yaml.safe_dump(PLAYS))
    own = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "moat_release": "B"}
    hosts = {n: {**own, "moat_root": str(tmp_path / n), "moat_site_dir": str(tmp_path)} for n in "abcd"}
    groups = {"moat_gateways": {"hosts": hosts}, "moat_edge": {"hosts": {"a": {}}}}
    (tmp_path / "inventory.yml").write_text(yaml.safe_dump({"all": {"children": groups}}))
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "-i", str(tmp_path / "inventory.yml"), str(tree / "plays.yml")],
        env={"PATH": os.environ["PATH"], "ANSIBLE_CONFIG": str(tree / "ansible.cfg"), "LC_ALL": "C.UTF-8",
             "ANSIBLE_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "it does not start" in done.stdout
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text("utf-8").splitlines()]
    there = [(x["host"], x["release"], x["check"]) for x in asked[:4]]
    assert there == [("a", "B", False), ("b", "B", False), ("c", "B", True), ("d", "B", True)]
    back = sorted((x["host"], x["release"], x["check"]) for x in asked[4:])
    assert back == [("a", "A", False), ("c", "A", False), ("d", "A", False)]
    spans = sorted((x["begun"], x["ended"]) for x in asked)
    assert all(spans[i][1] <= spans[i + 1][0] for i in range(len(spans) - 1)), "two nodes at the same time"
