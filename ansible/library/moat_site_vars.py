#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_site_vars``: set one variable in the operator's own file of variables.

The file is edited where the variable stands, or must stand: comments, order and every other line stay as they are. What
comes of it is read again before it is placed, and must say the same as before with that one value: a file that is
written in a way which is not understood here is refused, not damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_site_vars
short_description: Set one number in the site's vars.yml
description: Runs on the control host, with its control environment's Python.
options:
  path: {description: The file., type: path, default: /etc/moat/site/vars.yml}
  name: {description: The variable., type: str, required: true}
  value: {description: Its value., type: int, required: true}
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Keep the number of gateways
  moat_site_vars: {name: gateway_count, value: 3}
  vars: {ansible_python_interpreter: "{{ ansible_playbook_python }}"}
"""

RETURN = r"""
before: {description: "The value before; none if there was none.", type: raw, returned: always}
"""


class Loader(yaml.SafeLoader):
    """Reads tags that only Ansible knows (``!vault``) as what they stand at."""


Loader.add_multi_constructor("!", lambda _loader, suffix, node: (suffix, str(node.value)))


def parsed(text: str) -> dict[str, Any]:
    """Return the variables of a file; one with comments alone has none.

    Raises:
        ValueError: it is not YAML, or something else than variables.
    """
    try:
        value = yaml.load(text, Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from e
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} instead of names with values")
    return value


def edited(text: str, name: str, value: int) -> str:
    """Return the text of a YAML file with one variable set; see :func:`changed`, which checks it."""
    lines = text if not text or text.endswith("\n") else f"{text}\n"
    root = yaml.compose(text, Loader)
    if not isinstance(root, yaml.MappingNode):
        return f"{lines}{name}: {value}\n"
    for key, old in reversed(root.value):  # where a name stands twice, the last one counts
        if key.value == name:
            return f"{text[: old.start_mark.index]}{value}{text[old.end_mark.index :]}"
    if not root.flow_style:
        return f"{lines}{name}: {value}\n"
    start, end = root.start_mark.index, root.end_mark.index
    if not root.value:  # {}, which an older install.sh wrote; behind it no line could be added
        return f"{text[:start]}{name}: {value}{text[end:]}"
    return f"{text[: start + 1]}{name}: {value}, {text[start + 1 :]}"


def changed(text: str, name: str, value: int) -> str:
    """Return the text with one variable set, and everything else as before.

    Raises:
        ValueError: that cannot be done with this text.
    """
    before = parsed(text)
    if before.get(name) == value and type(before.get(name)) is int:
        return text
    after = edited(text, name, value)
    if parsed(after) != {**before, name: value}:
        raise ValueError(f"a file in which {name} cannot be set without a change of something else")
    return after


def keep(p: Mapping[str, Any], *, check: bool) -> tuple[bool, Any]:
    """Set the variable; return whether that changed the file, and the value before.

    Raises:
        Refused: the file cannot be edited; it is as it was.
        OSError: it cannot be read or written.
    """
    path = Path(p["path"])
    text = path.read_text("utf-8") if path.exists() else ""
    try:
        before = parsed(text).get(p["name"])
        after = changed(text, p["name"], p["value"])
    except ValueError as e:
        raise Refused(
            f"{path} cannot be edited. Found: {e}; expected: YAML with one variable a line. "
            f"Do: write the line `{p['name']}: {p['value']}` into it yourself"
        ) from e
    if after != text and not check:
        write(path, after.encode("utf-8"), 0o600)
    return after != text, before


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/moat/site/vars.yml"},
            "name": {"type": "str", "required": True},
            "value": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        done, before = keep(module.params, check=module.check_mode)
    except Refused as e:
        module.fail_json(msg=str(e))
    except OSError as e:
        module.fail_json(msg=f"{e.filename}: {e.strerror}")
    else:
        module.exit_json(changed=done, before=before)


if __name__ == "__main__":
    main()
