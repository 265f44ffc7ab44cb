# SPDX-License-Identifier: Apache-2.0
"""Measures what a change of the configuration costs a running gateway, against LiteLLM's own way in the same process.

400 deployments; one of them, then all of them are changed. Prints JSON lines: how long the event loop was held at most
(wall time, and the loop's own CPU time, which a busy machine does not change), CPU of the whole change, and the ratios.
Moat's figures hold everything from noticing ``current.json`` to the last clearing up; LiteLLM's are one call of
``set_model_list`` with values that are there already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from tests.integration.gateway.environment import gateway_python  # noqa: E402


def main() -> int:
    """Run the child with the gateway's interpreter and compare; about a minute on two cores."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'images/gateway'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [str(gateway_python()), str(ROOT / "tests/benchmarks/reloadchild.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = [json.loads(x.removeprefix("RESULT ")) for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    for record in found:
        print(json.dumps({"benchmark": "reload", **record}), flush=True)
    by = {r["change"]: r for r in found}
    if len(by) < 5:
        print(done.stderr[-3000:], file=sys.stderr)
        return 1
    for what in ("1 of 400", "400 of 400"):
        ours, stock = by[f"moat: {what}"], by[f"stock set_model_list: {what}"]
        print(
            json.dumps(
                {
                    "benchmark": "reload",
                    "ratio": what,
                    "longest_hold_moat_to_stock": round(ours["hold_cpu_ms"] / stock["hold_cpu_ms"], 3),
                    "cpu_moat_to_stock": round(ours["cpu_ms"] / stock["cpu_ms"], 2),
                }
            ),
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
