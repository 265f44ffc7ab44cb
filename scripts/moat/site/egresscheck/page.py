# SPDX-License-Identifier: Apache-2.0
"""The page of the egress report: one file that a reviewer reads on a screen, on a phone or on paper.

It loads nothing and runs nothing (a Content-Security-Policy in the page says so to the browser), and every
value in it may come from a hostile process: :func:`say` is the only way for a value into the page.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from moat.site.egresscheck.model import JSON_NAME, LayerResult, Report
from moat.site.egresscheck.verdict import Group, Verdict, by_component, count, verdict

#: Longest text of one value; the rest is in the JSON file.
LONGEST: Final = 300
#: Most rows of one component; the rest is in the JSON file.
MOST_ROWS: Final = 200
#: Most characters of the rules.
LONGEST_RULES: Final = 200_000

#: What each layer can see, and what not.
_LAYERS: Final = {
    "packets": (
        "every packet that a process with a user of the site hands to the network, IPv4 and IPv6, by whatever call; of "
        "root's packets the new connections of processes in a unit of the site",
        "an attempt that fails before there is a packet (“syscalls” sees those); frames of raw packet sockets; the "
        "name behind an address",
    ),
    "dns": (
        "every name that the site's processes ask a name server for at port 53: the only layer that gives names",
        "an attempt that uses an address without asking for a name (“packets” or “bridges” and “syscalls” see those); "
        "what another program looks up for a process over its socket or the bus (systemd-resolved, nscd, Avahi); names "
        "inside of an encrypted connection, which itself is seen; names that a process of root asks for on the host",
    ),
    "syscalls": (
        "connect, sendto, sendmsg and sendmmsg, by which a process asks the kernel to connect or to send, even if they "
        "fail at once",
        "names; io_uring; 32-bit programs; further messages of a sendmmsg than its first eight; a kind of socket that "
        "the service may not even open. What of these becomes a packet is seen by “packets” or “bridges”",
    ),
    "bridges": (
        "every packet that leaves a container by a watched bridge towards anything but the site's own containers",
        "an attempt that fails inside of the container (“syscalls” sees those); the process behind a packet; frames "
        "between containers of one network",
    ),
}

_STYLE: Final = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1.5rem 1.25rem 4rem;background:#fff;color:#1a1a1a;
font:1rem/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid #767676}
h3{font-size:1rem;margin:1.5rem 0 .25rem}
p{margin:.5rem 0;max-width:48rem}
.lead{color:#444}
.verdict{margin:1.25rem 0;padding:1rem 1.25rem;border:.3rem solid #000;border-radius:.25rem}
.verdict p{margin:.25rem 0}
.verdict ul{margin:.5rem 0 0;padding-left:1.25rem}
p,li{overflow-wrap:anywhere}
.word{font-size:2rem;font-weight:800;letter-spacing:.03em;line-height:1.2}
.pass{border-color:#0b6b2e}.pass .word{color:#0b6b2e}
.fail{border-color:#a30000;border-style:double;border-width:.6rem}.fail .word{color:#a30000}
.unproven{border-color:#7a4b00;border-style:dashed}.unproven .word{color:#7a4b00}
table{border-collapse:collapse;width:100%;margin:.75rem 0 0;font-size:.9rem}
caption{text-align:left;font-weight:600;padding:.25rem 0}
th,td{border:1px solid #8a8a8a;padding:.35rem .5rem;text-align:left;vertical-align:top;overflow-wrap:anywhere}
thead th{background:#eee;overflow-wrap:normal}
tbody th{font-weight:600}
.bad{font-weight:700}
.bad::before{content:"\\25B6\\00A0"}
.short{white-space:nowrap;width:1%;font-variant-numeric:tabular-nums}
.fixed{table-layout:fixed}
.fixed th:nth-child(1){width:32%}.fixed th:nth-child(2){width:28%}.fixed th:nth-child(3){width:20%}
code,pre{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.85em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #8a8a8a;padding:.75rem;margin:.75rem 0 0}
dl{display:grid;grid-template-columns:minmax(8rem,14rem) 1fr;gap:.25rem 1rem;margin:.75rem 0;font-size:.9rem}
dt{font-weight:600}
dd{margin:0;overflow-wrap:anywhere}
@media (max-width:40rem){
body{padding:1rem .75rem 3rem}
table,caption,tbody,tr,td,tbody th,.fixed tbody th:nth-child(1){display:block;width:100%}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
tr{border:1px solid #8a8a8a;margin:.5rem 0;padding:.25rem 0}
td,tbody th{border:0;padding:.1rem .5rem}
td:empty{display:none}
td::before{content:attr(data-label) ": ";font-weight:600;color:#444}
.short{white-space:normal;width:100%}
dl{display:block}dd{margin:0 0 .5rem}
}
@media print{
html{font-size:9.5pt}
body{max-width:none;padding:0}
h2,h3,caption{break-after:avoid}
tr,.verdict{break-inside:avoid}
thead{display:table-header-group}
thead th{background:none;border-bottom-width:2px}
.pass .word,.fail .word,.unproven .word{color:#000}
.pass,.fail,.unproven{border-color:#000}
}
"""


