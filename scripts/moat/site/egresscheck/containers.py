# SPDX-License-Identifier: Apache-2.0
"""The containers of a deployment as the engine describes them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from moat.errors import EgressUnproven
from moat.site.egresscheck.bridges import Bridge
from moat.site.engine import ASK_SECONDS, PROJECT

_FOLDER: Final = "com.docker.compose.project.working_dir"
_SERVICE: Final = "com.docker.compose.service"


@dataclass(frozen=True)
class Service:
    """One service's container.

    Attributes:
        name: of the service.
        container: name of the container.
        id: of the container.
        state: ``running``, ``exited``, ...
        pid: of its first process on the host; 0 if it does not run.
        uid: user of its processes.
        started: seconds since 1970 of its last start.
        namespace: file of its network namespace, or ``None`` if it does not run.
        addresses: by network.
        aliases: its other names on the networks.
        environ: what it was started with.
        argv: program and arguments.
        dns: name servers for what the engine cannot answer.
        extra_hosts: names with an address, of its ``/etc/hosts``.
        log_driver: who takes its output.
        log_options: of the log driver.
        ports: container port -> where it is published.
        image: id of its image.
        networks: every network that it is on, with an address or without (``host``), or where it has none of its own
            how it got into one (``container:...``).
    """

    name: str
    container: str
    id: str
    state: str
    pid: int
    uid: int
    started: float
    namespace: Path | None
    addresses: Mapping[str, str]
    aliases: tuple[str, ...]
    environ: Mapping[str, str]
    argv: tuple[str, ...]
    dns: tuple[str, ...]
    extra_hosts: tuple[tuple[str, str], ...]
    log_driver: str
    log_options: Mapping[str, str]
    ports: Mapping[int, tuple[tuple[str, int], ...]]
    image: str = ""
    networks: tuple[str, ...] = ()

    @property
    def is_gateway(self) -> bool:
        """Whether it serves as a gateway (the same image also does other work)."""
        return "serve" in self.argv and "MOAT_PORT" in self.environ

    def published(self, port: int) -> tuple[tuple[str, int], ...]:
        """Return the addresses and ports of this host at which ``port`` is published."""
        return self.ports.get(port, ())


class Deployment:
    """The containers of one deployment folder.

    Args:
        directory: the folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()

    def services(self) -> dict[str, Service]:
        """Return the service's containers, running or not, without those of ``docker compose run``.

        Raises:
            EgressUnproven: the engine cannot be asked.
        """
        ids = _docker(
            "ps", "--all", "--quiet", "--no-trunc",
            "--filter", f"label=com.docker.compose.project={PROJECT}",
            "--filter", "label=com.docker.compose.oneoff=False",
        ).split()  # fmt: skip
        found = {}
        for raw in _json("container", "inspect", *ids) if ids else ():
            if Path(raw["Config"]["Labels"].get(_FOLDER, "")).resolve() == self.directory:
                service = _service(raw)
                found[service.name] = service
        return dict(sorted(found.items()))

    def networks(self) -> list[dict[str, Any]]:
        """Return what the engine says of each network with a bridge that a service is on."""
        return [n for n in self.every_network() if n.get("Driver") == "bridge"]

    def every_network(self) -> list[dict[str, Any]]:
        """Return what the engine says of each network that a service is on, whatever makes it."""
        names = sorted({n for s in self.services().values() for n in s.networks if not n.startswith("container:")})
        return list(_json("network", "inspect", *names)) if names else []

    def bridges(self) -> list[Bridge]:
        """Return the networks as the host sees them."""
        found = []
        for n in self.networks():
            device = device_of(n)
            for ipam in n["IPAM"]["Config"] or ():
                if ":" not in ipam.get("Subnet", ":"):
                    found.append(Bridge(device, str(ipam["Subnet"]), str(ipam.get("Gateway", ""))))
        return found

    def engine_version(self) -> str:
        """Return the engine's version."""
        return "docker " + _docker("version", "--format", "{{.Server.Version}}").strip()


