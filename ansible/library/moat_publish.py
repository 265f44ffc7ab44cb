#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_publish``: make the site's configuration a signed revision, if it is not one already.

What was published from this folder last is noted beside it. So a later run that changes nothing in the folder leaves
alone what somebody has done since, a rollback for one, and takes no time for a dry run either.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_publish
short_description: Publish the configuration of the site as a signed revision
options:
  program: {description: The moat-gateway that checks and signs., type: path, required: true}
  folder: {description: The configuration., type: path, required: true}
  environment: {description: File with the settings of the publisher., type: path, required: true}
  record: {description: File in which the last publication is noted., type: path, required: true}
  policy:
    description: C(changed) publishes what was changed since the last time, C(always) whatever is not in force.
    type: str
    choices: [changed, always]
    default: changed
  site_key: {description: Another secret key than that of the settings; makes a revision in any case., type: path}
  wait: {description: Seconds in which every gateway must serve it., type: float, default: 60}
  message: {description: Shown by the history., type: str, default: ""}
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Publish the configuration
  moat_publish:
    program: /opt/moat/current/venv/bin/moat-gateway
    folder: /etc/moat/site/config
    environment: /etc/moat/site/publish.env
    record: /etc/moat/site/published.json
"""

RETURN = r"""
revision: {description: The number that is in force., type: int, returned: always}
text: {description: What was done, for people., type: str, returned: always}
"""


#: docs/reference/gateway-exit-codes.md
NOT_CONVERGED = 23


def content_of(folder: Path) -> str:
    """Return the digest of a configuration as revisions name it: of the sorted lines `digest  path` of its files."""
    names = ["config.yaml", "keys.yaml"]
    names += [p.relative_to(folder).as_posix() for p in folder.glob("routers/**/*") if p.is_file()]
    lines = sorted(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def settings(path: Path) -> dict[str, str]:
    """Return the variables of an environment file."""
    lines = (line.partition("=") for line in path.read_text("utf-8").splitlines() if not line.startswith("#"))
    return {name: value.removeprefix("'").removesuffix("'") for name, equals, value in lines if equals}


class NotServed(Refused):
    """It is published, and not every gateway serves it in time."""


class Publisher:
    """Asks ``moat-gateway config``.

    Args:
        p: the parameters.
    """

    def __init__(self, p: Mapping[str, Any]) -> None:
        self._p = p
        base = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
        self._environ = {**base, **settings(Path(p["environment"]))}
        if p["site_key"]:
            self._environ["MOAT_SITE_KEY_FILE"] = p["site_key"]

    def ask(self, *words: str) -> dict[str, Any]:
        """Return what an action says with ``--json``.

        Raises:
            Refused: it was refused, or cannot be run.
        """
        argv = [self._p["program"], "config", *words, "--json"]
        try:
            done = subprocess.run(argv, env=self._environ, capture_output=True, check=False, text=True)
            answer = dict(json.loads(done.stdout))
        except (OSError, ValueError) as e:
            text = "" if isinstance(e, OSError) else done.stderr.strip()[-600:]
            raise Refused(
                f"{self._p['program']} config {words[0]} gives no answer: {text or e}. Do: run moat-site site first"
            ) from e
        if not answer.get("ok"):
            lines = "\n".join(map(say, answer.get("problems", []))) or done.stderr.strip()[-1000:]
            kind = NotServed if done.returncode == NOT_CONVERGED else Refused
            raise kind(f"`moat-gateway config {words[0]}` ended with code {done.returncode}.\n{lines}")
        return answer

    def state(self) -> tuple[int, int]:
        """Return the number in the store (0: none), and the highest that any node has.

        Raises:
            Refused: the store does not answer.
        """
        answer = self.ask("status")
        store = answer["store"]
        if store["reachable"] is False:
            raise Refused(f"the store does not answer: {store['why']}. Do: systemctl status minio, then run it again")
        nodes = [int(n.get("revision") or 0) for n in [*answer["nodes"], *answer["gateways"]]]
        return int(store["revision"] or 0), max(nodes, default=0)

    def push(self, number: int | None, message: str) -> dict[str, Any]:
        """Publish; ``number`` forces a revision of that number.

        Raises:
            Refused: it was refused, or not every gateway serves it in time.
        """
        more = ["--force"] if number is not None or self._p["site_key"] else []
        more += ["--revision", str(number)] if number is not None else []
        return self.ask("push", self._p["folder"], f"--wait={self._p['wait']:g}", "--message", message, *more)


def say(problem: Mapping[str, Any]) -> str:
    """Return a problem as one line for the operator."""
    where = str(problem.get("path") or problem.get("file") or "")
    where += f" line {problem['line']}" if problem.get("line") else ""
    text = f"{where}: {problem['message']}" if where else str(problem.get("message"))
    parts = [text, *(f"{k}: {problem[k]}" for k in ("found", "expected") if problem.get(k))]
    return "; ".join(parts) + (f". Do: {problem['hint']}" if problem.get("hint") else "")


def note(path: Path) -> dict[str, Any]:
    """Return what was published last; empty where nothing was."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def publish(p: Mapping[str, Any], warn: Any, *, dry: bool) -> dict[str, Any]:
    """Do what the policy says.

    Raises:
        Refused: it cannot be published, or is not served everywhere.
    """
    before, content = note(Path(p["record"])), content_of(Path(p["folder"]))
    publisher = Publisher(p)
    held, highest = publisher.state()
    last = int(before.get("revision") or 0)
    same = before.get("content") == content and p["policy"] == "changed" and not p["site_key"]
    # A store that was emptied, or restored from an older copy, has less than the nodes: they would refuse its numbers.
    behind = max(last, highest) > held
    if same and held and not behind:
        return {"changed": False, "revision": held, "text": f"revision {held} is in force; the folder was not changed"}
    if last and held > last and not behind:
        warn(
            f"Revision {held} is in force and was not published from {p['folder']} (the last one from there: {last}). "
            "See what is different: moat-site config diff"
        )
    if dry:
        return {"changed": True, "revision": held, "text": "would be published"}
    done = publisher.push(max(last, highest) + 1 if behind else None, p["message"])
    now = {"content": done["content"], "revision": int(done["revision"])}
    if now != before:
        write(Path(p["record"]), (json.dumps(now, sort_keys=True) + "\n").encode(), 0o600)
    served = f"{len(done['gateways'])} gateways serve it"
    text = f"revision {done['revision']} is in force, {served}" + ("" if done["changed"] else "; it was before")
    return {"changed": bool(done["changed"]), "revision": int(done["revision"]), "text": text}


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "program": {"type": "path", "required": True},
            "folder": {"type": "path", "required": True},
            "environment": {"type": "path", "required": True},
            "record": {"type": "path", "required": True},
            "policy": {"type": "str", "choices": ["changed", "always"], "default": "changed"},
            "site_key": {"type": "path", "no_log": False},
            "wait": {"type": "float", "default": 60.0},
            "message": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode and not (Path(p["program"]).exists() and Path(p["environment"]).exists()):
        module.exit_json(changed=True, revision=0, text="would be published")
    try:
        result = publish(p, module.warn, dry=module.check_mode)
    except NotServed as e:
        module.fail_json(msg=str(e))
    except Refused as e:
        module.fail_json(msg=f"The configuration is not published; what was in force stays so.\n{e}")
    except OSError as e:
        module.fail_json(msg=f"{e.filename}: {e.strerror}. Do: put it right, then run it again")
    else:
        module.exit_json(**result)


if __name__ == "__main__":
    main()
