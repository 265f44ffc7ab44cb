# SPDX-License-Identifier: Apache-2.0
"""``evidence.html``: one page that a reviewer reads on a screen or on paper.

It loads nothing and runs nothing (a Content-Security-Policy in the page says so to the browser). Values come from the
host and may be hostile: :func:`say` is the only way for one into the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any, Final

from moat.site.evidencekit.model import Part

_LONGEST: Final = 400
_MOST_ROWS: Final = 400

_STYLE: Final = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1.5rem 1.25rem 4rem;background:#fff;color:#1a1a1a;
font:1rem/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid #767676}
h3{font-size:1rem;margin:1.25rem 0 .25rem}
p{margin:.5rem 0;max-width:48rem}
.verdict{margin:1.25rem 0;padding:1rem 1.25rem;border:.3rem solid #0b6b2e}
.verdict.bad{border-color:#a30000;border-style:double;border-width:.6rem}
.word{font-size:1.6rem;font-weight:800;line-height:1.2}
.verdict .word{color:#0b6b2e}.verdict.bad .word{color:#a30000}
table{border-collapse:collapse;width:100%;margin:.5rem 0 0;font-size:.85rem}
th,td{border:1px solid #8a8a8a;padding:.3rem .5rem;text-align:left;vertical-align:top;overflow-wrap:anywhere}
thead th{background:#eee;overflow-wrap:normal}
td.no{font-weight:700}td.no::before{content:"\\25B6\\00A0"}
pre{tab-size:2;font:.8rem/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;border:1px solid #8a8a8a;padding:.75rem;margin:.75rem 0 0}
dl{display:grid;grid-template-columns:minmax(8rem,14rem) 1fr;gap:.25rem 1rem;margin:.75rem 0;font-size:.9rem}
dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
.gap{border-left:.3rem solid #7a4b00;padding-left:.75rem}
.finding{border-left:.3rem solid #a30000;padding-left:.75rem}
@media (max-width:40rem){dl{display:block}dd{margin:0 0 .5rem}table{display:block;overflow-x:auto}}
@media print{body{max-width:none;padding:0;font-size:10pt}h2{break-after:avoid}tr{break-inside:avoid}}
"""


