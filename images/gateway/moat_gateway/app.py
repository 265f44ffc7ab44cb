# SPDX-License-Identifier: Apache-2.0
"""What a request goes through, outermost first; reads as a table of contents.

::

    correlation    an id and a trace for every request and every answer
    probes         /_moat/live, /_moat/ready
    meter          counts, one log line a request
    (drain gate)   comes later
    identity       whose key is it
    (admission)    comes later
    LiteLLM        unmodified; its custom_auth hook reads what identity found
"""

from __future__ import annotations

from moat_gateway.logs import Log
from moat_gateway.stages import ASGIApp
from moat_gateway.stages.correlation import Correlation
from moat_gateway.stages.identity import Identity
from moat_gateway.stages.meter import Meter
from moat_gateway.stages.probes import Probes
from moat_gateway.status import State


def compose(litellm_app: ASGIApp, state: State, log: Log) -> ASGIApp:
    """Return the application that the public port serves."""
    app: ASGIApp = litellm_app
    app = Identity(app, state.keys.identify, state.counters, state.keys.recheck)
    app = Meter(app, state.counters, log)
    app = Probes(app, state.not_ready)
    return Correlation(app, log)
