# SPDX-License-Identifier: Apache-2.0
"""Every address that the effective configuration names, compared with the allow-list.

The gateway is asked itself (``moat-gateway endpoints --json``), as the user and in the environment of its
running process: only it reads YAML, resolves its references and knows LiteLLM's settings. The rest is read
here: environments and arguments of every process, nginx's and Valkey's files, MinIO's variables. Only host
and port of an address are ever shown.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from moat.errors import EgressUnproven
from moat.site.egresscheck.destinations import AllowList, Destination, in_text, read
from moat.site.egresscheck.model import Endpoint

_ASK_SECONDS: Final = 60
#: Variables whose value is a destination even without a scheme.
_KEYS: Final = re.compile(
    r"(?:^|_)(?:HOST|HOSTNAME|ENDPOINT|SERVERS?|URL|URI|API_BASE|BASE_URL|DOMAIN|ADDRESS|ADDR|BROKERS?|TARGETS?|PROXY)$",
    re.IGNORECASE,
)
#: The container's own name; a list of what is *not* asked through a proxy.
_NO_KEYS: Final = frozenset({"HOSTNAME", "NO_PROXY", "no_proxy"})
_MINIO_SWITCHES: Final = {
    "MINIO_UPDATE": "MinIO's update server (the look-up of newer releases is on)",
    "MINIO_CALLHOME_ENABLE": "MinIO's support service (the daily report home is on)",
}
#: nginx directives whose first argument is a destination.
_NGINX: Final = frozenset(
    {
        "server", "proxy_pass", "grpc_pass", "fastcgi_pass", "uwsgi_pass", "scgi_pass", "memcached_pass",
        "ssl_stapling_responder",
    }
)  # fmt: skip
_MAX_INCLUDES: Final = 100


# --- the gateway ---


def gateway_argv(pid: int, container: str = "") -> list[str]:
    """Return the argv that asks a running gateway's own program for its endpoints, where and as what it runs.

    Args:
        pid: of the gateway's process.
        container: id of the container that it runs in; empty for a unit of systemd, which has the host's files.

    Raises:
        EgressUnproven: the process is no gateway, or has ended.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
        serve = words.index("serve")
    except (OSError, ValueError) as e:
        raise EgressUnproven(
            "a gateway cannot be asked for its endpoints",
            found=f"process {pid}: {e}",
            expected="a running `moat-gateway serve`",
            hint="see that the gateways run, and run it again",
        ) from e
    ids = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line[:4] in ("Uid:", "Gid:")}
    if container:
        # The engine gives it the container's user, environment and confinement.
        enter = ["docker", "exec", container]
    else:
        user = ["--reuid", ids["Uid"], "--regid", ids["Gid"], "--clear-groups"]
        # Its secrets are in a folder that leads nowhere but through its own mounts.
        enter = [
            "nsenter",
            "--target",
            str(pid),
            "--mount",
            "--",
            "setpriv",
            *user,
            "--no-new-privs",
            "--inh-caps=-all",
            "--",
        ]
    return [*enter, *words[:serve], "endpoints", "--json", *words[serve + 1 :]]


def of_gateway(name: str, pid: int, container: str = "") -> tuple[list[Endpoint], tuple[str, ...]]:
    """Ask one gateway, and return its endpoints and its allow-list; ``container`` as for :func:`gateway_argv`.

    Raises:
        EgressUnproven: it gives no answer.
    """
    argv = gateway_argv(pid, container)
    try:
        environ = None if container else environment_of(pid)
        done = subprocess.run(
            argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_SECONDS, check=False
        )
        raw = json.loads(done.stdout)
        found = [Endpoint(f"{name}: {e['setting']}", str(e["url"]), e["allowed"] is True) for e in raw["endpoints"]]
        return found, tuple(str(a) for a in raw["allow"])
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as e:
        words = "" if isinstance(e, OSError | subprocess.TimeoutExpired) else done.stderr.decode("utf-8", "replace")
        raise EgressUnproven(
            f"{name} does not tell its endpoints",
            found=words.strip()[-300:] or str(e),
            expected="the answer of `moat-gateway endpoints --json`",
            hint="the gateway is older than this program: upgrade the site first",
        ) from e


