# SPDX-License-Identifier: Apache-2.0
"""``python -m moat.demo up|down``."""

from __future__ import annotations

import argparse
import sys

from moat.console import Console
from moat.demo.down import down
from moat.demo.places import HTTP_PORT, HTTPS_PORT
from moat.demo.up import up
from moat.errors import MoatError


def main() -> int:
    """Bring the demo up or take it down; exit codes as for ``moat``."""
    parser = argparse.ArgumentParser(prog="moat.demo", description="The demo: a bundle built, installed and used here.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="build, verify and install a bundle; get a streamed answer")
    start.add_argument("--https-port", type=int, default=HTTPS_PORT, help="default %(default)s (MOAT_HTTPS_PORT)")
    start.add_argument("--http-port", type=int, default=HTTP_PORT, help="default %(default)s (MOAT_HTTP_PORT)")
    commands.add_parser("down", help="stop it and remove what it made, except the cache and the bundle")
    args = parser.parse_args()
    console = Console()
    try:
        if args.command == "up":
            up(console, https_port=args.https_port, http_port=args.http_port)
        else:
            down(console)
    except MoatError as e:
        console.problem(e)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
