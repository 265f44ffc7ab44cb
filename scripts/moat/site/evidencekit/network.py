# SPDX-License-Identifier: Apache-2.0
"""What may leave and who listens: the packet filter's rules against their file, sockets, the last egress report."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import pwd
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from moat.site.egresscheck import subject
from moat.site.evidencekit.model import Finding, Host, Part, last_line, redact

RULES: Final = "/etc/moat/nftables/no-egress.nft"
TABLE: Final = ("inet", "moat_egress")
#: How nft begins what it says about a line of its standard input.
_NFT_REFUSES: Final = "/dev/stdin:"
_LISTEN, _UNCONNECTED = "0A", "07"
_MAX_REPORT: Final = 32 * 1024 * 1024


def expected_rules(host: Host, content: str) -> tuple[str, str]:
    """Return how nft lists the rule file's content once loaded, and why that cannot be told.

    It is loaded in a network namespace of its own, which ends with the program.
    """
    script = "nft -f - && nft -s list table inet moat_egress"
    code, out, err = host.run(["unshare", "--net", "sh", "-c", script], content)
    if code == 0:
        return out, ""
    first = next((line for line in err.splitlines() if "Error" in line), last_line(err))
    return "", first or f"unshare ended with code {code}"


def rules(host: Host) -> Part:
    """Collect the rules in force, whether they are those of the file, and their counters."""
    part = Part("rules", "Packet filter: what may leave")
    path = host.path(RULES)
    try:
        content = path.read_text("utf-8")
    except OSError as e:
        part.gap("the site's rules", f"{RULES}: {e.strerror}; the role no_egress was not applied here")
        return part
    part.data["file"] = {"path": RULES, "sha256": hashlib.sha256(content.encode()).hexdigest()}
    code, out, err = host.run(["nft", "-s", "list", "table", *TABLE], "")
    if code != 0:
        part.data["in_force"] = False
        part.findings.append(
            Finding(
                "the rules are not in force",
                last_line(err) or f"nft ended with code {code}",
                f"the table inet moat_egress as in {RULES}",
                "systemctl restart moat-no-egress, and find out who took them away",
            )
        )
        return part
    part.data["in_force"] = True
    part.data["rules"] = redact(out).splitlines()
    expected, why = expected_rules(host, content)
    if _NFT_REFUSES in why:
        part.findings.append(
            Finding(
                "the rule file cannot be loaded", redact(why), "rules that nft accepts", "run the role no_egress again"
            )
        )
    elif why:
        part.gap("whether the rules in force are those of the file", why)
    else:
        part.data["as_in_file"] = out == expected
        if out != expected:
            part.findings.append(
                Finding(
                    "the rules in force are not those of the file",
                    _difference(out, expected),
                    f"the table inet moat_egress as in {RULES}",
                    "systemctl restart moat-no-egress, and find out who changed them",
                )
            )
    part.moment["counters"] = _counters(host, part)
    tables = host.ask(part, "the other tables", ["nft", "list", "tables"])
    part.data["tables"] = sorted((tables or "").split("\n")[:-1])
    return part


def _difference(found: str, expected: str) -> str:
    have, want = set(found.splitlines()), set(expected.splitlines())
    more = [f"more: {line.strip()}" for line in found.splitlines() if line not in want]
    less = [f"less: {line.strip()}" for line in expected.splitlines() if line not in have]
    return redact("; ".join((more + less)[:6])) or "the same lines in another order"


def _counters(host: Host, part: Part) -> list[dict[str, Any]]:
    out = host.ask(part, "the counters", ["nft", "-j", "list", "counters", "table", *TABLE])
    if out is None:
        return []
    try:
        rows = [one["counter"] for one in json.loads(out)["nftables"] if "counter" in one]
        return [
            {"name": r["name"], "comment": redact(r.get("comment", "")), "packets": r["packets"], "bytes": r["bytes"]}
            for r in rows
        ]
    except (ValueError, KeyError, TypeError) as e:
        part.gap("the counters", f"nft's answer cannot be read: {e!r}")
        return []


# --- sockets ---


def _address(text: str) -> tuple[str, int]:
    """Read ``0100007F:1F90`` of /proc/net/tcp (each 32 bits in the host's byte order, little endian)."""
    host, _, port = text.partition(":")
    raw = b"".join(bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8))
    found = ipaddress.ip_address(raw)
    # An IPv4 address in IPv6's form is an IPv4 address: ::ffff:127.0.0.1 is the loopback.
    return str(getattr(found, "ipv4_mapped", None) or found), int(port, 16)


