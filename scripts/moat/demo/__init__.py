# SPDX-License-Identifier: Apache-2.0
"""``make demo``: from a checkout to a streamed answer, on one machine, as a site would do it.

``up`` is the table of contents: each step is one of Moat's own commands, run as the operator would
run it. ``steps`` times them and keeps the network away from those that must not need it, ``chat``
is the client on the host, ``plugin`` installs Compose where it is missing, ``down`` removes it all.
Not part of the bundle: this is the build host playing both parts.
"""
