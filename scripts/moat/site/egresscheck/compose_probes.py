# SPDX-License-Identifier: Apache-2.0
"""Proofs about a Compose deployment that are no capture: the ways that must be closed are tried.

Each try is made inside a container's network namespace, by a process of ours as root (so that it is not
mistaken for the container's own). What is tried is the way itself: that the container's processes do not
know it is no answer. Towards the outside it is only tried while the capture's table is in force, which
drops at the very end what the site's own rules let through.
"""

from __future__ import annotations

import errno
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from moat.console import Console
from moat.site.egresscheck import bridges, leftovers
from moat.site.egresscheck.bridges import Bridge
from moat.site.egresscheck.containers import Deployment, Service, device_of
from moat.site.egresscheck.marks import Marks
from moat.site.egresscheck.model import NotAvailable, Probe
from moat.site.egresscheck.namespaces import inside, ipv6_of, network_of
from moat.site.firewall import FAMILIES, Firewall

_TRY_SECONDS: Final = 2.0


def all_probes(deployment: Deployment, console: Console, marks: Marks, own: set[tuple[str, int]]) -> list[Probe]:
    """Make every probe.

    Args:
        deployment: what runs.
        console: of the command.
        marks: where packets to the outside are aimed.
        own: is told address and port of every packet that the probes send, before it is sent.
    """
    services = [s for s in deployment.services().values() if s.pid]
    found = [_firewall(console), *_networks(deployment), _watched(deployment)]
    for bridge in deployment.bridges():
        sender = next((s for s in services if _on(s, bridge)), None)
        if sender is None:
            found.append(Probe(f"ways out of {bridge.device}", False, "no container runs on it", "one to try from"))
            continue
        found += _host_services(bridge, sender, own)
        found.append(_outside(bridge, sender, marks))
    found.append(_ipv6(services))
    return found


def _on(service: Service, bridge: Bridge) -> bool:
    prefix = bridge.gateway.rpartition(".")[0] + "."
    return any(a.startswith(prefix) for a in service.addresses.values())


# --- what is set ---


def _firewall(console: Console) -> Probe:
    """The rules of `moat firewall`, in both families."""
    missing = []
    for family in FAMILIES:
        status = Firewall(console).status(family)
        if status.available:
            missing += [f"{family.name}: {m}" for m in status.missing]
        elif family.name == "ipv4":
            missing.append(f"{family.name}: {status.why}")
    name = "the rules of `moat firewall` are in force"
    return Probe(name, not missing, "missing: " + "; ".join(missing) if missing else "all of them", "all of them")


def _networks(deployment: Deployment) -> list[Probe]:
    """What the engine itself closes: an internal network, or one without address translation."""
    found = []
    for n in deployment.networks():
        options = n.get("Options") or {}
        masquerade = options.get("com.docker.network.bridge.enable_ip_masquerade", "true") != "false"
        closed = bool(n.get("Internal")) or not masquerade
        words = "internal" if n.get("Internal") else "no masquerade" if closed else "masquerade to the outside"
        found.append(
            Probe(f"the engine gives {n['Name']} no way to the outside", closed, words, "internal, or no masquerade")
        )
        if n.get("EnableIPv6"):
            found.append(Probe(f"{n['Name']} has no IPv6", False, "IPv6 is on", "off"))
    return found


def _watched(deployment: Deployment) -> Probe:
    """A network without a bridge (the host's own, macvlan, ipvlan, an overlay) has ways out that no rule here meets."""
    bridges = {b.device: b for b in deployment.bridges()}
    drivers = {str(n["Name"]): n for n in deployment.every_network()}
    return watched(deployment.services().values(), drivers, bridges)


def watched(
    services: Iterable[Service], networks: Mapping[str, Mapping[str, Any]], bridges: Mapping[str, Bridge]
) -> Probe:
    """Judge that every network of every service is one whose packets are watched.

    Args:
        services: of the site.
        networks: what the engine says of each network, by name.
        bridges: the watched ones, by device.
    """
    outside = []
    for s in services:
        for name in s.networks:
            n = networks.get(name, {})
            driver = str(n.get("Driver", "unknown"))
            if driver == "null" or (driver == "bridge" and device_of(n) in bridges):
                continue  # `none` has loopback alone
            outside.append(f"{s.name} on {name} ({driver})")
    return Probe(
        name="every network of every service is a bridge that is watched",
        ok=not outside,
        found=", ".join(outside) or "all of them",
        expected="bridges with IPv4 addresses, and nothing else (network_mode, macvlan, ipvlan, overlay)",
    )


def _ipv6(services: list[Service]) -> Probe:
    """IPv6 in the containers: nothing but loopback."""
    able = [s.name for s in services if ipv6_of(s.pid)]
    found = "an IPv6 address in " + ", ".join(able) if able else "loopback only, in every container"
    return Probe("containers have no IPv6", not able, found, "loopback only")


