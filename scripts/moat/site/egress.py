# SPDX-License-Identifier: Apache-2.0
"""``moat egress verify``: restart the running site inside a capture and prove that nothing tries to leave.

This module is the command: which site, which options, which exit code. The work is in
:mod:`moat.site.egresscheck`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from moat.console import Console
from moat.errors import EgressFound, EgressUnproven, MoatError
from moat.site.egresscheck import signals
from moat.site.egresscheck.model import JSON_NAME, Report, Site
from moat.site.egresscheck.run import Options, verify
from moat.site.egresscheck.verdict import verdict

NAME = "egress"
HELP = "restart the running site inside a capture and prove that nothing tries to leave it"

#: Reports are evidence: they stay, one folder a run.
EVIDENCE_DIR: Final = Path("/var/lib/moat/evidence/egress")
_MAX_ROWS: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify")
    sub = actions.add_parser(
        "verify",
        help=HELP,
        description=HELP + ". Every service is restarted once; what the report says and what it cannot say: "
        "docs/egress-verify.md.",
    )
    # SUPPRESS: the option may stand before or behind the word `verify`.
    sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object on stdout")
    sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of a refusal")
    sub.add_argument("--site", choices=("auto", "systemd", "compose"), default="auto", help="default %(default)s")
    sub.add_argument(
        "--dir", type=Path, default=Path("/opt/moat"), help="deployment folder (Compose); default %(default)s"
    )
    sub.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="ADDRESS[:PORT]",
        help="one more destination that is no leak: address, network or name; may be given several times",
    )
    sub.add_argument(
        "--quiet",
        dest="quiet_seconds",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to go on watching after the last request; default %(default)s",
    )
    sub.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="a client key for the first requests; default on a systemd site: the gateways' own master key",
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the report; default {EVIDENCE_DIR}/<time>")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError("must be between 0 and 86400 seconds")
    return value


def run(args: argparse.Namespace, console: Console) -> int:
    """Verify, write the report, and say the verdict."""
    if os.geteuid() != 0:
        raise EgressUnproven(
            "the capture needs root",
            found=f"user id {os.geteuid()}",
            expected="0",
            hint="run it as root on the host: it sets packet filter rules, watches system calls and restarts services",
        )
    folder = args.out or EVIDENCE_DIR / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    refuse_to_overwrite(folder)
    with signals.ended_once():
        site = _site(args.site, args.dir, args.key_file, console)
        options = Options(quiet_seconds=args.quiet_seconds, allow=tuple(args.allow))
        try:
            report = verify(site, options, console)
        except KeyboardInterrupt:
            console.warn("interrupted: what was done for the capture is undone, and there is no report")
            raise
        command = shlex.join(["moat", *sys.argv[1:]])
        report = replace(report, host={**report.host, "command": command})
        # Imported here: the page is a large module, and no part of a capture that has to be undone.
        from moat.site.egresscheck.report import write_report

        try:
            write_report(report, folder)
        except OSError as e:
            raise EgressUnproven(
                f"the report cannot be written to {folder}",
                found=str(e),
                expected="a folder that root may write",
                hint="make room, or give another folder with --out, and run it again",
                path=str(folder),
            ) from e
    refusals = refusals_of(report, folder)
    for refusal in refusals:
        console.problem(refusal)
    code = min((r.exit_code for r in refusals), default=0)
    judged = verdict(report)
    words = {"word": judged.word.value, "sentence": judged.sentence, "reasons": judged.reasons, "mind": judged.mind}
    result = {**report.to_dict(), "verdict": words, "exit": code, "folder": str(folder)}
    console.result(result, _text(report, folder))
    return code


def refuse_to_overwrite(folder: Path) -> None:
    """Refuse a folder that has a report: evidence stays as it was.

    Raises:
        EgressUnproven: it has one.
    """
    if (folder / JSON_NAME).exists():
        raise EgressUnproven(
            "there is a report in this folder already",
            found=str(folder / JSON_NAME),
            expected="a folder without one: no report is ever overwritten",
            hint="give another folder with --out, or none",
            path=str(folder),
        )


def _site(kind: str, directory: Path, key_file: Path | None, console: Console) -> Site:
    """Return the running site; with ``auto``, systemd before Compose."""
    from moat.site.egresscheck.systemd_site import SystemdSite

    if kind == "systemd" or (kind == "auto" and SystemdSite.is_here()):
        return SystemdSite(console, key_file)
    if kind == "auto" and not (directory / "compose.yaml").is_file():
        raise EgressUnproven(
            "there is no site to verify here",
            found=f"no moat-gateway unit of systemd, and no {directory / 'compose.yaml'}",
            expected="a running site",
            hint="install it first, or name the deployment folder with --dir",
        )
    from moat.site.egresscheck.compose_site import ComposeSite

    return ComposeSite(directory, console, key_file)


def refusals_of(report: Report, folder: Path) -> list[MoatError]:
    """Return what the verdict refuses: an attempt found, and a proof that is none. Empty if the verdict is ok."""
    page = f"read {folder / 'egress-report.html'}"
    refusals: list[MoatError] = []
    if not report.clean:
        found = [f"{a.when} {a.component} ({a.process}): {a.destination} [{a.layer}]" for a in report.attempts]
        found += [f"{e.setting} names {e.url}" for e in report.endpoints if not e.allowed]
        found += [f"{p.name}: {p.found} (expected {p.expected})" for p in report.probes if not p.ok]
        more = len(found) - _MAX_ROWS
        refusals.append(
            EgressFound(
                f"{len(report.attempts)} attempts to leave, {sum(not e.allowed for e in report.endpoints)} endpoints "
                f"outside the allow-list, {sum(not p.ok for p in report.probes)} probes that do not hold",
                found="\n".join(found[:_MAX_ROWS]) + (f"\n... and {more} more" if more > 0 else ""),
                expected="none",
                hint=f"{page}; docs/egress-verify.md says how to find the cause",
            )
        )
    if not report.proven:
        why = [f"{n.name}: its control was not caught ({n.why})" for n in report.layers if n.control_caught is False]
        if not any(n.available and n.name in ("packets", "bridges", "syscalls") for n in report.layers):
            why += [f"{n.name}: {n.why}" for n in report.layers if not n.available]
        why += list(report.problems)
        refusals.append(
            EgressUnproven(
                "the capture proves nothing",
                found="\n".join(why[:_MAX_ROWS]) or "no layer",
                expected="a layer that sees packets or system calls, and every control caught",
                hint=page,
            )
        )
    return refusals


def _text(report: Report, folder: Path) -> str:
    lines = []
    for layer in report.layers:
        state = "watched, control caught" if layer.control_caught else "watched, CONTROL NOT CAUGHT"
        lines.append(f"{layer.name:<10} {state if layer.available else 'not available'}: {layer.why}")
    for request in report.requests:
        lines.append(
            f"request    {request.kind:<10} {request.status:>3} {'ok' if request.ok else 'FAILED'} {request.note}"
        )
    lines += [f"mind       {sentence}" for sentence in verdict(report).mind]
    lines.append(f"report     {folder / 'egress-report.html'}")
    words = "nothing tried to leave" if report.clean else f"NOT CLEAN: {len(report.attempts)} attempts to leave"
    lines.append(f"egress: {words}; {'proven' if report.proven else 'NOT PROVEN'}")
    return "\n".join(lines)
