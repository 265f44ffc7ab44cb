# SPDX-License-Identifier: Apache-2.0
"""Proves on a host installed from the medium, without any network, that the site is what the docs say.

Units, sockets, users, permissions, secrets, the packet filter, and a real model's answers through nginx.
"""

from __future__ import annotations

import json
import os
import re

import pytest

#: The scenario debian12 runs these tests, too; Debian 12 has no Valkey.
DEBIAN12 = os.environ["MOLECULE_SCENARIO_NAME"] == "debian12"
COUNTERS = "redis-server.service" if DEBIAN12 else "valkey-server.service"
COUNTERS_USER = "redis" if DEBIAN12 else "valkey"
GATEWAYS = ("moat-gateway@1.service", "moat-gateway@2.service")
SYNC = "moat-config-sync.service"
UNITS = (*GATEWAYS, SYNC, "minio.service", COUNTERS, "nginx.service", "moat-no-egress.service")
USERS = {
    GATEWAYS[0]: "moat-gateway",
    GATEWAYS[1]: "moat-gateway",
    SYNC: "moat-gateway",
    "minio.service": "moat-minio",
    COUNTERS: COUNTERS_USER,
}


@pytest.mark.parametrize("unit", UNITS)
def test_each_unit_runs_and_starts_at_boot(node, unit: str) -> None:
    service = node.host.service(unit)
    assert service.is_running
    assert service.is_enabled
    assert node.show(unit, "NRestarts")["NRestarts"] in ("0", ""), "it has been restarted by systemd since the install"


def test_no_unit_of_the_host_has_failed(node) -> None:
    assert node.ok("systemctl", "--failed", "--no-legend", "--plain") == ""


def test_only_nginx_listens_beyond_loopback(node) -> None:
    # 8081 is the test's own model server, which stands for the site's.
    open_ports = {
        (port, program) for address, port, program in node.listeners() if not address.startswith(("127.", "::1"))
    }
    assert open_ports - {(8081, "python3"), (22, "sshd")} == {(8443, "nginx"), (8080, "nginx")}


def test_the_services_listen_where_the_page_says(node) -> None:
    loopback = {port for address, port, _ in node.listeners() if address.startswith("127.")}
    assert {4001, 4002, 9000, 6379} <= loopback


@pytest.mark.parametrize(("unit", "user"), sorted(USERS.items()))
def test_each_service_has_a_user_of_its_own_that_cannot_log_in(node, unit: str, user: str) -> None:
    assert node.ok("ps", "-o", "user:32=", "-p", str(node.pid(unit))).strip() == user
    account = node.host.user(user)
    assert account.shell in ("/usr/sbin/nologin", "/bin/false")
    assert account.password in ("!", "*", "!*", "!!")


@pytest.mark.parametrize(
    ("path", "mode", "owner", "group"),
    [
        ("/etc/moat/secrets", 0o700, "root", "root"),
        ("/etc/moat/site", 0o700, "root", "root"),
        ("/etc/moat/site/secrets", 0o700, "root", "root"),
        ("/etc/moat/site/pki", 0o700, "root", "root"),
        ("/etc/moat/site/secrets/site_key", 0o600, "root", "root"),
        ("/etc/moat/secrets/gateway", 0o750, "root", "moat-gateway"),
        ("/etc/moat/secrets/gateway/master_key", 0o440, "root", "moat-gateway"),
        ("/etc/moat/secrets/config-sync/store_reader_secret_key", 0o440, "root", "moat-gateway"),
        ("/var/lib/moat/sync", 0o750, "moat-gateway", "moat-gateway"),
        ("/run/moat/reports", 0o750, "moat-gateway", "moat-gateway"),
        ("/etc/moat/config", 0o750, "root", "moat-gateway"),
        ("/etc/moat/config/config.yaml", 0o640, "root", "moat-gateway"),
        ("/etc/moat/config/keys.yaml", 0o640, "root", "moat-gateway"),
        ("/opt/moat/releases", 0o755, "root", "root"),
    ],
)
def test_modes_and_owners(node, path: str, mode: int, owner: str, group: str) -> None:
    file = node.host.file(path)
    assert (oct(file.mode), file.user, file.group) == (oct(mode), owner, group)


def test_no_secret_can_be_read_by_anyone_but_root_and_its_service(node) -> None:
    given = ["-path", "/etc/moat/secrets/gateway/*", "-o", "-path", "/etc/moat/secrets/config-sync/*"]
    mine = ["-user", "root", "-perm"]
    folders = ["/etc/moat/secrets", "/etc/moat/site/secrets"]
    loose = node.ok("find", *folders, "-type", "f", "!", "(", *given, ")", "!", "(", *mine, "600", ")")
    assert loose == ""
    loose = node.ok(
        "find", folders[0], "-type", "f", "(", *given, ")", "!", "(", *mine, "440", "-group", "moat-gateway", ")"
    )
    assert loose == ""
    secrets = node.ok("find", "/etc/moat/secrets", "-type", "f").split()
    assert len(secrets) >= 4, "there is nothing to protect: the check is looking in the wrong place"


