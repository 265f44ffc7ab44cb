#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_config``: put a site's configuration in force on a node, or refuse it and leave the old one.

The files are written into a staging folder and checked there by the very program that will read them
(``moat-gateway check``; files that differ from the live ones also by ``config validate``, which has LiteLLM build its
router). What it refuses is never put in place; its messages name the operator's file and line. What it accepts replaces
the live files one by one by rename, and is kept as a numbered version.
"""

from __future__ import annotations

import grp
import hashlib
import http.client
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_config
short_description: Check a configuration with the gateway's own program, then put it in force
options:
  files: {description: Contents by file name., type: dict, required: true}
  program: {description: The moat-gateway of the release that will read it., type: path, required: true}
  source: {description: Folder that messages name instead of the staging folder., type: str, required: true}
  environment: {description: File with the settings of the units., type: path, default: /etc/moat/gateway/common.env}
  path: {description: The live folder., type: path, default: /etc/moat/config}
  history: {description: Where versions are kept., type: path, default: /var/lib/moat/config}
  keep: {description: How many versions., type: int, default: 10}
  secrets: {description: Folder of the gateway's secrets., type: path, default: /etc/moat/secrets/gateway}
  group: {description: Group that may read the live files., type: str, default: moat-gateway}
  dry_run_timeout: {description: Seconds in which LiteLLM must have built its router., type: float, default: 10}
  dry_run_memory: {description: MiB that it may take for that., type: int, default: 512}
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Put the configuration in force
  moat_config:
    files: {config.yaml: "...", keys.yaml: "...", gateway.yaml: "..."}
    program: /opt/moat/releases/0.1.0-0123456789ab/venv/bin/moat-gateway
    source: /etc/moat/site/config
"""

RETURN = r"""
replaced: {description: The files that were replaced., type: list, returned: always}
ready: {description: Whether gateways can be started with it., type: bool, returned: always}
problem: {description: "Why not: the site names no model yet.", type: str, returned: always}
reloaded: {description: Gateways that have read the new keys., type: list, returned: always}
"""

NAMES = ("config.yaml", "keys.yaml", "gateway.yaml")


def staged(p: Mapping[str, Any]) -> Path:
    """Write the files into an empty staging folder that root alone may read."""
    folder = Path(p["path"]).with_name(Path(p["path"]).name + ".staging")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    for name in NAMES:
        write(folder / name, p["files"][name].encode("utf-8"), 0o600, (0, 0))
    return folder


def settings(path: Path) -> dict[str, str]:
    """Return the variables of an environment file as systemd reads it."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            found[name] = value.removeprefix("'").removesuffix("'")
    return found


def asked(p: Mapping[str, Any], environ: Mapping[str, str], *words: str) -> dict[str, Any]:
    """Return what ``moat-gateway ... --json`` says.

    Raises:
        Refused: it cannot be run.
    """
    base = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
    argv = [p["program"], *words, "--json"]
    try:
        done = subprocess.run(argv, env={**base, **environ}, capture_output=True, check=False, text=True)
        return dict(json.loads(done.stdout))
    except (OSError, ValueError) as e:
        raise Refused(f"{p['program']} cannot check the configuration: {e}. Do: run the role gateway first") from e


def check(p: Mapping[str, Any], folder: Path, *, changed: bool) -> list[dict[str, Any]]:
    """Return the problems of the staged configuration; what ``changed`` is also built once, which takes seconds."""
    files = {
        "MOAT_SETTINGS_FILE": str(folder / "gateway.yaml"),
        "MOAT_CONFIG": str(folder / "config.yaml"),
        "MOAT_KEYS": str(folder / "keys.yaml"),
        "MOAT_SECRETS_DIR": p["secrets"],
        "MOAT_MASTER_KEY_FILE": f"{p['secrets']}/master_key",
    }
    known = settings(Path(p["environment"]))
    # With the node's folder of revisions the program would check what is in force there, not these files.
    for name in ("MOAT_SYNC_DIR", "MOAT_REPORTS_DIR"):
        known.pop(name, None)
    answer = asked(p, {**known, **files}, "check")
    problems: list[dict[str, Any]] = answer["problems"]
    own = asked(p, {"MOAT_SETTINGS_FILE": files["MOAT_SETTINGS_FILE"]}, "settings")
    if own.get("egress_allow"):
        problems.append(
            {
                "kind": "setting-refused", "path": files["MOAT_SETTINGS_FILE"], "line": None,
                "message": "names egress_allow, which is not read here",
                "found": " ".join(own["egress_allow"]), "expected": "no such line",
                "hint": "list the servers in moat_egress_allow of vars.yml; the packet filter reads it too",
            }
        )  # fmt: skip
    if changed and not problems:
        limits = {"MOAT_DRY_RUN_TIMEOUT": f"{p['dry_run_timeout']:g}", "MOAT_DRY_RUN_MEMORY": str(p["dry_run_memory"])}
        answer = asked(p, {**known, **files, **limits}, "config", "validate", str(folder))
        problems = [{**x, "path": str(folder / x["file"])} for x in answer["problems"]]
    return problems


def say(problem: Mapping[str, Any], p: Mapping[str, Any], folder: Path) -> str:
    """Return a problem as lines for the operator, about the operator's own file."""
    where = str(problem.get("path") or "").replace(str(folder), p["source"])
    where += f" line {problem['line']}" if problem.get("line") else ""
    parts = [f"{where}: {problem['message']}" if where else str(problem["message"])]
    parts += [f"{k}: {problem[k]}" for k in ("found", "expected") if problem.get(k)]
    text = "; ".join(parts) + (f". Do: {problem['hint']}" if problem.get("hint") else "")
    return text.replace(str(folder), p["source"])


