# SPDX-License-Identifier: Apache-2.0
"""The part of ``bench_reload.py`` that runs with the gateway's interpreter: LiteLLM with 400 deployments.

Prints one JSON line a measurement. The event loop is watched by a task that never sleeps: how long one turn of the loop
took is how long a request would have waited.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.integration.gateway.revisions import Node

from moat_gateway import checks, litellm_port, served
from moat_gateway.keystore import KeyStore
from moat_gateway.litellm_port import EffectiveFile, Serving
from moat_gateway.live import Live, Situation
from moat_gateway.logs import Log
from moat_gateway.metrics import Counters
from moat_gateway.settings import Settings

COUNT = 400
KEYS = "teams:\n  - {id: t, models: ['*']}\nkeys: []\n"


def config(changed: int, generation: int) -> str:
    """Return a configuration whose first ``changed`` deployments are of this generation."""
    lines = ["model_list:"]
    for i in range(COUNT):
        g = generation if i < changed else 0
        lines.append(
            f"  - model_name: m{i}\n    litellm_params: {{model: openai/up-{i}, "
            f'api_base: "http://127.0.0.1:9/v{g}", api_key: os.environ/UP_KEY}}'
        )
    # LiteLLM asks each deployment for its limits in the background, which would be measured, too.
    return "\n".join(lines) + "\ngeneral_settings: {disable_model_info_refresh: true}\n"


_kept: list[asyncio.Task[Any]] = []  # a task that nobody holds is collected


class Probe:
    """Measures the turns of the event loop while it is entered."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.own: list[float] = []

    async def __aenter__(self) -> Probe:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def _watch(self) -> None:
        before, own_before = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(0)
            now, own = time.perf_counter(), time.thread_time()
            self.gaps.append(now - before)
            self.own.append(own - own_before)
            before, own_before = now, own

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)
        self._task.cancel()

    @property
    def longest_ms(self) -> float:
        """What a request would have waited, with whatever else the machine did."""
        return round(1000 * max(self.gaps), 2)

    @property
    def longest_cpu_ms(self) -> float:
        """The same in the loop's own CPU time: what the change itself takes, whoever else uses the machine."""
        return round(1000 * max(self.own), 2)


async def started(app: Any) -> None:
    """Start LiteLLM as an ASGI server does, and leave it running."""
    begun: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    await inbox.put({"type": "lifespan.startup"})

    async def send(message: dict[str, str]) -> None:
        if not begun.done():
            begun.set_result(message["type"])

    task = asyncio.create_task(app({"type": "lifespan", "state": {}}, inbox.get, send))
    _kept.append(task)
    assert await begun == "lifespan.startup.complete", await task


def say(**record: object) -> None:
    print("RESULT " + json.dumps(record), flush=True)


async def measure(name: str, change: Callable[[int], Awaitable[None]], runs: int) -> None:
    """Measure ``runs`` changes with the probe, and as many without it for their CPU time."""
    longest, own, cpu = [], [], []
    for i in range(runs):
        gc.collect()
        async with Probe() as probe:
            await change(2 * i + 1)
        longest.append(probe.longest_ms)
        own.append(probe.longest_cpu_ms)
        begun = time.process_time()
        await change(2 * i + 2)
        cpu.append(1000 * (time.process_time() - begun))
    say(
        change=name,
        longest_hold_ms=statistics.median(longest),
        worst_hold_ms=max(longest),
        hold_cpu_ms=statistics.median(own),
        worst_hold_cpu_ms=max(own),
        cpu_ms=round(statistics.median(cpu), 1),
        runs=runs,
    )


