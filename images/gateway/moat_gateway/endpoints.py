# SPDX-License-Identifier: Apache-2.0
"""Every destination that the configuration names, allowed or not: what `moat egress verify` lists for the reviewer.

The check of the configuration reads every string anyway; here its findings are shown instead of only its refusals.
What is shown of a destination is its host and port: the rest of a URL may be a secret.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moat_gateway import config
from moat_gateway.allowlist import Destination, NotADestination, destinations_of_urls, parse_host_port
from moat_gateway.errors import EndpointRefused, GatewayError
from moat_gateway.settings import Settings
from moat_gateway.strictyaml import dotted
from moat_gateway.sync import nodefolder


@dataclass(frozen=True)
class Endpoint:
    """One destination: where it is named, what it is, whether the allow-list covers it."""

    setting: str
    url: str
    allowed: bool


def collect(settings: Settings) -> tuple[list[Endpoint], list[GatewayError]]:
    """Return the destinations of the configuration and of the settings, and the other problems of the configuration.

    A setting that would call a public service without naming it (a model without ``api_base``, a vendor's callback) is
    a destination too, by the words of its refusal.
    """
    named: list[config.Named] = []
    _, problems = config.read(_in_force(settings), settings.secrets_dir, settings.allow, named)
    found = [Endpoint(f"config.yaml {dotted(n.at)}", n.text, n.allowed) for n in named]
    listed = {n.at for n in named if not n.allowed}
    others: list[GatewayError] = []
    for p in problems:
        if not isinstance(p, EndpointRefused):
            others.append(p)
        elif not any(p.message.startswith(dotted(at) + " ") for at in listed):
            found.append(Endpoint(f"config.yaml line {p.line}", p.message, False))
    if settings.store_endpoint:
        found += _store(settings)
    return list(dict.fromkeys(found)), others


def _in_force(settings: Settings) -> Path:
    """Return the configuration that a gateway started now would serve: of the node's revision, or the local file."""
    if settings.sync_dir:
        for number in nodefolder.usable_order(Path(settings.sync_dir)):
            return nodefolder.revision_folder(Path(settings.sync_dir), number) / "config.yaml"
    return settings.config


def _store(settings: Settings) -> list[Endpoint]:
    text = settings.store_endpoint
    destinations: list[Destination | NotADestination] = list(destinations_of_urls(text))
    if "://" not in text:
        try:
            destinations.append(parse_host_port(text))
        except NotADestination:
            destinations.append(NotADestination("a destination that cannot be read"))
    return [
        Endpoint("store_endpoint", str(d), not isinstance(d, NotADestination) and settings.allow.allows(d))
        for d in destinations
    ]


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return the object of ``moat-gateway endpoints --json``."""
    found, problems = collect(settings)
    return {
        "ok": not problems and all(e.allowed for e in found),
        "allow": list(settings.egress_allow),
        "endpoints": [asdict(e) for e in found],
        "problems": [p.to_dict() for p in problems],
    }
