# SPDX-License-Identifier: Apache-2.0
"""Runs a program in a network namespace without a way out, behind a name server of ours, and reports what it tried.

``run_isolated(SCENARIO, ...)`` starts this file under ``unshare --net --mount``. Inside: only the loopback, a private
``/etc/resolv.conf`` that names 127.0.0.53, a name server there that counts queries and drops them (the usual air gap)
or answers every name with 198.51.100.7 (a sinkhole), a model server, and the program, optionally under strace.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SINKHOLE = "198.51.100.7"
NAME_SERVER = "127.0.0.53"
START_TIMEOUT = 240.0


@dataclass
class Report:
    """What a run showed.

    Attributes:
        seconds_to_ready: from the start of the process to the first 200; ``None`` if it never came.
        queries: names that were asked for, in order.
        outside: destinations of connect and send calls beyond the loopback, as strace saw them.
        calls: results of the requests made, by label: status, seconds.
        status: the admin socket's ``/status`` at the end, for a gateway.
        output: the last lines that the program wrote.
    """

    seconds_to_ready: float | None = None
    queries: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    output: str = ""


def run_isolated(
    program: str, folder: Path, python: Path, *, names: str = "drop", strace: bool = True, calls: str = "all"
) -> Report:
    """Run one scenario in its own namespaces.

    Args:
        program: ``gateway``, ``stock`` (LiteLLM's own command) or ``attempts`` (a list of ways out, guard installed),
            or ``attempts-unguarded`` (the same without it).
        folder: an empty folder.
        python: interpreter of the gateway's environment.
        names: ``drop`` or ``sinkhole``.
        strace: trace the program (it starts about twice as slowly).
        calls: ``all``, or ``none`` to stop once it is ready.
    """
    folder.mkdir(parents=True, exist_ok=True)
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    argv = ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child", sys.executable, __file__]
    argv += [program, str(folder), str(python), names, "strace" if strace else "plain", calls]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, cwd=ROOT)
    if done.returncode != 0:
        raise AssertionError(f"{program} could not be run in isolation:\n{done.stderr[-4000:]}")
    return Report(**json.loads(done.stdout))


# --- inside the namespaces ---


class NameServer:
    """Counts queries on 127.0.0.53 and drops them, or answers with the sinkhole's address."""

    def __init__(self, answer: bool) -> None:
        self.names: list[str] = []
        self._answer = answer
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((NAME_SERVER, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            data, sender = self._socket.recvfrom(4096)
            name, end = self._name(data)
            self.names.append(name)
            if not self._answer:
                continue
            question, kind = data[12 : end + 4], struct.unpack("!H", data[end : end + 2])[0]
            is_a = kind == 1
            header = data[:2] + struct.pack("!HHHHH", 0x8180, 1, int(is_a), 0, 0)
            record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton(SINKHOLE) if is_a else b""
            self._socket.sendto(header + question + record, sender)

    @staticmethod
    def _name(data: bytes) -> tuple[str, int]:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode("ascii", "replace"))
            at += data[at] + 1
        return ".".join(labels), at + 1


def _private_resolver(folder: Path) -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for name, text in (
        ("resolv.conf", f"nameserver {NAME_SERVER}\n"),
        ("nsswitch.conf", "passwd: files\nhosts: files dns\n"),
    ):
        mine = folder / name
        mine.write_text(text)
        target = Path("/etc", name).resolve()
        if target.exists():
            subprocess.run(["mount", "--bind", str(mine), str(target)], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def outside_of(trace: str) -> list[str]:
    """Return the destinations beyond the loopback in strace's output, as ``call address:port``."""
    found = []
    for line in trace.splitlines():
        call = re.match(r"(?:\d+ +)?(?:\[pid +\d+\] +)?(\w+)\(", line)
        port = re.search(r"sin6?_port=htons\((\d+)\)", line)
        for text in re.findall(r'sin_addr=inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', line):
            address = ipaddress.ip_address(text[0] or text[1])
            address = getattr(address, "ipv4_mapped", None) or address
            if not (address.is_loopback or address.is_unspecified):
                found.append(f"{call.group(1) if call else '?'} {address}:{port.group(1) if port else '?'}")
    return found


def _call(port: int, label: str, report: Report, method: str, path: str, key: str, body: Any = None) -> None:
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request(method, path, json.dumps(body).encode() if body is not None else None, headers)
        response = connection.getresponse()
        raw = response.read()
        status: int | str = response.status
    except (OSError, http.client.HTTPException) as e:
        status, raw = type(e).__name__, b""
    finally:
        connection.close()
    report.calls[label] = {
        "status": status,
        "seconds": round(time.monotonic() - begun, 2),
        "body": raw[-400:].decode("utf-8", "replace"),
    }


def _all_calls(port: int, key: str, report: Report) -> None:
    message = [{"role": "user", "content": "hello there"}]
    chat = {"model": "small", "messages": message}
    _call(port, "chat", report, "POST", "/v1/chat/completions", key, chat)
    _call(port, "stream", report, "POST", "/v1/chat/completions", key, {**chat, "stream": True})
    _call(port, "models", report, "GET", "/v1/models", key)
    _call(port, "info", report, "GET", "/model/info", key)
    for label, model in (
        ("count-llama-3", "llama-3-8b"),
        ("count-llama-2", "meta-llama/Llama-2-7b"),
        ("count", "small"),
    ):
        body = {"model": model, "messages": message}
        _call(port, label, report, "POST", "/utils/token_counter", key, body)
    for label, path in (("ui", "/ui/"), ("docs", "/docs"), ("blog", "/public/litellm_blog_posts"), ("start", "/")):
        _call(port, label, report, "GET", path, key)
    # LiteLLM fetches the picture itself for a provider that takes no URL.
    picture = {"type": "image_url", "image_url": {"url": "http://pictures.example/cat.png"}}
    content = [{"role": "user", "content": [{"type": "text", "text": "what is it"}, picture]}]
    _call(port, "picture", report, "POST", "/v1/chat/completions", key, {"model": "llava", "messages": content})


@contextmanager
def _model_server() -> Iterator[str]:
    sys.path.insert(0, str(ROOT))
    from tests.integration.gateway.upstream import Upstream

    with Upstream() as server:
        yield server.base


def _config(base: str) -> str:
    models = {"small": "openai/up", "llama-3-8b": "openai/llama-3-8b", "llava": "ollama/llava"}
    entries = [
        {"model_name": name, "litellm_params": {"model": model, "api_base": base, "api_key": "x"}}
        for name, model in models.items()
    ]
    return json.dumps({"model_list": entries})


def _wait_ready(process: subprocess.Popen[bytes], port: int, path: str, begun: float) -> float | None:
    while process.poll() is None and time.monotonic() - begun < START_TIMEOUT:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return round(time.monotonic() - begun, 2)
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    return None


def _trace_prefix(folder: Path, mode: str) -> list[str]:
    if mode != "strace":
        return []
    return [
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=connect,sendto,sendmsg,sendmmsg",
        "-e",
        "signal=none",
        "-o",
        str(folder / "trace"),
    ]


def _serve_and_ask(program: str, folder: Path, python: str, mode: str, calls: str, report: Report) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.integration.gateway.harness import Site

    with _model_server() as base:
        site = Site(folder / "site", Path(python)).prepare(base)
        site.write("config.yaml", _config(base))
        if program == "gateway":
            argv, environment, probe = site.argv("serve"), site.environment, "/_moat/ready"
        else:
            # LiteLLM's own command, as its documentation starts it.
            start = "from litellm.proxy.proxy_cli import run_server; run_server()"
            argv = [python, "-c", start, "--config", str(site.folder / "config.yaml"), "--port", str(site.port)]
            argv += ["--host", "127.0.0.1"]
            environment = {
                "PATH": os.environ["PATH"], "HOME": str(folder), "LITELLM_MASTER_KEY": site.master,
                "TMPDIR": str(site.folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1",
            }  # fmt: skip
            probe = "/health/liveliness"
        begun = time.monotonic()
        with (folder / "output").open("wb") as out:
            process = subprocess.Popen(
                [*_trace_prefix(folder, mode), *argv], env=environment, cwd=folder, stdout=out, stderr=out
            )
        report.seconds_to_ready = _wait_ready(process, site.port, probe, begun)
        if report.seconds_to_ready is not None and calls == "all":
            _all_calls(site.port, site.master, report)
            if program == "gateway":
                done = site.command("status", "--json")
                report.status = json.loads(done.stdout)
        if process.poll() is None:
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            for pid in [int(c) for c in children] if mode == "strace" else [process.pid]:
                os.kill(pid, signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here: ask, wait, insist."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _attempts(program: str, folder: Path, python: str, mode: str, report: Report) -> None:
    argv = [python, str(Path(__file__).with_name("attempts.py")), "guarded" if program == "attempts" else "open"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT / "images/gateway")}
    done = subprocess.run(
        [*_trace_prefix(folder, mode), *argv], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    (folder / "output").write_text(done.stderr)
    report.calls = json.loads(done.stdout)


def _inside(argv: Sequence[str]) -> int:
    program, folder_name, python, names, mode, calls = argv
    folder = Path(folder_name)
    _private_resolver(folder)
    server = NameServer(answer=names == "sinkhole")
    report = Report()
    if program in ("gateway", "stock"):
        _serve_and_ask(program, folder, python, mode, calls, report)
    else:
        _attempts(program, folder, python, mode, report)
    report.queries = list(server.names)
    trace = folder / "trace"
    report.outside = outside_of(trace.read_text(errors="replace")) if trace.exists() else []
    report.output = (folder / "output").read_text(errors="replace")[-3000:]
    print(json.dumps(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(_inside(sys.argv[1:]))
