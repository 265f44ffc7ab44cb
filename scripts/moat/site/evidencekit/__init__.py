# SPDX-License-Identifier: Apache-2.0
"""The parts of ``moat evidence``: each module collects one subject of a host; ``page`` shows all of them to a person.

A collector takes a :class:`~moat.site.evidencekit.model.Host`, changes nothing, and returns a
:class:`~moat.site.evidencekit.model.Part`: what it found, what must not be so, and what could not be collected.
"""
