# SPDX-License-Identifier: Apache-2.0
"""Proves what ``moat evidence`` writes: the promised files, every gap with its reason, every contradiction, no secret.

The host is a planted tree: real files, a real signed bundle, and programs whose answers carry planted secrets.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.unit.site.bundles import CREATED, make_bundle

from moat.console import Console
from moat.errors import EvidenceFailed
from moat.site import evidence
from moat.site.egresscheck import subject
from moat.site.evidencekit.model import Host, Part, redact

PLANTED = {
    "source": "s3cr3t-of-the-mirror",
    "unit": "hunter2-hunter2",
    "token": "sk-moat-admin-AAAABBBBCCCCDDDD",
    "gateway": "master-key-that-nobody-may-read",
    "private": "MC4CAQAwBQYDK2VwBCIEIGplanted",
    "rule": "tok-in-a-comment",
}
MAPPED = "0000000000000000FFFF00000100007F"  # ::ffff:127.0.0.1
RULES = "table inet moat_egress {\n\tchain output {\n\t}\n}\n"
UNIT = "moat-gateway@1.service"
SHOWN = f"""ActiveState=active
SubState=running
UnitFileState=enabled
FragmentPath=/etc/systemd/system/moat-gateway@.service
Result=success
User=moat-gateway
NoNewPrivileges=yes
ReadWritePaths=/srv password={PLANTED["unit"]} key {PLANTED["token"]}
MainPID=4711
"""
COUNTERS = {"nftables": [{"counter": {"name": "moat_out_denied", "comment": "refused", "packets": 3, "bytes": 180}}]}


class Programs:
    """The programs of the planted host: what each answers, by the beginning of its command line."""

    def __init__(self) -> None:
        self.shown = SHOWN
        self.answers: dict[str, tuple[int, str, str]] = {
            "nft -s list table": (0, RULES, ""),
            "unshare --net sh": (0, RULES, ""),
            "nft -j list counters": (0, json.dumps(COUNTERS), ""),
            "nft list tables": (0, "table inet moat_egress\n", ""),
            "systemctl list-units": (
                0,
                f"{UNIT} loaded active running x\nredis-server.service not-found inactive dead\n",
                "",
            ),
            "systemd-analyze security": (0, f"x y\n→ Overall exposure level for {UNIT}: 1.2 OK :-)\n", ""),
            "dpkg-query": (0, "nginx\t1.26.3-3\tamd64\tinstalled\nvalkey-server\t1.0\tamd64\tinstalled\n", ""),
            "dpkg --verify": (0, "", ""),
            "sqv": (127, "", ""),
            "gpgv": (0, "", ""),
        }

    def __call__(self, argv: Sequence[str], stdin: str) -> tuple[int, str, str]:
        line = " ".join(argv)
        if line.startswith("systemctl show"):
            return (0, self.shown, "") if line.endswith(UNIT) else (0, "FragmentPath=\n", "")
        for start, answer in self.answers.items():
            if line.startswith(start):
                return answer
        return 127, "", "no such program"


def put(root: Path, path: str, text: str, mode: int = 0o644) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    file.chmod(mode)


@pytest.fixture
def programs() -> Programs:
    return Programs()


@pytest.fixture
def host(tmp_path: Path, programs: Programs) -> Host:
    """A host as the installation leaves it, with secrets in every place where somebody might have put one."""
    root = tmp_path / "host"
    made = make_bundle(root / "opt/moat/releases/0.1.0-abc/bundle", tmp_path / "keys", version="0.1.0")
    (root / "opt/moat/current").symlink_to("releases/0.1.0-abc")
    put(root, "/etc/moat/trusted-keys/moat.pub", made.public.read_text("utf-8"))
    put(root, "/etc/moat/secrets/gateway/master_key", PLANTED["gateway"] + "\n", 0o600)
    pem = f"-----BEGIN PRIVATE KEY-----\n{PLANTED['private']}\n-----END PRIVATE KEY-----\n"
    put(root, "/etc/moat/nginx/tls/key.pem", pem, 0o600)
    put(root, "/etc/moat/nginx/nginx.conf", "events {}\n")
    put(root, "/etc/moat/nftables/no-egress.nft", RULES)
    put(root, "/etc/apt/sources.list", f"# old\ndeb https://user:{PLANTED['source']}@mirror.example/ trixie main\n")
    put(root, "/etc/passwd", "root:x:0:0::/root:/bin/sh\nmoat-gateway:x:995:995::/nonexistent:/usr/sbin/nologin\n")
    put(root, "/etc/shadow", "root:$6$planted-hash:1::::::\nmoat-gateway:!:1::::::\n", 0o600)
    put(root, "/proc/uptime", "100.0 200.0\n")
    put(root, "/proc/sys/kernel/random/boot_id", "0000-1111\n")
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = "   0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000  {}        0 {} 1\n"
    put(
        root,
        "/proc/net/tcp",
        head + row.format("0100007F:0FA1", "0A", 995, 77) + row.format("0100007F:9999", "01", 0, 1),
    )
    put(
        root,
        "/proc/net/tcp6",
        head + row.format("0" * 32 + ":20FB", "0A", 33, 78) + row.format(MAPPED + ":0FA2", "0A", 995, 77),
    )
    put(root, "/proc/net/udp", head)
    put(root, "/proc/net/udp6", head)
    put(root, "/proc/net/unix", "Num       RefCount Protocol Flags    Type St Inode Path\n")
    put(root, "/proc/4711/comm", "moat-gateway\n")
    (root / "proc/4711/fd").mkdir()
    (root / "proc/4711/fd/3").symlink_to("socket:[77]")
    packages = (
        "Package: nginx\nVersion: 1.26.3-3\n\nPackage: valkey-server\nVersion: 2.0\n\nPackage: docker\nVersion: 1\n"
    )
    put(root, "/opt/moat/releases/0.1.0-abc/apt/Packages", packages)
    put(root, "/opt/moat/releases/0.1.0-abc/apt/InRelease", hashlib.sha256(packages.encode()).hexdigest() + "\n")
    put(root, "/opt/moat/releases/0.1.0-abc/apt/moat.gpg", "key")
    where = [Path(p) for p in ("/opt/moat", "/etc/moat/trusted-keys", "/var/lib/moat", "/var/lib/moat/evidence")]
    return Host(root, where[0], where[1], where[2], where[3], CREATED + 1000.0, programs)


def collected(host: Host) -> dict[str, Part]:
    return {p.name: p for p in evidence.collect(host, Console(quiet=True))}


def written(host: Host) -> Path:
    folder, _ = evidence.write(host, list(collected(host).values()))
    return folder


def test_the_promised_files_are_written_and_covered_by_the_sums(host: Host) -> None:
    folder = written(host)
    names = ["clock", "configuration", "egress", "packages", "release", "rules", "secrets", "sockets", "units"]
    assert {p.name for p in folder.iterdir()} == {f"{n}.json" for n in names} | {
        "index.json",
        "evidence.html",
        "SHA256SUMS",
    }
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text("ascii").splitlines())
    assert sums == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "SHA256SUMS"
    }
    assert folder.stat().st_mode & 0o777 == 0o700
    index = json.loads((folder / "index.json").read_bytes())
    assert index["parts"][0]["name"] == "release"
    assert {p["file"] for p in index["parts"]} == {f"{n}.json" for n in names}
    for name in names:
        part = json.loads((folder / f"{name}.json").read_bytes())
        assert set(part) == {"format", "part", "title", "data", "moment", "gaps", "findings"}


def test_the_release_is_compared_with_what_the_key_signed(host: Host) -> None:
    part = collected(host)["release"]
    assert part.findings == []
    assert part.data["verified"] is True
    assert part.data["release"] == "0.1.0-abc"
    assert re.fullmatch(r"[0-9A-F]{16}", part.data["key_id"])
    bundle = host.root / "opt/moat/releases/0.1.0-abc/bundle"
    (bundle / "README.txt").write_bytes(b"Read me lasst.\n")
    (bundle / "wheels/b-1.0-py3-none-any.whl").unlink()
    part = collected(host)["release"]
    assert [f.what.split(":")[0] for f in part.findings] == ["README.txt"]
    # What was not brought is said, but is no damage: the images stay on the medium.
    assert part.data["not_brought"] == {"wheels": 1}
    (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes().replace(b'"MIT"', b'"BSD"'))
    part = collected(host)["release"]
    assert part.data["verified"] is False
    assert len(part.findings) == 1


def test_sockets_are_read_from_the_kernels_tables_with_their_owner(host: Host) -> None:
    part = collected(host)["sockets"]
    rows = {(r["address"], r["port"]): r for r in part.data["internet"]}
    assert set(rows) == {("127.0.0.1", 4001), ("127.0.0.1", 4002), ("::", 8443)}
    assert rows["127.0.0.1", 4002]["loopback"] is True
    assert rows["127.0.0.1", 4001]["program"] == "moat-gateway"
    assert rows["127.0.0.1", 4001]["loopback"] is True
    assert part.moment["pids"]["tcp 127.0.0.1:4001"] == 4711
    assert ["tcp :::8443" in g.what for g in part.gaps] == [True]


def test_no_planted_secret_is_in_any_file(host: Host) -> None:
    folder = written(host)
    everything = b"\n".join(p.read_bytes() for p in folder.iterdir())
    for name, secret in PLANTED.items():
        assert secret.encode() not in everything, name
    assert b"planted-hash" not in everything
    assert hashlib.sha256((PLANTED["gateway"] + "\n").encode()).hexdigest().encode() not in everything
    assert b"[redacted]" in everything
    # They are listed, by name and mode.
    assert b"/etc/moat/secrets/gateway/master_key" in everything
    assert b"/etc/moat/nginx/tls/key.pem" in everything


def test_a_secret_in_a_place_that_nothing_tells_apart_stops_the_whole_collection(
    host: Host, programs: Programs
) -> None:
    # A rule's comment, word for word the master key: no pattern can know it, the search for the host's secrets does.
    leaking = RULES.replace("output {", f'output {{\n\t\taccept comment "{PLANTED["gateway"]}"')
    programs.answers["nft -s list table"] = (0, leaking, "")
    with pytest.raises(EvidenceFailed) as refused:
        written(host)
    assert "the collection would hold a secret" in refused.value.message
    assert PLANTED["gateway"] not in str(refused.value.to_dict())
    assert "master_key" in str(refused.value.found)
    assert not list((host.root / "var/lib/moat/evidence").glob("*"))


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("PASSWORD=abc123 x", "PASSWORD=[redacted] x", "abc123"),
        ("--api-key abc123", "--api-key [redacted]", "abc123"),
        ('db_password: "a b c"', "[redacted]", "a b c"),
        ("Authorization: Bearer abc.def", "[redacted]", "abc.def"),
        ("redis://u:pw@10.0.0.1/0", "redis://[redacted]@10.0.0.1/0", "pw@"),
        ("use sk-abcdefghij now", "use [redacted] now", "sk-abc"),
        ("-----BEGIN EC PRIVATE KEY-----\nabc", "[redacted]", "abc"),
        ("ProtectSystem=strict", "ProtectSystem=strict", "[redacted]"),
        ("token_throughput 12", "token_throughput [redacted]", " 12"),  # rather too much than too little
    ],
)
def test_redaction(text: str, kept: str, gone: str) -> None:
    assert kept in redact(text)
    assert gone not in redact(text)


def test_everything_that_cannot_be_collected_is_listed_with_its_reason(tmp_path: Path) -> None:
    nothing = Host(
        tmp_path / "empty", Path("/opt/moat"), Path("/keys"), Path("/state"), Path("/evidence"), 0.0,
        lambda argv, stdin: (127, "", f"{argv[0]}: no such program"),
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    parts = collected(nothing)
    assert all(p.gaps for name, p in parts.items())
    assert all(g.why for p in parts.values() for g in p.gaps)
    folder = written(nothing)
    page = (folder / "evidence.html").read_text("utf-8")
    for part in parts.values():
        for gap in part.gaps:
            assert gap.what.split("/")[0].split("'")[0] in page
    index = json.loads((folder / "index.json").read_bytes())
    assert (index["ok"], index["complete"]) == (True, False)


def test_a_collector_that_breaks_becomes_a_gap(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (host.root / "etc/passwd").write_text("moat-gateway:x:not-a-number:1::/:/x\n", "utf-8")
    assert [g.what for g in collected(host)["secrets"].gaps] == ["the whole part"]


CONTRADICTIONS = {
    "open secret": ("secrets", "is open to others"),
    "account with a password": ("secrets", "has a password"),
    "rules gone": ("rules", "the rules are not in force"),
    "rules changed": ("rules", "the rules in force are not those of the file"),
    "rule file damaged": ("rules", "the rule file cannot be loaded"),
    "failed unit": ("units", "has failed"),
    "changed program": ("packages", "is not as its package brought it"),
    "unsigned repository": ("packages", "refuses the signature"),
    "other package list": ("packages", "is not the one that InRelease lists"),
    "configuration for everyone": ("configuration", "may be written by everyone"),
    "clock": ("clock", "the clock is behind the release"),
    "egress": ("egress", "the last egress report is not clean"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_every_contradiction_is_found_and_named(name: str, host: Host, programs: Programs) -> None:
    part, words = CONTRADICTIONS[name]
    assert collected(host)[part].findings == []
    root = host.root
    match name:
        case "open secret":
            (root / "etc/moat/secrets/gateway/master_key").chmod(0o644)
        case "account with a password":
            put(root, "/etc/shadow", "moat-gateway:$6$x:1::::::\n")
        case "rules gone":
            programs.answers["nft -s list table"] = (1, "", "Error: No such file or directory")
        case "rules changed":
            programs.answers["nft -s list table"] = (0, RULES.replace("output {", "output {\n\t\taccept"), "")
        case "rule file damaged":
            programs.answers["unshare --net sh"] = (1, "", "/dev/stdin:3:1-7: Error: syntax error\n^^^\n")
        case "failed unit":
            programs.shown = SHOWN.replace("ActiveState=active", "ActiveState=failed")
        case "changed program":
            programs.answers["dpkg --verify"] = (
                1,
                "??5??????   /usr/sbin/nginx\n??5?????? c /etc/nginx/nginx.conf\n",
                "",
            )
        case "unsigned repository":
            programs.answers["gpgv"] = (1, "", "gpgv: BAD signature")
        case "other package list":
            put(root, "/opt/moat/releases/0.1.0-abc/apt/InRelease", "0" * 64)
        case "configuration for everyone":
            (root / "etc/moat/nginx/nginx.conf").chmod(0o666)
        case "clock":
            host = replace(host, now=CREATED - 1.0)
        case "egress":
            report = {"ok": False, "started": "a", "ended": "b", "attempts": [{}], "layers": []}
            put(root, "/var/lib/moat/evidence/20260101T000000Z/egress-report.json", json.dumps(report))
    findings = collected(host)[part].findings
    assert [words in f.what for f in findings] == [True], findings
    assert findings[0].expected
    assert findings[0].hint


def egress_report(host: Host, **changes: Any) -> None:
    """Write the report of a verification that has just ended, of what is in force."""
    report = {
        "ok": True, "site": "systemd", "started": "2026-01-01T00:00:00.000Z", "ended": "2026-01-01T00:01:00.000Z",
        "attempts": [], "layers": [], "subject": subject.of_systemd(host.root, host.store), **changes,
    }  # fmt: skip
    put(host.root, "/var/lib/moat/evidence/egress/20260101T000000Z/egress-report.json", json.dumps(report))


def gateway_serves(host: Host, revision: int) -> None:
    text = json.dumps({"revision": revision, "sha256": f"{revision:064x}" if revision else None})
    put(host.root, "/run/moat/reports/gateway-1.json", text)


def test_a_report_about_what_is_in_force_is_no_contradiction(host: Host) -> None:
    gateway_serves(host, 7)
    egress_report(host)
    part = collected(replace(host, now=datetime(2026, 1, 3, 12, 1, tzinfo=UTC).timestamp()))["egress"]
    assert (part.findings, part.gaps) == ([], [])
    assert part.moment["age"] == "2.5 days"
    assert part.data["subject"]["release"] == "0.1.0-abc"
    assert part.data["subject"]["configuration of gateway-1"] == f"revision 7, sha256 {7:064x}"


@pytest.mark.parametrize("what", ["release", "manifest", "packet filter's rules"])
def test_a_report_about_something_else_is_a_contradiction(host: Host, what: str) -> None:
    egress_report(host)
    match what:
        case "release":
            (host.root / "opt/moat/current").unlink()
            (host.root / "opt/moat/releases/0.1.0-abc").rename(host.root / "opt/moat/releases/0.2.0-def")
            (host.root / "opt/moat/current").symlink_to("releases/0.2.0-def")
        case "manifest":
            put(host.root, "/opt/moat/releases/0.1.0-abc/bundle/manifest.json", "{}")
        case _:
            put(host.root, "/etc/moat/nftables/no-egress.nft", RULES + "\n# changed\n")
    (finding,) = collected(host)["egress"].findings
    assert finding.what == f"the last egress report is not about what is in force: {what}"
    assert "moat egress verify" in finding.hint


def test_a_report_that_does_not_say_what_it_is_about_is_a_contradiction(host: Host) -> None:
    egress_report(host, subject={})
    found = collected(host)["egress"].findings
    assert [f.what.rpartition(": ")[2] for f in found] == ["manifest", "packet filter's rules", "release"]


def test_a_configuration_that_was_pushed_since_is_named(host: Host) -> None:
    """Every push would be a contradiction otherwise; it is a proof that is missing."""
    gateway_serves(host, 7)
    egress_report(host)
    gateway_serves(host, 8)
    part = collected(host)["egress"]
    assert part.findings == []
    assert [(g.what, "revision 7" in g.why, "revision 8" in g.why) for g in part.gaps] == [
        ("a proof of the configuration of gateway-1", True, True)
    ]


def test_gateways_of_several_nodes_have_the_node_in_their_name(host: Host) -> None:
    put(host.root, "/run/moat/reports/node2.gateway-1.json", '{"revision": 7, "sha256": "ab"}')
    put(host.root, "/run/moat/reports/broken.json", "{")
    found = subject.of_systemd(host.root, host.store)
    assert [k for k in found if k.startswith(subject.CONFIGURATION)] == ["configuration of node2.gateway-1"]


def test_local_files_are_told_apart_by_their_content(host: Host) -> None:
    gateway_serves(host, 0)
    put(host.root, "/etc/moat/config/config.yaml", "model_list: []\n")
    before = subject.of_systemd(host.root, host.store)
    put(host.root, "/etc/moat/config/config.yaml", "model_list: [a]\n")
    assert list(subject.differences(before, subject.of_systemd(host.root, host.store))) == [
        "configuration of gateway-1"
    ]


def test_units_are_shown_with_their_score_and_networks_that_stay_the_same(host: Host, programs: Programs) -> None:
    part = collected(host)["units"]
    assert [u["unit"] for u in part.data["units"]] == [UNIT]
    assert part.data["units"][0]["confinement"]["NoNewPrivileges"] == "yes"
    assert part.moment[UNIT]["exposure"] == "1.2 OK"
    folder = written(host)
    assert "1.2 OK" in (folder / "evidence.html").read_text("utf-8")
    # systemd shows either form of the same list, by whether it has reloaded its units since the start.
    prints = []
    for networks in ("127.0.0.0/8 127.0.0.1/32 ::1/128", "127.0.0.0/8 ::1/128"):
        programs.shown = SHOWN + f"IPAddressAllow={networks}\n"
        prints.append(evidence.fingerprint([collected(host)["units"]]))
    assert prints[0] == prints[1]


def test_packages_are_compared_with_the_repository(host: Host) -> None:
    part = collected(host)["packages"]
    assert [(r["package"], r["installed"], r["same"]) for r in part.data["packages"]] == [
        ("docker", None, False), ("nginx", "1.26.3-3", True), ("valkey-server", "1.0", False),
    ]  # fmt: skip
    assert part.data["repository"][0]["signature"] == "good"


def test_the_same_host_gives_no_second_collection_until_something_changes(host: Host) -> None:
    first, changed = evidence.write(host, list(collected(host).values()), only_if_changed=True)
    assert changed
    later = replace(host, now=host.now + 3600)
    put(host.root, "/proc/uptime", "3700.0 200.0\n")
    (host.root / "opt/moat/site").symlink_to("releases/0.1.0-abc")  # set by install.sh after its playbook
    assert evidence.write(later, list(collected(later).values()), only_if_changed=True) == (first, False)
    put(host.root, "/etc/moat/nginx/nginx.conf", "events { }\n")
    second, changed = evidence.write(later, list(collected(later).values()), only_if_changed=True)
    assert changed
    assert second != first


def test_old_collections_go_and_egress_reports_stay(host: Host) -> None:
    parts = list(collected(host).values())
    for i in range(4):
        evidence.write(replace(host, now=host.now + i), parts)
    base = host.root / "var/lib/moat/evidence"
    put(base, "20200101T000000Z/egress-report.json", "{}")
    assert len(evidence.prune(base, 2)) == 2
    assert len(evidence.collections(base)) == 2
    assert (base / "20200101T000000Z/egress-report.json").exists()


def test_the_page_loads_nothing_runs_nothing_and_escapes_what_the_host_says(host: Host, programs: Programs) -> None:
    put(host.root, "/etc/moat/nginx/<script>alert(1)</script>.conf", "x\n")
    page = (written(host) / "evidence.html").read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    without_sources = page.replace("https://[redacted]@mirror.example/", "")  # text of a table, not a link
    assert "://" not in without_sources
    assert not re.search(r"\b(src|href|action)=", page)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    policy = re.search(r"style-src 'sha256-([^']+)'", page)
    assert style is not None
    assert policy is not None
    assert base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode() == policy[1]
    assert "default-src 'none'" in page


def test_a_folder_that_cannot_be_written_is_the_documented_refusal(host: Host) -> None:
    shutil.rmtree(host.root / "var", ignore_errors=True)
    put(host.root, "/var/lib/moat/evidence", "a file, not a folder")
    with pytest.raises(EvidenceFailed, match="cannot be written") as refused:
        written(host)
    assert refused.value.exit_code == 27
    assert os.environ.get("HOME", "/x") not in str(refused.value.hint)