@pytest.mark.parametrize("user", ["moat-gateway", "moat-minio", "www-data", COUNTERS_USER, "nobody"])
def test_no_user_of_the_host_comes_to_the_secrets_outside_of_its_service(node, user: str) -> None:
    """Not even the gateways' own user: the way leads through a folder of root's; the units have one of their own."""
    files = node.ok("find", "/etc/moat/secrets", "/etc/moat/site/secrets", "-type", "f").split()
    group = node.ok("id", "--group", user).strip()
    for file in files:
        done = node.run("setpriv", f"--reuid={user}", f"--regid={group}", "--init-groups", "cat", file)
        assert (done.returncode, done.stdout) == (1, ""), file
        assert "Permission denied" in done.stderr
    # The control: root reads each.
    assert all(node.ok("cat", file) for file in files)


def test_nothing_of_the_release_can_be_changed_by_a_service(node) -> None:
    loose = node.ok("find", "/opt/moat", "!", "-type", "l", "(", "!", "-user", "root", "-o", "-perm", "/022", ")")
    assert loose == ""


def _secret_values(node) -> list[str]:
    """Return the values of the site's secrets (they never leave this process: no assert shows them)."""
    files = node.ok("find", "/etc/moat/site/secrets", "-type", "f").split()
    values = [node.ok("cat", f).strip() for f in files]
    return [v for v in values if len(v) >= 16]


def test_no_secret_shows_in_a_process_list_an_environment_or_a_log(node) -> None:
    values = _secret_values(node)
    assert len(values) >= 4
    values = [line for v in values for line in v.splitlines() if not line.startswith("untrusted comment:")]
    places = {
        "command lines": "cat /proc/[0-9]*/cmdline | tr '\\0' ' '",
        "environments of the services": f"for u in moat-gateway@1 moat-config-sync minio {COUNTERS} nginx; do "
        "cat /proc/$(systemctl show --property=MainPID --value $u)/environ; done | tr '\\0' '\\n'",
        "journal": "journalctl --no-pager --output=cat",
        "logs": "find /var/log -type f ! -name '*.journal' -exec cat {} +",
        "unit files": "cat /etc/systemd/system/*.service /etc/systemd/system/*.d/*",
    }
    leaks = []
    for what, command in places.items():
        text = node.ok("sh", "-c", command)
        assert len(text) > 50 or what == "logs", f"nothing was read for {what}"
        leaks += [what for v in values if v in text]
    assert leaks == []


def test_credentials_are_given_to_the_service_alone(node) -> None:
    for unit in ("minio.service", COUNTERS):
        user, folder = USERS[unit], f"/run/credentials/{unit}"
        listing = node.ok("find", folder, "-type", "f", "-printf", "%m %u %f\\n").splitlines()
        assert listing, f"{unit} was given no credential"
        for line in listing:
            mode, owner, _ = line.split()
            assert mode in ("400", "440"), line
            assert owner in (user, "root"), line


def test_the_packet_filter_drops_by_default(node) -> None:
    document = json.loads(node.ok("nft", "-j", "list", "table", "inet", "moat_egress"))
    chains = {i["chain"]["hook"]: i["chain"] for i in document["nftables"] if i.get("chain", {}).get("hook")}
    for hook in ("output", "forward"):
        assert chains[hook]["policy"] == "drop", hook
    counters = [i["counter"]["name"] for i in document["nftables"] if "counter" in i]
    assert counters, "no named counter: nobody could see what was refused"


def test_a_chat_completion_comes_through_nginx(node, client_key: str) -> None:
    answer = node.chat(client_key)
    assert answer.status == 200
    assert len(answer.text.split()) >= 3
    assert answer.request_id


def test_a_stream_comes_in_pieces_and_ends_with_done(node, client_key: str) -> None:
    answer = node.chat(client_key, stream=True, prompt="Count from one to ten in words.", max_tokens=40)
    assert answer.status == 200
    assert answer.done
    assert answer.chunks >= 8


def test_a_wrong_key_is_refused(node) -> None:
    node.ok("sh", "-c", "umask 077; printf 'sk-moat-%032d' 7 > /run/wrong.key")
    assert node.chat("/run/wrong.key").status == 401


def test_both_gateways_say_that_they_are_ready(node) -> None:
    for n in ("1", "2"):
        status = json.loads(node.ok("moat-gateway", f"@{n}", "status", "--json"))
        assert status, f"gateway {n} says nothing"


def test_the_operators_own_things_are_still_there(node) -> None:
    assert node.ok("cat", "/etc/apt/sources.list") == "# the host own sources: none\n"
    assert node.host.service("test-model").is_running
    assert node.host.package("nano").is_installed


def test_the_record_of_what_is_installed_names_the_release_that_runs(node) -> None:
    current = node.ok("readlink", "/opt/moat/current").strip()
    assert re.fullmatch(r"(/opt/moat/)?releases/[0-9.]+-[0-9a-f]{12}", current)
    record = json.loads(node.ok("cat", "/var/lib/moat/installed.json"))
    assert record["version"] == current.rpartition("/")[2].partition("-")[0]


def test_evidence_of_the_install_is_kept(node) -> None:
    files = node.ok("find", "/var/lib/moat/evidence", "-type", "f").split()
    assert files, "no evidence was written"
    assert node.ok("find", "/var/lib/moat/evidence", "-perm", "/002") == ""
