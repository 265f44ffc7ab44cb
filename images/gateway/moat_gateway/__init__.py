# SPDX-License-Identifier: Apache-2.0
"""Moat's layer around an unmodified LiteLLM proxy: one process, one event loop.

How the parts work together: ``cli`` parses, ``serve`` runs the process (sockets, signals, admin socket), ``preflight``
reads settings, secrets, configuration and keys and refuses what must not run, ``app`` composes the stages in front of
LiteLLM, and ``litellm_port`` is the only package that knows LiteLLM's internals.
"""

__version__ = "0.1.0"
