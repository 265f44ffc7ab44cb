# SPDX-License-Identifier: Apache-2.0
"""What runs and how it is held: units with their effective hardening, accounts, secrets, configuration, the clock."""

from __future__ import annotations

import grp
import hashlib
import ipaddress
import pwd
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from moat.site.evidencekit.model import Finding, Host, Part, files_below, redact, secret_files

#: Units of Moat by pattern, and those of Debian that carry it.
_UNITS: Final = ("moat*", "minio.service", "nginx.service", "valkey-server.service", "redis-server.service")
#: What a reviewer asks about a unit's cage. Environment is left out on purpose: it can hold anything.
_CAGE: Final = (
    "User", "Group", "SupplementaryGroups", "DynamicUser", "CapabilityBoundingSet", "AmbientCapabilities",
    "NoNewPrivileges", "ProtectSystem", "ProtectHome", "ReadWritePaths", "InaccessiblePaths", "ExecPaths",
    "NoExecPaths", "PrivateTmp", "PrivateDevices", "PrivateNetwork", "PrivateUsers", "ProtectProc", "ProcSubset",
    "ProtectClock", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectControlGroups", "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID",
    "LockPersonality", "MemoryDenyWriteExecute", "SystemCallFilter", "SystemCallArchitectures", "KeyringMode",
    "RemoveIPC", "UMask", "IPAddressAllow", "IPAddressDeny", "MemoryMax", "TasksMax", "LimitNOFILE", "LimitCORE",
)  # fmt: skip
_STATE: Final = ("ActiveState", "SubState", "UnitFileState", "FragmentPath", "DropInPaths", "Result")
_MOMENT: Final = ("MainPID", "NRestarts", "ActiveEnterTimestamp", "MemoryCurrent", "TasksCurrent")
_ACCOUNTS: Final = ("moat-gateway", "moat-minio", "www-data", "valkey", "redis")
#: Configuration whose sha256 is collected, as paths of the host.
_CONFIGURATION: Final = (
    "/etc/moat",
    "/etc/systemd/system/moat.target",
    "/etc/systemd/system/minio.service",
    "/etc/systemd/system/nginx.service.d",
    "/etc/systemd/system/valkey-server.service.d",
    "/etc/systemd/system/redis-server.service.d",
    "/etc/systemd/system/nftables.service.d",
    "/etc/nftables.conf",
    "/etc/valkey",
    "/etc/redis",
)


def _properties(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name] = f"{found[name]} {value}" if name in found else value
    return found


def units(host: Host) -> Part:
    """Collect the units, what confines each of them as systemd understood it, and systemd's own score."""
    part = Part("units", "Services and how they are confined")
    out = host.ask(
        part, "the units", ["systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager", *_UNITS]
    )
    if out is None:
        return part
    names = [line.split()[0] for line in out.splitlines() if line.split()]
    rows = []
    for name in sorted(n for n in names if n.endswith((".service", ".target", ".timer"))):
        wanted = ",".join((*_STATE, *_MOMENT, *_CAGE))
        shown = host.ask(part, f"the properties of {name}", ["systemctl", "show", "--no-pager", "-p", wanted, name])
        if shown is None:
            continue
        properties = _properties(shown)
        if not properties.get("FragmentPath"):
            continue  # only referred to by others: redis-server where valkey runs
        row: dict[str, Any] = {"unit": name}
        row.update({p: redact(properties.get(p, "")) for p in _STATE})
        if name.endswith(".service"):
            row["confinement"] = {p: _same_words(p, redact(properties[p])) for p in _CAGE if p in properties}
        part.moment[name] = {p: properties.get(p, "") for p in _MOMENT}
        if name.endswith(".service"):
            # systemd counts a network that is listed twice until it next starts the unit: the score can move by 0.1.
            part.moment[name]["exposure"] = _exposure(host, part, name)
        rows.append(row)
        if row["ActiveState"] == "failed":
            part.findings.append(
                Finding(
                    f"{name} has failed", row["Result"], "active", f"read `journalctl -u {name}` and start it again"
                )
            )
    part.data["units"] = rows
    if not rows:
        part.gap("the units of Moat", "systemd knows none of them: Moat is not installed as services here")
    return part


def _same_words(name: str, value: str) -> str:
    """Return networks without those that others contain: systemd shows either, by whether it has reloaded its units."""
    if name not in ("IPAddressAllow", "IPAddressDeny"):
        return value
    try:
        networks = [ipaddress.ip_network(word) for word in value.split()]
    except ValueError:
        return value
    v4 = ipaddress.collapse_addresses(n for n in networks if isinstance(n, ipaddress.IPv4Network))
    v6 = ipaddress.collapse_addresses(n for n in networks if isinstance(n, ipaddress.IPv6Network))
    return " ".join(str(n) for n in (*v4, *v6))


def _exposure(host: Host, part: Part, unit: str) -> str | None:
    """Return systemd's score, from 0.0 (confined) to 10.0."""
    out = host.ask(part, f"the score of {unit}", ["systemd-analyze", "security", "--no-pager", unit])
    for line in reversed((out or "").splitlines()):
        if "exposure level" in line:
            return (
                line.rpartition(":")[0].rpartition(":")[2].strip() if line.count(":") > 1 else line.rpartition(":")[2]
            )
    return None


# --- accounts and secrets ---