@dataclass
class _Processes:
    """Which process holds which socket, and what runs under which user; ``hidden`` were not to be looked into."""

    holders: dict[str, tuple[int, str]] = field(default_factory=dict)
    programs: dict[int, set[str]] = field(default_factory=dict)
    hidden: int = 0


def _processes(host: Host) -> _Processes:
    found = _Processes()
    for process in sorted(host.path("/proc").glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            name = (process / "comm").read_text("utf-8", "replace").strip()
            found.programs.setdefault(process.stat().st_uid, set()).add(name)
            for link in list((process / "fd").iterdir()):
                match = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
                if match:
                    found.holders.setdefault(match[1], (int(process.name), name))
        except PermissionError:
            found.hidden += 1
        except OSError:  # it has ended meanwhile
            continue
    return found


def _internet(host: Host, part: Part, processes: _Processes) -> Iterator[dict[str, Any]]:
    for protocol, state in (("tcp", _LISTEN), ("tcp6", _LISTEN), ("udp", _UNCONNECTED), ("udp6", _UNCONNECTED)):
        try:
            lines = host.path(f"/proc/net/{protocol}").read_text("ascii").splitlines()[1:]
        except OSError as e:
            part.gap(f"the {protocol} sockets", e.strerror)
            continue
        for line in lines:
            fields = line.split()
            if len(fields) < 10 or fields[3] != state:
                continue
            address, port = _address(fields[1])
            try:
                user = pwd.getpwuid(int(fields[7])).pw_name
            except KeyError:
                user = fields[7]
            pid, program = processes.holders.get(fields[9], (0, ""))
            alike = processes.programs.get(int(fields[7]), set())
            if not program and processes.hidden and int(fields[7]) != 0 and len(alike) == 1:
                program = f"{next(iter(alike))} (the only program of this user)"
            yield {
                "protocol": protocol[:3],
                "address": address,
                "port": port,
                "user": user,
                "program": program,
                "loopback": ipaddress.ip_address(address).is_loopback,
                "pid": pid,
            }


def _unix(host: Host, part: Part) -> list[dict[str, Any]]:
    """Return the listening Unix sockets of Moat, with who may connect."""
    try:
        lines = host.path("/proc/net/unix").read_text("utf-8", "replace").splitlines()[1:]
    except OSError as e:
        part.gap("the Unix sockets", e.strerror)
        return []
    rows = []
    for line in lines:
        fields = line.split(maxsplit=7)
        # Flags 00010000: it accepts connections.
        if len(fields) == 8 and fields[3] == "00010000" and fields[7].startswith("/run/moat/"):
            path = host.path(fields[7])
            try:
                status = path.stat()
                rows.append(
                    {
                        "path": fields[7],
                        "mode": f"{status.st_mode & 0o7777:04o}",
                        "uid": status.st_uid,
                        "gid": status.st_gid,
                    }
                )
            except OSError as e:
                part.gap(fields[7], e.strerror)
    return sorted(rows, key=lambda r: str(r["path"]))


def sockets(host: Host) -> Part:
    """Collect who listens, from the kernel's own tables."""
    part = Part("sockets", "Who listens")
    rows: list[dict[str, Any]] = []
    unknown: list[str] = []
    processes = _processes(host)
    for row in _internet(host, part, processes):
        name = f"{row['protocol']} {row['address']}:{row['port']}"
        part.moment.setdefault("pids", {})[name] = row.pop("pid")
        if row not in rows:
            rows.append(row)
            unknown += [] if row["program"] else [name]
    if unknown:
        why = (
            f"{processes.hidden} processes of other users may not be looked into (root without CAP_SYS_PTRACE, as in a "
            "container); the user of each socket is listed"
            if processes.hidden
            else "no process in /proc holds the socket: it is in another namespace, or the kernel's own"
        )
        part.gap("the program of " + ", ".join(sorted(unknown)), why)
    part.data["internet"] = sorted(rows, key=lambda r: (not r["loopback"], r["protocol"], r["port"], r["address"]))
    part.data["unix"] = _unix(host, part)
    part.data["host"] = socket.gethostname()
    return part


# --- the last proof ---


def egress(host: Host) -> Part:
    """Collect the verdict of the last ``moat egress verify``; the report itself lies beside."""
    part = Part("egress", "The last proof that nothing leaves")
    folder = host.path(host.evidence)
    found = [*folder.glob("egress/*/egress-report.json"), *folder.glob("*/egress-report.json")]
    reports = sorted(found, key=lambda p: (p.parent.name, p.stat().st_mtime))
    if not reports:
        part.gap("an egress report", f"there is none below {host.evidence}: `moat egress verify` has not run here")
        return part
    path = reports[-1]
    shown = f"/{path.relative_to(host.root)}"
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_REPORT:
            raise ValueError(f"larger than {_MAX_REPORT} bytes")
        report = json.loads(raw)
        part.data.update(
            {
                "path": shown,
                "sha256": hashlib.sha256(raw).hexdigest(),
                "ok": bool(report["ok"]),
                "started": str(report["started"]),
                "ended": str(report["ended"]),
                "attempts": len(report["attempts"]),
                "layers": [
                    {k: layer.get(k) for k in ("name", "available", "control_caught")} for layer in report["layers"]
                ],
                "site": str(report.get("site", "systemd")),
                "subject": {str(k): str(v) for k, v in dict(report.get("subject") or {}).items()},
            }
        )
        part.moment["age"] = _age(part.data["ended"], host.now)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        part.gap(shown, f"the report cannot be read: {e}")
        return part
    if not part.data["ok"]:
        part.findings.append(
            Finding(
                "the last egress report is not clean",
                f"{part.data['attempts']} attempts to leave, or a proof that is none",
                "0 attempts, and every control caught",
                f"read {Path(shown).with_suffix('.html')}, and run `moat egress verify` again",
            )
        )
    else:
        _still_true(host, part)
    return part


def _still_true(host: Host, part: Part) -> None:
    """Compare what the report is about with what is in force: of anything else it is no proof."""
    if part.data["site"] != "systemd":
        part.gap("whether the report is about what runs", "only services of systemd are compared; it names the images")
        return
    then = part.data["subject"]
    for name, (before, now) in subject.differences(then, subject.of_systemd(host.root, host.store)).items():
        if name.startswith(subject.CONFIGURATION) and then:
            # Every push would be a contradiction. The allow-list is checked before one takes force.
            part.gap(f"a proof of the {name}", f"the report is about {before}; in force is {now}")
            continue
        part.findings.append(
            Finding(
                f"the last egress report is not about what is in force: {name}",
                f"the report is about {before}",
                now,
                "run `moat egress verify` again, in a maintenance window: it restarts the services",
            )
        )


def _age(ended: str, now: float) -> str:
    try:
        seconds = now - datetime.fromisoformat(ended).timestamp()
    except ValueError:
        return "unknown: the report does not say when it ended"
    return f"{seconds / 86400:.1f} days" if seconds >= 0 else "the clock is behind the report"
