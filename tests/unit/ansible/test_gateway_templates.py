# SPDX-License-Identifier: Apache-2.0
"""Proves that the templates of the gateways and of nginx fit the gateway's settings, each other and Compose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.plugins.filter.core import to_bool
from jinja2 import Environment, StrictUndefined

from moat.site.egresscheck import lookups
from moat_gateway import errors, serve, settings

ROOT = Path(__file__).resolve().parents[3]
ROLES = ROOT / "ansible" / "roles"
SHARED = ROOT / "compose" / "nginx"


def role(name: str, part: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROLES / name / part / "main.yml").read_text("utf-8")))


GATEWAY, NGINX, SYNC = (role(name, "defaults") for name in ("gateway", "nginx", "config_sync"))


def render(name: str, template: str, **values: Any) -> str:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, autoescape=False)  # noqa: S701
    environment.filters["bool"] = to_bool
    environment.filters["basename"] = lambda path: path.rsplit("/", 1)[1]
    environment.filters["moat_egress_gateway_allow"] = lambda entries: [f"{e['address']}:{e['port']}" for e in entries]
    environment.filters["regex_replace"] = lambda text, a, b: re.sub(a, b, text)
    environment.filters["from_json"] = lambda value: value
    text = (ROLES / name / "templates" / template).read_text("utf-8")
    shared = {
        "moat_root": "/opt/moat",
        "moat_site_dir": "/etc/moat/site",
        "moat_egress_allow": [],
        "ansible_managed": "",
    }
    return environment.from_string(text).render({**shared, **GATEWAY, **NGINX, **SYNC, **values})


def unit(**values: Any) -> dict[str, list[str]]:
    return parsed(render("gateway", "moat-gateway@.service.j2", **{"_gateway_peers": ["192.0.2.11"], **values}))


def sidecar(**values: Any) -> dict[str, list[str]]:
    given = {"_config_sync_peers": [], "config_sync_source_dir": "", **values}
    return parsed(render("config_sync", "moat-config-sync.service.j2", **given))


def parsed(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.match(r"[A-Za-z]+=", line):
            found.setdefault(line.split("=", 1)[0], []).append(line.split("=", 1)[1])
    return found


def test_every_default_has_its_setting_and_the_gateway_knows_every_variable() -> None:
    text = render("gateway", "common.env.j2", gateway_listen_address="127.0.0.1", gateway_settings={"keys_poll": 2})
    text += "\n".join(unit()["Environment"]).replace(" ", "\n")
    names = set(re.findall(r"^(MOAT_\w+)=", text, re.MULTILINE))
    known = {s.env for s in settings.SETTINGS} | {settings.SETTINGS_FILE_VARIABLE}
    assert names <= known
    assert {"MOAT_KEYS_POLL", "MOAT_EGRESS_ALLOW", "MOAT_SECRETS_DIR", "MOAT_ADMIN_SOCKET"} <= names


def test_settings_that_the_role_fixes_are_settings() -> None:
    assert set(role("gateway", "vars")["_gateway_own_settings"]) <= {s.name for s in settings.SETTINGS}


@pytest.mark.parametrize(("delay", "timeout"), [(1, 60), (0.5, 600), (10, 3600)])
def test_systemd_waits_longer_than_the_gateway_gives_its_streams(delay: float, timeout: float) -> None:
    (stop,) = unit(gateway_shutdown_delay=delay, gateway_shutdown_timeout=timeout)["TimeoutStopSec"]
    assert int(stop) >= delay + timeout + 10


def test_a_refused_configuration_is_not_started_again_and_again() -> None:
    prevented = {int(x) for x in unit()["RestartPreventExitStatus"][0].split()}
    refusals = {c.exit_code for c in errors.all_kinds() if 3 <= c.exit_code <= 14}
    assert refusals - prevented == {errors.CannotListen.exit_code}


def test_a_restart_in_its_turn_is_no_failure_and_happens_at_once() -> None:
    made = unit()
    assert made["SuccessExitStatus"] == made["RestartForceExitStatus"] == [str(serve.RESTART_EXIT)]


def test_of_all_secrets_each_unit_gets_its_own_folders_alone() -> None:
    for made, folders in ((unit(), "gateway"), (sidecar(), "gateway config-sync")):
        assert made["TemporaryFileSystem"] == ["/etc/moat/secrets:ro"]
        assert made["BindReadOnlyPaths"] == [" ".join(f"/etc/moat/secrets/{f}" for f in folders.split())]
        assert "LoadCredential" not in made


def test_config_sync_ends_for_good_where_another_start_would_end_the_same_way() -> None:
    prevented = {int(x) for x in sidecar()["RestartPreventExitStatus"][0].split()}
    assert prevented == {2, errors.BadSetting.exit_code, errors.SyncFolderFailed.exit_code}


def test_config_sync_reaches_the_store_alone() -> None:
    made = sidecar(_config_sync_peers=["192.0.2.13"])
    assert (made["IPAddressDeny"], made["IPAddressAllow"]) == (["any"], ["localhost 192.0.2.13"])
    assert sidecar()["IPAddressAllow"] == ["localhost"]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("gateway", "moat-gateway@.service.j2"),
        ("config_sync", "moat-config-sync.service.j2"),
        ("minio", "minio.service.j2"),
        ("nginx", "nginx.service.j2"),
        ("valkey", "unit.conf.j2"),
    ],
)
def test_no_service_reaches_a_program_that_looks_up_names_and_each_can_tell_that_it_is_ready(
    name: str, template: str
) -> None:
    text = (ROLES / name / "templates" / template).read_text("utf-8")
    hidden = {word for line in re.findall(r"^InaccessiblePaths=(.*)$", text, re.MULTILINE) for word in line.split()}
    assert {f"-{path}" for path in lookups.SOCKETS} <= hidden, "with - in front: most hosts have none of them"
    # What they need: the notification, the journal, and the addresses of name servers where resolved keeps them.
    for needed in ("/run", "/run/systemd", "/run/systemd/notify", "/run/systemd/journal", "/run/systemd/resolve"):
        assert not {needed, f"-{needed}"} & hidden


def test_a_source_on_a_drive_is_not_hidden_from_config_sync() -> None:
    hidden = {p for p in sidecar()["InaccessiblePaths"][0].split() if p in ("-/boot", "-/media", "-/mnt")}
    assert hidden == {"-/boot", "-/media", "-/mnt"}
    assert "-/media" not in sidecar(config_sync_source_dir="/media/stick/moat")["InaccessiblePaths"][0].split()


def test_config_sync_knows_every_variable_of_its_settings() -> None:
    values = {
        "_config_sync_endpoint": "https:" + "//192.0.2.13:9000",
        "_config_sync_here": True,
        "config_sync_node": "n",
    }
    known = {s.env for s in settings.SETTINGS}
    for template in ("config-sync.env.j2", "publish.env.j2"):
        text = render("config_sync", template, **values, config_sync_source_dir="/srv/revisions")
        names = set(re.findall(r"^(\w+)=", text, re.MULTILINE))
        assert names <= known
        assert {"MOAT_STORE_ENDPOINT", "MOAT_SOURCE_DIR", "MOAT_STORE_BUCKET"} <= names


def test_the_network_is_closed_but_for_the_peers() -> None:
    made = unit()
    assert (made["IPAddressDeny"], made["IPAddressAllow"]) == (["any"], ["localhost 192.0.2.11"])
    assert unit(_gateway_peers=[])["IPAddressAllow"] == ["localhost"]


def test_both_packagings_of_nginx_share_every_file_but_three() -> None:
    shared = set(role("nginx", "vars")["_nginx_shared"])
    assert shared == {p.name for p in SHARED.iterdir()} - {"nginx.conf", "site.conf", "upstream.conf"}
    template = (ROLES / "nginx/templates/nginx.conf.j2").read_text("utf-8")
    for text in (template, (SHARED / "nginx.conf").read_text("utf-8")):
        names = set(re.findall(r"^\s*include (\w+\.conf);", text, re.MULTILINE))
        assert names | {"proxy.conf", "again.conf", "once.conf"} == shared | {"site.conf", "upstream.conf"}


def test_a_member_is_asked_again_before_the_next_gateway_is_restarted() -> None:
    # nginx counts whole seconds and leaves a member alone for one second more than it says.
    assert GATEWAY["gateway_settle"] >= NGINX["nginx_fail_timeout"] + 2
    assert GATEWAY["gateway_keepalive_timeout"] > 60


def test_a_drained_member_and_one_of_another_host_are_written_as_such() -> None:
    members = [
        {"name": "a/1", "address": "127.0.0.1:4001", "here": True, "down": False},
        {"name": "b/1", "address": "192.0.2.12:4001", "here": False, "down": True},
    ]
    lines = re.findall(r"^    server .*$", render("nginx", "upstream.conf.j2", _nginx_members=members), re.MULTILINE)
    assert lines == [
        "    server 127.0.0.1:4001 max_fails=0; # a/1",
        "    server 192.0.2.12:4001 max_fails=1 fail_timeout=2s down; # b/1",
    ]


def test_only_low_ports_bring_a_capability() -> None:
    assert "CAP_" not in render("nginx", "nginx.service.j2")
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in render("nginx", "nginx.service.j2", nginx_https_port=443)
