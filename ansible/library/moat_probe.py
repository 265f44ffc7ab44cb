#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: ask a running site whether it works, without changing it.

Every question becomes a row of the table that verify.yml prints: what was asked, whether the answer is right, what was
found. Nothing raises but a wrong argument: a host where everything is wrong still gives a whole table.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: moat_probe
short_description: Ask a running site whether it works
options:
  units: {type: list, elements: str, default: [], description: Units of systemd that must be active.}
  gateways: {type: list, elements: str, default: [], description: Gateways as ADDRESS:PORT; each must be ready.}
  ports: {type: list, elements: str, default: [], description: TCP ports as ADDRESS:PORT that must accept a connection.}
  tls: {type: list, elements: str, default: [], description: TLS ports as ADDRESS:PORT whose certificate must hold.}
  entrance: {type: str, description: The entrance as ADDRESS:PORT.}
  server_name: {type: str, description: Name that the entrance's certificate must carry.}
  ca: {type: path, default: /etc/moat/tls/ca.pem, description: Authorities of the site.}
  key: {type: str, description: A client's key; with it a request is made through the entrance.}
  model: {type: str, description: With the key, the model that a chat completion is asked of.}
  store: {type: path, default: /opt/moat, description: The release store.}
  days: {type: int, default: 14, description: A certificate must be valid for so many days yet.}
"""

TIMEOUT = 20.0
Answer = tuple[bool, str]


def host_port(text: str) -> tuple[str, int]:
    """Split ADDRESS:PORT; an IPv6 address may be in brackets."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def unit(name: str) -> Answer:
    """Ask systemd for a unit's state."""
    done = subprocess.run(["systemctl", "is-active", name], capture_output=True, text=True, check=False)
    state = done.stdout.strip() or done.stderr.strip()
    return state == "active", state


def port(text: str) -> Answer:
    """Connect and close."""
    with socket.create_connection(host_port(text), TIMEOUT):
        return True, "accepts connections"


def ready(text: str) -> Answer:
    """Ask a gateway whether it is ready."""
    host, number = host_port(text)
    connection = http.client.HTTPConnection(host, number, timeout=TIMEOUT)
    try:
        connection.request("GET", "/_moat/ready")
        answer = connection.getresponse()
        said = answer.read(200).decode("utf-8", "replace").strip()
        return answer.status == 200, "ready" if answer.status == 200 else f"{answer.status} {said}"
    finally:
        connection.close()


def certificate(text: str, name: str, ca: str, days: int) -> Answer:
    """Make a TLS connection: the chain must lead to the site's authority, name and dates must fit."""
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(host_port(text), TIMEOUT) as raw,
        context.wrap_socket(raw, server_hostname=name) as wrapped,
    ):
        end = dict(wrapped.getpeercert() or {}).get("notAfter", "")
        left = (ssl.cert_time_to_seconds(str(end)) - time.time()) / 86400
        return left >= days, f"{wrapped.version()}, {left:.0f} more days"


def entrance(
    text: str, name: str, ca: str, method: str, path: str, key: str | None, body: dict[str, Any] | None
) -> Answer:
    """Make one request through the entrance as a client would."""
    host, number = host_port(text)
    context = ssl.create_default_context(cafile=ca)
    # The name decides the certificate, the address the way: no name is looked up.
    raw = socket.create_connection((host, number), TIMEOUT)
    connection = http.client.HTTPSConnection(name, number, context=context, timeout=TIMEOUT)
    connection.sock = context.wrap_socket(raw, server_hostname=name)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        data = answer.read(1_000_000)
    finally:
        connection.close()
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if path == "/v1/models" and answer.status == 200 and isinstance(document, dict):
        names = [str(m.get("id")) for m in document.get("data", []) if isinstance(m, dict)]
        return bool(names), "200 with " + (", ".join(names[:10]) or "no model")
    if path == "/v1/chat/completions" and answer.status == 200 and isinstance(document, dict):
        choices = document.get("choices") or []
        said = str((choices[0].get("message") or {}).get("content", "")) if choices else ""
        return bool(said.strip()), f"200, {len(said)} characters"
    if key is None and path == "/v1/models":  # without a key the right answer is a refusal
        return answer.status == 401, "refused (401)" if answer.status == 401 else str(answer.status)
    if answer.status == 200:
        return True, "200"
    return False, f"{answer.status} {data[:120].decode('utf-8', 'replace').strip()}"


def configuration() -> Answer:
    """Ask whether every gateway of the site serves the revision in force."""
    argv = ["/usr/local/bin/moat-gateway", "config", "status", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    if not answer.get("ok"):
        return False, str(answer["problems"][0]["message"])
    store, lags = answer["store"], [f"{x['name']}: {x['why']}" for x in answer["lagging"]]
    if not store["reachable"]:
        return False, f"the store does not answer: {store['why']}"
    if not store["revision"]:
        return True, "no revision yet: the gateways serve their local files"
    served = f"revision {store['revision']} on {len(answer['gateways'])} gateways"
    return bool(answer["converged"]), "; ".join(lags) or served


def release(store: str) -> Answer:
    """Read which release this host runs, and whether its gateways run it too."""
    current = Path(store) / "current"
    if not current.is_symlink():
        return False, f"no {current}"
    name = current.readlink().name
    others = sorted({p.readlink().name for p in (Path(store) / "instances").glob("*") if p.is_symlink()} - {name})
    return not others, name + (f", but gateways run {', '.join(others)}" if others else "")


def main() -> None:
    """Ask everything that the arguments name."""
    text = {"type": "list", "elements": "str", "default": []}
    module = AnsibleModule(
        argument_spec={
            "units": text,
            "gateways": text,
            "ports": text,
            "tls": text,
            "entrance": {"type": "str"},
            "server_name": {"type": "str"},
            "ca": {"type": "path", "default": "/etc/moat/tls/ca.pem"},
            "key": {"type": "str", "no_log": True},
            "model": {"type": "str"},
            "store": {"type": "path", "default": "/opt/moat"},
            "days": {"type": "int", "default": 14},
        },
        supports_check_mode=True,
    )
    p = module.params
    rows: list[dict[str, Any]] = []

    def ask(what: str, question: Callable[[], Answer]) -> None:
        try:
            ok, found = question()
        except (OSError, ValueError, http.client.HTTPException) as e:
            ok, found = False, getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
        rows.append({"what": what, "ok": ok, "found": found})

    ask("release", lambda: release(p["store"]))
    for one in p["units"]:
        ask(f"unit {one}", partial(unit, one))
    for one in p["ports"]:
        ask(f"port {one}", partial(port, one))
    for one in p["tls"]:
        ask(f"certificate at {one}", partial(certificate, one, host_port(one)[0], p["ca"], p["days"]))
    for one in p["gateways"]:
        ask(f"gateway {one}", partial(ready, one))
    if p["gateways"]:
        ask("configuration", configuration)
    if p["entrance"]:
        where, name = p["entrance"], p["server_name"] or host_port(p["entrance"])[0]
        ask(f"entrance, certificate of {name}", lambda: certificate(where, name, p["ca"], p["days"]))

        def request(method: str, path: str, key: str | None = None, body: dict[str, Any] | None = None) -> Answer:
            return entrance(where, name, p["ca"], method, path, key, body)

        ask("entrance, readiness", lambda: request("GET", "/_moat/ready"))
        ask("entrance, a request without a key", lambda: request("GET", "/v1/models"))
        if p["key"]:
            ask("entrance, models for the key", lambda: request("GET", "/v1/models", p["key"]))
        if p["key"] and p["model"]:
            body = {"model": p["model"], "messages": [{"role": "user", "content": "Say: ready."}], "max_tokens": 16}
            ask(
                f"entrance, chat completion of {p['model']}",
                lambda: request("POST", "/v1/chat/completions", p["key"], body),
            )
    module.exit_json(changed=False, rows=rows)


if __name__ == "__main__":
    main()
