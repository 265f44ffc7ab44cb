# SPDX-License-Identifier: Apache-2.0
"""Proves what expressions of the playbooks and roles come to, evaluated by Ansible's own template engine.

Where the entrance is asked, when a drain ends, and that a value which arrives as text (quoted in vars.yml, or given
with ``-e`` to ansible-playbook itself) counts as the number or truth value that it says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.utils.collection_loader import AnsibleCollectionConfig

ANSIBLE = Path(__file__).resolve().parents[3] / "ansible"


def load(path: str) -> Any:
    return yaml.safe_load((ANSIBLE / path).read_text("utf-8"))


def task(plays_or_tasks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the task of that name from a playbook or a role's list of tasks."""
    tasks = [t for p in plays_or_tasks for t in p.get("tasks", [p])]
    (found,) = [t for t in tasks if t.get("name") == name]
    return found


def trusted(value: Any) -> Any:
    """Mark the strings of a file of the repository as templates, as Ansible's own loader does."""
    if isinstance(value, dict):
        return {k: trusted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [trusted(v) for v in value]
    return trust_as_template(value) if isinstance(value, str) else value


def engine(**variables: Any) -> Templar:
    return Templar(loader=DataLoader(), variables=variables)


def holds(condition: str, **variables: Any) -> bool:
    return bool(engine(**variables).evaluate_conditional(trust_as_template(condition)))


def rendered(template: str, **variables: Any) -> str:
    text = (ANSIBLE / "roles" / template).read_text("utf-8")
    return str(engine(**variables).template(trust_as_template(text)))


def role(name: str) -> dict[str, Any]:
    return dict(trusted(load(f"roles/{name}/defaults/main.yml")))


@pytest.fixture(scope="module")
def lookups() -> None:
    """Have Ansible find its lookups, as its command does at the start; once a process."""
    if not AnsibleCollectionConfig.collection_finder:
        init_plugin_loader()


# --- verify.yml ---


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, "127.0.0.1:8443"),
        ({"nginx_listen_addresses": ["0.0.0.0", "[::]"]}, "127.0.0.1:8443"),  # noqa: S104
        ({"nginx_listen_addresses": ["[::]"], "nginx_https_port": 443}, "[::1]:443"),
        ({"nginx_listen_addresses": ["192.0.2.80", "127.0.0.1"]}, "192.0.2.80:8443"),
        ({"nginx_listen_addresses": ["[2001:db8::80]"]}, "[2001:db8::80]:8443"),
    ],
    ids=str,
)
def test_the_entrance_is_asked_where_nginx_listens(given: dict[str, Any], asked: str) -> None:
    plays = load("verify.yml")
    argument = trusted(task(plays, "Ask units, ports, gateways and the entrance")["moat_probe"]["entrance"])
    variables = {**trusted(plays[0]["vars"]), "group_names": ["moat_edge"], **given}
    assert engine(**variables).template(argument) == asked


# --- drain.yml ---


@pytest.mark.parametrize(
    ("code", "stdout", "ended", "failed"),
    [
        (0, '{"in_flight": 0}', True, False),
        (0, '{"in_flight": 3}', False, False),
        (15, "", True, False),
        # It is too busy to answer in time: that is not idle.
        (28, '{"ok": false, "exit": 28}', False, True),
        (12, "", True, True),
        (1, "Traceback", True, True),
    ],
)
@pytest.mark.parametrize(
    ("playbook", "name"),
    [("drain", "Wait for running requests and streams"), ("scale", "Wait until those that go are idle")],
)
def test_a_gateway_is_idle_when_it_says_so_or_does_not_run(
    code: int, stdout: str, ended: bool, failed: bool, playbook: str, name: str
) -> None:
    wait = task(load(f"{playbook}.yml"), name)
    status = {wait["register"]: {"rc": code, "stdout": stdout}}
    assert holds(wait["until"], **status) is ended
    assert holds(wait["failed_when"], **status) is failed


def test_new_secrets_are_waited_for_at_a_gateway_that_is_too_busy_to_answer() -> None:
    wait = task(load("rotate_secrets.yml"), "Wait until every gateway says that it has taken them")
    assert not holds(wait["until"], __rotate_status={"rc": 28, "stdout": "{}"})
    assert holds(wait["until"], __rotate_status={"rc": 15, "stdout": ""})