# --- what is tried ---


def _host_services(bridge: Bridge, sender: Service, own: set[tuple[str, int]]) -> list[Probe]:
    """A service of the host, opened by us on the bridge's own address, must not be reached from a container."""
    found = []
    for kind, word in ((socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")):
        name = f"{sender.name} cannot reach the host's services by {bridge.device} ({word})"
        expected = "no connection, where the host itself has one" if word == "tcp" else "no datagram arrives"
        try:
            with socket.socket(socket.AF_INET, kind) as listener:
                listener.bind((bridge.gateway, 0))
                if kind == socket.SOCK_STREAM:
                    listener.listen()
                listener.settimeout(_TRY_SECONDS)
                port = listener.getsockname()[1]
                own.add((bridge.gateway, port))
                # The listener answers the host itself: otherwise silence would prove nothing.
                if _arrives(listener, kind, bridge.gateway, port, None) != "reached":
                    found.append(Probe(name, False, "the host does not reach its own service", expected))
                    continue
                result = _arrives(listener, kind, bridge.gateway, port, network_of(sender.pid))
                found.append(Probe(name, result != "reached", result, expected))
        except OSError as e:
            found.append(Probe(name, False, f"could not be tried: {e}", expected))
    return found


def _arrives(listener: socket.socket, kind: socket.SocketKind, address: str, port: int, namespace: Path | None) -> str:
    send = partial(_send, kind, address, port)
    result = inside(namespace, send) if namespace else send()
    if kind == socket.SOCK_STREAM:
        return "reached" if result == "connected" else f"refused: {result}"
    listener.settimeout(_TRY_SECONDS / 4)
    heard = 0
    try:
        while True:
            listener.recv(16)
            heard += 1
    except TimeoutError:
        return "reached" if heard else f"nothing arrived ({result})"


def _send(kind: socket.SocketKind, address: str, port: int) -> str:
    """Connect, or send one datagram; return ``connected``, ``sent`` or the error's name."""
    with socket.socket(socket.AF_INET, kind) as s:
        s.settimeout(_TRY_SECONDS)
        try:
            s.connect((address, port))
            if kind == socket.SOCK_STREAM:
                return "connected"
            s.send(b"moat probe")
            time.sleep(0.05)  # a refusal comes back as an error of the socket
            s.send(b"moat probe")
        except TimeoutError:
            return "no answer"
        except OSError as e:
            return errno.errorcode.get(e.errno or 0, str(e))
    return "sent"


def _outside(bridge: Bridge, sender: Service, marks: Marks) -> Probe:
    """A packet to the outside must be refused before the way out, although the container knows a way to the host."""
    name = f"nothing from {sender.name} leaves by {bridge.device}, masquerade included"
    expected = "the packets arrive at the host, and none of them at the way out"
    try:
        before = bridges.counters()
    except NotAvailable as e:
        return Probe(name, False, f"not tried, because the capture's own table is not in force: {e}", expected)
    try:
        with _way(sender, bridge, marks.ipv4):
            words = [
                inside(network_of(sender.pid), partial(_send, kind, marks.ipv4, marks.port))
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
            ]
        after = bridges.counters()
    except (OSError, NotAvailable) as e:
        return Probe(name, False, f"could not be tried: {e}", expected)
    seen = sum(after[k] - before.get(k, 0) for k in after if k.startswith("from_"))
    left = after["left"] - before["left"]
    found = f"{seen} packets arrived at the host, {left} at the way out (tcp: {words[0]}, udp: {words[1]})"
    return Probe(name, seen > 0 and left == 0 and "connected" not in words, found, expected)


@contextmanager
def _way(sender: Service, bridge: Bridge, address: str) -> Iterator[None]:
    """Give a container a way to one address by a bridge, for a moment: a missing one must not be what holds."""
    ip = ["nsenter", "--target", str(sender.pid), "--net", "--", "ip", "route"]
    route = [f"{address}/32", "via", bridge.gateway]
    note = leftovers.note_way(sender.pid, address)
    done = subprocess.run([*ip, "add", *route], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"no way could be made: {done.stderr.strip()[-200:]}")
    try:
        yield
    finally:
        subprocess.run([*ip, "del", *route], capture_output=True, check=False)
        leftovers.strike(note)


def rules_in_force() -> str:
    """Return the host's own packet filter rules, without the capture's."""
    parts = []
    for argv in (["iptables-save", "-c", "-t", "filter"], ["ip6tables-save", "-c", "-t", "filter"]):
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except OSError as e:
            parts.append(f"# {argv[0]}: {e.strerror}")
            continue
        lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
        if len(lines) > 2 or done.returncode != 0:
            parts += [f"# {' '.join(argv)}", *(lines or [f"# {done.stderr.strip()[:200]}"]), ""]
    return "\n".join(parts)