def device_of(network: Mapping[str, Any]) -> str:
    """Return the host's device of a network with a bridge."""
    return str((network.get("Options") or {}).get("com.docker.network.bridge.name") or f"br-{network['Id'][:12]}")


def _service(raw: Mapping[str, Any]) -> Service:
    config, host, state = raw["Config"], raw["HostConfig"], raw["State"]
    networks = raw["NetworkSettings"]["Networks"] or {}
    pid = int(state["Pid"])
    key = raw["NetworkSettings"].get("SandboxKey") or ""
    argv = [*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())]
    log = host.get("LogConfig") or {}
    name = str(config["Labels"][_SERVICE])
    container = str(raw["Name"]).lstrip("/")
    aliases = {container, str(config.get("Hostname", "")), str(raw["Id"])[:12]}
    aliases |= {str(a) for n in networks.values() for a in n.get("Aliases") or ()}
    return Service(
        name=name,
        container=container,
        id=str(raw["Id"]),
        state=str(state["Status"]),
        pid=pid,
        uid=_uid(pid, str(config.get("User", ""))),
        started=_moment(str(state["StartedAt"])),
        # The folder is the same with and without /var; the namespace vanishes with the container.
        namespace=Path(key) if key and pid else None,
        addresses={k: str(n["IPAddress"]) for k, n in networks.items() if n.get("IPAddress")},
        aliases=tuple(sorted(aliases - {"", name})),
        environ=dict(line.split("=", 1) for line in config.get("Env") or () if "=" in line),
        argv=tuple(str(a) for a in argv),
        # 0.0.0.0 is the container itself: nobody is there, and that is meant.
        dns=tuple(str(d) for d in host.get("Dns") or ()),
        extra_hosts=tuple(_pair(line) for line in host.get("ExtraHosts") or ()),
        log_driver=str(log.get("Type", "")),
        log_options={str(k): str(v) for k, v in (log.get("Config") or {}).items()},
        ports=dict(_ports(raw["NetworkSettings"].get("Ports") or {})),
        networks=tuple(sorted(networks)) or (str(host.get("NetworkMode", "")) or "none",),
        image=str(raw["Image"]),
    )


def _pair(line: str) -> tuple[str, str]:
    name, _, address = line.partition(":")
    return name, address


def _ports(raw: Mapping[str, Any]) -> Iterator[tuple[int, tuple[tuple[str, int], ...]]]:
    for port, bound in raw.items():
        if port.endswith("/tcp") and bound:
            places = tuple(
                ("127.0.0.1" if b["HostIp"] in ("", "0.0.0.0") else b["HostIp"], int(b["HostPort"]))  # noqa: S104
                for b in bound
                if ":" not in b["HostIp"]
            )
            yield int(port.partition("/")[0]), places


def _uid(pid: int, user: str) -> int:
    """Return the user of a running process, else of the configuration (a number in our images)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
            if line.startswith("Uid:"):
                return int(line.split()[1])
    except OSError:
        pass
    number = user.partition(":")[0]
    return int(number) if number.isdecimal() else 0


def _moment(text: str) -> float:
    """Return seconds from the engine's time, which has nine digits behind the point."""
    try:
        return datetime.fromisoformat(text[:26].rstrip("Z") + "+00:00").timestamp()
    except ValueError:
        return 0.0


def _docker(*words: str) -> str:
    """Ask the engine.

    Raises:
        EgressUnproven: it cannot be asked.
    """
    try:
        done = subprocess.run(
            ["docker", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise _unasked(str(e)) from e
    if done.returncode != 0:
        raise _unasked(done.stderr.strip()[-300:])
    return done.stdout


def _json(*words: str) -> Any:
    try:
        return json.loads(_docker(*words))
    except ValueError as e:
        raise _unasked(f"no JSON: {e}") from e


def _unasked(found: str) -> EgressUnproven:
    return EgressUnproven(
        "the container engine cannot be asked",
        found=found,
        expected="docker's answer",
        hint="see that dockerd runs (docker info), and run it as root",
    )