@pytest.mark.parametrize(
    ("given", "known", "refused", "state"),
    [
        ({"drain_out": "2"}, [], None, ["a/2"]),
        ({"drain_out": "a/2"}, ["a/3"], None, ["a/2", "a/3"]),
        ({"drain_back": "a/2, a/3"}, ["a/2", "a/3"], None, []),
        # Two gateways, both out: everything that follows would be refused by nginx's role, also the next `site`.
        ({"drain_out": "1,2"}, [], "nobody", None),
        ({"drain_out": "1"}, ["a/2"], "nobody", None),
        ({"drain_out": 3}, [], "names", None),
        ({"drain_out": "a/02"}, [], "names", None),
        ({"drain_out": "b/1"}, [], "names", None),
        ({"drain_back": "a/3"}, [], "names", None),
        ({"drain_out": "1", "drain_back": "1"}, [], "names", None),
        ({}, [], "names", None),
    ],
    ids=str,
)
def test_a_drain_knows_the_gateways_that_there_are(
    given: dict[str, Any], known: list[str], refused: str | None, state: list[str] | None, tmp_path: Path, lookups: None
) -> None:
    plays = load("drain.yml")
    (tmp_path / "drained.json").write_text(json.dumps(known))
    variables = {
        **trusted(plays[0]["vars"]), **given, "moat_site_dir": str(tmp_path), "playbook_dir": str(ANSIBLE),
        "groups": {"moat_gateways": ["a"]}, "hostvars": {"a": {}},
    }  # fmt: skip
    conditions = {
        "names": task(plays, "Refuse names that cannot be meant")["ansible.builtin.assert"]["that"],
        "nobody": [task(plays, "Refuse to leave nobody who serves")["ansible.builtin.assert"]["that"]],
    }
    wrong = [n for n, that in conditions.items() if not all(holds(c, **variables) for c in that)]
    assert wrong[:1] == ([refused] if refused else [])
    if state is not None:
        assert engine(**variables).template(trust_as_template("{{ _drain_state }}")) == state


@pytest.mark.parametrize("playbook", ["drain", "scale"])
def test_what_later_runs_put_in_force_is_kept_when_it_is_in_force(playbook: str) -> None:
    """Else a value that is refused on the way would stop every run after this one."""
    plays = load(f"{playbook}.yml")
    modules = ("ansible.builtin.copy", "moat_site_vars", "ansible.builtin.lineinfile")
    (kept,) = [i for i, p in enumerate(plays) if any(m in t for t in p.get("tasks", []) for m in modules)]
    nginx = [i for i, p in enumerate(plays) if p["hosts"] == "moat_edge"]
    assert max(nginx) < kept


@pytest.mark.parametrize(
    ("count", "right"),
    [(1, True), (64, True), ("3", True), (0, False), (65, False), (-1, False), ("abc", False), ("2.5", False),
     (True, False), ("", False), (100, False)],
)  # fmt: skip
def test_a_number_of_gateways_is_checked_before_anything_is_done(count: Any, right: bool) -> None:
    plays = load("scale.yml")
    first = plays[0]["tasks"][0]["ansible.builtin.assert"]["that"]
    assert all(holds(c, gateway_count=count) for c in first) is right
    assert not holds(first[0])


# --- the control host ---


@pytest.mark.parametrize(
    ("local", "more", "passes"),
    [
        ("node1", {}, True),
        ("", {}, False),
        # The store's host alone: it has no program that publishes.
        ("node3", {}, False),
        ("", {"config_sync_publish": "never"}, True),
        ("", {"config_sync_publish": "always"}, False),
    ],
)
def test_a_control_host_that_could_not_publish_is_refused(local: str, more: dict[str, Any], passes: bool) -> None:
    names = ("node1", "node2", "node3")
    hostvars = {n: {"inventory_hostname": n, **({"ansible_connection": "local"} if n == local else {})} for n in names}
    groups = {"moat_gateways": ["node1", "node2"], "moat_store": ["node3"]}
    steps = load("roles/preflight/tasks/main.yml")
    refusal = task(steps, "Refuse a control host that could not publish the site's configuration")
    variables = {**trusted(load("roles/preflight/vars/main.yml")), "groups": groups, "hostvars": hostvars, **more}
    assert holds(refusal["ansible.builtin.assert"]["that"], **variables) is passes
    said = engine(**variables).template(trusted(refusal["ansible.builtin.assert"]["fail_msg"]))
    assert "expected the control host among node1 node2. Do: run install.sh on one of these" in said


@pytest.mark.parametrize("name", ["example-multinode", "localhost"])
def test_the_inventories_on_the_medium_have_a_control_host_that_publishes(name: str) -> None:
    everything = load(f"inventory/{name}.yml")["all"]
    gateways = everything["children"]["moat_gateways"]["hosts"]
    assert [h for h in gateways if (everything["hosts"][h] or {}).get("ansible_connection") == "local"]


