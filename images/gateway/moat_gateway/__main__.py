# SPDX-License-Identifier: Apache-2.0
"""``python -m moat_gateway`` is ``moat-gateway``."""

import sys

from moat_gateway.cli import main

if __name__ == "__main__":
    sys.exit(main())
