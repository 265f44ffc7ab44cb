# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - a table whose rows are sentences
"""The names of all log events and what each means (``docs/reference/log-events.md``; a test compares the two)."""

from __future__ import annotations

EVENTS: dict[str, str] = {
    "start.begin": "The process has read its settings. Fields: `version`, `litellm`, `instance`, `pid`.",
    "start.refused": "The gateway does not start. Fields: `kind`, `exit`, `message`; the same line is on stderr.",
    "start.ready": "Requests are served. Fields: `models` (count), `keys` (count), `seconds` since the start, `address`.",
    "settings.unknown": "A `MOAT_*` variable is not a setting. Field: `names`.",
    "environment.ignored": "Inherited variables that would steer LiteLLM past the checked configuration were removed. Field: `names`.",
    "config.deployments_dropped": "LiteLLM left out deployments that it found invalid. Fields: `expected`, `found`.",
    "config.applied": "A revision took effect. Fields: `revision`, `sha256`, `seconds` from noticing it, `made` (deployments that were made anew), `loop_ms` (longest hold of the event loop), `loop_cpu_ms` (most processor time of one hold: what it takes on a machine with nothing else to do).",
    "config.refused": "A revision cannot be served; the one before it still serves. Fields: `revision`, `kind`, `message`.",
    "config.needs_restart": "What is wanted can only be taken by a restart; until then the configuration before it serves. Fields: `revision`, `names`, `policy`.",
    "config.fallback": "At the start the newest revision of the node could not be used. Fields: `revision` (what serves instead; 0 for the local files).",
    "config.report_failed": "The report for config-sync cannot be written. Fields: `message`, `path`.",
    "secrets.changed": "Changed secret files took effect. Fields: `names`, `seconds`, `made` (deployments that were made anew).",
    "secrets.refused": "A changed secret file cannot be used; the value before it still counts. Fields: `secret` (its name), `message`.",
    "keys.loaded": "A keys file took effect. Fields: `keys`, `teams`, `sha256`.",
    "keys.refused": "A changed keys file was refused; the one before it still serves. Field: `message`.",
    "request.finished": "A request ended. Fields: `method`, `path` (no query), `status`, `duration_ms`, `stream`, `key` (its id).",
    "request.failed": "A request broke off with an exception. Fields: `method`, `path`, `error` (class), `where`.",
    "egress.denied": "A connection or look-up outside the allow-list was refused. Fields: `operation`, `destination`, `count` since the last such event.",
    "library.log": "A record of a library's logger. Fields: `logger`, `where`, `error` (class); `message` only before the start is done, since later it may quote a prompt.",
    "library.print": "A library printed. Field: `text` before the start is done, later only `chars`.",
    "shutdown.begin": "SIGTERM, SIGINT or the turn to restart: readiness says 503. Fields: `signal` (`turn` for the last), `in_flight`, `active_streams`.",
    "shutdown.cut": "The shutdown time is over and requests are cut. Field: `in_flight`.",
    "shutdown.end": "The process ends. Field: `seconds` since the signal.",
    "admin.reload": "The admin socket (or SIGHUP) asked to look for changes at once. Field: `ok`.",
    "sync.begin": "config-sync has its folder. Fields: `version`, `node`, `pid`, `source`.",
    "sync.waiting": "The source answers and holds no revision yet. Field: `message`.",
    "sync.accepted": "A revision is verified, checked, kept and in force on this node. Fields: `revision`, `sha256`, `key` (that signed), `files`, `author`, `repaired` (it was in force before, and its kept copy was damaged), `seconds`.",
    "sync.refused": "A revision was refused; the one in force stays. Fields: `revision` (`null` if not even that could be read), `kind` (of the refusal), `message`, `tried_again` (when).",
    "sync.source_lost": "The source does not answer any more. Fields: `source`, `message`, `revision` (that goes on serving).",
    "sync.source_back": "The source answers again. Field: `source`.",
    "sync.damaged": "Something in the folder of config-sync is damaged or cannot be written. Fields: `revision` (or `null`), `message`.",
    "sync.turn": "A rolling restart. Fields: `instance`, `revision`, `turn` (`given`, `done`, `failed`), `why`.",
    "sync.report_failed": "The node's report could not be written to the source; said once until it works again. Field: `message`.",
    "sync.end": "config-sync ends. Fields: `signal`, `seconds` since its start.",
    "defect": "An exception that nothing expected. Fields: `error` (class), `where`.",
}


def markdown() -> str:
    """Return the reference page."""
    lines = [
        "# Log events",
        "",
        "JSON lines on stdout. Every line has `ts` (UTC, milliseconds), `level`, `event`, `trace_id`, `span_id`, `request_id`, `team`",
        "(`null` where there is no request). No line holds a prompt, an answer, a key or a secret. A test compares this page with the code.",
        "",
        "| event | meaning |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in EVENTS.items()),
    ]
    return "\n".join(lines) + "\n"