# --- what a run that was cut left undone ---


def cut_short(role_name: str, tasks: str, noted: dict[str, Any], now: dict[str, Any], rc: int = 0) -> tuple[str, bool]:
    """Return how a service is started where ``noted`` was found then, and whether it is given its certificate anew."""
    variables = trusted(load(f"roles/{role_name}/vars/main.yml"))
    short = {"minio": "_minio_state | join('\n')", "valkey": "_valkey_state"}[role_name]
    text = str(engine(**variables, **noted).template(trust_as_template("{{ " + short + " }}"))) if noted else ""
    known = {
        f"__{role_name}_noted": {"stdout": text, "stdout_lines": text.splitlines()},
        f"__{role_name}_credentials": {"rc": rc},
        f"__{role_name}_started": {"changed": False},
    }
    steps = load(f"roles/{role_name}/tasks/{tasks}.yml")
    start = task(steps, {"minio": "Start the store", "valkey": "Start the counters"}[role_name])
    values = {**variables, **known, **now}
    state = engine(**values).template(trusted(start["ansible.builtin.systemd_service"]["state"]))
    reload = [t["when"] for t in steps if t["name"] == "Give the running store its new certificate"]
    return str(state), bool(reload) and holds(reload[0], **values)


def store(link: str = "releases/a", unit: str = "1  unit", pair: str = "2  public.crt") -> dict[str, Any]:
    return {"__minio_link": {"stdout": link}, "__minio_sums": {"results": [{"stdout": unit}, {"stdout": pair}]}}


def test_the_store_is_given_what_a_run_that_was_cut_had_placed() -> None:
    def asked(noted: dict[str, Any], now: dict[str, Any], rc: int = 0) -> tuple[str, bool]:
        return cut_short("minio", "configure", noted, now, rc)

    assert asked(store(), store()) == ("started", False)
    assert asked(store(), store(link="releases/b"))[0] == "restarted"
    assert asked(store(), store(unit="3  unit"))[0] == "restarted"
    assert asked(store(), store(pair="4  public.crt")) == ("started", True)
    assert asked(store(), store(), rc=1)[0] == "restarted"
    # Nothing was noted: the first start, or a release from before the note.
    assert asked({}, store())[0] == "restarted"


def test_the_counters_are_given_what_a_run_that_was_cut_had_placed() -> None:
    one, other = ({"__valkey_sums": {"stdout": f"{n}  valkey.conf\n{n}  moat.conf"}} for n in "12")
    assert cut_short("valkey", "main", one, one)[0] == "started"
    assert cut_short("valkey", "main", one, other)[0] == "restarted"
    assert cut_short("valkey", "main", one, one, rc=1)[0] == "restarted"
    assert cut_short("valkey", "main", {}, one)[0] == "restarted"


# --- values that arrive as text ---


def test_text_is_compared_as_the_number_that_it_says() -> None:
    nginx = task(load("roles/nginx/tasks/main.yml"), "Refuse values that cannot work")["ansible.builtin.assert"]["that"]
    assert not holds(nginx[0], nginx_https_port="8443", nginx_http_port=8443)
    assert holds(nginx[0], nginx_https_port="8443", nginx_http_port=8080)
    base = task(load("roles/base/tasks/main.yml"), "Check the variables of the base")["ansible.builtin.assert"]["that"]
    assert holds(base[1], base_certificate_renew_days="30", base_certificate_days="200")
    assert not holds(base[1], base_certificate_renew_days="300", base_certificate_days=90)
    counters = load("roles/valkey/tasks/main.yml")
    valkey = task(counters, "Check the variables of the counters")["ansible.builtin.assert"]["that"]
    assert holds(valkey[0], valkey_memory="64")
    assert not holds(valkey[0], valkey_memory="8")


def test_text_is_reckoned_with_as_the_number_that_it_says() -> None:
    for wait in ("Wait for a control connection", "Wait for a control connection under the new rules"):
        argument = task(load("roles/no_egress/tasks/confirm.yml"), wait)["ansible.builtin.wait_for_connection"]
        assert engine(no_egress_rollback_seconds="20").template(trusted(argument["timeout"])) == 80
    minio = rendered_lines("minio/templates/minio.service.j2", "GOMEMLIMIT", minio_memory_max="1000")
    assert minio == ["Environment=GOMEMLIMIT=800MiB"]
    valkey = rendered_lines("valkey/templates/unit.conf.j2", "MemoryMax", valkey_memory="64")
    assert valkey == ["MemoryMax=128M"]