# --- every process ---


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment a process was started with. (nginx and Valkey write over theirs: then it is empty.)

    Raises:
        OSError: it has ended.
    """
    raw = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "surrogateescape")
    return dict(line.split("=", 1) for line in raw.split("\0") if re.match(r"[A-Za-z_][A-Za-z0-9_]*=", line))


def arguments_of(pid: int) -> list[str]:
    """Return the arguments of a process.

    Raises:
        OSError: it has ended.
    """
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


def of_environment(name: str, environ: Mapping[str, str], allow: AllowList) -> list[Endpoint]:
    """Return what the variables of a component name."""
    found = []
    for key, value in sorted(environ.items()):
        for d in _of_value(key, value):
            found.append(Endpoint(f"{name}: environment {key}", _show(d), allow.allows(d)))
    return found


def of_arguments(name: str, words: Iterable[str], allow: AllowList) -> list[Endpoint]:
    """Return what the arguments of a component name."""
    return [Endpoint(f"{name}: argument", _show(d), allow.allows(d)) for word in words for d in in_text(word)]


def of_words(name: str, setting: str, words: Iterable[str], allow: AllowList) -> list[Endpoint]:
    """Return what a list of addresses names; this host itself is left out."""
    found = [read(word) or Destination("") for word in words]
    return [Endpoint(f"{name}: {setting}", _show(d), allow.allows(d)) for d in found if not d.local]


def _of_value(key: str, value: str) -> list[Destination]:
    found = in_text(value)
    if found or "://" in value or key in _NO_KEYS or not _KEYS.search(key):
        return found
    for word in value.replace(",", " ").split():
        if word[0] in "/." or word.startswith("unix:"):
            continue
        host = word.partition("/")[0]
        d = read(host)
        if d is None:
            # Not a word like "off": something that means a place, and nobody can say which.
            found += [Destination("")] if "." in host or ":" in host else []
        # An address to listen on is no destination, and neither is a bare word.
        elif (not d.local or d.host == "localhost") and (d.port or "." in d.host or ":" in d.host):
            found.append(d)
    return found


def _show(d: Destination) -> str:
    return f"{d.scheme}://{d}" if d.scheme and d.host else str(d)


# --- MinIO, Valkey, nginx ---


def of_minio(name: str, environ: Mapping[str, str]) -> list[Endpoint]:
    """Return what MinIO calls by itself unless it is told not to; its other addresses are in its environment."""
    return [
        Endpoint(f"{name}: environment {key} is not off", what, False)
        for key, what in _MINIO_SWITCHES.items()
        if environ.get(key, "").lower() not in ("off", "false", "0")
        and not (key == "MINIO_CALLHOME_ENABLE" and key not in environ)
    ]


def of_valkey(name: str, text: str, allow: AllowList) -> list[Endpoint]:
    """Return the servers that Valkey's configuration would copy from or watch."""
    found = []
    for line in text.splitlines():
        words = line.split("#", 1)[0].split()
        key = words[0].lower() if words else ""
        host = None
        if key in ("replicaof", "slaveof") and len(words) >= 3 and [w.lower() for w in words[1:3]] != ["no", "one"]:
            host = f"[{words[1]}]:{words[2]}" if ":" in words[1] else f"{words[1]}:{words[2]}"
        elif key == "sentinel" and len(words) >= 5 and words[1].lower() == "monitor":
            host = f"{words[3]}:{words[4]}"
        if host is not None:
            d = read(host) or Destination("")
            found.append(Endpoint(f"{name}: {key}", str(d), allow.allows(d)))
    return found


