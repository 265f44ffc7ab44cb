# SPDX-License-Identifier: Apache-2.0
"""Proves that scale, rotate_secrets and drain work with other ports, addresses and certificates, and lose no request.

Every kind of request (new connections, kept ones, lists of models, streams) runs all the time; the model is the small
real one, so the load is a light one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .test_1_effects import HTTPS, V, digest, served, site_rules, table
from .test_2_changes import moat_site, text_of

RESULT = "/run/load.json"


@contextmanager
def load(node, key_file: str) -> Iterator[None]:
    """Run the load client on the host for as long as the block runs; every request must have been answered."""
    node.run("rm", "-f", RESULT)
    client = ["python3", "/srv/operator/loadclient.py", "--base-url", HTTPS, "--ca-file", "/etc/moat/tls/ca.pem"]
    client += ["--key-file", key_file, "--model", "smollm2-135m-instruct", "--rate", "0.7", "--workers", "1"]
    client += ["--streams", "1", "--words", "8", "--max-tokens", "24", "--timeout", "240", "--out", RESULT]
    unit = [
        "systemd-run",
        "--quiet",
        "--unit=load",
        "--collect",
        "-p",
        "StandardOutput=null",
        "-p",
        "TimeoutStopSec=300",
    ]
    node.ok(*unit, *client)
    time.sleep(3)
    yield
    time.sleep(2)
    node.ok("systemctl", "stop", "load")
    result = json.loads(node.ok("cat", RESULT))
    assert result["first_failures"] == [], json.dumps(result, indent=1)[:4000]
    assert result["ok"] is True, json.dumps(result, indent=1)[:4000]


def run(node, *words: str) -> str:
    done = moat_site(node, *words)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_a_gateway_that_is_told_to_stop_waits_as_long_as_it_was_told(node) -> None:
    began = time.monotonic()
    node.ok("systemctl", "stop", "moat-gateway@1")
    took = time.monotonic() - began
    node.ok("systemctl", "start", "moat-gateway@1")
    assert V["gateway_shutdown_delay"] <= took < V["gateway_shutdown_timeout"]


def test_one_more_gateway_other_secrets_and_a_drained_one_lose_no_request(node) -> None:
    with load(node, node.new_key("load")):
        run(node, "scale", "-e", "gateway_count=2")
        assert (V["gateway_listen_address"], V["gateway_base_port"] + 2) in {(a, p) for a, p, _ in node.listeners()}
        run(node, "drain", "-e", "drain_out=2")
        run(node, "drain", "-e", "drain_back=2")
        before = node.ok("sha256sum", "/etc/moat/secrets/gateway/master_key")
        signed = node.ok("ls", "/etc/moat/site-keys").split()
        run(node, "rotate_secrets", "-e", "rotate=all")
        assert node.ok("sha256sum", "/etc/moat/secrets/gateway/master_key") != before
        # The key before is trusted beside the new one, until it is dropped.
        both = node.ok("ls", "/etc/moat/site-keys").split()
        assert len(both) == len(signed) + 1
        run(node, "rotate_secrets", "-e", "rotate=drop_site_key")
        assert node.ok("ls", "/etc/moat/site-keys").split() == sorted(set(both) - set(signed))
        assert node.revision() > 1


def test_verify_finds_nothing_wrong(node) -> None:
    done = moat_site(node, "verify")
    assert done.returncode == 0, text_of(done)[-4000:]


def test_the_switches_flipped(node) -> None:
    """Forwarding closed with the site's own rule in it, evidence collected, another certificate by nginx_tls_cert.

    The last of the changes: ``nginx_restart: true`` closes nginx's ports for a moment, and would again on the way back.
    """
    old = "for n in 1 2 3; do d=/var/lib/moat/evidence/2020010${n}T000000Z; mkdir -p $d; echo '{}' >$d/index.json; done"
    assert V["evidence_enabled"] is False
    more = {
        "no_egress_forward": True,
        "evidence_enabled": True,
        "nginx_tls_cert": "/srv/operator/second.pem",
        "nginx_tls_key": "/srv/operator/second.key",
        "nginx_stop_timeout": V["nginx_stop_timeout"] + 1,
    }
    node.ok("sh", "-c", old)
    assert V["nginx_restart"] is True
    before = node.pid("nginx.service")
    done = moat_site(node, "site", "--tags", "nginx,no_egress,evidence", "-e", json.dumps(more))
    assert done.returncode == 0, text_of(done)[-3000:]
    assert node.pid("nginx.service") != before, "its unit is another, and nginx was not restarted"
    assert {i["chain"]["hook"] for i in table(node) if i.get("chain", {}).get("hook")} == {"output", "forward"}
    assert "9998" in V["no_egress_extra_forward"][0]
    assert set(site_rules(node)) == {"output", "forward"}
    second = digest(node.ok("cat", more["nginx_tls_cert"]))
    assert served(node, "127.0.0.1", V["nginx_https_port"], V["moat_server_name"])["digest"] == second
    kept = node.ok("find", "/var/lib/moat/evidence", "-mindepth", "1", "-maxdepth", "1", "-name", "2*").split()
    assert len(kept) == V["evidence_keep"]
