# SPDX-License-Identifier: Apache-2.0
"""Where this build host downloads from: its own configuration, never ours.

Locks name bytes. The hosts that serve them come from what the machine is already set up with, so a
company's mirror is used without telling Moat about it:

- wheels: ``UV_DEFAULT_INDEX``, ``UV_INDEX_URL``, ``PIP_INDEX_URL``, pip's configuration, pip's default;
- Debian: apt's sources (``MOAT_DEBIAN_MIRROR``, ``MOAT_DEBIAN_SECURITY_MIRROR`` override them), apt's proxy;
- Debian's snapshot archive: ``MOAT_DEBIAN_SNAPSHOT``, or what apt knows (``Acquire::Snapshots``, a signed
  Release file's ``Snapshots``);
- Go modules: ``GOPROXY``, the user's Go configuration, the toolchain's default.
"""

from __future__ import annotations

import configparser
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from moat.errors import FetchFailed, LockFailed

DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_CODENAMES = r"(buster|bullseye|bookworm|trixie|forky|sid|unstable|testing|stable|oldstable)"


@dataclass(frozen=True)
class DebianMirrors:
    """Places of Debian packages, each the folder that holds ``dists/`` and ``pool/``.

    Attributes:
        main: for the release and its updates.
        security: for the security suite.
        keyring: file of the keys that sign the archive; apt checks every index against it.
        snapshot: root of the snapshot archive (``.../archive``), or empty where none is known.
    """

    main: str
    security: str
    keyring: str
    snapshot: str


def _deb822(text: str) -> Iterator[dict[str, str]]:
    stanza: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if stanza:
                yield stanza
            stanza = {}
        elif line[0] in " \t" and last:
            stanza[last] += " " + line.strip()
        elif ":" in line:
            last, _, value = line.partition(":")
            last = last.strip().lower()
            stanza[last] = value.strip()


def apt_sources(etc: Path = Path("/etc/apt")) -> Iterator[tuple[str, str]]:
    """Yield ``(uri, suite)`` of every enabled binary source of this host, deb822 and one-line."""
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text("utf-8", "replace")
        if file.suffix == ".sources":
            for stanza in _deb822(text):
                if stanza.get("enabled", "yes").lower() == "no" or "deb" not in stanza.get("types", "").split():
                    continue
                for uri in stanza.get("uris", "").split():
                    for suite in stanza.get("suites", "").split():
                        yield uri, suite
        elif file.suffix == ".list":
            for line in text.splitlines():
                found = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)", line)
                if found:
                    yield found[1], found[2]


