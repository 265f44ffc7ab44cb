# SPDX-License-Identifier: Apache-2.0
"""Measures the start-up of a gateway behind a name server that drops every query, against LiteLLM's own command.

Both run in a network namespace without a way out. Prints JSON lines: seconds to ready (median of the runs), DNS
queries, connects beyond the loopback (strace, in runs of their own), the ratio to stock, the guard's cost a look-up.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from tests.integration.gateway.environment import gateway_python  # noqa: E402
from tests.integration.gateway.isolated import Report, run_isolated  # noqa: E402

RUNS = 3
#: Nanoseconds of one look-up of a literal address, with and without the guard: the smallest call that it sees.
_GUARD_COST = """
import socket, sys, timeit
sys.path.insert(0, sys.argv[1])
def once():
    return min(timeit.repeat(lambda: socket.getaddrinfo("127.0.0.1", 80), number=2000, repeat=7)) / 2000 * 1e9
before = once()
from moat_gateway.allowlist import AllowList
from moat_gateway.egress import EgressGuard
EgressGuard(AllowList.parse(["model:8081", "10.0.0.0/8"]), lambda *a: None).install()
print(before, once())
"""


def _say(**record: object) -> None:
    print(json.dumps({"benchmark": "startup", **record}), flush=True)


def _run(program: str, folder: Path, python: Path, *, strace: bool, names: str = "drop") -> Report:
    report = run_isolated(program, folder, python, names=names, strace=strace, calls="all" if strace else "none")
    if report.seconds_to_ready is None:
        raise SystemExit(f"{program} did not start:\n{report.output}")
    return report


def main() -> int:
    """Run everything; about four minutes on two cores."""
    python = gateway_python()
    with tempfile.TemporaryDirectory(prefix="moat-bench-") as name:
        folder = Path(name)
        seconds: dict[str, list[float]] = {"gateway": [], "stock": []}
        for i in range(RUNS):
            for program in seconds:
                report = _run(program, folder / f"{program}-{i}", python, strace=False)
                seconds[program].append(report.seconds_to_ready or 0.0)
                _say(program=program, run=i, seconds_to_ready=report.seconds_to_ready, dns_queries=len(report.queries))
        for program, names in (("gateway", "drop"), ("gateway", "sinkhole"), ("stock", "drop"), ("stock", "sinkhole")):
            report = _run(program, folder / f"{program}-traced-{names}", python, strace=True, names=names)
            _say(
                program=program,
                names=names,
                traced=True,
                dns_queries=len(report.queries),
                dns_names=sorted(set(report.queries)),
                outside_calls=len(report.outside),
                outside=sorted(set(report.outside)),
                slowest_request_seconds=max(c["seconds"] for c in report.calls.values()),
            )
        medians = {p: statistics.median(s) for p, s in seconds.items()}
        _say(
            median_seconds=medians,
            ratio_stock_to_gateway=round(medians["stock"] / medians["gateway"], 2),
            positive_control="the runs of stock above: the same capture, queries and calls above 0",
        )
        done = subprocess.run(
            [str(python), "-c", _GUARD_COST, str(ROOT / "images/gateway")], capture_output=True, text=True, check=True
        )
        without, guarded = (float(x) for x in done.stdout.split())
        _say(guard_nanoseconds_per_lookup=round(guarded - without), without=round(without), with_guard=round(guarded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