def nginx_directives(text: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield name, arguments and the name of the block around each directive of a piece of configuration."""
    blocks: list[str] = []
    words: list[str] = []
    lexer = shlex.shlex(text, posix=True, punctuation_chars="{};")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    try:
        for token in lexer:
            # Punctuation comes in runs: "};" or "}}".
            if token and set(token) <= set("{};"):
                for mark in token:
                    if mark == "}":
                        del blocks[-1:]
                    elif words:
                        yield words[0], words[1:], blocks[-1] if blocks else ""
                    if mark == "{":
                        blocks.append(words[0] if words else "")
                    words = []
            else:
                words.append(token)
    except ValueError:
        yield "unreadable", [], ""


def nginx_text(path: Path, root: Path = Path("/")) -> str:
    """Return nginx's configuration with what it includes; ``root`` is the root of nginx's own file system.

    Raises:
        OSError: it cannot be read.
    """
    budget = [_MAX_INCLUDES]

    def expand(file: Path) -> str:
        budget[0] -= 1
        text = file.read_text("utf-8", "replace")
        parts = [text]
        for name, args, _ in nginx_directives(text):
            if name == "include" and args and budget[0] > 0:
                inner = args[0] if args[0].startswith("/") else str(path.parent / args[0])
                for more in sorted(root.glob(inner.lstrip("/"))):
                    if more.name != "mime.types":
                        parts.append(expand(more))
        return "\n".join(parts)

    return expand(root / str(path).lstrip("/"))


def of_nginx(name: str, text: str, allow: AllowList) -> list[Endpoint]:
    """Return every server that nginx's configuration (with its includes) names."""
    found: list[Endpoint] = []
    directives = list(nginx_directives(text))
    upstreams = {args[0] for key, args, _ in directives if key == "upstream" and args}

    def add(setting: str, d: Destination) -> None:
        found.append(Endpoint(f"{name}: {setting}", _show(d), allow.allows(d)))

    for key, args, around in directives:
        if key == "unreadable":
            found.append(Endpoint(f"{name}: configuration", "a file that cannot be read", False))
        elif key == "server" and around != "upstream":
            continue
        elif key in _NGINX and args and not args[0].startswith("unix:"):
            urls = in_text(args[0]) or [read(args[0]) or Destination("")]
            for d in urls:
                if d.host not in upstreams:
                    add(key, d)
        elif key == "resolver":
            for word in args:
                if "=" not in word:
                    add(key, read(word) or Destination(""))
        elif key in ("access_log", "error_log"):
            for word in args:
                target = word.removeprefix("syslog:").split(",")[0].removeprefix("server=")
                if word.startswith("syslog:") and not target.startswith("unix:"):
                    add(key, read(target) or Destination(""))
        elif key in ("ssl_stapling", "ssl_ocsp") and args[:1] != ["off"]:
            found.append(Endpoint(f"{name}: {key}", "the OCSP responder that the certificate names", False))
    return list(dict.fromkeys(found))


# --- the host: information, no part of the verdict ---


def host_facts(root: Path = Path("/")) -> dict[str, str]:
    """Return where the host itself asks for names, time and packages."""
    servers, search = [], []
    for line in _lines([root / "etc/resolv.conf"]):
        words = line.split()
        if words[:1] == ["nameserver"]:
            servers += words[1:2]
        elif words[:1] in (["search"], ["domain"]):
            search += words[1:]
    time = []
    for line in _lines(
        [root / "etc/systemd/timesyncd.conf", *sorted((root / "etc/systemd/timesyncd.conf.d").glob("*.conf"))]
    ):
        key, _, value = line.partition("=")
        if key.strip() in ("NTP", "FallbackNTP"):
            time += value.split()
    chrony = [root / "etc/chrony/chrony.conf", *sorted((root / "etc/chrony").glob("*.d/*"))]
    time += [w[1] for line in _lines(chrony) if len(w := line.split()) > 1 and w[0] in ("server", "pool", "peer")]
    apt = [root / "etc/apt/sources.list", *sorted((root / "etc/apt/sources.list.d").glob("*"))]
    hosts = {str(Destination(d.host, None)) for line in _lines(apt) for d in in_text(line)}
    return {
        "name servers of the host": ", ".join(servers) or "none",
        "search domains of the host": ", ".join(search) or "none",
        "time servers of the host": ", ".join(dict.fromkeys(time)) or "none configured",
        "package sources of the host": ", ".join(sorted(hosts)) or "none on the network",
    }


def _lines(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with contextlib.suppress(OSError):
            for line in path.read_text("utf-8", "replace").splitlines():
                if line.strip() and not line.lstrip().startswith(("#", ";")):
                    yield line.strip()