def replace(p: Mapping[str, Any], gid: int, *, dry: bool) -> list[str]:
    """Replace the live files that differ, and return their names."""
    replaced = []
    for name in NAMES:
        live = Path(p["path"]) / name
        try:
            status = live.lstat()
            same = live.read_bytes() == p["files"][name].encode("utf-8")
            right = (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, gid, 0o640)
        except OSError:
            same = right = False
        if same and right:
            continue
        replaced.append(name)
        if not dry:
            write(live, p["files"][name].encode("utf-8"), 0o640, (0, gid))
    return replaced


def keep(p: Mapping[str, Any]) -> None:
    """Keep this version under the next number, and the last ones before it."""
    folder = Path(p["history"])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(p["files"], sort_keys=True).encode()).hexdigest()[:12]
    versions = sorted(
        (x for x in folder.iterdir() if re.fullmatch(r"[0-9]{6}-[0-9a-f]{12}", x.name)), key=lambda x: x.name
    )
    if versions and versions[-1].name.endswith(digest):
        return
    number = int(versions[-1].name[:6]) + 1 if versions else 1
    temporary = folder / ".new"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    for name in NAMES:
        write(temporary / name, p["files"][name].encode("utf-8"), 0o600, (0, 0))
    made = folder / f"{number:06d}-{digest}"
    temporary.rename(made)
    for old in [*versions, made][: -p["keep"]]:
        shutil.rmtree(old)


class Unix(http.client.HTTPConnection):
    """A connection to an admin socket."""

    def connect(self) -> None:
        """Connect to the Unix socket that is named instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(self.host)


def reload_keys() -> list[str]:
    """Have every running gateway of this node read the keys now; they would see them within a second by themselves."""
    done = []
    for path in sorted(Path("/run/moat").glob("gateway-*/admin.sock")):
        connection = Unix(str(path))
        try:
            connection.request("POST", "/reload")
            if connection.getresponse().status == 200:
                done.append(path.parent.name)
        except (OSError, http.client.HTTPException):
            continue  # not running; it reads them when it starts
        finally:
            connection.close()
    return done


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "files": {"type": "dict", "required": True, "no_log": True},
            "program": {"type": "path", "required": True},
            "source": {"type": "str", "required": True},
            "environment": {"type": "path", "default": "/etc/moat/gateway/common.env"},
            "path": {"type": "path", "default": "/etc/moat/config"},
            "history": {"type": "path", "default": "/var/lib/moat/config"},
            "keep": {"type": "int", "default": 10},
            "secrets": {"type": "path", "default": "/etc/moat/secrets/gateway", "no_log": False},
            "group": {"type": "str", "default": "moat-gateway"},
            "dry_run_timeout": {"type": "float", "default": 10},
            "dry_run_memory": {"type": "int", "default": 512},
        },
        supports_check_mode=True,
    )
    p = module.params
    if module.check_mode and not (Path(p["program"]).exists() and Path(p["environment"]).exists()):
        module.exit_json(changed=True, ready=True, problem="", replaced=list(NAMES), reloaded=[])
    try:
        folder = staged(p)
        gid = grp.getgrnam(p["group"]).gr_gid
        try:
            problems = check(p, folder, changed=bool(replace(p, gid, dry=True)))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        unset = [x for x in problems if x["kind"] == "no-models"]
        serving = (Path(p["path"]) / "config.yaml").exists()
        if problems and (len(unset) < len(problems) or serving):
            lines = "\n".join(say(x, p, folder) for x in problems)
            kept = "the one before it stays in force" if serving else "nothing was changed"
            module.fail_json(msg=f"The configuration was refused; {kept}.\n{lines}")
        if unset:
            # A new site: nothing to serve yet, and nothing wrong either.
            module.exit_json(changed=False, ready=False, problem=say(unset[0], p, folder), replaced=[], reloaded=[])
        replaced = replace(p, gid, dry=module.check_mode)
        reloaded = []
        if replaced and not module.check_mode:
            keep(p)
            reloaded = reload_keys() if "keys.yaml" in replaced else []
    except Refused as e:
        module.fail_json(msg=str(e))
    except OSError as e:
        module.fail_json(msg=f"{e.filename}: {e.strerror}. Do: make room or mend the disk, then run it again")
    else:
        module.exit_json(changed=bool(replaced), ready=True, problem="", replaced=replaced, reloaded=reloaded)


if __name__ == "__main__":
    main()
