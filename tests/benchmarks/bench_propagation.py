# SPDX-License-Identifier: Apache-2.0
"""Measures how long a revision takes to every gateway: MinIO, nginx, a sidecar, three gateways, idle and under load.

Prints JSON lines: p50, p95 and the longest, in seconds, of each leg of the way (by CLOCK_MONOTONIC of this host): from
the end of `config push`, or from the moment the pointer moved, to the node's acceptance and to the last gateway that
serves; how much of it is this machine's own delay (the control); and what `config push` itself took.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "images/gateway"))

from tests.integration.hotreload.site import INTERVAL, Site  # noqa: E402
from tests.integration.hotreload.traffic import Busy, Watch, figures  # noqa: E402

BY_HAND = 40
BY_COMMAND = 20
GOAL = 1.0  # seconds, p95 from the end of `push`


def _say(**record: object) -> None:
    print(json.dumps({"benchmark": "propagation", **record}), flush=True)


def _figures(values: Sequence[float]) -> dict[str, float]:
    named = dict(zip(("p50", "p95", "max"), figures(values), strict=True))
    return {"n": len(values), **{k: round(v, 3) for k, v in named.items()}}


class Accepted:
    """Notes when the node accepted each revision."""

    def __init__(self, site: Site) -> None:
        self._node = site.nodes[0]
        self._stop = threading.Event()
        self.first: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Accepted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.first.setdefault(self._node.accepted(), time.monotonic())
            time.sleep(0.005)


def _measure(site: Site, load: str, by_hand: int, by_command: int) -> None:
    node: list[float] = []
    moved_to_all: list[float] = []
    pushed_to_all: list[float] = []
    command: list[float] = []
    with Watch(site.nodes) as watch, Accepted(site) as accepted, Busy() as busy:
        begun = time.monotonic()
        for i in range(by_hand):
            marker = f"r{site.hand.next()}"
            number, moved = site.hand.put({"config.yaml": site.config(marker), "keys.yaml": site.keys()})
            moved_to_all.append(watch.wait(number) - moved)
            node.append(accepted.first[number] - moved)
            time.sleep(INTERVAL * ((i * 0.37) % 1))  # not in step with the sidecar's own looks
        for _ in range(by_command):
            site.admin.write(f"r{site.hand.next()}")
            asked = time.monotonic()
            pushed = site.admin.push()
            command.append(pushed.at - asked)
            pushed_to_all.append(max(0.0, watch.wait(pushed.revision) - pushed.at))
        slower = busy.since(begun)
        late = watch.late
    for leg, values in (
        ("pointer moved -> accepted by the node", node),
        ("pointer moved -> all gateways serve", moved_to_all),
        ("`config push` returned -> all gateways serve", pushed_to_all),
        ("`config push` itself", command),
        ("control: this measurement's own lateness", late),
    ):
        _say(load=load, leg=leg, seconds=_figures(values))
    p95 = _figures(pushed_to_all)["p95"]
    _say(load=load, goal_p95=GOAL, p95=p95, ratio_goal_to_p95=round(GOAL / max(p95, 0.001), 1))
    _say(load=load, machine_slower_than_alone=round(slower, 2))


def main() -> int:
    """Run both; about four minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by-hand", type=int, default=BY_HAND)
    parser.add_argument("--by-command", type=int, default=BY_COMMAND)
    args = parser.parse_args()
    site = Site(on_disk=True)
    try:
        site.node()
        site.start()
        _say(reload_interval=INTERVAL, gateways=len(site.gateways))
        _measure(site, "none", args.by_hand, args.by_command)
        traffic = site.load()
        _measure(site, "steady", args.by_hand, args.by_command)
        traffic.stop()
        done = sum(1 for r in traffic.records if not r["failed"])
        seconds = max(r["ended"] for r in traffic.records) - min(r["begun"] for r in traffic.records)
        _say(load="steady", requests=done, requests_a_second=round(done / seconds, 1), failed=len(traffic.failures))
    finally:
        site.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
