#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module ``moat_instances``: bring a node's gateways to a release, one after the other, or back to the old one.

A gateway is restarted when it does not run the wanted release, or was started before something that it reads at the
start (its unit, settings, configuration, secrets) took its present content. That is told by a digest kept with the
id of the unit's run, so that a run which was interrupted between writing a file and restarting is finished by the next.
Each restarted gateway must become ready and answer a real request before the next one is touched. If one does not,
every gateway that was moved returns to the release that it came from: the node's (the link ``current`` moves last, when
all of them serve), so that what a run before this one moved, and did not come to the end of, returns too.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import Refused, write

DOCUMENTATION = r"""
module: moat_instances
short_description: Bring the gateways of a node to a release without losing a request
options:
  release: {description: Name of the release below root/releases., type: str, required: true}
  count: {description: How many gateways the node runs; those above it are stopped., type: int, required: true}
  root: {description: The release store., type: path, default: /opt/moat}
  address: {description: Where the gateways listen., type: str, default: 127.0.0.1}
  base_port: {description: Gateway N listens on this port plus N., type: int, default: 4000}
  settle: {description: Seconds between two gateways., type: float, default: 4}
  probe:
    description: The model of the request after a restart; auto for the first, models for none.
    type: str
    default: auto
  master_key:
    description: File with the administrator's key.
    type: path
    default: /etc/moat/secrets/gateway/master_key
  only:
    description: The gateway of this node that alone gets requests, because all others are out; it is not restarted.
    type: int
    default: 0
  inputs: {description: Files and folders that a gateway reads at its start., type: list, elements: path, default: []}
author: [The Moat project]
"""

EXAMPLES = r"""
- name: Bring the gateways to the release
  moat_instances: {release: 0.2.0-0123456789ab, count: 2}
"""

RETURN = r"""
started: {description: Gateways that were not running and are now., type: list, returned: always}
restarted: {description: Gateways that were restarted., type: list, returned: always}
stopped: {description: Gateways that are no longer wanted., type: list, returned: always}
before:
  description: The release that they came from, also in a run before this one that was cut short; empty if none moved.
  type: str
  returned: always
returned: {description: "After a failure, gateways that run their old release again.", type: list, returned: on failure}
seconds: {description: What it took., type: float, returned: always}
"""

RECORD = Path("/var/lib/moat/gateways.json")
UNIT_FILE = "/etc/systemd/system/moat-gateway@.service"
JOURNAL_LINES = 15


def run(*argv: str, check: bool = True) -> str:
    """Run a program and return what it printed.

    Raises:
        Refused: it failed.
    """
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True)
    if check and done.returncode:
        raise Refused(f"`{' '.join(argv)}` failed ({done.returncode}): {done.stdout.strip()}")
    return done.stdout


def unit(n: int) -> str:
    """Return the name of a gateway's unit."""
    return f"moat-gateway@{n}.service"


