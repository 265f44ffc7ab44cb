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

from .test_1_effects import HTTPS, V
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
    with load(node, node.new_key("load", lasting=True)):
        run(node, "scale", "-e", "gateway_count=2")
        assert (V["gateway_listen_address"], V["gateway_base_port"] + 2) in {(a, p) for a, p, _ in node.listeners()}
        run(node, "drain", "-e", "drain_out=2")
        run(node, "drain", "-e", "drain_back=2")
        before = node.ok("sha256sum", "/etc/moat/secrets/gateway/master_key")
        run(node, "rotate_secrets", "-e", "rotate=all")
        assert node.ok("sha256sum", "/etc/moat/secrets/gateway/master_key") != before


def test_verify_finds_nothing_wrong(node) -> None:
    done = moat_site(node, "verify")
    assert done.returncode == 0, text_of(done)[-4000:]
