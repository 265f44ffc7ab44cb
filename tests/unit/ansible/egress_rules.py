# SPDX-License-Identifier: Apache-2.0
"""Renders the role no_egress as Ansible does, and runs commands in a network namespace of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from ansible.plugins.filter.core import to_bool
from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "ansible" / "roles" / "no_egress"


def namespaces_possible() -> bool:
    """Say whether this user may load rules into a network namespace of its own."""
    if os.geteuid() != 0 or shutil.which("nft") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def plugin() -> ModuleType:
    """Import the filter plugin from where Ansible finds it."""
    spec = importlib.util.spec_from_file_location("moat_egress", ROOT / "ansible/filter_plugins/moat_egress.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILTERS = plugin()


def render(allow: list[Any] = [], nodes: list[Any] = [], template: str = "no-egress.nft.j2", **more: Any) -> str:  # noqa: B006
    """Return the rule file for an allow-list and other variables of the role."""
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text("utf-8"))
    plain = {k: v for k, v in defaults.items() if not isinstance(v, str) or "{{" not in v}
    values = {**plain, **more}
    environment = Environment(
        loader=FileSystemLoader(ROLE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,  # as Ansible's template module has it
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - rules of a packet filter, not a page
    )
    environment.filters["bool"] = to_bool
    return environment.get_template(template).render(
        **values,
        _no_egress_ssh_ports=FILTERS.ports(values["no_egress_ssh_ports"], "no_egress_ssh_ports"),
        _no_egress_ntp=FILTERS.addresses(values["no_egress_ntp_servers"], "no_egress_ntp_servers"),
        _no_egress_dns=FILTERS.addresses(values["no_egress_name_servers"], "no_egress_name_servers"),
        _no_egress_entries=FILTERS.entries(allow) + nodes,
    )


def in_namespace(argv: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program without any network but what it makes itself."""
    return subprocess.run(["unshare", "--net", *argv], input=stdin, capture_output=True, text=True, timeout=60)