def properties(n: int) -> dict[str, str]:
    """Return what systemd says of a gateway."""
    wanted = "ActiveState,UnitFileState,InvocationID,NeedDaemonReload,ExecMainStartTimestampMonotonic,MainPID"
    lines = run("systemctl", "show", unit(n), f"--property={wanted}").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def digest(paths: list[str]) -> tuple[str, float]:
    """Return a digest of files and of the files in folders, and the time of the latest change."""
    total, latest = hashlib.sha256(), 0.0
    for name in paths:
        path = Path(name)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                total.update(f"{file}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
                latest = max(latest, file.stat().st_ctime)
    return total.hexdigest(), latest


def started_at(p: Mapping[str, str]) -> float:
    """Return when a unit's process was started, in seconds since 1970."""
    since_boot = int(p.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    return time.time() - (time.clock_gettime(time.CLOCK_MONOTONIC) - since_boot)


@dataclass
class Node:
    """The gateways of this node.

    Attributes:
        p: the parameters.
        record: what each gateway was started with, by its number.
        moved: gateway and the release that it came from, also one that a run which was cut short had moved.
        origins: the release that each gateway returns to if the wanted one fails, or nothing.
        begun: something may have been changed.
        unnoted: gateways that somebody else started, with what is there now.
    """

    p: Mapping[str, Any]
    record: dict[str, dict[str, str]] = field(default_factory=dict)
    moved: list[tuple[int, str]] = field(default_factory=list)
    origins: dict[int, str] = field(default_factory=dict)
    unnoted: list[int] = field(default_factory=list)
    begun: bool = False
    started: list[int] = field(default_factory=list)
    restarted: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    def link(self, n: int) -> Path:
        """Return the link that says which release a gateway runs."""
        return Path(self.p["root"]) / "instances" / str(n)

    def release(self, n: int) -> str:
        """Return the release that a gateway is to run, or nothing."""
        try:
            return os.path.basename(os.readlink(self.link(n)))  # noqa: PTH115, PTH119
        except OSError:
            return ""

    def current(self) -> str:
        """Return the release of the node, which all its gateways have served with, or nothing."""
        try:
            return os.path.basename(os.readlink(Path(self.p["root"]) / "current"))  # noqa: PTH115, PTH119
        except OSError:
            return ""

    def running(self, properties_: Mapping[str, str]) -> str:
        """Return the release that a gateway's process does run, or nothing."""
        try:
            words = Path(f"/proc/{properties_['MainPID']}/cmdline").read_bytes().split(b"\0")
        except (OSError, KeyError):
            return ""
        inside = os.fsencode(Path(self.p["root"]) / "releases") + b"/"
        found = [w for w in words if w.startswith(inside)]
        return os.fsdecode(found[0][len(inside) :].split(b"/")[0]) if found else ""

    def origin(self, n: int, p: Mapping[str, str]) -> str:
        """Return the release that a gateway returns to if the wanted one fails, or nothing.

        Its own link does not say it: a run that was cut short may have moved that to a release which never served.
        """
        current, wanted = self.current(), self.p["release"]
        if current not in ("", wanted):
            return current
        found = self.running(p) if p["ActiveState"] == "active" else ""
        if not found and not current:
            found = self.release(n)  # the first installation did not come to its end
        return "" if found == wanted else found

    def flip(self, n: int, release: str) -> None:
        """Point a gateway's link to a release, in one step."""
        link = self.link(n)
        link.parent.mkdir(mode=0o755, exist_ok=True)
        temporary = link.with_name(f".{n}.new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"../releases/{release}")
        temporary.replace(link)

    def inputs(self, n: int) -> tuple[str, float]:
        """Return the digest and the time of what a gateway reads at its start."""
        own = [
            "/etc/systemd/system/moat-gateway@.service",
            "/etc/moat/gateway/common.env",
            f"/etc/moat/gateway/{n}.env",
        ]
        return digest(own + list(self.p["inputs"]))

    def remember(self, n: int) -> None:
        """Note what a gateway was started with."""
        self.record[str(n)] = {"invocation": properties(n)["InvocationID"], "inputs": self.inputs(n)[0]}
        write(RECORD, (json.dumps(self.record, sort_keys=True) + "\n").encode("utf-8"), 0o644)

    def stale(self, n: int, p: Mapping[str, str]) -> bool:
        """Say whether a running gateway was started with something else than what is there now."""
        now, latest = self.inputs(n)
        known = self.record.get(str(n), {})
        if known.get("invocation") == p.get("InvocationID"):
            return known.get("inputs") != now
        # Somebody else started it (a reboot, Restart=): it has read what was there then.
        return latest > started_at(p)

    # --- questions to a gateway ---

    def ask(self, n: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return status and answer of one request with the administrator's key.

        Raises:
            Refused: no answer came.
        """
        key = Path(self.p["master_key"]).read_text("utf-8").strip()
        connection = http.client.HTTPConnection(self.p["address"], self.p["base_port"] + n, timeout=60)
        try:
            raw = json.dumps(body) if body is not None else None
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            connection.request(method, path, raw, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise Refused(f"gateway {n} gave no answer to {method} {path}: {e}") from e
        finally:
            connection.close()

    def completes(self, n: int) -> bool:
        """Say whether a completion of one token succeeds."""
        model = self.p["probe"]
        try:
            if model == "auto":
                code, answer = self.ask(n, "GET", "/v1/models")
                names = [m["id"] for m in answer["data"]] if code == 200 else []
                if not names:
                    return False
                model = names[0]
            body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "ping"}]}
            return self.ask(n, "POST", "/v1/chat/completions", body)[0] == 200
        except (Refused, KeyError, TypeError):
            return False

    def must_answer(self, n: int, completed: bool) -> None:
        """Ask a restarted gateway a real request; what succeeded before must succeed now.

        Raises:
            Refused: it does not answer, or not as before.
        """
        code, answer = self.ask(n, "GET", "/v1/models")
        if code != 200 or not isinstance(answer, dict) or "data" not in answer:
            raise Refused(f"gateway {n} is up and does not serve: GET /v1/models answered {code}")
        if completed and not self.completes(n):
            raise Refused(f"gateway {n} is up, but a completion that succeeded before the restart fails now")

    # --- steps ---

    def plan(self) -> tuple[list[int], list[int], list[int]]:
        """Return the gateways to start, to restart and to stop."""
        start, restart = [], []
        for n in range(1, self.p["count"] + 1):
            p = properties(n)
            self.origins[n] = self.origin(n, p)
            if self.origins[n] and self.release(n) not in ("", self.origins[n]):
                self.moved.append((n, self.origins[n]))  # by a run that was cut short
            if p["ActiveState"] != "active":
                start.append(n)  # also one that systemd tries to start again and again
            elif self.running(p) != self.p["release"] or self.release(n) != self.p["release"] or self.stale(n, p):
                restart.append(n)
            elif str(n) not in self.record or self.record[str(n)]["invocation"] != p["InvocationID"]:
                self.unnoted.append(n)
        folder = Path(self.p["root"]) / "instances"
        there = [int(x.name) for x in folder.iterdir() if x.name.isdecimal()] if folder.is_dir() else []
        return start, restart, sorted(n for n in there if n > self.p["count"])

    def apply(self, start: list[int], restart: list[int], stop: list[int]) -> None:
        """Do it.

        Raises:
            Refused: a gateway failed, and those that were moved are not yet back; or nothing was begun.
        """
        if self.p["only"] in restart:
            raise Refused(
                f"gateway {self.p['only']} would be restarted while no other one gets requests. Found: all others are "
                "out (moat-site drain); expected: one more that is in. Do: put one back, moat-site drain "
                "-e drain_back=HOST/N; or, if requests may fail meanwhile, add -e gateway_alone=true"
            )
        self.begun = True
        run("systemctl", "daemon-reload")
        if start:
            for n in start:
                self.move(n)
            # None of them serves, so nothing is lost by starting them together.
            run("systemctl", "reset-failed", *map(unit, start), check=False)
            self.wait(start)
            for n in start:
                self.must_answer(n, completed=False)
                self.remember(n)
                self.started.append(n)
        for n in restart:
            if self.started or self.restarted:
                # nginx has set the one before aside while it was away; it must be back before this one goes.
                time.sleep(self.p["settle"])
            completed = self.p["probe"] != "models" and self.completes(n)
            self.move(n)
            self.wait([n])
            self.must_answer(n, completed)
            self.remember(n)
            self.restarted.append(n)
        for n in stop:
            run("systemctl", "disable", "--now", unit(n))
            self.link(n).unlink()
            self.stopped.append(n)
        for n in [*start, *restart]:
            if properties(n)["UnitFileState"] != "enabled":
                run("systemctl", "enable", unit(n))

    def move(self, n: int) -> None:
        """Point a gateway to the wanted release and note where it came from."""
        if self.release(n) != self.p["release"]:
            self.flip(n, self.p["release"])
        if self.origins[n] and n not in dict(self.moved):
            self.moved.append((n, self.origins[n]))

    def wait(self, numbers: list[int]) -> None:
        """Start or restart units and wait until each is ready (they are of Type=notify).

        Raises:
            Refused: one is not; its last lines are in the text.
        """
        try:
            run("systemctl", "restart", *map(unit, numbers))
        except Refused as e:
            lines = []
            for n in numbers:
                if properties(n)["ActiveState"] != "active":
                    journal = run("journalctl", "-u", unit(n), "-n", str(JOURNAL_LINES), "-o", "cat", check=False)
                    lines.append(f"{unit(n)} says:\n{journal.strip()}")
            raise Refused("\n".join([str(e), *lines])) from e

    def go_back(self) -> list[int]:
        """Return the gateways that were moved to where they came from; return those that serve again."""
        back = []
        for n, before in reversed(self.moved):
            self.flip(n, before)
            p = properties(n)
            if p["ActiveState"] == "active" and self.running(p) == before:
                back.append(n)  # only its link had been moved; it has served all the time
                continue
            try:
                run("systemctl", "reset-failed", unit(n), check=False)
                self.wait([n])
                self.must_answer(n, completed=False)
                self.remember(n)
                back.append(n)
            except Refused:
                continue
            if len(back) < len(self.moved):
                time.sleep(self.p["settle"])
        return back


def main() -> None:
    """Run as Ansible's module."""
    module: Any = AnsibleModule(
        argument_spec={
            "release": {"type": "str", "required": True},
            "count": {"type": "int", "required": True},
            "root": {"type": "path", "default": "/opt/moat"},
            "address": {"type": "str", "default": "127.0.0.1"},
            "base_port": {"type": "int", "default": 4000},
            "settle": {"type": "float", "default": 4.0},
            "probe": {"type": "str", "default": "auto"},
            "master_key": {"type": "path", "default": "/etc/moat/secrets/gateway/master_key", "no_log": False},
            "only": {"type": "int", "default": 0},
            "inputs": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    begun = time.monotonic()
    node = Node(module.params)
    try:
        node.record = dict(json.loads(RECORD.read_text("utf-8")))
    except (OSError, ValueError):
        node.record = {}

    def result() -> dict[str, Any]:
        done = {"started": node.started, "restarted": node.restarted, "stopped": node.stopped}
        before = node.moved[0][1] if node.moved else ""
        return {**done, "before": before, "seconds": round(time.monotonic() - begun, 1), "changed": any(done.values())}

    try:
        start, restart, stop = node.plan()
        if module.check_mode:
            node.started, node.restarted, node.stopped = start, restart, stop
        else:
            for n in node.unnoted:
                node.remember(n)
            if start or restart or stop:
                node.apply(start, restart, stop)
    except Refused as e:
        back = node.go_back() if node.moved and node.begun else []
        if not node.begun:
            after = "Nothing was changed on this node."
        elif node.moved and len(back) == len(node.moved):
            after = f"Gateways {sorted(back)} run their old release again and serve."
        elif node.moved:
            after = (
                f"Gateways {sorted(n for n, _ in node.moved)} were to return to their old release; {back} serve again."
            )
        else:
            after = "There is no other release to return to. Do: correct what it says, then run this again."
        module.fail_json(msg=f"{e}\n{after}", returned=sorted(back), **result())
    except OSError as e:
        module.fail_json(msg=f"{e.filename}: {e.strerror}", **result())
    module.exit_json(**result())


if __name__ == "__main__":
    main()
