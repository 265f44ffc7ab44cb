# SPDX-License-Identifier: Apache-2.0
"""A site that systemd runs: which units belong to it, how they are restarted, what is probed.

The components are the gateways (``moat-gateway@N``) and every other service that is part of
``moat.target`` (config-sync, MinIO, Valkey, nginx), in whatever state: one that does not run is not started by us, and
is a problem of the report, because what it would try is not seen. Their processes are looked at as they run, not as the
unit files say: a unit with processes of several users is several components with one name.
"""

from __future__ import annotations

import contextlib
import pwd
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import EgressUnproven
from moat.site.egresscheck import endpoints, subject, systemd_probes
from moat.site.egresscheck.allow import parse_all
from moat.site.egresscheck.destinations import AllowList
from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.model import Component, Endpoint, Layer, Probe, RequestResult
from moat.site.egresscheck.packets import PacketsLayer
from moat.site.egresscheck.requests import Gateway, Target, first_requests
from moat.site.egresscheck.sinkhole import DnsLayer
from moat.site.egresscheck.syscalls import SyscallsLayer

TARGET: Final = "moat.target"
GATEWAYS: Final = "moat-gateway@*.service"
#: The authority of the site's certificates on a node.
CA_FILE: Final = Path("/etc/moat/tls/ca.pem")
#: What the first requests are made with if no client key is given; the gateways hold it already.
MASTER_KEY: Final = Path("/etc/moat/secrets/gateway/master_key")
NGINX_CONF: Final = Path("/etc/moat/nginx/nginx.conf")
VALKEY_CONF: Final = Path("/etc/moat/valkey/valkey.conf")
#: The store and the counters first, the entrance last; between them systemd keeps its own order.
_ORDER: Final = ("minio", "valkey", "config-sync", "gateway", "nginx")
_RUNNING: Final = ("active", "reloading")
_RESTART_SECONDS: Final = 900
_READY_SECONDS: Final = 60


def systemctl(*words: str, seconds: float = 60) -> str:
    """Run ``systemctl`` and return its stdout.

    Raises:
        EgressUnproven: it is not there, or refuses.
    """
    argv = ["systemctl", "--no-pager", *words]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise EgressUnproven("systemd cannot be asked", found=str(e), hint="run it on the host itself") from e
    if done.returncode != 0:
        raise EgressUnproven(
            f"`systemctl {' '.join(words)}` ended with code {done.returncode}",
            found=done.stderr.strip()[-600:] or "no output",
            hint="see `systemctl --failed` and `journalctl -xe`; the capture has been undone",
        )
    return done.stdout


def show(unit: str, *names: str) -> dict[str, str]:
    """Return properties of a unit."""
    text = systemctl("show", unit, "--property", ",".join(names))
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def component_name(unit: str) -> str:
    """Return the name as the operator knows it: ``gateway-1``, ``config-sync``, ``minio``, ``valkey``, ``nginx``."""
    stem = unit.removesuffix(".service")
    if m := re.fullmatch(r"moat-gateway@(.+)", stem):
        return f"gateway-{m[1]}"
    return stem.removeprefix("moat-").removesuffix("-server")


