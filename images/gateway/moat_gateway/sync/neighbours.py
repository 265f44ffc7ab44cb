# SPDX-License-Identifier: Apache-2.0
"""Asks the other nodes' reports before a gateway is restarted, so that a site does not restart everywhere at once.

There is no lock in the store. Each node tells that its gateways need a restart, then waits a while, then looks: the
node whose name comes first begins, and nobody begins while another node restarts a gateway or lacks one. The wait
covers the time in which two nodes could miss each other's word.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from moat_gateway.revstore import NodeReport
from moat_gateway.sync.reports import ALIVE
from moat_gateway.sync.turns import RETURN

SETTLE = 5.0  # seconds between telling and looking
_FRESH = 30.0  # seconds after which a node that says nothing is taken for gone
_LOOK_COUNTS = 5.0  # seconds for which a look at the reports counts
_GAP = 2.0  # seconds without a question after which the next one begins anew


class Neighbours:
    """What the other nodes say; asked by one thread, told by another.

    Args:
        node: name of this node.
        clock: seconds that never go back.
    """

    def __init__(self, node: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: float | None = None  # when last
        self._since = 0.0  # when the present series of questions began
        self._told: float | None = None  # when the source had our word
        self._looked: tuple[float, Mapping[str, Mapping[str, Any]]] | None = None
        self._failed = ""

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for an answer."""
        with self._lock:
            return self._asked is not None and self._clock() - self._asked <= _GAP

    def objection(self) -> str | None:
        """Say why no gateway may be restarted now; ``None`` if one may, empty while the answer is not known yet."""
        with self._lock:
            now = self._clock()
            if self._asked is None or now - self._asked > _GAP:
                self._since, self._told, self._looked, self._failed = now, None, None, ""
            self._asked = now
            if self._looked is None or self._told is None:
                return self._failed
            at, others = self._looked
            if now - at > _LOOK_COUNTS:
                return self._failed or "the other nodes cannot be asked"
            if others and at < self._told + SETTLE:
                return ""
            return next((why for name in sorted(others) if (why := self._why(name, others[name]))), None)

    def told(self, offered: float) -> None:
        """Take note that a report that was made at this moment (by ``clock``) has arrived."""
        with self._lock:
            if self._told is None and offered >= self._since:
                self._told = self._clock()

    def looked(self, reports: Mapping[str, NodeReport]) -> None:
        """Take the reports of all nodes."""
        others = {}
        for name, report in reports.items():
            if name == self._node or report.age is None or report.age > _FRESH:
                continue
            try:
                value = json.loads(report.raw)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                others[name] = value
        with self._lock:
            self._looked = (self._clock(), others)
            self._failed = ""

    def failed(self, why: str) -> None:
        """Take note that the reports could not be exchanged."""
        with self._lock:
            self._failed = f"the other nodes cannot be asked: {why}"

    def _why(self, name: str, value: Mapping[str, Any]) -> str | None:
        try:
            turn = value["sync"]["turn"]
            if turn is not None:
                return f"{turn['instance']} of node {name} is being restarted"
            gateways = [g for g in value["gateways"] if g["age"] is not None]
            for gateway in gateways:
                serves = gateway["ready"] and not gateway["draining"] and gateway["age"] <= ALIVE
                if gateway["age"] <= RETURN and not serves:
                    return f"{gateway['name']} of node {name} is not ready"
            waits = any(g["needs_restart"] and g["age"] <= ALIVE for g in gateways)
            if value.get("rolling") is True and waits and name < self._node:
                return f"node {name} restarts its gateways first"
        except (KeyError, TypeError):
            # What cannot be read says nothing; the node is as good as one without a report.
            return None
        return None
