# SPDX-License-Identifier: Apache-2.0
"""What was installed: the release in the store against the signed manifest; bills of materials; Debian packages."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any, Final

from moat.console import Console
from moat.errors import MissingFile, MoatError
from moat.manifest import Manifest
from moat.site import scan
from moat.site.evidencekit.model import Finding, Host, Part, files_below, last_line, redact
from moat.site.keyring import trusted_keys
from moat.site.state import read_installed
from moat.site.trust import TrustedBundle
from moat.site.verify import read_signed_bytes

_MOST_ROWS: Final = 50
_NO_PROGRAM: Final = 127
_AGAIN: Final = "bring the release again with install.sh from its medium, and find out who changed it"


def _links(host: Host) -> dict[str, str]:
    store = host.path(host.store)
    found = {}
    for link in sorted(store.glob("*")) + sorted((store / "instances").glob("*")):
        if link.is_symlink():
            found[str(link.relative_to(store))] = Path(link.readlink()).name
    return found


def release(host: Host, console: Console) -> Part:
    """Collect what the release store holds and whether it is what the release key signed."""
    part = Part("release", "What was installed")
    links = _links(host)
    # install.sh sets this one when its playbook has ended: it says what the control host brought last, not what runs.
    part.moment["site_link"] = links.pop("site", None)
    part.data["links"] = links
    try:
        installed = read_installed(host.path(host.state))
        part.data["recorded"] = vars(installed) if installed else None
    except MoatError as e:
        installed = None
        part.gap("the record of what is installed", f"{e.message}: {e.found}")
    current = host.path(host.store) / "current"
    if not current.exists():
        part.gap("the release in use", f"{host.store}/current does not exist: no release is installed by Ansible here")
        return part
    bundle = current.resolve() / "bundle"
    try:
        trust = TrustedBundle(trusted_keys((), host.path(host.trusted_keys), bundle, console))
        with scan.open_root(bundle) as root:
            trust.check_signature(*read_signed_bytes(root))
            manifest = trust.parse()
            trust.accept(target=None, installed=None)
            problems, readable = trust.check_entries(scan.walk(root))
            with console.progress("hashing the release", sum(f.size for f in readable)) as bar:
                digests = scan.hash_files(root, readable, count=bar.add)
            problems += trust.count(digests, readable)
    except MoatError as e:
        part.data["verified"] = False
        part.findings.append(
            Finding(f"the release in use: {e.message}", e.found or "", e.expected or "", e.hint or _AGAIN)
        )
        return part
    # What was never brought (images, sources) is no damage: it stays on the medium. What was changed or added is.
    absent = [p.path for p in problems if isinstance(p, MissingFile) and p.path]
    damage = [p for p in problems if not isinstance(p, MissingFile)]
    for p in damage[:_MOST_ROWS]:
        part.findings.append(Finding(f"{p.path}: {p.message}", p.found or "", p.expected or "", _AGAIN))
    part.data.update(
        {
            "release": current.resolve().name,
            "bundle": vars(manifest.bundle),
            "manifest_sha256": trust.manifest_sha256,
            "key_id": trust.key.id_text,
            "verified": not damage,
            "files_compared": len(readable),
            "bytes_compared": sum(f.size for f in readable),
            "not_brought": _folders(absent),
        }
    )
    if installed is not None and installed.manifest_sha256 != trust.manifest_sha256:
        part.data["recorded_is_current"] = False
    part.data["sbom"] = _sboms(manifest, set(absent))
    return part


def _folders(paths: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in paths:
        top = path.partition("/")[0]
        counts[top] = counts.get(top, 0) + 1
    return counts


def _sboms(manifest: Manifest, absent: set[str]) -> list[dict[str, Any]]:
    """Return the bills of materials with the hashes that the release key signed."""
    return [
        {"path": f.path, "sha256": f.sha256, "size": f.size, "in_store": f.path not in absent}
        for f in manifest.files
        if f.path.startswith("sbom/")
    ]


# --- Debian packages ---


def _stanzas(text: str) -> list[dict[str, str]]:
    found = []
    for block in text.split("\n\n"):
        one: dict[str, str] = {}
        for line in block.splitlines():
            name, colon, value = line.partition(":")
            if colon and not line.startswith((" ", "\t")):
                one[name] = value.strip()
        if one:
            found.append(one)
    return found


def packages(host: Host, console: Console) -> Part:
    """Collect apt's sources, and compare installed packages with those of the signed repository."""
    part = Part("packages", "Debian packages and where they come from")
    part.data["sources"] = _sources(host, part)
    repository = host.path(host.store) / "current" / "apt"
    lists = [p for p in files_below(repository) if p.name == "Packages"]
    if not lists:
        part.gap("the packages of Moat's repository", f"there is no Packages file below {host.store}/current/apt")
        return part
    part.data["repository"] = [_repository(host, part, p) for p in lists]
    out = host.ask(
        part,
        "the installed packages",
        ["dpkg-query", "-W", "-f", "${Package}\\t${Version}\\t${Architecture}\\t${db:Status-Status}\\n"],
    )
    if out is None:
        return part
    installed = {}
    for line in out.splitlines():
        name, version, _, state = [*line.split("\t"), "", "", ""][:4]
        if state == "installed":
            installed[name] = version
    rows = []
    for stanza in [s for p in lists for s in _stanzas(p.read_text("utf-8", "replace"))]:
        name, offered = stanza.get("Package", ""), stanza.get("Version", "")
        have = installed.get(name)
        rows.append({"package": name, "repository": offered, "installed": have, "same": have == offered})
    part.data["packages"] = sorted(rows, key=lambda r: str(r["package"]))
    ours = sorted({str(r["package"]) for r in rows if r["same"]})
    if ours:
        _, changed, err = host.run(["dpkg", "--verify", *ours], "")
        if err.strip():
            part.gap("the files of the installed packages", last_line(err))
        for line in changed.splitlines():
            state, _, rest = line.partition(" ")
            words = rest.split()
            if not words:
                continue
            if words[0] == "c":  # a configuration file: the administrator's
                part.data.setdefault("changed_configuration_files", []).append(words[-1])
            elif "missing" in state or "5" in state:
                part.findings.append(
                    Finding(
                        f"{words[-1]} is not as its package brought it",
                        "missing" if "missing" in state else "another content",
                        "the package's own file",
                        "reinstall the package from Moat's repository, and find out who changed the file",
                    )
                )
    return part


