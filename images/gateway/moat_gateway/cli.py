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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moat_gateway import (
    __version__,
    adminclient,
    cliconfig,
    endpoints,
    events,
    keyfile,
    keys,
    metrics,
    preflight,
    settings,
    store,
    storeaccounts,
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

    _keys_parser(command("keys", _keys, "Make, list and revoke client keys in keys.yaml."))

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

    _store_parser(command("store", _store, "Make or check the bucket of configuration revisions, and its accounts."))

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


def _keys_parser(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--keys", "--file", dest="setting_keys", metavar="FILE", help="the keys file (MOAT_KEYS)")
    new = actions.add_parser("new", parents=[shared], help="make a key; its secret is shown once")
    new.add_argument("id_positional", nargs="?", metavar="ID", help="id of the key in logs")
    new.add_argument("--id", dest="id_option", help="the same as an option")
    new.add_argument("--team", required=True, help="id of its team")
    new.add_argument(
        "--create-team", action="store_true", help="make the team if it is not there (with --models, or all)"
    )
    new.add_argument("--models", help="model names it may use, with commas; default: the team's")
    new.add_argument("--not-after", metavar="DATE", help="last day (2027-06-30), or a time with its zone")
    new.add_argument("--out", type=Path, metavar="FILE", help="write the secret there (mode 0600) instead of stdout")
    listing = actions.add_parser("list", parents=[shared], help="list teams and keys")
    listing.add_argument("--json", action="store_true", help="one JSON object on stdout")
    revoke = actions.add_parser("revoke", parents=[shared], help="remove a key")
    revoke.add_argument("id", metavar="ID")


def _store_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("init", "check", "accounts"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--endpoint", dest="setting_store_endpoint", help="short for --store-endpoint")
    parser.add_argument("--bucket", action="append", metavar="NAME", help="a bucket; with `accounts` repeat for more")
    secrets = parser.add_mutually_exclusive_group()
    secrets.add_argument(
        "--secrets",
        type=Path,
        metavar="DIR",
        help="accounts: folder with store_root_user, store_writer_secret_key, ...",
    )
    secrets.add_argument(
        "--secrets-stdin", action="store_true", help="accounts: the same as one JSON object on standard input"
    )
    parser.add_argument("--prune", action="store_true", help="accounts: remove those of earlier keys")
    settings.add_options(parser, *(s.name for s in settings.SETTINGS if s.name.startswith("store_")))


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


def _keys(args: argparse.Namespace) -> int:
    path = _load(args)[0].keys
    if args.action == "new":
        return _keys_new(args, path)
    if args.action == "revoke":
        keyfile.revoke(path, args.id)
        _say(f"{args.id} is revoked; running gateways see it within a second")
        return 0
    now = keys.read(path)
    if args.json:
        _print_json(
            {
                "ok": True,
                "teams": [asdict(t) for t in now.teams.values()],
                "keys": [{"id": k.id, "team": k.team, "models": k.models, "not_after": _moment(k)} for k in now.keys],
            }
        )
        return 0
    for t in now.teams.values():
        print(f"team {t.id}: models {', '.join(t.models)}")
    for k in now.keys:
        models = ", ".join(k.models or ("of the team",))
        print(f"key  {k.id}: team {k.team}, models {models}, ends {_moment(k) or 'never'}")
    return 0


def _keys_new(args: argparse.Namespace, path: Path) -> int:
    key_id = args.id_option or args.id_positional
    if not key_id or (args.id_option and args.id_positional):
        raise BadKeys("the key needs one id", expected="moat-gateway keys new ID --team TEAM")
    names = [m.strip() for m in args.models.split(",") if m.strip()] if args.models else None
    secret = keys.new_secret()
    out = _open_new(args.out) if args.out else None
    try:
        keyfile.new_key(
            path, key_id, args.team, models=names, not_after=args.not_after, create_team=args.create_team, secret=secret
        )
    except BaseException:
        if out is not None:
            os.close(out)
            args.out.unlink(missing_ok=True)
        raise
    if out is None:
        print(secret)
    else:
        with os.fdopen(out, "w", encoding="ascii") as f:
            f.write(secret + "\n")
    _say(f"{key_id} is in {path}; this is the only time that its secret is shown")
    return 0


def _open_new(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as e:
        raise BadKeys("the secret cannot be written", found=e.strerror or str(e), path=str(path)) from e


def _moment(key: keys.Key) -> str | None:
    return key.not_after.isoformat().replace("+00:00", "Z") if key.not_after is not None else None


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
            raise BadRevision(f"revision {refused['revision']} is refused: {refused['reason']}")
        problem = (answer.get("problems") or [{}])[0]
        kinds = {k.kind: k for k in all_kinds()}
        raise kinds.get(str(problem.get("kind")), BadKeys)(
            str(problem.get("message", "the keys file was refused")),
            path=problem.get("path"),
            line=problem.get("line"),
            found=problem.get("found"),
            expected=problem.get("expected"),
            hint="correct the file; the one before it still serves",
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


def _store(args: argparse.Namespace) -> int:
    if args.action == "accounts":
        return _store_accounts(args)
    if args.bucket:
        args.setting_store_bucket = args.bucket[-1]
    values, _unknown = _load(args)
    state = store.init(values) if args.action == "init" else store.check(values)
    reports_made = store.init_status(values) if args.action == "init" else False
    if args.json:
        _print_json({"ok": True, **asdict(state), "status_bucket": values.store_status_bucket})
    else:
        made = "made" if state.created else "was there"
        kept = "turned on" if state.versioning_enabled else "on"
        print(f"bucket {state.bucket} at {state.endpoint}: {made}, versioning {kept}")
        if args.action == "init":
            print(f"bucket {values.store_status_bucket}: {'made' if reports_made else 'was there'}")
    return 0


def _store_accounts(args: argparse.Namespace) -> int:
    values, _unknown = _load(args)
    if args.secrets_stdin:
        secrets = storeaccounts.read_json(sys.stdin.read(1 << 16))
    else:
        secrets = storeaccounts.read_folder(args.secrets or values.secrets_dir)
    done = storeaccounts.apply(values, secrets, args.bucket or [values.store_bucket], prune=args.prune)
    if args.json:
        _print_json({"ok": True, "exit": 0, "changed": bool(done.changes), **asdict(done), "problems": []})
    else:
        print(f"store {done.endpoint}: {'; '.join(done.changes) or 'buckets and accounts were right'}")
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
