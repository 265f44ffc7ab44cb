# SPDX-License-Identifier: Apache-2.0
"""Moat: makes, signs, verifies and loads offline bundles of the LiteLLM gateway.

The package has two halves. ``moat.site`` (verify, inspect, plan, doctor, load, prepare)
imports the standard library only, runs on the target's own Python (3.11 or newer) and
travels on the medium as the zipapp ``moat.pyz``. ``moat.build`` (lock, fetch, build, keys,
sign) runs on the connected build host, may use any library, and is left out of the zipapp.

The modules directly below this package are shared by both halves and therefore keep to
the standard library as well.
"""

__version__ = "0.1.0"
