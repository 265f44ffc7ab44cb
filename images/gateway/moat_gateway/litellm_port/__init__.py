# SPDX-License-Identifier: Apache-2.0
"""The only package that touches LiteLLM; the rest of Moat asks here.

``start`` prepares its environment, imports and verifies it, and holds the hook that it calls. ``options`` says which of
its settings it reads at each request, and so can be changed while it serves. ``live`` prepares a change, ``put`` puts
it into force, ``prices`` keeps LiteLLM's price table from growing by it, ``effective`` is the file that LiteLLM reads.
``words`` are those that a configuration may use, ``dryrun`` loads one to see whether it can be loaded.

LiteLLM is installed unmodified. Everything here that leans on more than its documented interface is checked when it
is loaded (:func:`verify`) and by contract tests that name what moved when the pin moves. Nothing of LiteLLM is imported
before it is needed: importing it takes seconds.
"""

from __future__ import annotations

from moat_gateway.litellm_port.effective import EffectiveFile
from moat_gateway.litellm_port.live import NeedsRestart, Serving, Wanted
from moat_gateway.litellm_port.put import callback_counts, set_master_key
from moat_gateway.litellm_port.start import (
    OFFLINE,
    PIN,
    custom_auth,
    deployments,
    import_app,
    models,
    prepare_environment,
    steering_variables,
    verify,
    version,
)

__all__ = [
    "OFFLINE",
    "PIN",
    "EffectiveFile",
    "NeedsRestart",
    "Serving",
    "Wanted",
    "callback_counts",
    "custom_auth",
    "deployments",
    "import_app",
    "models",
    "prepare_environment",
    "set_master_key",
    "steering_variables",
    "verify",
    "version",
]
