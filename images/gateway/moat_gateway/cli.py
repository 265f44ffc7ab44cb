# SPDX-License-Identifier: Apache-2.0
"""The command line ``moat-gateway``: a table of contents, and the translation of errors to exit codes.

With ``--json`` there is one object on stdout and nothing else; messages go to stderr. Secrets are never options:
options name files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moat_gateway import (
    __version__,
    adminclient,
    cliconfig,
    clikeys,
    clistore,
    endpoints,
    events,
    metrics,
    preflight,
    settings,
    tls,
)
from moat_gateway import ask as ask_
from moat_gateway.errors import BadKeys, BadRevision, GatewayError, all_kinds
from moat_gateway.settings import Settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moat-gateway", description="LiteLLM with Moat's layer, for sites without internet."
    )
    parser.add_argument("--version", action="version", version=f"moat-gateway {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
        return sub

    serve = command("serve", _serve, "Run the gateway.")
    settings.add_options(serve)

    check = command(
        "check", _check, "Check settings, secrets, configuration and keys as `serve` does, without serving."
    )
    check.add_argument("--json", action="store_true", help="one JSON object on stdout")
    settings.add_options(check)

    listing = command(
        "endpoints", _endpoints, "List every destination that the configuration names, and whether it is allowed."
    )
    listing.add_argument("--json", action="store_true", help="one JSON object on stdout")
    settings.add_options(listing)

    clikeys.add_parser(command("keys", clikeys.run, "Make, list, rotate and revoke client keys in keys.yaml."))

    status = command("status", _status, "Ask the running gateway how it is.")
    status.add_argument("--json", action="store_true", help="one JSON object on stdout")
    settings.add_options(status, "admin_socket")

    reload = command("reload", _reload, "Have the running gateway look for a new revision, secrets and keys at once.")
    settings.add_options(reload, "admin_socket")

    table = command("settings", _settings, "Show the settings in force, or the reference pages.")
    table.add_argument("--json", action="store_true", help="one JSON object on stdout")
    pages = table.add_mutually_exclusive_group()
    pages.add_argument("--markdown", action="store_true", help="print docs/reference/settings.md")
    pages.add_argument("--metrics-markdown", action="store_true", help="print docs/reference/metrics.md")
    pages.add_argument("--events-markdown", action="store_true", help="print docs/reference/log-events.md")

    _ask_parser(command("ask", _ask, "Make one chat completion as a client does."))

    cliconfig.add_parser(
        command("config", cliconfig.run, "Check, sign, publish and follow revisions of the configuration.")
    )

    sync = command("sync", _sync, "Bring signed revisions to this node's gateways; runs until SIGTERM.")
    settings.add_options(sync)

    clistore.add_parser(
        command(
            "store",
            clistore.run,
            "Make or check the buckets of a store and their accounts, or copy revisions to another site.",
        )
    )

    tls_parser = command("tls", _tls, "Make a local certificate authority and a server certificate.")
    tls_parser.add_argument("action", choices=("self-signed",))
    tls_parser.add_argument(
        "--out-dir",
        "--out",
        dest="out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for ca.pem, cert.pem, key.pem",
    )
    tls_parser.add_argument(
        "--name", action="append", default=[], help="host name (or address) of the server; repeat for more"
    )
    tls_parser.add_argument("--ip", action="append", default=[], help="IP address of the server; repeat for more")
    tls_parser.add_argument("--days", type=int, default=825, help="how long it counts (default 825)")
    return parser


def _ask_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--base-url", "--url", dest="base_url", required=True, help="scheme, host and port of the site")
    parser.add_argument("--key-file", type=Path, required=True, help="file with the client key")
    parser.add_argument("--model", required=True)
    parser.add_argument("--ca-file", type=Path, help="certificate authority of the site; default: the system's")
    parser.add_argument("--stream", action="store_true", help="ask for a stream and print it as it comes")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of the answer (default 64)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds without a byte (default 120)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


# --- commands ---


def _load(args: argparse.Namespace) -> tuple[Settings, tuple[str, ...]]:
    return settings.load(os.environ, settings.overrides(args))


def _named(args: argparse.Namespace, values: Settings, unknown: tuple[str, ...]) -> tuple[Settings, tuple[str, ...]]:
    """Look at the files that were named by options, not at the revision of the node."""
    if args.setting_config is not None or args.setting_keys is not None:
        values = replace(values, sync_dir="")
    return values, unknown


def _serve(args: argparse.Namespace) -> int:
    from moat_gateway.serve import serve

    return serve(*_load(args))


def _sync(args: argparse.Namespace) -> int:
    from moat_gateway.sync.manager import run

    return run(*_load(args))


def _check(args: argparse.Namespace) -> int:
    values, unknown = _named(args, *_load(args))
    checked, problems = preflight.check(values, os.environ)
    if checked is None:
        if args.json:
            _print_json({"ok": False, "exit": problems[0].exit_code, "problems": [p.to_dict() for p in problems]})
        for p in problems:
            _say(f"moat-gateway: refused ({p.kind}): {p.one_line()}")
        return problems[0].exit_code
    for name in unknown:
        _say(f"warning: {name} is not a setting")
    summary = {
        "ok": True,
        "exit": 0,
        "revision": checked.served.revision,
        "models": list(checked.models),
        "deployments": len(checked.served.digests),
        "secrets": sorted(checked.secrets),
        "keys": len(checked.keys.keys),
        "teams": len(checked.keys.teams),
        "egress_allow": list(values.egress_allow),
        "config_sha256": checked.served.config_sha256,
        "problems": [],
    }
    if args.json:
        _print_json(summary)
    else:
        what = f"revision {checked.served.revision}" if checked.served.revision else str(values.config)
        for number, e in checked.passed_over:
            _say(f"warning: revision {number} cannot be used: {e.one_line()}")
        print(
            f"{what} is right: {len(checked.models)} models, {len(checked.served.digests)} deployments, "
            f"{len(checked.secrets)} secrets, {len(checked.keys.keys)} keys of {len(checked.keys.teams)} teams; "
            f"allowed destinations: {values.allow}"
        )
    return 0


def _endpoints(args: argparse.Namespace) -> int:
    values, _unknown = _named(args, *_load(args))
    found = endpoints.to_dict(values)
    if args.json:
        _print_json(found)
        return 0
    for e in found["endpoints"]:
        print(f"{'allowed' if e['allowed'] else 'REFUSED':<8} {e['url']:<40} {e['setting']}")
    print(f"allowed destinations: {values.allow}")
    return 0


def _status(args: argparse.Namespace) -> int:
    value = adminclient.status(_load(args)[0].admin_socket)
    if args.json:
        _print_json(value)
        return 0
    state = "ready" if value["ready"] else "not ready: " + "; ".join(value["not_ready"])
    print(f"{value['name']} (pid {value['pid']}): {state}")
    print(f"  version      {value['version']}, LiteLLM {value['litellm']}, since {value['started_at']}")
    print(f"  models       {', '.join(value['models']) or 'none'}")
    revision = value["config"]["revision"]
    print(f"  config       {f'revision {revision}' if revision else 'local files'}, {value['config']['applied_at']}")
    print(f"  keys         {value['keys']['count']} of {value['keys']['teams']} teams")
    print(f"  requests     {value['in_flight']} in flight, {value['active_streams']} streams")
    allowed = ", ".join(value["egress"]["allow"]) or "nothing but the loopback"
    print(f"  egress       {value['egress']['denied']} refused; allowed: {allowed}")
    for line in value["degraded"]:
        print(f"  degraded     {line}")
    return 0


def _reload(args: argparse.Namespace) -> int:
    code, body = adminclient.request(_load(args)[0].admin_socket, "POST", "/reload", timeout=30)
    answer = json.loads(body)
    config, refused = answer["config"], answer["config"]["last_refused"]
    if code != 200:
        if refused is not None:
            what = f"revision {refused['revision']}" if refused["revision"] else "what the source offers"
            raise BadRevision(f"{what} is refused: {refused['reason']}")
        problem = (answer.get("problems") or [{}])[0]
        kinds = {k.kind: k for k in all_kinds()}
        raise kinds.get(str(problem.get("kind")), BadKeys)(
            str(problem.get("message", "the keys file was refused")),
            path=problem.get("path"),
            line=problem.get("line"),
            found=problem.get("found"),
            expected=problem.get("expected"),
            hint=f"{problem.get('hint') or 'correct the file'}; the one before it still serves",
        )
    what = f"revision {config['revision']}" if config["revision"] else "the local files"
    print(f"{what} in force, {answer['keys']['count']} keys")
    if answer["checked"] is False:
        _say("config-sync did not answer within 2 s; what it has accepted so far was looked at")
    if config["needs_restart"]:
        _say(f"needs restart: {', '.join(config['needs_restart'])}")
    return 0


def _settings(args: argparse.Namespace) -> int:
    for wanted, page in ((args.markdown, settings), (args.metrics_markdown, metrics), (args.events_markdown, events)):
        if wanted:
            print(page.markdown(), end="")
            return 0
    values, _unknown = _load(args)
    if args.json:
        _print_json({s.name: _plain(getattr(values, s.name)) for s in settings.SETTINGS})
        return 0
    for s in settings.SETTINGS:
        value = _plain(getattr(values, s.name))
        print(f"{s.env:<28} {value if not isinstance(value, list) else ' '.join(value)}")
    return 0


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _ask(args: argparse.Namespace) -> int:
    show = not args.json

    def on_text(text: str) -> None:
        if show:
            print(text, end="", flush=True)

    answer = ask_.ask(
        base_url=args.base_url,
        model=args.model,
        prompt=args.prompt,
        key_file=args.key_file,
        ca_file=args.ca_file,
        stream=args.stream,
        max_tokens=args.max_tokens,
        timeout=args.timeout,
        on_text=on_text,
    )
    if args.json:
        _print_json(answer.to_dict())
        return 0
    u = answer.usage
    first = f"first token after {answer.first_token_seconds:.2f} s, " if answer.first_token_seconds is not None else ""
    print(
        f"\n--- {first}{answer.seconds:.2f} s in all; tokens: {u['prompt_tokens']} + {u['completion_tokens']} = "
        f"{u['total_tokens']}; request id {answer.request_id}"
    )
    return 0


def _tls(args: argparse.Namespace) -> int:
    made = tls.self_signed(args.out, [*args.name, *args.ip], days=args.days)
    print(f"{made.folder}: ca.pem, cert.pem, key.pem for {', '.join(made.names)}, until {made.not_after:%Y-%m-%d}")
    return 0


# --- output ---


def _print_json(value: Any) -> None:
    print(json.dumps(value, sort_keys=True))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (``docs/reference/gateway-exit-codes.md``)."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except GatewayError as e:
        if args.debug:
            traceback.print_exc()
        if getattr(args, "json", False):
            _print_json({"ok": False, "exit": e.exit_code, "problems": [e.to_dict()]})
        _say(f"moat-gateway: refused ({e.kind}): {e.one_line()}")
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception:
        traceback.print_exc()
        _say("This is a defect of moat-gateway; please report it with the lines above.")
        return 1
