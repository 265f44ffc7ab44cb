# SPDX-License-Identifier: Apache-2.0
"""What the tests of several hosts share: the hosts by name, what is tried between them, and nginx's own log."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

#: Run inside a host; prints what a connection, or a datagram, comes to.
_TRY = """
import socket, sys
kind = socket.SOCK_DGRAM if sys.argv[1] == "udp" else socket.SOCK_STREAM
with socket.socket(socket.AF_INET, kind) as s:
    s.settimeout(3)
    try:
        s.connect((sys.argv[2], int(sys.argv[3])))
        if sys.argv[1] == "udp":
            s.send(b"x")
        print("connected")
    except OSError as e:
        print(e.strerror or type(e).__name__)
"""


@dataclass(frozen=True)
class Site:
    """The hosts by their names in the inventory, their addresses, and the hosts of each group."""

    hosts: dict[str, Any]
    addresses: dict[str, str]
    groups: dict[str, list[str]]

    def gateways(self, *names: str) -> set[str]:
        """Return address and port of the gateway on each of these hosts, of all without names."""
        return {f"{self.addresses[n]}:4001" for n in names or self.groups["moat_gateways"]}

    def counters(self, name: str) -> dict[str, int]:
        """Return the packets that a host's filter has counted, by the counter's name."""
        document = json.loads(self.hosts[name].ok("nft", "-j", "list", "counters", "table", "inet", "moat_egress"))
        return {i["counter"]["name"]: i["counter"]["packets"] for i in document["nftables"] if "counter" in i}

    def attempt(self, name: str, address: str, port: int, *, kind: str = "tcp", user: str = "root") -> str:
        """Try to reach something from inside a host: ``connected``, or the error's text."""
        argv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "python3", "-c", _TRY]
        return str(self.hosts[name].ok(*argv, kind, address, str(port))).strip()

    def attempt_from_elsewhere(self, name: str, port: int) -> str:
        """Try the same from the machine that runs the tests: on the hosts' network, and no host of the site."""
        argv = ["python3", "-c", _TRY, "tcp", self.addresses[name], str(port)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    def asked(self, name: str, request_id: str) -> str:
        """Return which gateways nginx asked for a request, with commas, as its log says."""
        assert request_id
        give_up = time.monotonic() + 5
        while time.monotonic() < give_up:
            log = self.hosts[name].ok("journalctl", "-t", "moat_nginx", "-o", "cat", "-n", "30", "--no-pager")
            for line in log.splitlines():
                if request_id in line:
                    return str(json.loads(line)["upstream"])
            time.sleep(0.2)
        raise AssertionError(f"nginx on {name} has not logged the request {request_id}")


@pytest.fixture(scope="session")
def site(nodes) -> Site:
    """The site as the inventory of the scenario describes it."""
    file = Path(os.environ["MOLECULE_FILE"]).parent / "inventory.yml"
    if not file.is_file():
        file = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]) / "inventory.yml"
    inventory = yaml.safe_load(file.read_text("utf-8"))["all"]
    addresses = {name: host["moat_address"] for name, host in inventory["hosts"].items()}
    groups = {name: list(group["hosts"]) for name, group in inventory["children"].items()}
    return Site(dict(zip(addresses, nodes, strict=True)), addresses, groups)


@pytest.fixture(scope="session")
def site_key(site: Site) -> str:
    """A client key, made as the pages say: in the site's own file, then brought to every node; a file on each edge."""
    first, path, keys = site.hosts["node1"], "/run/site.key", "/etc/moat/site/config/keys.yaml"
    first.run("moat-gateway", "keys", "revoke", "--keys", keys, "site")
    first.run("rm", "-f", path)
    first.ok("moat-gateway", "keys", "new", "site", "--team", "default", "--keys", keys, "--out", path)
    first.ok("moat-site", "config")
    value = first.ok("cat", path)
    for name in site.groups["moat_edge"]:
        site.hosts[name].ok("sh", "-c", f"umask 077; cat >{path}.new; mv {path}.new {path}", stdin=value)
    return path


@pytest.fixture(scope="session")
def ask(site: Site, site_key: str):
    """Ask for a short completion through an entrance; status, and which gateways nginx asked."""

    def chat(edge: str) -> tuple[int, str]:
        answer = site.hosts[edge].chat(site_key, max_tokens=2, prompt="Hi")
        return answer.status, site.asked(edge, answer.request_id)

    return chat
