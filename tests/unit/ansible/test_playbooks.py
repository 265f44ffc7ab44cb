# SPDX-License-Identifier: Apache-2.0
"""Proves what can be known of the playbooks without a host: they parse, every variable is defined somewhere, only

modules that the control environment has are used, by their full names, and nothing asks for what a host without a
network lacks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ANSIBLE = ROOT / "ansible"
PLAYBOOKS = sorted(ANSIBLE.glob("*.yml"))
OWN_MODULES = {p.stem for p in (ANSIBLE / "library").glob("*.py")}
#: Keywords of a task or block whose strings are expressions without braces.
EXPRESSIONS = {"when", "that", "changed_when", "failed_when", "until"}
#: Keywords of a task: whatever else a task holds is its module.
KEYWORDS = {
    "name", "when", "register", "changed_when", "failed_when", "until", "retries", "delay", "loop", "loop_control",
    "vars",
    "tags", "become", "become_user", "delegate_to", "delegate_facts", "run_once", "no_log", "notify", "listen",
    "environment",
    "check_mode", "diff", "args", "throttle", "any_errors_fatal", "ignore_unreachable", "block", "rescue", "always",
    "timeout",
    "connection", "async", "poll", "module_defaults", "remote_user",
}  # fmt: skip
#: What Ansible itself defines.
MAGIC = {
    "ansible_facts", "ansible_check_mode", "ansible_connection", "ansible_host", "ansible_port", "ansible_managed",
    "ansible_play_hosts", "ansible_play_hosts_all", "ansible_play_batch", "ansible_run_tags", "ansible_diff_mode",
    "group_names", "groups", "hostvars", "inventory_hostname", "item", "lookup", "query", "q", "now", "omit",
    "playbook_dir",
    "role_path", "undef", "ansible_user", "ansible_python_interpreter", "inventory_dir", "inventory_file",
    "template_path",
    "ansible_failed_task", "ansible_failed_result", "ansible_loop", "vars", "ansible_become", "ansible_limit",
    "varnames",
    "ansible_verbosity", "ansible_skip_tags", "ansible_playbook_python", "_",
}  # fmt: skip


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def task_files() -> list[Path]:
    return sorted(p for d in ("tasks", "handlers") for p in ANSIBLE.glob(f"roles/*/{d}/*.yml"))


def tasks_of(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every task of a list of tasks or plays, blocks opened."""
    for one in node or []:
        if "hosts" in one:
            for part in ("pre_tasks", "tasks", "post_tasks", "handlers"):
                yield from tasks_of(one.get(part))
            continue
        yield one
        for part in ("block", "rescue", "always"):
            yield from tasks_of(one.get(part))


def every_task() -> list[tuple[Path, dict[str, Any]]]:
    return [(p, t) for p in [*PLAYBOOKS, *task_files()] for t in tasks_of(load(p))]


# --- syntax ---


def test_every_playbook_parses(tmp_path: Path) -> None:
    """Ansible itself reads all playbooks with their roles; imports are resolved, modules found."""
    inventory = str(ANSIBLE / "inventory/localhost.yml")
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "--syntax-check", "-i", inventory, *map(str, PLAYBOOKS)],
        env={
            "PATH": os.environ["PATH"], "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"), "ANSIBLE_HOME": str(tmp_path),
            "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr


# --- modules ---


@pytest.mark.parametrize(("path", "task"), every_task(), ids=lambda v: v.name if isinstance(v, Path) else "")
def test_each_task_uses_a_module_that_is_there(path: Path, task: dict[str, Any]) -> None:
    modules = set(task) - KEYWORDS
    if "block" in task:
        assert not modules
        return
    assert len(modules) == 1, f"{path}: {task.get('name')}: {modules}"
    module = modules.pop()
    assert module in OWN_MODULES or module.startswith("ansible.builtin."), f"{path}: {module}"
    # These need Python packages on the host that a minimal Debian does not have.
    assert module not in {"ansible.builtin.apt", "ansible.builtin.deb822_repository", "ansible.builtin.apt_repository"}
    assert "ignore_errors" not in task
    assert str(task.get("name", "")[:1]).isupper(), f"{path}: a task without a name that is a sentence"


