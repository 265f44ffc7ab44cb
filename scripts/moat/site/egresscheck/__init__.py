# SPDX-License-Identifier: Apache-2.0
"""What ``moat egress verify`` is made of: capture layers, the two kinds of site, first requests, the report."""
