# SPDX-License-Identifier: Apache-2.0
"""Proves which addresses of a configuration are listed, that the allow-list decides, and that no secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from moat.site.egresscheck import endpoints
from moat.site.egresscheck.destinations import AllowList, Destination, in_text, read

ALLOW = AllowList(
    ["model:8081", "10.1.0.0/16", "vault.site.example", "192.0.2.7:443", "[fd00::5]:8000"],
    own=["minio", "172.30.242.11"],
)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("model:8081", True),
        ("MODEL.:8081", True),
        ("model:8082", False),
        ("model", False),
        ("10.1.2.3:80", True),
        ("10.2.0.1", False),
        ("vault.site.example:1", True),
        ("evil-vault.site.example", False),
        ("vault.site.example.attacker.example", False),
        ("192.0.2.7:443", True),
        ("192.0.2.7:80", False),
        ("[fd00::5]:8000", True),
        ("fd00::6", False),
        ("[::ffff:10.1.0.9]:1", True),
        ("localhost:9", True),
        ("127.8.9.1", True),
        ("[::1]:5", True),
        ("0.0.0.0", True),  # noqa: S104
        ("minio:9000", True),
        ("172.30.242.11:4001", True),
        ("172.30.242.1:22", False),
        # Only the C library reads these as loopback.
        ("127.1", False),
        ("2130706433", False),
    ],
)
def test_the_allow_list_decides(text: str, allowed: bool) -> None:
    destination = read(text)
    assert destination is not None
    assert ALLOW.allows(destination) is allowed


@pytest.mark.parametrize(
    ("entry", "text", "allowed"),
    [
        ("10.20.0.0/24:8000", "10.20.0.9:8000", True),
        ("10.20.0.0/24:8000", "10.20.0.9:8001", False),
        ("10.20.0.0/24:8000", "10.20.0.9", False),  # no port is not that port
        ("10.20.0.7/24", "10.20.0.9:1", True),  # a network written by one of its hosts
        ("tcp 10.20.0.5:8000", "10.20.0.5:8000", True),
        ("udp [fd00:20::/64]:8001", "[fd00:20::7]:8001", True),
        ("udp [fd00:20::/64]:8001", "[fd00:21::7]:8001", False),
        ("tcp Vault.site.example.:8200", "vault.site.example:8200", True),
        ("tcp vault.site.example:8200", "vault.site.example", False),
        ("10.20.0.0/24:99999", "10.20.0.9", False),  # what cannot be read allows nothing
        ("icmp 10.20.0.5", "10.20.0.5", False),
    ],
)
def test_an_entry_is_read_as_the_capture_reads_it(entry: str, text: str, allowed: bool) -> None:
    destination = read(text)
    assert destination is not None
    assert AllowList([entry]).allows(destination) is allowed


@pytest.mark.parametrize(
    "text", ["", "a b", "host:0", "host:99999", "host:x", "[::1", "[model]:1", "a/b", "-x", "ho$t"]
)
def test_what_is_no_destination_is_none(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host.example/path/T000/secret?token=x#y", ["host.example:443"]),
        ("http://a@b@c.example", ["c.example:80"]),
        ("redis://:pw@one.example:26379,two.example:26379/0", ["one.example:26379", "two.example:26379"]),
        ("x=http://one.example;y=grpc://two.example", ["one.example;y=grpc:80"]),
        ("file:///etc/passwd and unix:///run/x", []),
        ("https://host\\@evil.example/", ["an address that cannot be read (https)"]),
        ("https://%65vil.example", ["an address that cannot be read (https)"]),
        ("https://", ["an address that cannot be read (https)"]),
    ],
)
def test_urls_are_read_strictly_and_shown_without_secrets(text: str, shown: list[str]) -> None:
    found = [str(d) for d in in_text(text)]
    if "one.example;y" in "".join(shown):
        # Two readings are possible: then it must be on no list.
        assert not any(ALLOW.allows(d) for d in in_text(text))
        return
    assert found == shown
    assert not any(word in str(found) for word in ("pass", "secret", "token", "pw"))


def test_an_unreadable_destination_is_on_no_list() -> None:
    assert AllowList(["0.0.0.0/0", "::/0"]).allows(Destination("")) is False


def test_environment_names_destinations_with_and_without_a_scheme() -> None:
    found = endpoints.of_environment(
        "gateway-1",
        {
            "HTTPS_PROXY": "proxy.example:3128",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://u:s3cret@otel.example:4318/v1?k=s3cret",
            "REDIS_HOST": "10.1.0.9",
            "SOME_TOKEN": "abc.def",
            "MOAT_HOST": "0.0.0.0",  # noqa: S104
            "HOSTNAME": "962199aa6990",
            "NO_PROXY": "internal.example",
            "MINIO_UPDATE": "off",
            "API_BASE": "http://model:8081/v1",
            "PATH": "/usr/bin",
            "KAFKA_BROKERS": "one.example:9092",
        },
        ALLOW,
    )
    assert {(e.setting.split()[-1], e.url, e.allowed) for e in found} == {
        ("HTTPS_PROXY", "proxy.example:3128", False),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://otel.example:4318", False),
        ("REDIS_HOST", "10.1.0.9", True),
        ("API_BASE", "http://model:8081", True),
        ("KAFKA_BROKERS", "one.example:9092", False),
    }
    assert "s3cret" not in str(found)


def test_lists_and_unreadable_values_are_not_passed_over() -> None:
    found = endpoints.of_environment(
        "g", {"KAFKA_BROKERS": "one.example:9092,two.example:9092", "X_HOST": "ho$t.x:1"}, ALLOW
    )
    assert [(e.url, e.allowed) for e in found] == [
        ("one.example:9092", False),
        ("two.example:9092", False),
        ("an address that cannot be read", False),
    ]


def test_arguments_name_destinations() -> None:
    found = endpoints.of_arguments("minio", ["server", "http://node{1...4}.example/data", "/data"], ALLOW)
    assert [(e.url, e.allowed) for e in found] == [("an address that cannot be read (http)", False)]


def test_minio_calls_home_unless_it_is_told_not_to() -> None:
    assert [e.allowed for e in endpoints.of_minio("minio", {})] == [False]
    assert endpoints.of_minio("minio", {"MINIO_UPDATE": "off", "MINIO_CALLHOME_ENABLE": "off"}) == []
    assert len(endpoints.of_minio("minio", {"MINIO_UPDATE": "on", "MINIO_CALLHOME_ENABLE": "on"})) == 2


@pytest.mark.parametrize(
    ("line", "url"),
    [
        ("replicaof 203.0.113.4 6379", "203.0.113.4:6379"),
        ("  SLAVEOF 2001:db8::1 6379", "[2001:db8::1]:6379"),
        ("sentinel monitor m 203.0.113.4 26379 2", "203.0.113.4:26379"),
    ],
)
def test_valkey_names_whom_it_copies(line: str, url: str) -> None:
    assert [(e.url, e.allowed) for e in endpoints.of_valkey("valkey", f"port 1\n{line}\n", ALLOW)] == [(url, False)]


@pytest.mark.parametrize("text", ["# replicaof 203.0.113.4 6379", "replicaof no one", "bind * -::*", ""])
def test_valkey_without_a_master_names_nobody(text: str) -> None:
    assert endpoints.of_valkey("valkey", text, ALLOW) == []


NGINX = """
http {
    # server 203.0.113.1:80;
    include more/*.conf;
    upstream gateways { zone z 64k; server 172.30.242.11:4001 max_fails=1; server unix:/run/x.sock; }
    map $host $x { default "203.0.113.99"; }
    server {
        listen 8443 ssl default_server;
        server_name example.net;
        access_log syslog:server=203.0.113.3:514,tag=x moat;
        error_log stderr warn;
        ssl_stapling off;
        resolver 203.0.113.4 valid=10s ipv6=off;
        location / { proxy_pass http://gateways; return 200 '{"a":"server 203.0.113.9;"}'; }
        location /b { proxy_pass https://vendor.example/x; }
        location /c { proxy_pass http://$arg_host; }
    }
}
"""


def test_nginx_names_its_servers_and_nothing_else() -> None:
    found = {(e.setting.split(": ")[1], e.url): e.allowed for e in endpoints.of_nginx("nginx", NGINX, ALLOW)}
    assert found == {
        ("server", "172.30.242.11:4001"): True,
        ("access_log", "203.0.113.3:514"): False,
        ("resolver", "203.0.113.4"): False,
        ("proxy_pass", "https://vendor.example:443"): False,
        ("proxy_pass", "an address that cannot be read (http)"): False,
    }


def test_nginx_stapling_asks_somebody_outside() -> None:
    found = endpoints.of_nginx("nginx", "http { ssl_stapling on; }", ALLOW)
    assert [(e.setting, e.allowed) for e in found] == [("nginx: ssl_stapling", False)]


def test_a_broken_nginx_file_is_an_endpoint_that_cannot_be_read() -> None:
    assert [e.allowed for e in endpoints.of_nginx("nginx", "http { a 'never closed", ALLOW)] == [False]


def test_nginx_includes_are_read_below_its_own_root(tmp_path: Path) -> None:
    folder = tmp_path / "etc/nginx"
    (folder / "more").mkdir(parents=True)
    (folder / "nginx.conf").write_text("http { include more/*.conf; include /etc/nginx/up.conf; }")
    (folder / "more/a.conf").write_text("server { location / { proxy_pass http://203.0.113.8; } }")
    (folder / "up.conf").write_text("upstream u { server 203.0.113.9:1; include /etc/nginx/nginx.conf; }")  # a circle
    found = endpoints.of_nginx("n", endpoints.nginx_text(Path("/etc/nginx/nginx.conf"), tmp_path), ALLOW)
    assert {e.url for e in found} == {"http://203.0.113.8:80", "203.0.113.9:1"}


def test_the_facts_of_the_host_hold_no_secret(tmp_path: Path) -> None:
    for path, text in {
        "etc/resolv.conf": "nameserver 10.0.0.2\nsearch site.example\noptions edns0\n",
        "etc/systemd/timesyncd.conf": "[Time]\n#NTP=x\nNTP=ntp.site.example\n",
        "etc/apt/sources.list": "deb http://user:s3cret@mirror.site.example/debian trixie main\n# deb http://no.example\n",
        "etc/chrony/chrony.conf": "pool 2.pool.example iburst\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    facts = endpoints.host_facts(tmp_path)
    assert facts == {
        "name servers of the host": "10.0.0.2",
        "search domains of the host": "site.example",
        "time servers of the host": "ntp.site.example, 2.pool.example",
        "package sources of the host": "mirror.site.example",
    }
    assert endpoints.host_facts(tmp_path / "nowhere")["name servers of the host"] == "none"