def say(value: object) -> str:
    """Return a value for the page: unprintable characters as escapes, shortened, HTML escaped."""
    if value is None or value == "":
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(say(v) for v in value) or "&ndash;"
    if isinstance(value, Mapping):
        return ", ".join(f"{say(k)}: {say(v)}" for k, v in value.items()) or "&ndash;"
    text = str(value)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:_LONGEST])
    return html.escape(shown) + ("…" if len(text) > _LONGEST else "")


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table; ``columns`` are keys and their headings. A ``False`` is marked."""
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{say(title)}</th>" for _, title in columns)
    body = ""
    for row in rows[:_MOST_ROWS]:
        cells = "".join(
            (f'<td class="no">{say(False)}</td>' if row.get(key) is False else f"<td>{say(row.get(key))}</td>")
            for key, _ in columns
        )
        body += f"<tr>{cells}</tr>\n"
    more = f"<p>{len(rows) - _MOST_ROWS} more rows are in the JSON file.</p>" if len(rows) > _MOST_ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>{more}"


def _list(pairs: Sequence[tuple[str, Any]]) -> str:
    return "<dl>" + "".join(f"<dt>{say(k)}</dt><dd>{say(v)}</dd>" for k, v in pairs) + "</dl>"


def _release(p: Part) -> str:
    d = p.data
    bundle = d.get("bundle") or {}
    shown = [
        ("Release in use", d.get("release")),
        ("Version, profile, target", [bundle.get(k) for k in ("version", "profile", "target")] if bundle else None),
        ("sha256 of the signed manifest", d.get("manifest_sha256")),
        ("Signed by the key", d.get("key_id")),
        ("Every file as the key signed it", d.get("verified")),
        ("Files compared", d.get("files_compared")),
        ("Left on the medium (folder: files)", d.get("not_brought")),
        ("Links", d.get("links")),
    ]
    boms = _table(
        [("path", "Bill of materials"), ("sha256", "sha256"), ("in_store", "On this host")], d.get("sbom", [])
    )
    return _list(shown) + "<h3>Bills of materials</h3>" + boms


def _rules(p: Part) -> str:
    d = p.data
    shown = _list(
        [("In force", d.get("in_force")), ("The same as the file", d.get("as_in_file")), ("File", d.get("file"))]
    )
    counters = _table(
        [("name", "Counter"), ("comment", "What it counts"), ("packets", "Packets"), ("bytes", "Bytes")],
        p.moment.get("counters", []),
    )
    lines = d.get("rules", [])
    # The table above has the counters; what is let out stands in the chains.
    first = next((i for i, line in enumerate(lines) if line.startswith("\tchain ")), 0)
    text = "\n".join(lines[first:])
    return (
        shown
        + "<h3>Counters</h3>"
        + counters
        + (f"<h3>Rules in force</h3><pre>{html.escape(text)}</pre>" if text else "")
    )


def _units(p: Part) -> str:
    rows = [{**r, "exposure": p.moment.get(r["unit"], {}).get("exposure")} for r in p.data.get("units", [])]
    table = _table(
        [
            ("unit", "Unit"),
            ("ActiveState", "State"),
            ("UnitFileState", "At boot"),
            ("exposure", "systemd-analyze security"),
        ],
        rows,
    )
    keys = ("User", "CapabilityBoundingSet", "NoNewPrivileges", "ProtectSystem", "MemoryDenyWriteExecute")
    more = ("RestrictAddressFamilies", "IPAddressDeny", "IPAddressAllow", "ReadWritePaths")
    cages = [{"unit": r["unit"], **r.get("confinement", {})} for r in rows if r.get("confinement")]
    return (
        table
        + "<h3>Confinement</h3><p>Further properties are in units.json.</p>"
        + _table([("unit", "Unit"), *((k, k) for k in keys)], cages)
        + _table([("unit", "Unit"), *((k, k) for k in more)], cages)
    )


def _secrets(p: Part) -> str:
    accounts = _table(
        [("name", "Account"), ("uid", "uid"), ("shell", "Shell"), ("password_locked", "No password")],
        p.data.get("accounts", []),
    )
    files = _table(
        [("path", "File"), ("owner", "Owner"), ("group", "Group"), ("mode", "Mode")], p.data.get("files", [])
    )
    return f"<p>No content was read into this collection.</p><h3>Accounts</h3>{accounts}<h3>Secrets</h3>{files}"


def _sockets(p: Part) -> str:
    internet = _table(
        [
            ("protocol", "Protocol"), ("address", "Address"), ("port", "Port"), ("program", "Program"),
            ("user", "User"), ("loopback", "Who may connect"),
        ],
        [{**r, "loopback": "this host" if r.get("loopback") else "other hosts"} for r in p.data.get("internet", [])],
    )  # fmt: skip
    unix = _table([("path", "Unix socket"), ("mode", "Mode"), ("uid", "uid"), ("gid", "gid")], p.data.get("unix", []))
    return internet + "<h3>Unix sockets of Moat</h3>" + unix


def _packages(p: Part) -> str:
    sources = _table([("file", "Source of apt"), ("lines", "Active lines")], p.data.get("sources", []))
    repository = _table(
        [("packages", "Moat's repository"), ("listed", "Listed by InRelease"), ("signature", "Signature")],
        p.data.get("repository", []),
    )
    columns = [
        ("package", "Package"),
        ("repository", "In the repository"),
        ("installed", "Installed"),
        ("same", "The same"),
    ]
    # What is not installed is no contradiction: the repository also serves hosts of other roles.
    rows = [{**r, "same": r["same"] if r["installed"] else "not installed"} for r in p.data.get("packages", [])]
    return sources + repository + _table(columns, rows)


def _configuration(p: Part) -> str:
    return _table(
        [("path", "File"), ("owner", "Owner"), ("group", "Group"), ("mode", "Mode"), ("sha256", "sha256")],
        p.data.get("files", []),
    )


def _plain(p: Part) -> str:
    rows = [(k.replace("_", " "), v) for k, v in {**p.data, **p.moment}.items()]
    return _list(rows) if rows else "<p>Nothing was collected; the reason is given above.</p>"


_SECTIONS: Final = {
    "release": _release,
    "rules": _rules,
    "units": _units,
    "secrets": _secrets,
    "sockets": _sockets,
    "packages": _packages,
    "configuration": _configuration,
}


def page(parts: Sequence[Part], host: str, created: str, version: str) -> str:
    """Return the whole page."""
    findings = [(p, f) for p in parts for f in p.findings]
    gaps = [(p, g) for p in parts for g in p.gaps]
    word = f"{len(findings)} contradiction{'s' if len(findings) != 1 else ''}" if findings else "Nothing contradicts"
    lead = (
        "What must not be so is listed first; each entry says what to do."
        if findings
        else "What was collected agrees with what was signed and with what Moat promises of a host."
    )
    missing = (
        f"{len(gaps)} thing{'s' if len(gaps) != 1 else ''} could not be collected." if gaps else "Nothing is missing."
    )
    css = "verdict bad" if findings else "verdict"
    blocks = [f'<div class="{css}"><p class="word">{say(word)}</p><p>{say(lead)} {say(missing)}</p></div>']
    if findings:
        blocks.append("<h2>What must not be so</h2>")
        for p, f in findings:
            pairs = _list([("Found", f.found), ("Expected", f.expected), ("Do", f.hint)])
            blocks.append(f'<div class="finding"><p><strong>{say(f.what)}</strong> ({say(p.title)})</p>{pairs}</div>')
    if gaps:
        blocks.append("<h2>What could not be collected</h2>")
        blocks += [f'<p class="gap"><strong>{say(g.what)}</strong> ({say(p.title)}): {say(g.why)}</p>' for p, g in gaps]
    for p in parts:
        blocks.append(f"<h2>{say(p.title)}</h2>{_SECTIONS.get(p.name, _plain)(p)}")
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evidence: {say(host)}, {say(created)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Evidence of {say(host)}</h1>\n<p>Collected {say(created)} (the host's clock, UTC) by moat "
        f"{say(version)}. SHA256SUMS beside this page covers it and the JSON files that it was made from.</p>\n"
        + "\n".join(blocks)
        + "\n</main>\n</body>\n</html>\n"
    )