def _owner(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _row(host: Host, path: Path) -> dict[str, Any]:
    status = path.lstat()
    return {
        "path": f"/{path.relative_to(host.root)}",
        "owner": _owner(status.st_uid),
        "group": _group(status.st_gid),
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
    }


def secrets(host: Host) -> Part:
    """Collect who may read the secrets; their content, size and hash are none of a reviewer's business."""
    part = Part("secrets", "Accounts, and who may read the secrets")
    part.data["accounts"] = _accounts(host, part)
    rows = []
    try:
        for path in secret_files(host):
            row = _row(host, path)
            rows.append(row)
            mode = int(row["mode"], 8)
            # A program that drops its rights before it reads a key (nginx, MinIO) is given it through its own group.
            if mode & 0o037 or (mode & 0o040 and row["group"] not in (*_ACCOUNTS, "root")):
                part.findings.append(
                    Finding(
                        f"the secret {row['path']} is open to others",
                        f"mode {row['mode']}, group {row['group']}",
                        "0600, or 0640 with the service's own group",
                        f"chmod 0600 {row['path']}, and replace the secret (rotate_secrets.yml)",
                    )
                )
    except OSError as e:
        part.gap("the secrets", f"{e.filename}: {e.strerror}")
    part.data["files"] = rows
    if not rows:
        part.gap("the secrets", "there is none below /etc/moat on this host")
    return part


def _accounts(host: Host, part: Part) -> list[dict[str, Any]]:
    locked: dict[str, bool] = {}
    try:
        for line in host.path("/etc/shadow").read_text("utf-8", "replace").splitlines():
            name, _, rest = line.partition(":")
            locked[name] = rest.partition(":")[0].startswith(("!", "*"))
    except OSError as e:
        part.gap("which accounts have a password", f"/etc/shadow: {e.strerror}")
    rows = []
    try:
        lines = host.path("/etc/passwd").read_text("utf-8", "replace").splitlines()
    except OSError as e:
        part.gap("the accounts", f"/etc/passwd: {e.strerror}")
        return []
    for line in lines:
        fields = line.split(":")
        if len(fields) == 7 and fields[0] in _ACCOUNTS:
            rows.append(
                {
                    "name": fields[0],
                    "uid": int(fields[2]),
                    "home": fields[5],
                    "shell": fields[6],
                    "password_locked": locked.get(fields[0]),
                }
            )
            if locked.get(fields[0]) is False:
                part.findings.append(
                    Finding(
                        f"the account {fields[0]} has a password", "a password", "none", f"passwd --lock {fields[0]}"
                    )
                )
    return rows


# --- configuration ---


def configuration(host: Host) -> Part:
    """Collect the sha256 of every file that decides how the services behave; secrets are left out."""
    part = Part("configuration", "Configuration in force")
    rows = []
    kept_back = set(secret_files(host))
    for place in _CONFIGURATION:
        for path in _ordinary(host, part, host.path(place)):
            if path in kept_back:
                continue
            row = _row(host, path)
            # A file that only its owner may read could hold a weak secret, which its hash would let somebody guess.
            if not int(row["mode"], 8) & 0o077:
                rows.append({**row, "sha256": None, "note": "private to its owner: not hashed"})
                continue
            try:
                rows.append({**row, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
            except OSError as e:
                part.gap(f"/{path.relative_to(host.root)}", e.strerror)
    for path in sorted(host.path("/etc/systemd/system").glob("moat-*.service")):
        rows.append({**_row(host, path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    part.data["files"] = sorted(rows, key=lambda r: str(r["path"]))
    if not rows:
        part.gap("the configuration", "there is no file below /etc/moat on this host")
    for row in rows:
        if int(row["mode"], 8) & 0o002:
            part.findings.append(
                Finding(
                    f"{row['path']} may be written by everyone", f"mode {row['mode']}", "0644 or less", "chmod o-w it"
                )
            )
    return part


def _ordinary(host: Host, part: Part, place: Path) -> Iterable[Path]:
    if place.is_file():
        return [place]
    try:
        return list(files_below(place))
    except OSError as e:
        part.gap(f"/{Path(e.filename or place).relative_to(host.root)}", e.strerror)
        return []


# --- clock ---


def clock(host: Host, created: int | None) -> Part:
    """Collect what the host takes for the time; ``created`` is the release's (seconds since 1970)."""
    part = Part("clock", "Clock")
    part.moment["utc"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(host.now))
    for name, path in (("uptime_seconds", "/proc/uptime"), ("boot_id", "/proc/sys/kernel/random/boot_id")):
        try:
            part.moment[name] = host.path(path).read_text("ascii").split()[0]
        except (OSError, IndexError) as e:
            part.gap(name, e)
    # Not `timedatectl`: it asks a service that would first have to be started.
    part.data["timezone"] = _timezone(host)
    part.data["synchronised"] = host.path("/run/systemd/timesync/synchronized").exists()
    if created is not None and host.now < created:
        part.findings.append(
            Finding(
                "the clock is behind the release",
                str(part.moment["utc"]),
                "after " + time.strftime("%Y-%m-%d", time.gmtime(created)),
                "set the clock: certificates and keys are judged by it",
            )
        )
    return part


def _timezone(host: Host) -> str:
    link = host.path("/etc/localtime")
    return str(link.readlink()).partition("zoneinfo/")[2] if link.is_symlink() else "UTC"