def rendered_lines(template: str, word: str, **variables: Any) -> list[str]:
    """Render only the lines of a template that hold a word."""
    text = "\n".join(n for n in (ANSIBLE / "roles" / template).read_text("utf-8").splitlines() if word in n)
    return str(engine(**variables).template(trust_as_template(text))).splitlines()


@pytest.mark.parametrize(("given", "said"), [("false", "no"), (False, "no"), ("true", "yes"), (True, "yes")])
def test_text_that_says_false_is_false(given: Any, said: str) -> None:
    name = "gateway/templates/moat-gateway@.service.j2"
    lines = rendered_lines(name, "MemoryDenyWriteExecute", gateway_memory_deny_write_execute=given)
    assert lines == [f"MemoryDenyWriteExecute={said}"]
    for part in ("Collect the evidence if anything has changed", "Name what must not be so"):
        condition = task(load("roles/evidence/tasks/main.yml"), part)["when"]
        assert holds(condition, evidence_enabled=given, ansible_check_mode=False) is (said == "yes")


@pytest.mark.parametrize("template", ["no-egress.nft.j2", "closed.nft.j2"])
def test_rules_are_the_same_for_text_and_truth_values(template: str) -> None:
    lists = ("_no_egress_ssh_ports", "_no_egress_ntp", "_no_egress_dns", "_no_egress_entries")
    empty: dict[str, Any] = {n: [] for n in (*lists, "no_egress_extra_output", "no_egress_extra_forward")}
    values = {**role("no_egress"), **empty}
    found = {
        (given, as_text): rendered(
            f"no_egress/templates/{template}",
            **{
                **values,
                "no_egress_forward": str(given).lower() if as_text else given,
                "no_egress_dhcp_client": str(given).lower() if as_text else given,
            },
        )
        for given in (True, False)
        for as_text in (True, False)
    }
    assert found[True, True] == found[True, False]
    assert found[False, True] == found[False, False]
    assert found[True, True] != found[False, False]


# --- one gateway at a time ---


@pytest.mark.parametrize(
    ("hosts", "out", "only"),
    [
        # The default's two gateways of one host.
        ({"a": {}}, [], 0),
        ({"a": {}}, ["a/2"], 1),
        ({"a": {}}, ["a/1"], 2),
        # A site with one gateway has asked for it.
        ({"a": {"gateway_count": 1}}, [], 0),
        ({"a": {"gateway_count": 3}}, ["a/2"], 0),
        # Two hosts: what is in on the other one counts.
        ({"a": {}, "b": {}}, ["a/2"], 0),
        ({"a": {}, "b": {}}, ["a/2", "b/1", "b/2"], 1),
        ({"a": {}, "b": {}}, ["a/1", "a/2", "b/1"], 0),
        ({"a": {"gateway_count": 1}, "b": {"gateway_count": "1"}}, ["b/1"], 1),
        # Of one that is not there any more nothing follows.
        ({"a": {"gateway_count": 1}}, ["a/2"], 0),
    ],
    ids=str,
)
def test_the_gateway_that_alone_gets_requests_is_known(
    hosts: dict[str, dict[str, Any]], out: list[str], only: int, tmp_path: Path, lookups: None
) -> None:
    (tmp_path / "drained.json").write_text(json.dumps(out))
    variables = {
        **trusted(load("roles/gateway/vars/main.yml")), "role_path": str(ANSIBLE / "roles/gateway"),
        "moat_site_dir": str(tmp_path), "groups": {"moat_gateways": list(hosts)}, "hostvars": hosts,
        "inventory_hostname": "a",
    }  # fmt: skip
    roll = load("roles/gateway/tasks/roll.yml")[0]["moat_instances"]["only"]
    assert int(engine(**variables).template(trust_as_template(roll))) == only
    assert int(engine(**variables, gateway_alone="true").template(trust_as_template(roll))) == 0


def test_gateways_of_several_nodes_are_never_restarted_at_the_same_time() -> None:
    """Neither on their way to a release, nor on the way back, nor for a new secret."""
    (back, _stop) = load("roles/gateway/tasks/outcome.yml")
    assert back["throttle"] == 1
    rolls = 0
    for path in ANSIBLE.glob("*.yml"):
        for play in load(path.name):
            for one in play.get("tasks", []):
                role = one.get("ansible.builtin.import_role") or one.get("ansible.builtin.include_role") or {}
                if role.get("tasks_from") == "roll":
                    rolls += 1
                    assert play["serial"] == 1, f"{path.name}: {play['name']}"
    assert rolls >= 4
