# SPDX-License-Identifier: Apache-2.0
"""Proves what nginx's configuration does when gateways fail, with the shipped nginx image and real connections.

The container has no network but a loopback. The gateways' places are taken by servers of this test, whose sockets are
opened inside the container's network namespace: they count what reaches them, break off, hang or are simply not there.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moat.site.deployment import SWITCH, write_pair, write_together

ROOT = Path(__file__).resolve().parents[3]
NGINX_UID = 10101
CLONE_NEWNET = 0x40000000
BODY = json.dumps({"model": "m", "messages": []}).encode()
PATIENCE = 60  # seconds: for what comes at once, on a machine that is busy

Handler = Callable[[socket.socket, bytes], None]


def image() -> str:
    done = subprocess.run(
        ["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", "moat/nginx"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = done.stdout.split()
    if not found:
        pytest.skip("the engine has no image moat/nginx: run `make demo` first")
    return found[0]


def inside(pid: int, make: Callable[[], Any]) -> Any:
    """Run ``make`` in a thread that is in the network namespace of ``pid``; a socket keeps its namespace."""
    result: list[Any] = []

    def work() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)
            result.append(make())
        except BaseException as e:
            result.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def until(what: str, check: Callable[[], Any]) -> Any:
    """Return the first true value of ``check``."""
    deadline = time.monotonic() + PATIENCE
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.02)
    return found


def read_request(connection: socket.socket) -> bytes:
    """Return head and body of one request, or nothing if the connection was closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = connection.recv(65536)
        if not block:
            return b""
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answer(body: bytes, headers: str = "", status: str = "200 OK") -> Handler:
    def handle(connection: socket.socket, _: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        connection.sendall(head.encode() + body)

    return handle


def break_off(connection: socket.socket, _: bytes) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def stream(pieces: int, turns: threading.Semaphore | None = None, *, whole: bool = True) -> Handler:
    """Answer with a stream of so many pieces; each waits for its turn, where there are turns."""

    def handle(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for i in range(pieces):
            if turns is not None and not turns.acquire(timeout=10 * PATIENCE):
                return
            data = f"data: {i}\n\n".encode()
            connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if whole:
            connection.sendall(b"0\r\n\r\n")
        else:
            connection.shutdown(socket.SHUT_RDWR)

    return handle


@dataclass
class Gateway:
    """A server in a gateway's place; ``requests`` are the raw ones that reached it."""

    listener: socket.socket
    handle: Handler
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            try:
                while request := read_request(connection):
                    self.requests.append(request)
                    self.handle(connection, request)
            except OSError:
                pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate of this host's name and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    argv += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*argv, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


class Site:
    """The shipped nginx in a container without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "compose" / "nginx", folder / "nginx")
        upstream = folder / "nginx" / "upstream.conf"
        text = upstream.read_text()
        assert text.count("172.30.242.1") == 2
        upstream.write_text(text.replace("172.30.242.11:", "127.0.0.1:").replace("172.30.242.12:", "127.0.0.1:"))
        for name in ("before", "switch/now", "switch/before"):
            (folder / "tls" / name).mkdir(parents=True)
        (folder / SWITCH).symlink_to("now")
        cert, key = make_pair(folder, "first")
        cert.rename(folder / "tls/cert.pem")
        key.rename(folder / "tls/key.pem")
        for path in (folder / "tls").rglob("*.pem"):
            os.chown(path, NGINX_UID, NGINX_UID)
        argv = ["docker", "run", "--detach", "--network", "none", "--read-only", "--cap-drop", "ALL"]
        argv += ["--user", f"{NGINX_UID}:{NGINX_UID}", "--security-opt", "no-new-privileges:true", "--tmpfs", "/tmp"]
        argv += ["--tmpfs", f"/var/cache/nginx:uid={NGINX_UID}", "-v", f"{folder}/nginx:/etc/nginx/moat:ro"]
        argv += ["-v", f"{folder}/tls:/run/secrets:ro", image()]
        argv += ["-c", "/etc/nginx/moat/nginx.conf", "-e", "/dev/stderr", "-g", "daemon off;"]
        self.gateways: list[Gateway] = []
        self.id = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        try:
            self.pid = int(self._docker("inspect", "--format", "{{.State.Pid}}", self.id))
            self._wait()
        except BaseException:
            self.close()
            raise

    def _docker(self, *words: str) -> str:
        done = subprocess.run(["docker", *words], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                inside(self.pid, lambda: socket.create_connection(("127.0.0.1", 8443), 1)).close()
                return
            except OSError:
                assert time.monotonic() < deadline, self.logs()
                time.sleep(0.05)

    def logs(self) -> str:
        return self._docker("logs", self.id)

    def logged(self, request_id: str) -> dict[str, Any]:
        """Return the line of the access log for a request; it is written when the answer is out."""

        def found() -> list[dict[str, Any]]:
            lines = [json.loads(x) for x in self.logs().splitlines() if x.startswith("{")]
            return [x for x in lines if x["request_id"] == request_id]

        return dict(until(f"a line of {request_id}", found)[-1])

    def workers(self) -> dict[int, str]:
        """Return nginx's worker processes by their number: what each calls itself."""
        found = {}
        for process in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with suppress(OSError):
                found[int(process)] = Path(f"/proc/{process}/cmdline").read_bytes().strip(b"\0").decode()
        return found

    def reload(self) -> None:
        """Reload, and wait until no worker of before takes connections any more."""
        before = self.workers()
        self._docker("kill", "--signal", "HUP", self.id)

        def changed() -> bool:
            taking = {n for n, name in self.workers().items() if "shutting down" not in name}
            return len(taking) == len(before) and not taking & set(before)

        until("new workers alone", changed)

    def gateway(self, port: int, handle: Handler) -> Gateway:
        made = Gateway(inside(self.pid, lambda: socket.create_server(("127.0.0.1", port))), handle)
        threading.Thread(target=made.serve, daemon=True).start()
        self.gateways.append(made)
        return made

    def connect(self, *, tls: bool = True) -> http.client.HTTPConnection:
        port = 8443 if tls else 8080
        raw = inside(self.pid, lambda: socket.create_connection(("127.0.0.1", port), PATIENCE))
        connection = http.client.HTTPConnection("localhost", port)
        if tls:
            context = ssl.create_default_context(cafile=str(self.folder / "tls/cert.pem"))
            raw = context.wrap_socket(raw, server_hostname="localhost")
        connection.sock = raw
        return connection

    def ask(
        self, method: str = "POST", path: str = "/v1/chat/completions", *, tls: bool = True, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect(tls=tls)
        connection.request(method, path, BODY if method == "POST" else None, headers)
        response = connection.getresponse()
        result = (response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return result

    def close(self) -> None:
        with ExitStack() as last_first:
            last_first.callback(self._docker, "rm", "--force", self.id)
            for gateway in self.gateways:
                last_first.callback(gateway.close)


def readable(folder: Path) -> Path:
    """Open a folder to nginx's user; pytest's are for root alone."""
    for place in (folder, folder.parent, folder.parent.parent):
        place.chmod(0o755)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A container of its own, for what leaves something behind: a gateway that is set aside, a file, a reload."""
    with closing(Site(readable(tmp_path))) as made:
        yield made


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with closing(Site(readable(tmp_path_factory.mktemp("healthy")))) as made:
        for port in (4001, 4002):
            made.gateway(port, answer(b"{}"))
        yield made


@pytest.fixture
def healthy(one_for_all: Site) -> Site:
    """Two gateways that answer, and have not been asked yet; for tests that leave nothing behind."""
    for gateway in one_for_all.gateways:
        gateway.handle = answer(b"{}")
        gateway.requests.clear()
    return one_for_all


def reached(site: Site) -> list[bytes]:
    """Return the requests that reached a gateway."""
    return [r for gateway in site.gateways for r in gateway.requests]


def error_code(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


def test_a_completion_is_sent_to_the_other_gateway_when_one_ends_before_a_byte_of_its_answer(site: Site) -> None:
    first, second = site.gateway(4001, break_off), site.gateway(4002, answer(b"{}"))
    for _ in range(2):
        assert site.ask()[0] == 200
    assert len(first.requests) == 1  # then it is left alone for a while
    assert len(second.requests) == 2


def test_a_completion_is_sent_twice_at_most(site: Site) -> None:
    first, second = site.gateway(4001, break_off), site.gateway(4002, break_off)
    status, headers, body = site.ask()
    assert (status, error_code(body)) == (502, "gateway_unreachable")
    assert headers["retry-after"] == "1"
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_completion_on_which_a_gateway_has_worked_for_long_is_not_sent_again(site: Site) -> None:
    def late(connection: socket.socket, request: bytes) -> None:
        time.sleep(5.5)
        break_off(connection, request)

    first, second = site.gateway(4001, late), site.gateway(4002, late)
    assert site.ask()[0] == 502
    assert len(first.requests) + len(second.requests) == 1


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/audio/speech", "/v1/responses/resp_1/cancel"])
def test_a_post_that_is_no_completion_is_never_sent_again(site: Site, path: str) -> None:
    first, second = site.gateway(4001, break_off), site.gateway(4002, break_off)
    status, headers, body = site.ask(path=path)
    assert (status, error_code(body)) == (502, "gateway_unreachable")
    assert headers["retry-after"] == "1"
    assert len(first.requests) + len(second.requests) == 1


def test_a_get_is_sent_to_the_other_gateway_when_one_breaks_off(site: Site) -> None:
    # The control of the test above: with a request that may be repeated, both are asked.
    first, second = site.gateway(4001, break_off), site.gateway(4002, break_off)
    assert site.ask("GET", "/v1/models")[0] == 502
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_post_goes_to_the_other_gateway_when_one_is_not_there(site: Site) -> None:
    only = site.gateway(4002, answer(b"{}"))
    for _ in range(6):
        assert site.ask()[0] == 200
    assert len(only.requests) == 6


def test_without_any_gateway_the_answer_says_so_in_openai_shape(site: Site) -> None:
    status, headers, body = site.ask()
    assert (status, error_code(body)) == (502, "gateway_unreachable")
    assert headers["content-type"] == "application/json"
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_chunks_of_a_stream_are_passed_on_when_they_come(site: Site) -> None:
    turns = threading.Semaphore(0)
    site.gateway(4001, stream(8, turns))
    site.gateway(4002, stream(8, turns))
    connection = site.connect()
    connection.request("POST", "/v1/chat/completions", BODY)
    response = connection.getresponse()
    for i in range(8):
        # The next one is sent when this one has arrived: with a buffer anywhere, this waits until it gives up.
        turns.release()
        assert response.readline() == b"data: %d\n" % i
        assert response.readline() == b"\n"
    assert response.read() == b""
    connection.close()


def test_a_stream_that_a_gateway_breaks_off_does_not_look_complete(site: Site) -> None:
    for port in (4001, 4002):
        site.gateway(port, stream(2, whole=False))
    connection = site.connect()
    connection.request("POST", "/v1/chat/completions", BODY)
    with pytest.raises(http.client.IncompleteRead):
        connection.getresponse().read()
    connection.close()


def test_a_running_stream_survives_a_reload_that_marks_its_gateway_down(site: Site) -> None:
    turns = threading.Semaphore(1)
    first, second = site.gateway(4001, stream(15, turns)), site.gateway(4002, stream(15, turns))
    connection = site.connect()
    connection.request("POST", "/v1/chat/completions", BODY)
    response = connection.getresponse()
    response.readline()
    busy, other, port = (first, second, 4001) if first.requests else (second, first, 4002)
    upstream = site.folder / "nginx" / "upstream.conf"
    upstream.write_text(upstream.read_text().replace(f"127.0.0.1:{port}", f"127.0.0.1:{port} down"))
    site.reload()
    before = len(other.requests)
    other.handle = answer(b"{}")
    for _ in range(4):
        assert site.ask()[0] == 200
    assert (len(busy.requests), len(other.requests) - before) == (1, 4)
    turns.release(14)  # it has been running all the while
    assert response.read().count(b"data:") == 14  # one was read above
    connection.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations"])
def test_answers_close_their_connections_while_a_reload_is_near(site: Site, path: str) -> None:
    one = site.gateway(4002, answer(b'{"a":1}'))
    assert site.ask(path=path)[1].get("connection") == "keep-alive"  # the control
    closing = site.folder / "nginx" / "closing"
    closing.touch(mode=0o644)
    status, headers, body = site.ask(path=path)
    assert (status, headers["connection"], body) == (200, "close", b'{"a":1}')
    assert one.requests[1].startswith(f"POST {path} HTTP/1.1".encode())
    assert one.requests[1].endswith(BODY)
    closing.unlink()
    assert site.ask(path=path)[1].get("connection") == "keep-alive"
    closing.touch(mode=0o644)
    one.handle = break_off
    status, headers, body = site.ask(path=path)
    assert (status, headers["connection"], error_code(body)) == (502, "close", "gateway_unreachable")


def served(site: Site, context: ssl.SSLContext) -> tuple[str, int]:
    """Ask once by a new connection; return the certificate that was shown, and the answer's status."""
    with (
        inside(site.pid, lambda: socket.create_connection(("127.0.0.1", 8443), PATIENCE)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
        connection.sendall(b"GET /_moat/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return ssl.DER_cert_to_PEM_cert(shown or b""), int(connection.makefile("rb").readline().split()[1])


def test_a_replaced_certificate_counts_from_the_next_connection_on_and_cuts_nothing(site: Site) -> None:
    turns = threading.Semaphore(1)
    site.gateway(4001, stream(80, turns))
    site.gateway(4002, stream(80, turns))
    pairs = [make_pair(site.folder, f"next-{n}") for n in range(5)]
    context = ssl.create_default_context()
    for cert in (site.folder / "tls/cert.pem", *(p[0] for p in pairs)):
        context.load_verify_locations(cert)
    running = site.connect()
    running.request("POST", "/v1/chat/completions", BODY)
    response = running.getresponse()
    assert response.readline() == b"data: 0\n"
    over, outcomes = threading.Event(), list[int | str]()

    def ask() -> None:
        while not over.is_set():
            try:
                outcomes.append(served(site, context)[1])
            except OSError as e:
                outcomes.append(str(e))

    # Short answers at the gateways' probes, so that it is the handshakes that count.
    for gateway in site.gateways:
        gateway.handle = answer(b"{}")
    askers = [threading.Thread(target=ask) for _ in range(2)]
    for thread in askers:
        thread.start()
    try:
        for n, (cert, key) in enumerate(pairs):
            until("some handshakes with each pair", lambda: len(outcomes) > 4 * (n + 1))  # noqa: B023
            write_pair(
                site.folder,
                [
                    (site.folder / "tls/cert.pem", cert.read_bytes(), 0o644, NGINX_UID),
                    (site.folder / "tls/key.pem", key.read_bytes(), 0o600, NGINX_UID),
                ],
            )
            assert served(site, context)[0].split() == cert.read_text().split()
        asked = len(outcomes)
        until("some more with the last one", lambda: len(outcomes) > asked + 4)
    finally:
        over.set()
        for thread in askers:
            thread.join()
    turns.release(79)
    assert response.read().count(b"data: ") == 79  # the stream that ran all the while is whole
    assert len(outcomes) > 20
    assert set(outcomes) == {200}
    assert "realpath" not in site.logs()
    assert site.ask("GET", "/key.pem")[0] == site.ask("GET", "/before/key.pem")[0] == 404
    running.close()


def test_a_pair_that_does_not_fit_is_refused_at_the_handshake_and_healed_by_the_right_one(site: Site) -> None:
    site.gateway(4001, answer(b"{}"))
    kept = site.connect()  # a connection from before
    kept.request("GET", "/_moat/live")
    assert kept.getresponse().read() == b"{}"
    right = (site.folder / "tls/key.pem").read_bytes()
    _, other = make_pair(site.folder, "other")
    write_together([(site.folder / "tls/key.pem", other.read_bytes(), 0o600, NGINX_UID)])
    with pytest.raises(ssl.SSLError):
        site.connect()
    until("the reason in the log", lambda: "key values mismatch" in site.logs())
    kept.request("GET", "/_moat/live")
    assert kept.getresponse().read() == b"{}"
    write_together([(site.folder / "tls/key.pem", right, 0o600, NGINX_UID)])
    assert site.ask("GET", "/_moat/live")[0] == 200
    kept.close()


def test_connections_to_the_gateways_are_kept(site: Site) -> None:
    one = site.gateway(4002, answer(b"{}"))
    for _ in range(10):
        site.ask()
    assert len(one.requests) == 10
    assert one.connections <= 2  # one a worker at most


def test_what_nginx_adds_and_takes_away(healthy: Site) -> None:
    leaks = (
        "x-litellm-model-api-base: http://model:8081\r\nx-request-id: the-gateways-own\r\n"
        "content-security-policy: default-src *\r\nserver: uvicorn\r\n"
    )
    for gateway in healthy.gateways:
        gateway.handle = answer(b"{}", leaks)
    claims = {
        "x-request-id": "caller-0123",
        "x-forwarded-for": "192.0.2.77",
        "forwarded": "for=192.0.2.77",
        "x-real-ip": "192.0.2.77",
        "traceparent": "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01",
    }
    status, headers, _ = healthy.ask(
        path="/v1/chat/completions?api-key=SECRET-QUERY", **claims, authorization="Bearer KEY"
    )
    request = reached(healthy)[0].decode().lower()
    assert status == 200
    assert headers["x-request-id"] == "caller-0123"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["server"] == "nginx"
    assert "x-litellm-model-api-base" not in headers
    assert "x-request-id: caller-0123" in request
    assert "authorization: bearer key" in request
    assert "traceparent: 00-0123" in request
    assert "192.0.2.77" not in request
    assert "x-forwarded-for: 127.0.0.1" in request
    entry = healthy.logged("caller-0123")
    assert entry["trace_id"] == "0123456789abcdef0123456789abcdef"
    assert entry["path"] == "/v1/chat/completions"
    assert "SECRET-QUERY" not in healthy.logs()
    assert "KEY" not in healthy.logs()


@pytest.mark.parametrize("claimed", ["short", 'a"b{injected}', "x" * 200, "ok id with blanks"])
def test_a_request_id_that_is_not_plain_is_replaced(healthy: Site, claimed: str) -> None:
    _, headers, _ = healthy.ask(**{"x-request-id": claimed})
    assert headers["x-request-id"] != claimed
    assert len(headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    "path",
    [
        "/", "/metrics", "/config", "/config/yaml", "/sso/key/generate", "/docs", "/redoc", "/openapi.json", "/ui",
        "/ui/", "/key/generate", "/team/new", "/user/info", "/model/info", "/v1/model/info", "/v1/model_group/info",
        "/health", "/health/readiness", "/health/drain", "/debug/asyncio-tasks", "/get/config/callbacks",
        "/v1/mcp/server", "/mcp/", "/_moat/nginx", "/_moat/status", "/routes", "/v1/files", "/v1/batches",
        "/openai/v1/chat/completions", "/vertex_ai/../v1/models", "/v1//models", "/v1/./models",
        "/v1/models/../../metrics", "/v1/models%2f..%2f..%2fmetrics", "/%76%31/models", "/v1/models;x=1",
        "/v1/models/%0d%0aX-Evil:1", "/V1/MODELS", "/v1/chat/completions/",
    ],
)  # fmt: skip
def test_paths_that_are_not_public_never_reach_a_gateway(healthy: Site, path: str) -> None:
    status, _, body = healthy.ask("GET", path)
    assert (status, error_code(body)) == (404, "not_found")
    assert reached(healthy) == []
    # Control: a public path does reach one.
    assert healthy.ask("GET", "/v1/models")[0] == 200
    assert len(reached(healthy)) == 1


def test_a_body_above_the_limit_is_refused_before_a_gateway_sees_it(healthy: Site) -> None:
    connection = healthy.connect()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-length", str(21 * 1024 * 1024))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, error_code(response.read())) == (413, "request_too_large")
    connection.close()
    assert reached(healthy) == []


def test_a_large_body_is_kept_in_the_tmpfs_and_arrives_whole(healthy: Site) -> None:
    body = b'{"x":"' + b"a" * (5 * 1024 * 1024) + b'"}'
    connection = healthy.connect()
    connection.request("POST", "/v1/chat/completions", body)
    assert connection.getresponse().status == 200
    connection.close()
    assert reached(healthy)[0].endswith(body)


def test_the_plain_port_redirects_but_refuses_keys(healthy: Site) -> None:
    status, headers, _ = healthy.ask("GET", "/v1/models", tls=False)
    assert (status, headers["location"]) == (308, "https://localhost:8443/v1/models")
    for name in ("authorization", "x-api-key", "api-key"):
        status, _, body = healthy.ask("GET", "/v1/models", tls=False, **{name: "something"})
        assert (status, error_code(body)) == (403, "tls_required")
    assert healthy.ask("GET", "/_moat/nginx", tls=False)[0] == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_tls_is_refused(healthy: Site, version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # asking for old versions is the point
        context.minimum_version = context.maximum_version = version
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    raw = inside(healthy.pid, lambda: socket.create_connection(("127.0.0.1", 8443), PATIENCE))
    with raw, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(raw)
