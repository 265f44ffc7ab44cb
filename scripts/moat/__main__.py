# SPDX-License-Identifier: Apache-2.0
"""``python3 -m moat`` and the entry point of ``moat.pyz``."""

import sys

from moat.cli import main

if __name__ == "__main__":
    sys.exit(main())