class SystemdSite:
    """See the module.

    Args:
        console: where the commands are shown.
        key_file: file with a key for the first requests; default the gateways' own master key.
    """

    kind = "systemd"

    def __init__(self, console: Console, key_file: Path | None = None) -> None:
        self._console = console
        self._key_file = key_file or (MASTER_KEY if MASTER_KEY.exists() else None)
        self._marks = draw()
        self._allowed: tuple[str, ...] | None = None
        #: The allow-list of this run, with what the operator adds to it.
        self._given: tuple[str, ...] = ()
        self._answers: dict[str, tuple[list[Endpoint], tuple[str, ...]]] = {}
        #: Each unit's main process after the restart inside the capture, and how often systemd had started it again.
        self._restarted: dict[str, tuple[str, str]] = {}

    @staticmethod
    def is_here() -> bool:
        """Whether systemd runs this host and a part of a site on it."""
        return Path("/run/systemd/system").is_dir() and bool(
            _units(GATEWAYS, "--state=active") or _units(TARGET, "--state=active")
        )

    # --- what runs ---

    def units(self) -> list[str]:
        """Return the site's services, whether they run or not, in the order in which they are restarted."""
        parts = show(TARGET, "ConsistsOf").get("ConsistsOf", "").split()
        found = [u for u in dict.fromkeys((*parts, *_units(GATEWAYS, "--all"))) if u.endswith(".service")]
        return sorted(filter(_is_service, found), key=lambda u: (_place(component_name(u)), u))

    def components(self) -> list[Component]:
        """List the services with the users that their processes run as; nothing if none of them runs."""
        units = self.units()
        if not any(is_up(show(u, "ActiveState")) for u in units):
            return []
        found = []
        for unit in units:
            # Between two attempts of systemd to start it, a unit has no process, and will have one in a moment.
            for uid in sorted(users_of(show(unit, "ControlGroup").get("ControlGroup", "")) or configured_user(unit)):
                found.append(Component(component_name(unit), unit, uid))
        return found

    def _pids(self) -> dict[str, int]:
        return {unit: int(show(unit, "MainPID").get("MainPID", "0")) for unit in self.units()}

    # --- what is configured ---

    def _asked(self, unit: str, pid: int) -> tuple[list[Endpoint], tuple[str, ...]]:
        """Ask a gateway once: its program takes a second to start."""
        if unit not in self._answers:
            self._answers[unit] = endpoints.of_gateway(component_name(unit), pid)
        return self._answers[unit]

    def allowed(self) -> tuple[str, ...]:
        """Return the site's allow-list: that of the gateways, and what the packet filter lets out by its rules."""
        if self._allowed is None:
            texts: list[str] = []
            for unit, pid in self._pids().items():
                if unit.startswith("moat-gateway@") and pid:
                    texts += self._asked(unit, pid)[1]
            self._allowed = tuple(dict.fromkeys((*texts, *systemd_probes.let_out())))
        return self._allowed

    def endpoints(self) -> list[Endpoint]:
        """Ask the gateways, and read the rest's configuration, environment and arguments."""
        allow = AllowList(self.allowed())
        found: list[Endpoint] = []
        for unit, pid in self._pids().items():
            name = component_name(unit)
            if not pid:
                continue
            environ = endpoints.environment_of(pid)
            if unit.startswith("moat-gateway@"):
                found += self._asked(unit, pid)[0]
            elif name == "minio":
                found += endpoints.of_minio(name, environ)
            elif name in ("valkey", "redis") and VALKEY_CONF.exists():
                found += endpoints.of_valkey(name, VALKEY_CONF.read_text("utf-8", "replace"), allow)
            elif name == "nginx" and NGINX_CONF.exists():
                found += endpoints.of_nginx(name, endpoints.nginx_text(NGINX_CONF), allow)
            found += endpoints.of_environment(name, environ, allow)
            found += endpoints.of_arguments(name, endpoints.arguments_of(pid)[1:], allow)
        return list(dict.fromkeys(found))

    def facts(self) -> dict[str, str]:
        """Return what is worth knowing about the host and is no part of the verdict."""
        return endpoints.host_facts()

    def subject(self) -> dict[str, str]:
        """Return what is in force."""
        return subject.of_systemd()

    # --- the capture ---

    def layers(self, allowed: Sequence[str]) -> list[Layer]:
        """Return the layers for services of this host."""
        self._given = tuple(allowed)
        entries = parse_all(allowed)
        # Names first: in the moment between the two a question for a name on the allow-list would be refused.
        return [
            DnsLayer(entries, self._marks),
            PacketsLayer(entries, self._marks),
            SyscallsLayer(entries, self._marks),
        ]

    def restart(self, components: Sequence[Component]) -> None:
        """Restart every service that is not stopped; systemd answers when each says that it is ready."""
        units = [u for u in dict.fromkeys(c.unit for c in components) if is_up(show(u, "ActiveState"))]
        self._console.info("+ systemctl restart " + " ".join(units))
        self._console.info("this takes as long as running streams are given, and a gateway needs to start")
        systemctl("restart", *units, seconds=_RESTART_SECONDS)
        for unit in units:
            state = show(unit, "ActiveState", "SubState", "Result")
            if state.get("ActiveState") != "active":
                raise EgressUnproven(
                    f"{unit} does not run after its restart",
                    found=", ".join(f"{k}={v}" for k, v in state.items()),
                    expected="ActiveState=active",
                    hint=f"read `journalctl -u {unit} -n 50`; the capture has been undone",
                )
        self._restarted = {unit: _main(show(unit, "MainPID", "NRestarts")) for unit in units}
        # The answers were those of the processes before: a file that was changed since takes force only now.
        self._answers, self._allowed = {}, None
        # nginx sets a gateway aside that was away for a moment; the first request must not meet that.
        deadline = time.monotonic() + _READY_SECONDS
        target = self._target()
        while target.https_port and time.monotonic() < deadline and not systemd_probes.ready(target):
            time.sleep(0.5)

    def changes(self) -> list[str]:
        """Say which services did not run from the restart to this moment."""
        found = []
        for unit in dict.fromkeys((*self.units(), *self._restarted)):
            now = show(unit, "ActiveState", "SubState", "Result", "MainPID", "NRestarts")
            before = self._restarted.get(unit)
            state = ", ".join(f"{key}={now.get(key)}" for key in ("ActiveState", "SubState", "Result"))
            if now.get("ActiveState") not in _RUNNING or now.get("MainPID") == "0":
                word = "does not run" if before is None else "ended during the capture"
                found.append(f"{unit} {word} ({state}): what it would try was not seen")
            elif before is not None and _main(now) != before:
                pids = f"main process {before[0]}, then {_main(now)[0]}"
                found.append(f"{unit} was started again during the capture ({pids}): read `journalctl -u {unit} -n 50`")
            elif before is None and self._restarted:
                found.append(f"{unit} began to run during the capture: it was not watched from its start")
        return found

    def _target(self) -> Target:
        units = [u for u in self.units() if is_up(show(u, "ActiveState"))]
        address, port = entrance() if any(component_name(u) == "nginx" for u in units) else ("127.0.0.1", 0)
        gateways = []
        for unit in units:
            if m := re.fullmatch(r"moat-gateway@(.+)\.service", unit):
                where = gateway_address(m[1])
                if where is not None:
                    gateways.append(Gateway(f"gateway-{m[1]}", *where, Path(f"/run/moat/gateway-{m[1]}/admin.sock")))
        ca = CA_FILE if CA_FILE.exists() else None
        return Target(address, port, ca, self._key_file, tuple(gateways), every_model=self._key_file == MASTER_KEY)

    def requests(self) -> list[RequestResult]:
        """Send a first request of every kind through the entrance, and one to each gateway, as far as they are here."""
        return first_requests(self._target())

    def probes(self) -> list[Probe]:
        """Prove that the rules are in force."""
        return systemd_probes.probes(self.units(), self._given)

    def rules(self) -> str:
        """Return the site's packet filter rules in force."""
        return systemd_probes.rules()


