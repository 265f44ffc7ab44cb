# SPDX-License-Identifier: Apache-2.0
"""Runs inside the test host: writes what it is like (files, units, users, packages) to the file that is named."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

#: The kernel's own, what lives as long as the machine runs, what the test brought, and logs.
OUTSIDE = {"/proc", "/sys", "/dev", "/run", "/medium", "/test", "/opt/test-model", "/srv/stick", "/srv/operator"}


def files() -> dict[str, list[object]]:
    """Return kind and mode, owner, group, and a digest of what is in it (the target of a link), by path."""
    found: dict[str, list[object]] = {}
    for folder, names, others in os.walk("/"):
        names[:] = [n for n in names if str(Path(folder, n)) not in OUTSIDE and (folder, n) != ("/", "tmp")]
        for name in [*names, *others]:
            path = Path(folder, name)
            status = path.lstat()
            content = ""
            if stat.S_ISLNK(status.st_mode):
                content = str(path.readlink())
            elif stat.S_ISREG(status.st_mode) and str(path).startswith(("/etc/", "/usr/local/", "/opt/")):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = [oct(status.st_mode), status.st_uid, status.st_gid, content]
    return found


def lines(*argv: str) -> list[str]:
    """Return a program's output."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> int:
    """Look and write."""
    unit_files = (line.split()[:2] for line in lines("systemctl", "list-unit-files", "--plain", "--no-legend"))
    active = (line.split()[0] for line in lines("systemctl", "list-units", "--plain", "--no-legend", "--state=active"))
    packages = (line.split("\t") for line in lines("dpkg-query", "-W", "-f", "${Package}\t${db:Status-Status}\n"))
    snapshot = {
        "files": files(),
        "unit_files": dict(unit_files),
        "active": sorted(u for u in active if u.endswith((".service", ".socket", ".target", ".timer", ".path"))),
        "users": sorted(line.split(":")[0] for line in Path("/etc/passwd").read_text("utf-8").splitlines()),
        "groups": sorted(line.split(":")[0] for line in Path("/etc/group").read_text("utf-8").splitlines()),
        "packages": sorted(name for name, state in packages if state == "installed"),
    }
    Path(sys.argv[1]).write_text(json.dumps(snapshot), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
