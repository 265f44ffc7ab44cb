# SPDX-License-Identifier: Apache-2.0
"""The command line ``moat``: a table of contents, and the translation of errors to exit codes.

A command is a module with ``NAME``, ``HELP``, ``add_arguments(parser)`` and
``run(args, console) -> int``; ``run`` returns 0, or the exit code of a refusal that it has
already reported, or raises :class:`moat.errors.MoatError`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import traceback
from collections.abc import Sequence

from moat import __version__
from moat.console import Console
from moat.errors import MoatError

#: Travel on the medium; standard library only.
SITE_COMMANDS = (
    "verify",
    "inspect",
    "plan",
    "doctor",
    "load",
    "prepare",
    "gateway",
    "firewall",
    "stage",
    "pack",
    "program",
    "apt-sign",
    "egress",
    "evidence",
)
#: Stay on the build host; absent from moat.pyz.
BUILD_COMMANDS = ("lock", "fetch", "build", "keys", "sign")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moat", description="Signed offline bundles of the LiteLLM gateway.")
    parser.add_argument("--version", action="version", version=f"moat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room, names in (("site", SITE_COMMANDS), ("build", BUILD_COMMANDS)):
        for name in names:
            path = f"moat.{room}.{name.replace('-', '_')}"
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as e:
                # In moat.pyz the build half is absent; a test holds both lists against the modules.
                if e.name in ("moat.build", path):
                    continue
                if room == "site" or (e.name or "").startswith("moat"):
                    raise
                # A checkout without its tools' environment still does all that a site does.
                parser.epilog = (
                    f"Without {e.name} there is no `moat {name}` here: run `make setup`, then .venv/bin/moat."
                )
                continue
            sub = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP)
            sub.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else there")
            sub.add_argument("--quiet", action="store_true", help="no steps and no progress")
            sub.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (``docs/reference/exit-codes.md``)."""
    for stream in (sys.stdout, sys.stderr):  # a Latin-1 terminal must not turn a file name into a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    console = Console(json_mode=args.json, quiet=args.quiet)
    try:
        return int(args.run(args, console))
    except MoatError as e:
        if args.debug:
            traceback.print_exc()
        console.problem(e)
        if args.json:
            console.result({"ok": False, "exit": e.exit_code, "problems": [e.to_dict()]}, "")
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception:
        traceback.print_exc()
        print("This is a defect of moat; please report it with the lines above.", file=sys.stderr)
        return 1
