# SPDX-License-Identifier: Apache-2.0
"""Proves on compose.yaml itself that no service is left out of the hardening, whatever is added to it later.

What the engine makes of it is proved on the running containers (tests/acceptance). Here every service is looked at, and
a file with the hardening taken out is shown to be noticed.
"""

from __future__ import annotations

import copy
import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moat.site import deployment, firewall, layout
from moat.site.checks import SUBNETS

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "compose/compose.yaml").read_text("utf-8")
DOCUMENT: dict[str, Any] = yaml.safe_load(TEXT)
#: From docs/architecture.md, section 6.
USERS = {
    "nginx": deployment.NGINX, "gateway-1": deployment.GATEWAY, "gateway-2": deployment.GATEWAY,
    "minio": deployment.MINIO, "minio-init": deployment.GATEWAY, "valkey": deployment.VALKEY, "model": 10105,
    "config-sync": deployment.GATEWAY, "client": deployment.GATEWAY, "admin": deployment.GATEWAY,
}  # fmt: skip


def problems(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with the hardening, one line a service and rule."""
    found = []

    def rule(ok: bool, service: str, words: str) -> None:
        if not ok:
            found.append(f"{service}: {words}")

    for name, s in document["services"].items():
        rule(s.get("pull_policy") == "never", name, "may be pulled")
        rule(s.get("read_only") is True, name, "root file system is writable")
        rule(s.get("cap_drop") == ["ALL"] and "cap_add" not in s, name, "has capabilities")
        rule(s.get("security_opt") == ["no-new-privileges:true"], name, "may gain privileges")
        rule(s.get("user") == f"{USERS.get(name)}:{USERS.get(name)}", name, "runs as another user")
        rule("privileged" not in s and "devices" not in s and s.get("pid") is None, name, "shares with the host")
        rule(s.get("network_mode") in (None, "none"), name, "uses a network mode")
        for limit in ("mem_limit", "memswap_limit", "pids_limit", "cpus"):
            rule(limit in s, name, f"has no {limit}")
        rule(s.get("mem_limit") == s.get("memswap_limit"), name, "may swap")
        rule(s["image"].startswith("${MOAT_IMAGE_"), name, "has an image that is not from the manifest")
        rule(s.get("logging", {}).get("options", {}).get("max-size") is not None, name, "logs without a limit")
        rule(s.get("ulimits", {}).get("core") == 0, name, "may dump core")
        rule(s.get("dns") == ["0.0.0.0"], name, "asks the host's name servers")  # noqa: S104 - compared, not bound
        rule("ports" not in s or name == "nginx", name, "publishes a port")
        for volume in s.get("volumes", []):
            writable = volume["type"] == "bind" and volume.get("read_only") is not True
            rule(not writable or (name, volume["source"]) == ("admin", "./config"), name, "has a writable host folder")
            rule(volume["type"] != "bind" or volume["source"].startswith("./"), name, "mounts from outside the folder")
            rule(volume["source"] != "./secrets/admin" or name == "admin", name, "has the secret site key")
            kept = volume["source"] != "sync" or name == "config-sync" or volume.get("read_only") is True
            rule(kept, name, "may write revisions")
        for mount in s.get("tmpfs", []):
            rule(all(w in mount for w in ("size=", "nosuid", "nodev", "noexec")), name, f"tmpfs {mount} is too free")
        secret = re.search(
            r"(?i)(password|secret|master_key|token)\s*[:=]\s*[^/\s]", yaml.safe_dump(s.get("environment"))
        )
        rule(secret is None, name, "has a secret in its environment")
        one_shot = s.get("restart") == "no"
        rule(one_shot or s.get("healthcheck", {}).get("test", [""])[0] == "CMD", name, "has no exec-form health check")
        rule(one_shot or s.get("restart") == "unless-stopped", name, "is not restarted")
    return found


def test_every_service_is_hardened() -> None:
    assert problems(DOCUMENT) == []
    assert set(DOCUMENT["services"]) == set(USERS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pull_policy", "missing"), ("read_only", False), ("cap_drop", []), ("cap_add", ["NET_ADMIN"]), ("user", "0:0"),
        ("security_opt", []), ("privileged", True), ("mem_limit", "2g"), ("ports", ["1:1"]), ("dns", None),
        ("network_mode", "host"), ("environment", {"PASSWORD": "x"}), ("healthcheck", {"test": ["CMD-SHELL", "x"]}),
        ("tmpfs", ["/tmp"]), ("volumes", [{"type": "bind", "source": "/", "target": "/h", "read_only": True}]),
        ("volumes", [{"type": "bind", "source": "./config", "target": "/h"}]), ("logging", {}), ("restart", "always"),
        ("volumes", [{"type": "bind", "source": "./secrets/admin", "target": "/h", "read_only": True}]),
        ("volumes", [{"type": "volume", "source": "sync", "target": "/h"}]),
    ],
)  # fmt: skip
def test_the_rules_notice_what_is_taken_away(key: str, value: object) -> None:
    planted = copy.deepcopy(DOCUMENT)
    planted["services"]["valkey"][key] = value
    assert len(problems(planted)) >= 1


def test_networks_are_those_that_the_firewall_and_doctor_know() -> None:
    found = {n["name"]: n for n in DOCUMENT["networks"].values()}
    assert set(found) == set(firewall.BRIDGES) == set(SUBNETS)
    for name, network in found.items():
        assert network["driver_opts"]["com.docker.network.bridge.name"] == name
        assert [c["subnet"] for c in network["ipam"]["config"]] == [SUBNETS[name]]
        assert network["enable_ipv6"] is False
    assert found["moat-core"]["internal"] is True
    assert found["moat-edge"]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    on_edge = {name for name, s in DOCUMENT["services"].items() if "edge" in s.get("networks", ())}
    assert on_edge == {"nginx", "client"}


def test_fixed_addresses_are_outside_of_the_range_that_docker_gives_away() -> None:
    for key, network in DOCUMENT["networks"].items():
        config = network["ipam"]["config"][0]
        free = ipaddress.ip_network(config["ip_range"])
        for name, s in DOCUMENT["services"].items():
            address = s["networks"].get(key, {}).get("ipv4_address") if isinstance(s.get("networks"), dict) else None
            if address is not None:
                assert ipaddress.ip_address(address) in ipaddress.ip_network(config["subnet"]), name
                assert ipaddress.ip_address(address) not in free, name


def test_gateways_start_without_the_store_and_without_config_sync() -> None:
    services = DOCUMENT["services"]
    for name in ("gateway-1", "gateway-2"):
        assert set(services[name]["depends_on"]) == {"valkey"}
    assert set(services["nginx"]["depends_on"]) == {"gateway-1", "gateway-2"}
    assert set(services["config-sync"]["depends_on"]) == {"minio-init"}


def test_every_program_of_a_node_means_the_same_folders() -> None:
    services = DOCUMENT["services"]
    names = ("MOAT_SYNC_DIR", "MOAT_REPORTS_DIR", "MOAT_SITE_KEYS_DIR")
    for service in ("gateway-1", "gateway-2", "config-sync", "admin"):
        environment, targets = services[service]["environment"], {v["target"] for v in services[service]["volumes"]}
        for name in names:
            assert environment[name] == services["config-sync"]["environment"][name]
            assert environment[name] in targets, (service, name)
    sockets = {services[f"gateway-{n}"]["environment"]["MOAT_ADMIN_SOCKET"] for n in (1, 2)}
    assert sockets == {"/run/moat/gateway-1.sock", "/run/moat/gateway-2.sock"}


def test_volumes_in_memory_are_as_closed_as_the_other_file_systems_in_memory() -> None:
    in_memory = {k: v["driver_opts"]["o"] for k, v in DOCUMENT["volumes"].items() if "driver_opts" in v}
    assert set(in_memory) == {"reports", "sockets"}
    for name, options in in_memory.items():
        for word in ("size=", "mode=0750", "uid=10102", "gid=10102", "nosuid", "nodev", "noexec"):
            assert word in options, (name, word)


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_docker_waits_longer_than_the_gateways_drain() -> None:
    for name in ("gateway-1", "gateway-2", "nginx"):
        environment = DOCUMENT["services"]["gateway-1"]["environment"]
        drain = int(environment["MOAT_SHUTDOWN_DELAY"]) + int(environment["MOAT_SHUTDOWN_TIMEOUT"])
        assert seconds(DOCUMENT["services"][name]["stop_grace_period"]) > drain + 5


def test_nginx_names_the_gateways_that_there_are() -> None:
    upstream = (ROOT / "compose/nginx/upstream.conf").read_text("utf-8")
    wanted = {
        f"{s['networks']['core']['ipv4_address']}:{s['environment']['MOAT_PORT']}"
        for name, s in DOCUMENT["services"].items()
        if re.fullmatch(r"gateway-\d", name)
    }
    assert set(re.findall(r"^\s*server (\S+) ", upstream, re.MULTILINE)) == wanted
    idle = re.search(r"keepalive_timeout (\d+)s;", upstream)
    assert idle is not None
    assert int(idle[1]) < int(DOCUMENT["services"]["gateway-1"]["environment"]["MOAT_KEEPALIVE_TIMEOUT"])


def test_every_file_that_prepare_needs_is_here_and_every_variable_is_written() -> None:
    there = {p.relative_to(ROOT / "compose").as_posix() for p in (ROOT / "compose").rglob("*")} | {layout.PYZ}
    assert there >= layout.NEEDED
    asked = set(re.findall(r"\$\{(MOAT_\w+)", TEXT))
    source = (ROOT / "scripts/moat/site/layout.py").read_text("utf-8")
    written = set(re.findall(r"(MOAT_\w+)=", source)) | {f"MOAT_IMAGE_{n.upper()}" for n in layout.images_of("demo")}
    assert asked <= written


def test_the_demo_configuration_names_containers_only() -> None:
    for name in ("demo.yaml", "site.yaml"):
        text = (ROOT / "compose/config" / name).read_text("utf-8")
        for host in re.findall(r"^[^#]*?//([^:/\s]+)", text, re.MULTILINE):
            assert host in DOCUMENT["services"]
    demo = yaml.safe_load((ROOT / "compose/config/demo.yaml").read_text("utf-8"))
    allowed = yaml.safe_load((ROOT / "compose/config/demo.gateway.yaml").read_text("utf-8"))["egress_allow"]
    for model in demo["model_list"]:
        assert re.sub(r"^\w+://|/.*$", "", model["litellm_params"]["api_base"]) in allowed