def _apt_config(name: str) -> str:
    done = subprocess.run(["apt-config", "dump", "--format", "%v", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def debian_mirrors(etc: Path = Path("/etc/apt")) -> DebianMirrors:
    """Return this host's Debian mirrors.

    Raises:
        LockFailed: apt's sources name no Debian archive and no variable does.
    """
    main, security = os.environ.get("MOAT_DEBIAN_MIRROR", ""), os.environ.get("MOAT_DEBIAN_SECURITY_MIRROR", "")
    for configured, suite in apt_sources(etc):
        uri = configured.rstrip("/")
        if not uri.startswith(("http:", "https:", "file:")):
            continue
        if re.fullmatch(_CODENAMES + r"(-security|/updates)", suite):
            security = security or uri
        elif re.fullmatch(_CODENAMES + "(-updates)?", suite):
            main = main or uri
    if main and not security and main.endswith("/debian"):
        security = main + "-security"  # the layout of Debian's own mirrors
    if not main or not security:
        raise LockFailed(
            "no Debian mirror is known",
            found=f"main: {'known' if main else 'none'}; security: {'known' if security else 'none'}",
            expected="a Debian source in this host's apt configuration",
            hint="set MOAT_DEBIAN_MIRROR and MOAT_DEBIAN_SECURITY_MIRROR to folders that hold dists/ and pool/",
        )
    snapshot = os.environ.get("MOAT_DEBIAN_SNAPSHOT", "") or _apt_config("Acquire::Snapshots::URI::Origin::Debian")
    return DebianMirrors(
        main=main.rstrip("/"),
        security=security.rstrip("/"),
        keyring=os.environ.get("MOAT_DEBIAN_KEYRING", DEBIAN_KEYRING),
        # apt's own form carries a place for the time and the archive's name; we add those ourselves.
        snapshot=re.sub(r"/(debian/)?@SNAPSHOTID@/?$", "", snapshot).rstrip("/"),
    )


def apt_proxy(scheme: str) -> str | None:
    """Return apt's own proxy for ``http`` or ``https``, or ``None``."""
    value = _apt_config(f"Acquire::{scheme}::Proxy")
    return value if value and value != "DIRECT" else None


def _pip_config_files() -> list[Path]:
    """Return pip's configuration files, those that win first (pip's own order)."""
    home = Path.home()
    files = [
        Path(sys.prefix) / "pip.conf",
        Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf",
        home / ".pip" / "pip.conf",
        Path("/etc/xdg/pip/pip.conf"),
        Path("/etc/pip.conf"),
    ]
    named = os.environ.get("PIP_CONFIG_FILE")
    return [Path(named), *files] if named else files


def python_index() -> str:
    """Return the package index's simple API, without a trailing slash.

    Raises:
        LockFailed: neither the environment, nor pip's configuration, nor uv's default names one.
    """
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    for file in _pip_config_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, "utf-8")
        except (OSError, configparser.Error) as e:
            raise LockFailed(f"cannot read pip's configuration {file}", found=str(e), path=str(file)) from e
        for section in ("install", "global"):
            url = parser.get(section, "index-url", fallback="").strip()
            if url:
                return url.rstrip("/")
    # The installed resolver's own default: its help is where it says which.
    uv = [uv_program(), "help", "--no-pager", "pip", "compile"]
    text = subprocess.run(uv, capture_output=True, text=True, check=False).stdout
    default = re.search(r"--default-index .*?\(by default: <(\S+?)>\)", " ".join(text.split()))
    if default is None:
        raise LockFailed(
            "the package index is not known",
            found="the installed uv names no default",
            hint="set PIP_INDEX_URL, or index-url in pip's configuration",
        )
    return default[1].rstrip("/")


def uv_program() -> str:
    """Return the path of uv: the one beside this Python, else the one on the path."""
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.is_file() else "uv"


def go_proxies(goroot: Path | None = None) -> list[str]:
    """Return the Go module proxies, in order; ``direct`` and ``off`` are left out.

    Args:
        goroot: an unpacked toolchain, whose ``go.env`` holds its default.

    Raises:
        FetchFailed: none is known.
    """
    value = os.environ.get("GOPROXY", "")
    places = [Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "go" / "env"]
    if goroot is not None:
        places.append(goroot / "go.env")
    for place in places:
        if not value and place.is_file():
            found = re.search(r"^GOPROXY=(\S+)", place.read_text("utf-8"), re.M)
            value = found[1] if found else ""
    proxies = [p.rstrip("/") for p in re.split(r"[,|]", value) if p not in ("", "direct", "off")]
    if not proxies:
        raise FetchFailed("no Go module proxy is known", hint="set GOPROXY to the proxy's address")
    return proxies


def http_client(*, proxy: str | None = None) -> httpx.Client:
    """Return a client that trusts what this host trusts and waits as long as a slow mirror needs."""
    context = ssl.create_default_context()
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE"):
        if os.environ.get(name) and Path(os.environ[name]).is_file():
            context.load_verify_locations(cafile=os.environ[name])
    return httpx.Client(
        verify=context,
        proxy=proxy,
        follow_redirects=True,
        timeout=httpx.Timeout(60.0, connect=20.0),
        headers={"User-Agent": "moat"},
    )