def test_nothing_is_left_to_a_handler() -> None:
    """A run that is killed between a change and its handler forgets the handler, and the next one sees no change."""
    assert [(p.name, t["name"]) for p, t in every_task() if "notify" in t] == []
    assert list(ANSIBLE.glob("roles/*/handlers")) == []


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda p: p.name)
def test_the_second_line_of_a_playbook_says_what_it_does(path: Path) -> None:
    """``moat-site`` shows it."""
    line = path.read_text("utf-8").splitlines()[1]
    assert re.fullmatch(r"# [A-Z].{20,170}", line), line


# --- variables ---


def expressions(node: Any, key: str = "") -> Iterator[str]:
    """Yield the templates in a YAML document."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from expressions(value, name if isinstance(name, str) else "")
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value, key)
    elif isinstance(node, str):
        if key in EXPRESSIONS and "{{" not in node:
            yield "{{ " + node + " }}"
        elif "{{" in node or "{%" in node:
            yield node


def defined(path: Path) -> set[str]:
    """Return the names that a YAML file of tasks, plays or variables defines."""
    names: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                if name == "register":
                    names.add(value)
                elif name in ("vars", "ansible.builtin.set_fact", "set_fact") and isinstance(value, dict):
                    names.update(value)
                elif name in ("loop_var", "index_var"):
                    names.add(value)
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(load(path))
    return names


def everything_defined() -> set[str]:
    names = set(MAGIC)
    for path in [
        *ANSIBLE.glob("roles/*/defaults/*.yml"),
        *ANSIBLE.glob("roles/*/vars/*.yml"),
        *ANSIBLE.glob("group_vars/*.yml"),
    ]:
        names |= set(load(path) or {})
    for path in [*PLAYBOOKS, *task_files()]:
        names |= defined(path)
    # What the caller of a template hands to it.
    for path in [*PLAYBOOKS, *task_files(), *ANSIBLE.glob("roles/*/vars/*.yml")]:
        for given in re.findall(r"template_vars=(?:dict\(|\{)([^)}]*)", path.read_text("utf-8")):
            names |= set(re.findall(r"['\"]?(\w+)['\"]?\s*[:=]", given))
    for path in ANSIBLE.glob("roles/*/meta/argument_specs.yml"):
        for spec in load(path)["argument_specs"].values():
            names |= set(spec.get("options") or {})
    return names


class _AnyName(dict[str, Any]):
    """Ansible's filters and tests are not known here; which names a template reads does not depend on them."""

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, str)


def undeclared(text: str) -> set[str]:
    """Return the variables that a template reads."""
    environment = jinja2.Environment(extensions=["jinja2.ext.do"], autoescape=False)  # noqa: S701 (never rendered)
    environment.filters = _AnyName(environment.filters)
    environment.tests = _AnyName(environment.tests)
    return jinja2.meta.find_undeclared_variables(environment.parse(text))


def sources() -> list[Path]:
    found = [*PLAYBOOKS, *task_files()]
    for pattern in ("roles/*/vars/*.yml", "roles/*/defaults/*.yml", "roles/*/templates/**/*.j2", "group_vars/*.yml"):
        found += ANSIBLE.glob(pattern)
    return sorted(p for p in found if p.is_file())


#: What an operator gives on the command line of a playbook; documented in the playbook's head.
GIVEN = re.compile(r"-e (?:')?([a-z_]+)=")


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ANSIBLE).as_posix())
def test_every_variable_is_defined_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    known = everything_defined() | set(GIVEN.findall(text))
    templates = [text] if path.suffix == ".j2" else list(expressions(load(path)))
    missing = {n for t in templates for n in undeclared(t)} - known
    # A name that is read with a default is one that another playbook or the operator may give.
    optional = {n for n in missing if re.search(rf"\b{n}\s*(\||is (not )?defined)", text)}
    assert missing - optional == set()


def test_the_search_for_variables_finds_a_planted_one() -> None:
    assert undeclared("{{ nobody_defined_this | bool }} {{ x.y }}") == {"nobody_defined_this", "x"}
    assert list(expressions({"when": "a_b"})) == ["{{ a_b }}"]
