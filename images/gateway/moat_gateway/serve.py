# SPDX-License-Identifier: Apache-2.0
"""The process: start in order, serve on one event loop, end without cutting a stream before its time.

Order of the start: settings, checks (``preflight``), stdout for JSON lines, environment, the egress guard, LiteLLM's
import, LiteLLM's own start-up, its verification, and only then the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from moat_gateway import __version__, app, garbage, hardening, litellm_port, preflight
from moat_gateway.admin import admin_app, open_socket
from moat_gateway.allowlist import as_address
from moat_gateway.egress import EgressGuard
from moat_gateway.errors import CannotListen, GatewayError, LiteLLMRefused
from moat_gateway.keystore import KeyStore
from moat_gateway.litellm_port import EffectiveFile, Serving
from moat_gateway.live import Live, Situation
from moat_gateway.logs import Log, adopt_loggers, capture_everything, where_of
from moat_gateway.notify import Notifier
from moat_gateway.preflight import Checked
from moat_gateway.reloader import Reloader
from moat_gateway.settings import Settings
from moat_gateway.stages import ASGIApp, Message, Receive, Scope, Send
from moat_gateway.status import State
from moat_gateway.sync import nodefolder
from moat_gateway.sync.files import timestamp

#: The gateway ended in its turn, to be started again (``RestartForceExitStatus=`` of its unit).
RESTART_EXIT = 75
_TURN = "turn"


def serve(settings: Settings, unknown: tuple[str, ...]) -> int:
    """Run the gateway until SIGTERM, SIGINT or its turn to restart; return its exit code."""
    hardening.forbid_core_dumps()
    garbage.hold()
    begun = time.monotonic() - _age_of_process()
    stderr = os.fdopen(os.dup(2), "w", buffering=1)
    log = capture_everything(settings.log_level)
    try:
        return _serve(settings, unknown, log, begun)
    except GatewayError as e:
        _say_refusal(e, [], log, stderr)
        return e.exit_code
    except _Refused as refused:
        _say_refusal(refused.problems[0], refused.problems[1:], log, stderr)
        return refused.problems[0].exit_code
    except Exception as e:
        log.event("defect", "error", error=type(e).__name__, where=where_of(e))
        sys.stderr = stderr
        raise


class _Refused(Exception):
    def __init__(self, problems: list[GatewayError]) -> None:
        super().__init__()
        self.problems = problems


def _say_refusal(first: GatewayError, more: list[GatewayError], log: Log, stderr: object) -> None:
    for e in [first, *more]:
        log.event("start.refused", "error", kind=e.kind, exit=e.exit_code, message=e.one_line())
        print(f"moat-gateway: refused ({e.kind}): {e.one_line()}", file=stderr)  # type: ignore[call-overload]


def _serve(settings: Settings, unknown: tuple[str, ...], log: Log, begun: float) -> int:
    if unknown:
        log.event("settings.unknown", "warning", names=list(unknown))
    checked, problems = preflight.check(settings, os.environ)
    if checked is None:
        raise _Refused(problems)
    log.hide([checked.master_key, *checked.secrets.values()])
    log.event(
        "start.begin",
        version=__version__,
        litellm=litellm_port.version(),
        instance=settings.instance,
        pid=os.getpid(),
    )
    ignored = litellm_port.steering_variables(os.environ)
    if ignored:
        log.event("environment.ignored", "warning", names=list(ignored))
    # Until the event loop takes signals over, an end must still run what is in the `finally` clauses.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    file = EffectiveFile()
    try:
        wanted = checked.served.wanted(checked.secrets)
        litellm_port.prepare_environment(os.environ, wanted, checked.master_key, settings.shutdown_timeout, file.path)
        return _serve_checked(settings, checked, Serving(file), log, begun)
    finally:
        file.remove()


def _serve_checked(settings: Settings, checked: Checked, serving: Serving, log: Log, begun: float) -> int:
    guard = EgressGuard(
        settings.allow,
        lambda operation, destination, count: log.event(
            "egress.denied", "warning", operation=operation, destination=destination, count=count
        ),
    )
    guard.install()
    notifier = Notifier(os.environ)
    notifier.status("loading LiteLLM")
    store = KeyStore(settings.keys, checked.master_sha256, log)
    if checked.served.revision:
        store.replace(checked.keys)
    else:
        store.load_first()
    state = State(settings, _situation(settings, checked, log), store, guard)
    # Both sockets are opened before the long import: a port in use is said at once.
    admin_socket = open_socket(settings.admin_socket)
    try:
        with _public_socket(settings) as public_socket:
            litellm_app = litellm_port.import_app()
            serving.before_start(checked.served.wanted(checked.secrets))
            adopt_loggers(log)
            process = _Process(settings, state, serving, checked, log, begun, notifier)
            # A plain asyncio.run: uvloop would open sockets past the egress guard.
            return asyncio.run(process.run(litellm_app, public_socket, admin_socket))
    finally:
        admin_socket.close()
        with contextlib.suppress(OSError):
            settings.admin_socket.unlink()


def _situation(settings: Settings, checked: Checked, log: Log) -> Situation:
    for number, e in checked.passed_over:
        log.event("config.refused", "error", revision=number, kind=e.kind, message=e.one_line())
    if checked.passed_over:
        log.event("config.fallback", "warning", revision=checked.served.revision)
    lines = [f"config: revision {n} could not be used at the start: {e.one_line()}" for n, e in checked.passed_over]
    # Read at once: until LiteLLM is loaded, nobody looks again.
    sync = nodefolder.read_sync(Path(settings.sync_dir)) if settings.sync_dir else None
    return Situation(checked.served, timestamp(), follows=bool(settings.sync_dir), sync=sync, passed_over=tuple(lines))


@contextlib.contextmanager
def _public_socket(settings: Settings) -> Generator[socket.socket]:
    address = as_address(settings.host)
    family = socket.AF_INET6 if address is not None and address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Bound, and not listening until LiteLLM is ready: clients are refused, not left waiting.
            sock.bind((settings.host, settings.port))
        except OSError as e:
            raise CannotListen(
                f"port {settings.port} on {settings.host} cannot be opened",
                found=e.strerror or str(e),
                hint="stop what uses it, or set MOAT_PORT",
            ) from e
        yield sock


class _Process:
    """The two servers of one event loop, and the way they end."""

    def __init__(
        self,
        settings: Settings,
        state: State,
        serving: Serving,
        checked: Checked,
        log: Log,
        begun: float,
        notifier: Notifier,
    ) -> None:
        self._notifier = notifier
        self._serving = serving
        self._checked = checked
        self._settings = settings
        self._state = state
        self._log = log
        self._begun = begun
        self._stop = asyncio.Event()
        self._signal = ""
        self._failure: GatewayError | None = None

    async def run(self, litellm_app: ASGIApp, public_socket: socket.socket, admin_socket: socket.socket) -> int:
        """Serve to the end; return the exit code."""
        import uvicorn

        loop = asyncio.get_running_loop()
        if not type(loop).__module__.startswith("asyncio"):
            raise LiteLLMRefused(
                "the event loop is not asyncio's own", found=type(loop).__module__, expected="asyncio",
                hint="remove what sets an event loop policy",
            )  # fmt: skip
        loop.set_exception_handler(self._loop_exception)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        state = self._state
        live = Live(self._settings, state.situation, self._serving, state.keys, state.counters, self._log)
        reloader = Reloader(state, live, self._log, self._restart)
        live.told = reloader.told
        composed = app.compose(self._watch_start(litellm_app), self._state, self._log)

        class Server(uvicorn.Server):  # type: ignore[misc]
            # Signals are handled here, and must not be raised again at the end: that would not be exit code 0.
            @contextlib.contextmanager
            def capture_signals(self) -> Generator[None]:
                yield

            # A failed start ends in sys.exit(), which would tear the event loop down before the reason is known.
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                try:
                    await super().startup(sockets)
                except SystemExit:
                    self.should_exit = True

        common = {
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "proxy_headers": False,
            "loop": "asyncio",
        }
        public = Server(
            uvicorn.Config(
                composed,
                http="httptools",
                ws="websockets-sansio",
                lifespan="on",
                timeout_keep_alive=int(self._settings.keepalive_timeout),
                timeout_graceful_shutdown=max(1, int(self._settings.shutdown_timeout)),
                **common,
            )
        )
        admin = Server(
            uvicorn.Config(
                admin_app(self._state, self._log, reloader.reload),
                http="h11",
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=5,
                **common,
            )
        )
        tasks = [
            asyncio.create_task(admin.serve([admin_socket])),
            asyncio.create_task(self._serve_public(public, public_socket)),
        ]
        side = [
            asyncio.create_task(garbage.run()),
            asyncio.create_task(self._state.keys.poll(self._settings.keys_poll)),
            asyncio.create_task(self._follow(live, reloader)),
        ]
        try:
            await tasks[1]
        finally:
            for task in side:
                task.cancel()
            await asyncio.gather(*side, return_exceptions=True)
            live.close()
            await reloader.last_report(comes_back=self._signal == _TURN)
            admin.should_exit = True
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure
        return RESTART_EXIT if self._signal == _TURN else 0

    async def _follow(self, live: Live, reloader: Reloader) -> None:
        """Follow changes from when LiteLLM serves to the end."""
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task[Any]] = set()

        def hang_up() -> None:
            task = asyncio.ensure_future(self._reload_by_signal(reloader))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        report = asyncio.create_task(reloader.run())
        try:
            while not self._state.loaded:
                await asyncio.sleep(0.02)
            live.begin(self._checked.secrets, self._checked.master_key)
            self._state.keys.look_for_revision = live.look
            reloader.told()
            await live.run()
        finally:
            report.cancel()
            await asyncio.gather(report, *reloads, return_exceptions=True)

    async def _reload_by_signal(self, reloader: Reloader) -> None:
        if self._state.loaded:
            ok = (await reloader.reload())["ok"]
            self._log.event("admin.reload", "info" if ok else "error", ok=ok)

    async def _serve_public(self, server: Any, sock: socket.socket) -> None:
        serving = asyncio.create_task(server.serve([sock]))
        stopping = asyncio.create_task(self._stop.wait())
        while not (server.started or serving.done() or stopping.done()):
            await asyncio.wait({serving, stopping}, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
        if server.started:
            self._ready()
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            asked = time.monotonic()
            running = self._state.counters.in_flight
            self._notifier.stopping(f"finishing {running} requests, {self._settings.shutdown_timeout:g} s at most")
            self._log.event(
                "shutdown.begin",
                signal=self._signal,
                in_flight=running,
                active_streams=self._state.counters.active_streams,
            )
            # Requests are still taken for a moment, so that probes and nginx see the 503 before the port closes.
            if self._state.loaded:
                await asyncio.wait({serving}, timeout=self._settings.shutdown_delay)
            server.should_exit = True
            cut = asyncio.create_task(self._say_cut())
            await asyncio.wait({serving})
            cut.cancel()
            self._log.event("shutdown.end", seconds=round(time.monotonic() - asked, 1))
        stopping.cancel()
        serving.result()
        if not server.started and not self._stop.is_set() and self._failure is None:
            self._failure = LiteLLMRefused("LiteLLM did not start", hint="see the library.log events above")

    async def _say_cut(self) -> None:
        await asyncio.sleep(max(1, int(self._settings.shutdown_timeout)))
        if self._state.counters.in_flight:
            self._log.event("shutdown.cut", "warning", in_flight=self._state.counters.in_flight)

    def _on_signal(self, number: int) -> None:
        self._end(signal.Signals(number).name)

    def _restart(self) -> None:
        self._end(_TURN)

    def _end(self, why: str) -> None:
        # A SIGTERM that comes while the turn is drained for means the end for good.
        self._signal = why
        self._state.draining = True
        self._stop.set()

    def _watch_start(self, litellm_app: ASGIApp) -> ASGIApp:
        """Wrap LiteLLM so that its start-up is verified before the port opens, and its failure has one line."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                await litellm_app(scope, receive, send)
                return

            async def check(message: Message) -> None:
                if message["type"] == "lifespan.startup.complete":
                    try:
                        self._loaded()
                    except GatewayError as e:
                        self._failure = e
                        message = {"type": "lifespan.startup.failed", "message": e.message}
                elif message["type"] == "lifespan.startup.failed":
                    self._failure = LiteLLMRefused(
                        "LiteLLM did not accept the configuration",
                        found=_last_line(str(message.get("message", ""))),
                        hint="correct config.yaml; the library.log events above say more",
                        path=str(self._settings.config),
                    )
                await send(message)

            await litellm_app(scope, receive, check)

        return watched

    def _loaded(self) -> None:
        litellm_port.verify()
        self._serving.after_start()
        adopt_loggers(self._log)
        state = self._state
        expected = len(state.situation.served.digests)
        state.dropped = max(0, expected - litellm_port.deployments())
        if state.dropped:
            self._log.event("config.deployments_dropped", "error", expected=expected, found=litellm_port.deployments())
        # What is there now stays: looking through it for garbage again and again holds the loop for long.
        gc.collect()
        gc.freeze()
        # From here on a library's message may quote a prompt.
        self._log.serving = True

    def _ready(self) -> None:
        state = self._state
        state.loaded = True
        state.start_seconds = round(time.monotonic() - self._begun, 2)
        self._log.event(
            "start.ready",
            models=len(litellm_port.models()),
            keys=len(state.keys.current.keys),
            seconds=state.start_seconds,
            address=f"{self._settings.host}:{self._settings.port}",
        )
        self._notifier.ready(f"serving {len(litellm_port.models())} models on port {self._settings.port}")

    def _loop_exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        if isinstance(error, BaseException):
            self._log.event("defect", "error", error=type(error).__name__, where=where_of(error))
        else:
            self._log.event("defect", "error", error="none", where="event loop")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"


def _age_of_process() -> float:
    """Return the seconds since this process was started, imports included."""
    try:
        with open("/proc/self/stat", encoding="ascii") as f:  # noqa: PTH123
            ticks = int(f.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as f:  # noqa: PTH123
            return max(0.0, float(f.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0
