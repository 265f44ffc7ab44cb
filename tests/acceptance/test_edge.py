# SPDX-License-Identifier: Apache-2.0
"""Proves what can be reached from outside through nginx, and with which headers, on the running stack."""

from __future__ import annotations

import json
import re
import socket

import pytest
from tests.acceptance.stack import ROOT, Stack

#: Paths that the pinned LiteLLM serves and the site does not.
FORBIDDEN = [
    "/", "/metrics", "/config/yaml", "/get/config/callbacks", "/sso/key/generate", "/docs", "/redoc", "/openapi.json",
    "/ui/", "/key/generate", "/key/info", "/team/new", "/user/info", "/model/info", "/v1/model/info", "/model/new",
    "/health", "/health/readiness", "/health/drain", "/routes", "/debug/memory/summary", "/v1/mcp/server", "/mcp/",
    "/_moat/status", "/_moat/metrics", "/_moat/reload", "/_moat/nginx", "/v1//models", "/v1/models/..%2f..%2fmetrics",
]  # fmt: skip


@pytest.mark.parametrize("path", FORBIDDEN)
def test_forbidden_paths_are_404_at_nginx_even_with_the_master_key(stack: Stack, path: str) -> None:
    master = (stack.folder / "secrets/gateway/master_key").read_text("ascii").strip()
    for key in (stack.key, master, ""):
        with stack.client(key) as client:
            answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "not_found"  # nginx's own: no gateway was asked


@pytest.mark.parametrize("path", ["/health/liveliness", "/_moat/live", "/_moat/ready"])
def test_probes_need_no_key_and_tell_nothing(stack: Stack, path: str) -> None:
    with stack.client("") as client:
        answer = client.get(path)
    assert answer.status_code == 200, answer.text
    for word in ("litellm", "172.30.", "version", "model:"):
        assert word not in answer.text.lower()


def test_every_answer_carries_the_headers(stack: Stack) -> None:
    with stack.client() as client:
        for path in ("/v1/models", "/metrics", "/_moat/ready"):
            headers = client.get(path, headers={"x-request-id": "acceptance-0001"}).headers
            assert headers.get_list("x-request-id") == ["acceptance-0001"]
            assert headers.get_list("content-security-policy")[0].startswith("default-src 'none'")
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert headers["server"] == "nginx"
            assert "x-litellm-model-api-base" not in headers
            assert "172.30." not in str(headers)
        made = client.get("/v1/models").headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_the_access_log_is_json_with_the_request_id_and_without_secrets(stack: Stack) -> None:
    with stack.client() as client:
        client.get("/v1/models?api-key=QUERYSECRET", headers={"x-request-id": "acceptance-0002"})
    lines = [json.loads(line) for line in stack.logs("nginx").splitlines() if line.startswith("{")]
    mine = [line for line in lines if line["request_id"] == "acceptance-0002"]
    assert len(mine) == 1
    assert (mine[0]["path"], mine[0]["status"]) == ("/v1/models", 200)
    assert "QUERYSECRET" not in stack.logs("nginx")


def test_the_request_id_reaches_the_gateways_log(stack: Stack) -> None:
    with stack.client() as client:
        body = {"model": stack.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        answer = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "acceptance-0003"})
    assert answer.status_code == 200, answer.text
    logs = stack.logs("gateway-1") + stack.logs("gateway-2")
    assert "acceptance-0003" in logs


def test_nothing_but_nginx_is_published(stack: Stack) -> None:
    port = int(stack.base_url.rsplit(":", 1)[1])
    published = {}
    for service in ("nginx", "gateway-1", "gateway-2", "minio", "valkey", "model"):
        ports = stack.inspect(service)["NetworkSettings"]["Ports"] or {}
        for bindings in ports.values():
            for b in bindings or ():
                published[int(b["HostPort"])] = service
    assert set(published.values()) == {"nginx"}
    assert port in published
    assert len(published) == 2


def test_plain_http_on_the_tls_port_is_told_to_use_tls(stack: Stack) -> None:
    port = int(stack.base_url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), 5) as s:
        s.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        answer = s.makefile("rb").read()
    assert b"tls_required" in answer


def test_the_table_of_public_paths_in_the_docs_is_nginxs(stack: Stack) -> None:
    page = (ROOT / "docs/compose.md").read_text("utf-8")
    table = page.split("## Public paths")[1].split("\n## ")[0]
    documented = re.findall(r"^\| `(/[^`]*)`", table, re.MULTILINE)
    assert len(documented) >= 10
    with stack.client() as client:
        for path in documented:
            concrete = path.replace("{id}", "abc")
            code = client.get(concrete).json().get("error", {}) if client.get(concrete).status_code == 404 else {}
            assert code.get("code") != "not_found", f"{path} is documented but nginx refuses it"
