# SPDX-License-Identifier: Apache-2.0
"""The sidecar ``moat-gateway sync``: from the source of revisions to this node's folder."""
