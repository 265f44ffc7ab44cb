# SPDX-License-Identifier: Apache-2.0
"""What runs at a site, on the standard library alone: check a bundle, then bring it into use.

``verify`` decides whether a medium is trusted (state machine in ``trust``, bytes in ``scan``),
``inspect`` and ``plan`` say what is on it and what it would change, ``doctor`` whether this host
can take it, ``load`` brings the images into the engine, ``prepare`` makes a Compose deployment
folder with its secrets and certificate, ``firewall`` closes the container networks.
"""