def say(value: object, longest: int = LONGEST) -> str:
    """Return a value for the page: control characters and the like written as escapes, shortened, HTML escaped."""
    text = str(value)
    cut = len(text) - longest
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text[:longest]
    )
    return html.escape(shown) + (f" <em>… ({cut} more characters: {JSON_NAME})</em>" if cut > 0 else "")


def page(report: Report) -> str:
    """Return the whole page."""
    judged = verdict(report)
    title = f"Egress report: {judged.word.value}"
    sections = (
        _subject(report),
        _done(report),
        _tried(report),
        _endpoints(report),
        _layers(report),
        _requests(report),
        _probes(report),
        _rules(report),
        _host(report),
        _limits(report),
        _repeat(report),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{say(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(report, judged)}\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


# --- parts ---


def _head(report: Report, judged: Verdict) -> str:
    kind = {"PASS": "pass", "FAIL": "fail"}.get(judged.word.value, "unproven")
    where = report.host.get("host", "")
    mind = "".join(f"<li>{say(m)}</li>" for m in judged.mind)
    return (
        "<header>\n<h1>Does anything try to leave this site?</h1>\n"
        f'<p class="lead">Moat{" on <strong>" + say(where) + "</strong>" if where else ""}, '
        f"{say(_site(report.site))}; measured {_span(report.started, report.ended)} (UTC).</p>\n"
        f'<section class="verdict {kind}" aria-label="Verdict">\n<p class="word">{say(judged.word.value)}</p>\n'
        f"<p><strong>{say(judged.sentence)}</strong></p>\n"
        f"<ul>{''.join(f'<li>{say(r)}</li>' for r in judged.reasons)}</ul>\n"
        + (f"<p><strong>Bear in mind:</strong></p><ul>{mind}</ul>\n" if mind else "")
        + "</section>\n</header>"
    )


def _site(kind: str) -> str:
    return {"systemd": "installed as systemd services", "compose": "running with Docker Compose"}.get(kind, kind)


def _subject(report: Report) -> str:
    lines = "".join(f"<dt>{say(k)}</dt><dd><code>{say(v)}</code></dd>" for k, v in report.subject.items())
    return _section(
        "What was verified",
        "<p>The report is about this. Of another release, other rules or another configuration it proves nothing.</p>"
        + (f"<dl>{lines}</dl>" if lines else "<p>Nothing of it could be read.</p>"),
    )


def _done(report: Report) -> str:
    asked = (
        "Then the requests below were sent, and"
        if report.requests
        else "<strong>No request was sent</strong>: what one sets off is not in the picture. Then"
    )
    text = (
        "<p>Every service of the site that ran was restarted while the layers below watched what its processes do, so "
        f"that the start itself is in the picture. {asked} nothing was done for {report.quiet_seconds:g} seconds. For "
        "each layer attempts to leave were made on purpose, towards an address that is reserved for documentation: a "
        "layer that does not see them proves nothing.</p>"
    )
    rows = [[_moment(s.when), say(s.what)] for s in report.steps]
    return _section(
        "What was done",
        text + (_table("Steps, in their order", ("When (UTC)", "What"), rows, short=(0,)) if rows else ""),
    )


def _tried(report: Report) -> str:
    found = by_component(report.attempts)
    rows = []
    names = [c.name for c in report.components]
    # A container that has done its work and ended has no address.
    own = "none now" if report.site == "compose" else "the host's"
    for c in report.components:
        groups = found.get(c.name, [])
        rows.append([say(c.name), say(c.unit), say(c.uid), "<br>".join(map(say, c.addresses)) or own, _tally(groups)])
    for name in sorted(set(found) - set(names)):
        rows.append([say(name), "not a component", "", "", _tally(found[name])])
    out = _table(
        "Components that were watched",
        ("Component", "Unit or container", "User id", "Address", "Attempts"),
        rows,
        head=0,
        short=(0, 2, 3),
    )
    if not found:
        return _section("What was tried", "<p><strong>Nothing.</strong> No component made an attempt.</p>" + out)
    for name, groups in found.items():
        out += f"<h3>{say(name)}</h3>" + _groups(groups)
    return _section(
        "What was tried",
        "<p>Each line is one destination. One attempt may be seen by several layers, so that their numbers are not "
        "to be added up.</p>" + out,
    )


def _tally(groups: Sequence[Group]) -> str:
    if not groups:
        return "none"
    seen = sum(g.sightings for g in groups)
    return f'<span class="bad">{count(len(groups), "destination")}, seen {count(seen, "time")}</span>'


def _groups(groups: Sequence[Group]) -> str:
    rows = []
    for g in groups[:MOST_ROWS]:
        # A user id says less than the process that another layer knew.
        known = [p for p in g.processes if not (g.pids and p.startswith("uid "))]
        who = ", ".join(say(p, 80) for p in known[:5])
        if len(known) > 5:
            who += f" and {len(known) - 5} more"
        if g.pids:
            more = f" and {len(g.pids) - 5} more" if len(g.pids) > 5 else ""
            who += f" (process {', '.join(list(g.pids)[:5])}{more})"
        seen = ", ".join(f"{say(layer)}: {n}" for layer, n in g.seen.items())
        detail = "".join(f"<br>{say(d)}" for d in g.details)
        last = "" if _moment(g.last) == _moment(g.first) else f"<br>last {_moment(g.last)}"
        rows.append([say(g.destination), who, f"{_moment(g.first)}{last}", seen + detail])
    out = _table(
        count(len(groups), "destination"),
        ("To where", "By which process", "When (UTC)", "Seen by, how often"),
        rows,
        head=0,
        fixed=True,
    )
    rest = groups[MOST_ROWS:]
    if rest:
        out += (
            f"<p>And {len(rest)} more destinations, seen {sum(g.sightings for g in rest)} times: each is in "
            f"{JSON_NAME}.</p>"
        )
    return out


def _endpoints(report: Report) -> str:
    allowed = ", ".join(f"<code>{say(a)}</code>" for a in report.allowed) or "empty: nothing but this host"
    # What is wrong comes first.
    rows = [
        [say(e.url), say(e.setting), "on the list" if e.allowed else _bad("not on the list")]
        for e in sorted(report.endpoints, key=lambda e: e.allowed)
    ]
    return _section(
        "Where the configuration points",
        f"<p>Every address that the effective configuration names. The allow-list of the site: {allowed}. The host "
        "itself and the site's own services are always on the list.</p>"
        + (
            _table("Addresses in the configuration", ("Address", "Named by", "Allow-list"), rows, short=(2,))
            if rows
            else "<p>None.</p>"
        ),
    )


def _layers(report: Report) -> str:
    rows = []
    for layer in report.layers:
        can, cannot = _LAYERS.get(layer.name, ("", ""))
        rows.append([say(layer.name), _caught(layer), say(layer.why), say(can), say(cannot)])
    return _section(
        "How it was watched",
        _table(
            "Layers",
            ("Layer", "Control", "What the control was, or why not", "Sees", "Does not see"),
            rows,
            head=0,
            short=(0,),
        ),
    )


def _caught(layer: LayerResult) -> str:
    if not layer.available:
        return _bad("not available here")
    return "caught" if layer.control_caught else _bad("missed")


def _requests(report: Report) -> str:
    rows = [
        [say(r.kind), say(r.status or "none"), "as expected" if r.ok else _bad("not as expected"), say(r.note)]
        for r in report.requests
    ]
    return _section(
        "First requests",
        "<p>A program often calls home on its first use, not at its start: so each kind of request was made once.</p>"
        + (
            _table("Requests", ("Kind", "Status", "Outcome", "Note"), rows, head=0, short=(0, 1, 2))
            if rows
            else "<p>None was sent.</p>"
        ),
    )


def _probes(report: Report) -> str:
    if not report.probes:
        return ""
    rows = [
        [say(p.name), "holds" if p.ok else _bad("does not hold"), say(p.found), say(p.expected)] for p in report.probes
    ]
    return _section(
        "Further probes",
        _table(
            "What the deployment must not allow", ("Probe", "Outcome", "Found", "Expected"), rows, head=0, short=(1,)
        ),
    )


def _rules(report: Report) -> str:
    rules = f'<pre tabindex="0">{say(report.rules, LONGEST_RULES)}</pre>' if report.rules.strip() else "<p>None.</p>"
    return _section(
        "Packet filter rules in force",
        "<p>These hold when nobody watches. They were read after the measurement, without the rules that were made "
        "for it.</p>" + rules,
    )


def _host(report: Report) -> str:
    facts = {k: v for k, v in report.host.items() if k != "command"}
    if not facts:
        return ""
    lines = "".join(f"<dt>{say(k)}</dt><dd>{say(v, 2000)}</dd>" for k, v in facts.items())
    return _section(
        "About the host",
        "<p>For information: these belong to the host, not to the site's services, and are no part of the verdict.</p>"
        f"<dl>{lines}</dl>",
    )


def _limits(report: Report) -> str:
    return _section(
        "What this does not say",
        "<ul><li>It covers the time above. Something that waits longer than "
        f"{report.quiet_seconds:g} seconds after the first requests is not seen by this run; the rules in force are "
        "what holds it.</li>"
        "<li>It covers the site's components. Other programs of the host are not watched.</li>"
        "<li>It covers the requests above, with the configuration of that moment. After a change of the configuration "
        "or an upgrade, run it again.</li></ul>",
    )


def _repeat(report: Report) -> str:
    command = report.host.get("command") or "moat egress verify"
    return _section(
        "How to repeat it",
        f"<p>As root on the host: <code>{say(command)}</code>. It restarts the services. Its exit code is 0 only if "
        f"the verdict is PASS; the same facts for programs, every single attempt included, are in {JSON_NAME}.</p>",
    )


# --- pieces ---


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{say(heading)}</h2>\n{content}\n</section>"


def _bad(text: str) -> str:
    return f'<span class="bad">{say(text)}</span>'


def _moment(when: str) -> str:
    """Return ``2026-11-23 15:20:01`` from ISO 8601; what is not a time is shown as it is."""
    try:
        return f"{datetime.fromisoformat(when):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return say(when, 40)


def _span(start: str, end: str) -> str:
    """Return two moments, the day once where it is the same."""
    first, last = _moment(start), _moment(end)
    return f"{first} to {last.removeprefix(first[:11])}"


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    head: int | None = None,
    short: tuple[int, ...] = (),
    fixed: bool = False,
) -> str:
    """Return a table of cells that are HTML already; ``head`` is the column that names the row, ``short`` are
    those that are never wrapped, ``fixed`` gives the columns widths that long values cannot change.

    On a phone each row becomes a block and each cell shows its column's name; the roles keep it a table for
    programs that read it aloud.
    """
    titles = "".join(f'<th scope="col" role="columnheader">{say(c)}</th>' for c in columns)
    lines = []
    for row in rows:
        cells = ""
        for i, cell in enumerate(row):
            tag, extra = ("th", ' scope="row" role="rowheader"') if i == head else ("td", ' role="cell"')
            mark = ' class="short"' if i in short else ""
            cells += f'<{tag}{extra}{mark} data-label="{say(columns[i])}">{cell}</{tag}>'
        lines.append(f'<tr role="row">{cells}</tr>')
    return (
        f'<table role="table"{" class=fixed" if fixed else ""}><caption>{say(caption)}</caption>\n'
        f'<thead role="rowgroup"><tr role="row">{titles}</tr></thead>\n'
        f'<tbody role="rowgroup">{"".join(lines)}</tbody></table>'
    )