def _units(pattern: str, *which: str) -> list[str]:
    with contextlib.suppress(EgressUnproven):
        text = systemctl("list-units", pattern, "--no-legend", "--plain", *which)
        return [line.split()[0] for line in text.splitlines() if line.strip()]
    return []


def is_up(state: Mapping[str, str]) -> bool:
    """Whether a unit runs, or is about to."""
    return state.get("ActiveState") in (*_RUNNING, "activating")


def _is_service(unit: str) -> bool:
    """Whether this is a unit that there is (others may only refer to it), and one that goes on running."""
    state = show(unit, "LoadState", "ActiveState", "Type")
    return (state.get("LoadState") == "loaded" or is_up(state)) and state.get("Type") != "oneshot"


def _main(state: Mapping[str, str]) -> tuple[str, str]:
    return state.get("MainPID", "0"), state.get("NRestarts", "0")


def configured_user(unit: str) -> set[int]:
    """Return the user that a unit's processes would have; nothing if the host does not know it."""
    name = show(unit, "User").get("User") or "root"
    try:
        return {int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid}
    except KeyError:
        return set()


def _place(name: str) -> int:
    return next((i for i, word in enumerate(_ORDER) if name.startswith(word)), 1)


def users_of(group: str, proc: Path = Path("/proc")) -> set[int]:
    """Return the users of the processes in a unit's control group, as systemd names it; nothing for an empty name.

    The unit's name alone would not do: a container on this host may have a unit of the same name.
    """
    if not group.strip("/"):
        return set()
    mark = re.compile(r"^\d+:[^:]*:" + re.escape(group) + r"(?:/|$)", re.MULTILINE)
    found = set()
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark.search((entry / "cgroup").read_text("utf-8", "replace")):
                    found.add(entry.stat().st_uid)
    return found


def entrance(conf: Path = NGINX_CONF) -> tuple[str, int]:
    """Return where nginx listens with TLS, as seen from this host; port 0 if nowhere."""
    try:
        text = endpoints.nginx_text(conf)
    except OSError:
        return "127.0.0.1", 0
    for name, args, _ in endpoints.nginx_directives(text):
        if name == "listen" and "ssl" in args and (m := re.fullmatch(r"(?:(.*):)?(\d+)", args[0])):
            address = (m[1] or "0.0.0.0").strip("[]")  # noqa: S104 - nginx's word for every address
            return {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}.get(address, address), int(m[2])  # noqa: S104
    return "127.0.0.1", 0


def gateway_address(instance: str, folder: Path = Path("/etc/moat/gateway")) -> tuple[str, int] | None:
    """Return where a gateway listens, from the files that its unit reads."""
    values: dict[str, str] = {}
    for name in ("common.env", f"{instance}.env"):
        with contextlib.suppress(OSError):
            values |= _environment_file((folder / name).read_text("utf-8", "replace"))
    port = values.get("MOAT_PORT", "")
    host = values.get("MOAT_HOST", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return (host, int(port)) if port.isdecimal() else None


def _environment_file(text: str) -> Mapping[str, str]:
    lines = (line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("'\"") for key, value in lines}
