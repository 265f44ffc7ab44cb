# SPDX-License-Identifier: Apache-2.0
"""A site that runs with Docker Compose: what it consists of, how it is restarted, how it is watched.

Nothing of the deployment is changed: the containers are stopped and started as they are, and everything is
watched from the host. The layers are the host's system calls (by the containers' user ids), the packets
that come out of the bridges, and the names that are asked for inside of the containers.
"""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import EgressUnproven
from moat.site.egresscheck import compose_probes, endpoints, leftovers, marks, signals
from moat.site.egresscheck.allow import Allowed, parse
from moat.site.egresscheck.bridges import BridgesLayer
from moat.site.egresscheck.containers import Deployment, Service
from moat.site.egresscheck.destinations import AllowList
from moat.site.egresscheck.model import Component, Endpoint, Layer, Probe, RequestResult
from moat.site.egresscheck.names import NamesLayer
from moat.site.egresscheck.namespaces import default_gateway
from moat.site.egresscheck.requests import Gateway, Target, first_requests, read_key
from moat.site.egresscheck.subject import configurations
from moat.site.egresscheck.syscalls import SyscallsLayer

_UP_SECONDS: Final = "300"


class ComposeSite:
    """See the module.

    Args:
        directory: the deployment folder.
        console: where the commands are shown.
        key_file: file with a client key for the first requests; without one the gateways' own master key is used,
            which lies in the deployment folder.
    """

    kind = "compose"

    def __init__(self, directory: Path, console: Console, key_file: Path | None = None) -> None:
        self._console = console
        master = directory / "secrets/gateway/master_key"
        self._key_file = key_file or (master if master.is_file() else None)
        self._deployment = Deployment(directory)
        self._allowed: tuple[str, ...] = ()
        self._marks = marks.draw()
        #: Address and port of the packets that our own probes send.
        self._own: set[tuple[str, int]] = set()
        #: What ran before the restart, and what runs since; when the restart began (seconds since 1970).
        self._before: dict[str, Service] = {}
        self._since: dict[str, Service] = {}
        self._began = 0.0
        read_key(self._key_file)  # before anything is restarted

    def components(self) -> list[Component]:
        """List the services; one that has done its work and ended is one too, it runs again with the others."""
        return [
            Component(s.name, s.container, s.uid, tuple(s.addresses.values()), s.id)
            for s in self._deployment.services().values()
        ]

    # --- where the configuration points ---

    def endpoints(self) -> list[Endpoint]:
        """List every address that the effective configuration names."""
        services = self._deployment.services()
        gateways = [s for s in services.values() if s.is_gateway and s.pid]
        if not gateways:
            raise EgressUnproven(
                "no gateway is running",
                found=", ".join(f"{s.name} ({s.state})" for s in services.values()) or "no container",
                expected="at least one running gateway",
                hint="start the site first, and see that it answers",
            )
        found: list[Endpoint] = []
        allowed: dict[str, None] = {}
        for s in gateways:
            named, texts = endpoints.of_gateway(s.name, s.pid, s.id)
            found += named
            allowed.update(dict.fromkeys(texts))
        self._allowed = tuple(allowed)
        allow = AllowList(allowed, self._own_names())
        for s in services.values():
            found += self._of_service(s, allow)
        return list(dict.fromkeys(found))

    def _of_service(self, s: Service, allow: AllowList) -> list[Endpoint]:
        found = endpoints.of_environment(s.name, s.environ, allow)
        found += endpoints.of_arguments(s.name, s.argv, allow)
        # The engine passes what it cannot answer on to these, and a log driver writes to a server by itself.
        found += endpoints.of_words(s.name, "name server", s.dns, allow)
        found += endpoints.of_environment(f"{s.name}: log driver {s.log_driver}", s.log_options, allow)
        program = Path(s.argv[0]).name if s.argv else ""
        root = Path(f"/proc/{s.pid}/root")
        try:
            if program == "minio":
                found += endpoints.of_minio(s.name, s.environ)
            elif program == "valkey-server" and s.pid:
                for word in s.argv[1:]:
                    if word.startswith("/"):
                        text = (root / word.lstrip("/")).read_text("utf-8", "replace")
                        found += endpoints.of_valkey(s.name, text, allow)
            elif program == "nginx" and s.pid:
                path = s.argv[s.argv.index("-c") + 1] if "-c" in s.argv else "/etc/nginx/nginx.conf"
                found += endpoints.of_nginx(s.name, endpoints.nginx_text(Path(path), root), allow)
        except OSError as e:
            raise EgressUnproven(
                f"the configuration of {s.name} cannot be read",
                found=str(e),
                expected="its files, in its container",
                hint="see that it runs, and run it again",
            ) from e
        return found

    def allowed(self) -> tuple[str, ...]:
        """Return the gateways' allow-list; :meth:`endpoints` has asked for it."""
        return self._allowed

    def _own_names(self) -> list[str]:
        services = self._deployment.services().values()
        return [n for s in services for n in (s.name, *s.aliases, *s.addresses.values())]

    # --- the capture ---

    def layers(self, allowed: Sequence[str]) -> list[Layer]:
        """Return the capture layers."""
        services = self._deployment.services()
        known: dict[str, list[str]] = {}
        for s in services.values():
            for name in (s.name, *s.aliases):
                known.setdefault(name.lower(), []).extend(s.addresses.values())
            for name, address in s.extra_hosts:
                known.setdefault(name.lower(), []).append(address)
        # Names mean what they mean in the containers; the host's resolver is not asked.
        entries = [parse(text, lambda name: sorted(set(known.get(name, ())))) for text in allowed]
        bridges = self._deployment.bridges()
        networks = tuple(ipaddress.IPv4Network(b.subnet) for b in bridges)
        names = [n for s in services.values() for n in (s.name, *s.aliases)]
        folder = next((s.namespace.parent for s in services.values() if s.namespace), None)
        # Among each other they may talk; what goes to the host's own address there is seen on the bridge.
        calls = SyscallsLayer([*entries, Allowed("the site's own networks", networks)], self._marks, self._users)
        found: list[Layer] = [
            calls,
            BridgesLayer(bridges, entries, self._marks, self._senders, lambda: calls.watching, self._own),
        ]
        if folder is not None:
            found.append(
                NamesLayer(folder, self._marks, [*names, *(e.name for e in entries if e.name)], networks, self._running)
            )
        return found

    def _running(self) -> dict[str, tuple[Path, float]]:
        services = self._deployment.services().values()
        return {s.name: (s.namespace, s.started) for s in services if s.namespace is not None and s.pid}

    def _users(self) -> dict[int, int]:
        """Return, for each user, the process of a running container."""
        return {s.uid: s.pid for s in self._deployment.services().values() if s.pid}

    def _senders(self) -> dict[str, tuple[int, int]]:
        """Return, for each bridge, a container whose way out it is."""
        found: dict[str, tuple[int, int]] = {}
        for s in self._deployment.services().values():
            gateway = default_gateway(s.pid) if s.pid else None
            for bridge in self._deployment.bridges():
                if gateway == bridge.gateway:
                    found.setdefault(bridge.device, (s.pid, s.uid))
        return found

    def restart(self, components: Sequence[Component]) -> None:
        """Stop and start the containers as they are, in their order, and wait until all are healthy.

        Containers are not made anew: their logs stay, and what runs is what ran before.
        """
        self._before, self._began = self._deployment.services(), time.time()
        self._console.info("an interruption takes effect when the services run again")
        with signals.deferred():
            note = leftovers.note_stopped(self._deployment.directory)
            try:
                self._compose("stop", what="stop the services")
            finally:  # whichever of them were stopped
                up = (*leftovers.UP, "--wait", "--wait-timeout", _UP_SECONDS)
                self._compose(*up, what="start the services")
            leftovers.strike(note)
        self._since = self._deployment.services()

    def _compose(self, *words: str, what: str) -> None:
        compose = ["docker", "compose", "--project-directory", str(self._deployment.directory), "--progress", "quiet"]
        start = f"docker compose --project-directory {self._deployment.directory} up --detach"
        hint = f"see `docker compose ps` and `docker compose logs`; what is stopped: `{start}`"
        self._console.run([*compose, *words], error=EgressUnproven, what=what, hint=hint, own_session=True)

    def changes(self) -> list[str]:
        """Say which services did not run from the restart to this moment; some do their work once and end."""
        return changes(self._before, self._since, self._deployment.services(), self._began)

    # --- requests, probes, rules ---

    def requests(self) -> list[RequestResult]:
        """Send a first request of every kind."""
        services = self._deployment.services().values()
        ports = [p for s in services for p in s.published(8443)]
        if not ports:
            return [RequestResult("chat", 0, False, "no container publishes the port 8443")]
        ca = self._deployment.directory / "tls/ca.pem"
        gateways = tuple(
            Gateway(
                s.name,
                next(iter(s.addresses.values()), ""),
                int(s.environ.get("MOAT_PORT", "4000")),
                Path(f"/proc/{s.pid}/root") / s.environ.get("MOAT_ADMIN_SOCKET", "/run/moat/admin.sock").lstrip("/"),
            )
            for s in services
            if s.is_gateway and s.pid
        )
        address, port = ports[0]
        return first_requests(Target(address, port, ca if ca.is_file() else None, self._key_file, gateways))

    def probes(self) -> list[Probe]:
        """Prove that containers reach neither the host's services nor the outside."""
        return compose_probes.all_probes(self._deployment, self._console, self._marks, self._own)

    def rules(self) -> str:
        """Return the packet filter's rules in force."""
        return compose_probes.rules_in_force()

    def subject(self) -> dict[str, str]:
        """Return what is in force: each service's image, the deployment's file, what each gateway serves."""
        services = self._deployment.services().values()
        found = {f"image of {s.name}": s.image for s in services}
        text = (self._deployment.directory / "compose.yaml").read_bytes()
        found["compose.yaml"] = f"sha256 {hashlib.sha256(text).hexdigest()}"
        for s in services:
            if s.is_gateway and s.pid:
                root = Path(f"/proc/{s.pid}/root")
                reports = root / s.environ.get("MOAT_REPORTS_DIR", "/run/moat-reports").lstrip("/")
                # The reports of all of them lie in the same volume.
                found |= configurations(reports, self._deployment.directory / "config")
        return found

    def facts(self) -> dict[str, str]:
        """Return what is worth to know about the host."""
        return {"container engine": self._deployment.engine_version(), **endpoints.host_facts()}


def changes(
    before: Mapping[str, Service], since: Mapping[str, Service], now: Mapping[str, Service], began: float
) -> list[str]:
    """Say what did not run, or not all the time.

    Args:
        before: the services before the restart; empty if there was none.
        since: right after the restart; empty if it did not come to its end.
        now: at this moment.
        began: when the restart began, in seconds since 1970.
    """
    found = []
    for name in sorted({*before, *since, *now}):
        service, first = now.get(name), since.get(name)
        state = service.state if service else "gone"
        ran = first is not None and first.pid != 0
        # It had done its work and ended, and has done so again.
        done = not ran and name in before and not before[name].pid and service is not None and service.started >= began
        if service is None or not (service.pid or done):
            word = "ended during the capture" if ran else "does not run"
            found.append(f"{name} {word} ({state}): what it would try was not seen")
        elif first is not None and (first.id, first.started) != (service.id, service.started):
            found.append(f"{name} was started again during the capture: read `docker compose logs {name}`")
        elif since and first is None:
            found.append(f"{name} began to run during the capture: it was not watched from its start")
    return found
