# SPDX-License-Identifier: Apache-2.0
"""Health check of config-sync: ``sync.py FILE [SECONDS]``, FILE being its ``sync.json``.

That a process runs proves little. What counts is when it last had an answer of the source of
revisions: the file says at which moment of CLOCK_BOOTTIME, which no setting of a clock moves. Prints
one readable line and ends with 0 or 1.
"""

import json
import sys
import time
from pathlib import Path

TOLD_SECONDS = 10.0  # the file is written every two seconds by a thread of its own
MOST_SECONDS = 15.0  # an answer is asked for several times a second, unless reload_interval is long


def check(path: str, most: float, now: float, boot_id: str) -> tuple[bool, str]:
    """Return whether the source answered within the last ``most`` seconds, and a line that says so or why not."""
    try:
        state = json.loads(Path(path).read_bytes())
        revision, source = state["revision"], state["source"]
        moment, boot = state["checked_boottime"], state["boot_id"]
        most = max(most, 3 * float(state.get("interval", 0)))
        trial, told = state.get("trial"), state.get("told_boottime")
        trying = f"trying revision {trial['revision']} for {now - trial['since_boottime']:.0f} s" if trial else ""
        busy = bool(trying) and told is not None and 0 <= now - told <= TOLD_SECONDS
        where, why = str(source.get("where", "the source")), str(source.get("why") or "no answer yet")
    except FileNotFoundError:
        return False, f"unhealthy: {path} is not there: config-sync has not begun"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return False, f"unhealthy: {path} cannot be read: {type(e).__name__}: {e}"
    if moment is None or boot != boot_id:
        return False, f"unhealthy: no answer of {where} since the start: {_short(why)}"
    age = now - float(moment)
    serving = f"revision {revision}" if revision else "no revision yet"
    if busy:
        # A dry run may take minutes where so it is set; the source is asked again after it.
        return True, f"healthy: {trying}; {serving}"
    if not 0 <= age <= most:
        return False, f"unhealthy: no answer of {where} for {age:.0f} s ({_short(why)}); {serving}"
    return True, f"healthy: {where} answered {age:.1f} s ago; {serving}"


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


if __name__ == "__main__":
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else MOST_SECONDS
    ok, line = check(sys.argv[1], seconds, time.clock_gettime(time.CLOCK_BOOTTIME), boot_id)
    print(line)
    sys.exit(0 if ok else 1)