def _sources(host: Host, part: Part) -> list[dict[str, Any]]:
    """Return the active lines of apt's sources; credentials in them are redacted."""
    found = []
    apt = host.path("/etc/apt")
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        try:
            lines = path.read_text("utf-8", "replace").splitlines()
        except OSError as e:
            part.gap(f"/{path.relative_to(host.root)}", e.strerror)
            continue
        active = [redact(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        found.append({"file": f"/{path.relative_to(host.root)}", "lines": active})
    return found


def _repository(host: Host, part: Part, path: Path) -> dict[str, Any]:
    """Compare one Packages file with the signed InRelease above it, and the signature with the public key beside."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    top = next((p for p in path.parents if (p / "InRelease").is_file()), None)
    shown = f"/{path.relative_to(host.root)}"
    if top is None:
        part.findings.append(
            Finding(f"{shown} is covered by no signature", "no InRelease", "a signed InRelease", "run install.sh again")
        )
        return {"packages": shown, "sha256": digest, "listed": False, "signature": "none"}
    listed = digest in (top / "InRelease").read_text("utf-8", "replace")
    if not listed:
        part.findings.append(
            Finding(
                f"{shown} is not the one that InRelease lists",
                digest,
                "its sha256 in InRelease",
                "run install.sh again",
            )
        )
    key = next(iter(sorted(host.path(host.store).glob("current/apt/**/moat.gpg"))), None)
    signature = "not checked"
    if key is None:
        part.gap(f"the signature of {top.name}/InRelease", "there is no moat.gpg beside the repository")
    else:
        signature = _check_signature(host, part, key, top / "InRelease")
    return {"packages": shown, "sha256": digest, "listed": listed, "signature": signature}


def _check_signature(host: Host, part: Part, key: Path, signed: Path) -> str:
    """Let the host's own verifier check a signature: sqv (Debian 13) or gpgv (Debian 12)."""
    with tempfile.TemporaryDirectory() as scratch:
        # sqv refuses an output that exists, even /dev/null.
        sqv = ["sqv", "--keyring", str(key), "--output", f"{scratch}/text", "--cleartext", str(signed)]
        code, _, err = host.run(sqv, "")
    tool = "sqv"
    if code == _NO_PROGRAM:
        tool = "gpgv"
        code, _, err = host.run([tool, "--keyring", str(key), str(signed)], "")
    if code == _NO_PROGRAM:
        part.gap("the signature of the repository", "neither sqv nor gpgv is installed")
        return "not checked"
    if code != 0:
        what = f"{tool} refuses the signature of the repository"
        part.findings.append(Finding(what, last_line(err), "a good signature", "run install.sh again"))
    return "good" if code == 0 else "bad"