async def main(folder: Path) -> None:
    """Run everything."""
    (folder / "secrets").mkdir()
    (folder / "secrets/up_key").write_text("upstream-key\n")
    (folder / "secrets/master_key").write_text("sk-" + os.urandom(24).hex() + "\n")
    node = Node(folder, folder / "secrets")
    settings = Settings(
        secrets_dir=folder / "secrets", master_key_file=folder / "secrets/master_key",
        sync_dir=str(node.sync_dir), reports_dir=str(node.reports_dir),
    )  # fmt: skip
    files = {"config.yaml": config(0, 0).encode(), "keys.yaml": KEYS.encode()}
    prepared, problems = checks.check(files, settings, dry_run=None)
    assert prepared is not None, problems
    first = served.of_revision(prepared, "0" * 64)
    secrets = {"UP_KEY": "upstream-key"}
    master = (folder / "secrets/master_key").read_text().strip()
    file = EffectiveFile()
    litellm_port.prepare_environment(os.environ, first.wanted(secrets), master, 10, file.path)
    app = litellm_port.import_app()
    serving = Serving(file)
    serving.before_start(first.wanted(secrets))
    await started(app)
    litellm_port.verify()
    serving.after_start()
    gc.collect()
    gc.freeze()
    log = Log(lambda _line: None)
    keys = KeyStore(folder / "keys.yaml", "", log)
    keys.replace(prepared.key_set())
    live = Live(settings, Situation(first, ""), serving, keys, Counters(), log)
    live.begin(secrets, master)
    generation = 0

    async def applied_only(name: str, changed: int, runs: int) -> None:
        """Like :func:`measure`, without the writing of the revision, which config-sync does elsewhere."""
        nonlocal generation
        longest, own, cpu, wall = [], [], [], []
        for _ in range(runs):
            for probed in (True, False):
                generation += 1
                number = node.put(config(changed, generation), KEYS)
                gc.collect()
                begun, cpu_begun = time.perf_counter(), time.process_time()
                if probed:
                    async with Probe() as probe:
                        await live.look()
                    longest.append(probe.longest_ms)
                    own.append(probe.longest_cpu_ms)
                else:
                    await live.look()
                    cpu.append(1000 * (time.process_time() - cpu_begun))
                    wall.append(1000 * (time.perf_counter() - begun))
                assert live._situation.served.revision == number, live._situation.last_refused
        say(
            change=name,
            longest_hold_ms=statistics.median(longest),
            worst_hold_ms=max(longest),
            hold_cpu_ms=statistics.median(own),
            worst_hold_cpu_ms=max(own),
            cpu_ms=round(statistics.median(cpu), 1),
            wall_ms=round(statistics.median(wall), 1),
            runs=runs,
        )

    await applied_only("moat: 1 of 400", 1, 15)
    await applied_only("moat: 400 of 400", COUNT, 5)

    from litellm.proxy import proxy_server
    from litellm.types.router import Deployment

    router = proxy_server.llm_router
    resolved: list[dict[str, Any]] = [
        {
            "model_name": f"m{i}",
            "litellm_params": {"model": f"openai/up-{i}", "api_base": "http://127.0.0.1:9/v1", "api_key": "k"},
        }
        for i in range(COUNT)
    ]

    async def whole_list(i: int) -> None:
        resolved[0]["litellm_params"] = {**resolved[0]["litellm_params"], "api_base": f"http://127.0.0.1:9/s{i}"}
        router.set_model_list(resolved)

    async def whole_list_changed(i: int) -> None:
        for entry in resolved:
            entry["litellm_params"] = {**entry["litellm_params"], "api_base": f"http://127.0.0.1:9/w{i}"}
        router.set_model_list(resolved)

    async def one_by_one(i: int) -> None:
        wanted = dict(resolved[0], litellm_params={**resolved[0]["litellm_params"], "api_base": f"http://x:9/u{i}"})
        id_ = router.generate_model_id(wanted["model_name"], wanted["litellm_params"])
        router.upsert_deployment(Deployment(**wanted, model_info={"id": id_}))
        router.delete_deployment(id_)

    await measure("stock set_model_list: 1 of 400", whole_list, 15)
    await measure("stock set_model_list: 400 of 400", whole_list_changed, 5)
    await measure("stock upsert and delete: 1", one_by_one, 15)
    file.remove()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moat-bench-") as name:
        asyncio.run(main(Path(name)))
