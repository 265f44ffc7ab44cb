#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the table ``inet moat_egress``, set so that nobody is locked out.

``present`` compares the wanted rules with the file and with what the kernel holds. Where they differ it arms a timer on
the node that brings the former rules back, and lets systemd load the new ones a moment *after* it has answered: a rule
set that cuts the control connection cannot cut the answer too. The role then makes fresh control connections;
``confirmed`` writes the file and takes the timer away. If nobody confirms, the timer does what its name says.

A run on the host itself makes no control connection, but whoever started it may sit on the host by SSH. Then ``loaded``
notes how much was sent over that connection, and ``confirmed`` lets the timer do its work unless more than that is
acknowledged by the far end: what was sent under the new rules has arrived.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.moat_common import write

DOCUMENTATION = r"""
module: moat_no_egress
short_description: Set the table inet moat_egress with an automatic way back
options:
  state:
    type: str
    default: present
    choices: [check, present, loaded, confirmed, absent]
    description: >-
      check looks whether this host can carry the rules and changes nothing; present arms the timer and loads the rules
      if anything differs; loaded fails unless the new rules are in force; confirmed keeps them; absent removes all.
  content: {type: str, description: The whole rule file; for present.}
  path: {type: path, default: /etc/moat/nftables/no-egress.nft}
  rollback_seconds: {type: int, default: 45, description: Time after which the former rules return.}
  ssh_ports: {type: list, elements: int, default: [22], description: Ports of the host's own SSH server.}
  check_ssh: {type: bool, default: true, description: Refuse a control connection that the rules would not spare.}
  forward: {type: bool, default: true, description: The rules close forwarding too.}
  dhcp: {type: bool, default: false, description: The rules let the host ask for its address by DHCP.}
  local:
    type: bool
    default: false
    description: The run is on the host itself; loaded and confirmed look at the SSH connection that started it.
"""

TABLE = ("inet", "moat_egress")
#: Bridges that engines make, some before their first container: docker, podman, CNI (containerd, Kubernetes), libvirt,
#: LXC, LXD and Incus.
BRIDGES = re.compile(
    r"(docker|podman|cni|virbr|lxcbr|lxdbr|incusbr|nerdctl|cilium|kube-bridge|weave)[0-9]*|(br|cni)-.+"
)
#: Of engines that are told by them: docker runs as a service; podman's is made by systemd wherever podman is installed.
SOCKETS = ("run/docker.sock", "run/crio/crio.sock", "run/k3s/containerd/containerd.sock")
#: What ip says for an address without an end.
FOREVER = 2**32 - 1
RUN = Path("/run/moat-no-egress")
PENDING, PREVIOUS, SEEN = RUN / "pending.nft", RUN / "previous.nft", RUN / "sessions.json"
TIMER, APPLY = "moat-no-egress-rollback", "moat-no-egress-apply"
DELETE = f"table {TABLE[0]} {TABLE[1]}\ndelete table {TABLE[0]} {TABLE[1]}\n"


def run(argv: list[str], stdin: str | None = None) -> tuple[int, str, str]:
    """Run one program from a list; a missing one has exit code 127."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    except OSError as e:
        return 127, "", str(e)
    return done.returncode, done.stdout, done.stderr


def nft() -> str:
    """Return the path of nft; a module's PATH may lack sbin."""
    return next((p for p in ("/usr/sbin/nft", "/sbin/nft") if Path(p).exists()), "nft")


def ip() -> str:
    """Return the path of ip; a module's PATH may lack sbin."""
    return next((p for p in ("/usr/bin/ip", "/usr/sbin/ip", "/sbin/ip") if Path(p).exists()), "ip")


def loaded() -> str:
    """Return the table that the kernel holds, without counts, or an empty string."""
    code, out, _ = run([nft(), "-s", "list", "table", *TABLE])
    return out if code == 0 else ""


def listing_of(content: str) -> tuple[str, str]:
    """Return how this nft lists ``content`` once it is loaded, and why that cannot be told.

    The rules are loaded in a network namespace of their own, that ends with the program.
    """
    script = 'nft=$1; "$nft" -f - && "$nft" -s list table inet moat_egress'
    code, out, err = run(["unshare", "--net", "sh", "-c", script, "sh", nft()], content)
    return (out, "") if code == 0 else ("", err.strip() or f"unshare ended with code {code}")


def inherited(name: str) -> str:
    """Return a variable of the environment; ``sudo`` removes those of SSH, so the parents are asked too."""
    text, pid = os.environ.get(name, ""), os.getpid()
    while not text and pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
            pid = int(stat.rpartition(")")[2].split()[1])
            environ = Path(f"/proc/{pid}/environ").read_bytes() if pid > 1 else b""
        except (OSError, ValueError):
            break
        found = re.search(rb"(?:^|\0)" + name.encode() + rb"=([^\0]*)", environ)
        text = found[1].decode("ascii", "replace") if found else ""
    return text


def control_connection() -> tuple[str, int, int] | None:
    """Return client address, client port and server port of the SSH connection that this process belongs to."""
    parts = inherited("SSH_CONNECTION").split()
    if len(parts) != 4 or not parts[1].isdigit() or not parts[3].isdigit():
        return None
    return parts[0].partition("%")[0], int(parts[1]), int(parts[3])


@dataclass(frozen=True)
class Session:
    """An SSH connection of this host: its far end, and how many bytes were sent and acknowledged."""

    peer: str
    port: int
    sent: int
    acked: int


def parse_sessions(text: str) -> list[Session]:
    """Read what ``ss -HOtni state established`` says."""
    found = []
    for line in text.splitlines():
        peer, _, port = line.split()[3].rpartition(":")
        peer = peer.strip("[]").partition("%")[0].removeprefix("::ffff:")
        counts = {k: int(v) for k, v in re.findall(r"\b(bytes_\w+):(\d+)", line)}
        sent = counts.get("bytes_sent", 0) - counts.get("bytes_retrans", 0)
        found.append(Session(peer, int(port), sent, counts.get("bytes_acked", 0)))
    return found


def sessions(ports: list[int]) -> list[Session] | None:
    """Return the SSH connections of this host, or ``None`` where that cannot be told."""
    which = " or ".join(f"sport = :{p}" for p in ports)
    code, out, _ = run(["ss", "-HOtni", "state", "established", f"( {which} )"])
    return parse_sessions(out) if code == 0 else None


def to_be_proven(ports: list[int]) -> list[Session]:
    """Return the connections of which one must outlive the rules: that of the operator who runs this.

    Where that one is gone (a terminal multiplexer, to which the operator came back), it is one of those that are there;
    where there is none, nobody can be locked out.
    """
    connection = control_connection()
    if connection is None:
        return []
    client, port = connection[0].removeprefix("::ffff:"), connection[1]
    there = sessions(sorted({*ports, connection[2]}))
    if there is None:  # nothing proves it then
        return [Session(client, port, 0, 0)]
    return [s for s in there if (s.peer, s.port) == (client, port)] or there


def proven(noted: list[Session], now: list[Session]) -> bool:
    """Say whether more was acknowledged on one of the connections than had been sent when it was noted.

    The kernel's two counts may differ by the one byte that opens a connection; a packet of SSH has more.
    """
    sent = {(s.peer, s.port): s.sent for s in noted}
    return not noted or any(s.acked > sent[s.peer, s.port] + 1 for s in now if (s.peer, s.port) in sent)


def say(text: str) -> None:
    """Write a line to the operator's terminal, so that something is sent even if the run's output goes elsewhere."""
    terminal = inherited("SSH_TTY")
    if re.fullmatch(r"/dev/pts/[0-9]+", terminal):
        with contextlib.suppress(OSError):
            fd = os.open(terminal, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                os.write(fd, f"\r\n{text}\r\n".encode())
            finally:
                os.close(fd)


def route_to(client: str) -> str:
    """Return what the kernel says of the way to ``client``, or an empty string."""
    code, out, _ = run([ip(), "-6" if ":" in client else "-4", "route", "get", client])
    return out if code == 0 else ""


def tunnel_towards(client: str) -> str:
    """Return the tunnel device that leads to ``client``, or an empty string."""
    found = re.search(r"\bdev (\S+)", route_to(client))
    if found is None:
        return ""
    device = Path("/sys/class/net") / found[1]
    try:
        kind = (device / "uevent").read_text("ascii", "replace")
    except OSError:
        kind = ""
    return found[1] if (device / "tun_flags").exists() or "DEVTYPE=wireguard" in kind else ""


def path_problem(ssh_ports: list[int]) -> str:
    """Return why the control connection would not outlive the rules, or an empty string."""
    connection = control_connection()
    if connection is None:
        return ""
    client, _, port = connection
    where = f"the control connection comes from {client} to port {port} of this host"
    if port not in ssh_ports:
        return (
            f"{where}; found: no_egress_ssh_ports {ssh_ports}; expected: a list with {port}; "
            f"do: add {port} to no_egress_ssh_ports"
        )
    if client in ("::1", "::ffff:127.0.0.1") or client.startswith("127."):
        return (
            f"{where}: it arrives through a tunnel that this host opened itself, and the rules would close it; "
            "expected: a connection from another host; do: connect directly, or list the tunnel's far end in "
            "moat_egress_allow and set no_egress_check_ssh: false"
        )
    if route_to(client).startswith("local "):
        # Taken for any other node it would not be allowed to reach the other hosts by SSH, and the run would end there.
        return (
            f"{where}, and that is an address of this host: it is the control host itself; found: a connection by SSH; "
            "expected: ansible_connection: local; do: give it `ansible_connection: local` in the inventory"
        )
    device = tunnel_towards(client)
    if device:
        return (
            f"{where} over the tunnel {device}, whose own packets the rules may refuse; expected: a direct path; "
            "do: list the tunnel's far end in moat_egress_allow and set no_egress_check_ssh: false"
        )
    return ""


def leased(addresses: Any) -> list[str]:
    """Return the addresses that end by themselves and come from DHCP, from what ``ip -j address`` says.

    IPv6 addresses of a router's announcement end too; those are renewed by what comes in, which no rule here refuses.
    They have the prefix of their network; those of a DHCPv6 server stand alone (/128).
    """
    found = []
    for link in addresses if isinstance(addresses, list) else []:
        for a in link.get("addr_info", []):
            lifetime = a.get("valid_life_time", FOREVER)
            asked_for = a.get("family") == "inet" or (a.get("family") == "inet6" and a.get("prefixlen") == 128)
            if asked_for and (a.get("dynamic") or lifetime < FOREVER):
                found.append(f"{a.get('local')} on {link.get('ifname')}, for another {lifetime} s")
    return found


def lease_problem(dhcp: bool) -> str:
    """Return why this host would lose its address under these rules, or an empty string."""
    code, out, _ = run([ip(), "-j", "address", "show"])
    if dhcp or code != 0:  # without ip nothing is known; role apt_offline installs it before the rules are set
        return ""
    try:
        found = leased(json.loads(out or "[]"))
    except ValueError:
        return ""
    if not found:
        return ""
    return (
        "this host has its address from DHCP, may not ask for it again under these rules, and would lose it when its "
        f"time is over; found: {'; '.join(found)}; expected: fixed addresses, or a host that may ask; do: set "
        "no_egress_dhcp_client: true"
    )


def is_virtual(device: Path) -> bool:
    """Say whether a network device is the near end of a container's cable (veth), or a virtual machine's (tap)."""
    if (device / "tun_flags").exists():
        return True
    try:
        ends = [(device / name).read_text("ascii").strip() for name in ("ifindex", "iflink")]
        kind = (device / "uevent").read_text("ascii", "replace")
    except OSError:
        return False
    # A VLAN, too, is linked to another device; it says what it is, which a veth does not.
    return ends[0] != ends[1] and "DEVTYPE=" not in kind and not (device / "device").exists()


def engines(root: Path = Path("/")) -> list[str]:
    """Return what containers or virtual machines of this host show: bridges of theirs, and sockets of engines.

    A bridge that somebody made for a network card is none: it has no member of theirs.
    """
    found = []
    for bridge in sorted(p.parent for p in (root / "sys/class/net").glob("*/bridge")):
        members = sorted(p.name for p in (bridge / "brif").glob("*"))
        if BRIDGES.fullmatch(bridge.name) or any(is_virtual(bridge.parent / m) for m in members):
            found.append(f"bridge {bridge.name}")
    return found + [f"/{s}" for s in SOCKETS if (root / s).exists()]


def host_problem(forward: bool, dhcp: bool = False) -> str:
    """Return why this host should not get these rules, or an empty string."""
    found = engines() if forward else []
    if found:
        return (
            "containers or virtual machines run here, and a closed forward chain would cut them off without a word; "
            f"found: {', '.join(found)}; expected: a host without them; do: remove their engine, or set "
            "no_egress_forward: false and close the containers' networks with `moat firewall apply`"
        )
    return lease_problem(dhcp)


def stop_timer() -> None:
    """Take the timer away, if it is there."""
    run(["systemctl", "stop", f"{TIMER}.timer", f"{APPLY}.timer"])
    run(["systemctl", "reset-failed", f"{TIMER}.service", f"{APPLY}.service"])


def timer_active() -> bool:
    """Say whether rules are on trial."""
    return run(["systemctl", "is-active", "--quiet", f"{TIMER}.timer"])[0] == 0


def read(path: Path) -> str:
    """Return a file's text; a missing one is empty."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""


def keep(path: Path, text: str) -> None:
    """Write a file that everyone may read, and its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    write(path, text.encode("utf-8"), 0o644)


def arm(module: AnsibleModule, content: str, seconds: int) -> None:
    """Load ``content`` in a second from now, and bring back what is in force now after ``seconds``."""
    if timer_active():  # an interrupted run left its trial behind: what it found is what must come back
        run(["systemctl", "start", f"{TIMER}.service"])
    stop_timer()
    SEEN.unlink(missing_ok=True)
    keep(PREVIOUS, DELETE + loaded())
    keep(PENDING, content)
    for unit, after, file in ((TIMER, seconds, PREVIOUS), (APPLY, 1, PENDING)):
        argv = ["systemd-run", "--quiet", "--collect", f"--unit={unit}", f"--on-active={after}"]
        argv += ["--timer-property=AccuracySec=100ms", nft(), "-f", str(file)]
        code, _, err = run(argv)
        if code != 0:
            stop_timer()
            module.fail_json(msg=f"the rules were not touched: {' '.join(argv)} failed: {err.strip()}")


def present(module: AnsibleModule) -> dict[str, Any]:
    """Compare, and put the rules on trial if anything differs."""
    content, path = module.params["content"], Path(module.params["path"])
    before = read(path)
    if module.check_mode and not Path(nft()).exists():  # a host on which nothing is installed yet
        return {"changed": True, "armed": False, "diff": {"before": before, "after": content}}
    expected, why = listing_of(content)
    current = loaded()
    if before == content and current and current == expected and not timer_active():
        return {"changed": False, "armed": False}
    code, _, err = run([nft(), "-c", "-f", "-"], content)
    if code != 0:
        module.fail_json(
            msg=f"nft refuses the rules; nothing was changed. found: {err.strip()}; expected: rules that nft accepts; "
            "do: correct no_egress_extra_output and no_egress_extra_forward"
        )
    if not expected:
        module.fail_json(msg=f"the rules cannot be tried in a network namespace of their own; found: {why}")
    problem = host_problem(module.params["forward"], module.params["dhcp"])
    if not problem and module.params["check_ssh"]:
        problem = path_problem(module.params["ssh_ports"])
    if problem:
        module.fail_json(msg=f"the rules were not touched: {problem}")
    header = str(path) if before != content else "rules in force"
    difference = {
        "before_header": header,
        "after_header": header,
        "before": before if before != content else current,
        "after": content if before != content else expected,
    }
    if not module.check_mode:
        arm(module, content, module.params["rollback_seconds"])
    return {"changed": True, "armed": not module.check_mode, "diff": difference}


def end_trial() -> None:
    """Take away what belongs to the trial alone."""
    stop_timer()
    for file in (PENDING, PREVIOUS, SEEN):
        file.unlink(missing_ok=True)


def taken_back(module: AnsibleModule, why: str, found: str, expected: str, do: str) -> None:
    """Bring the former rules back, if the timer has not done it, and fail."""
    stop_timer()
    if PREVIOUS.exists():
        run([nft(), "-f", str(PREVIOUS)])
    end_trial()
    module.fail_json(
        msg=f"the new rules are not in force: {why}; the site runs on as before. found: {found}; expected: {expected}; "
        f"do: see `journalctl -u {APPLY} -u {TIMER}`, compare no_egress_extra_output and moat_egress_allow with the "
        f"path of your control connection, and run again{do}"
    )


def in_force(module: AnsibleModule) -> None:
    """Fail unless the rules on trial are in force."""
    expected, why = listing_of(read(PENDING))
    for _ in range(50):  # the load was ordered for a second after the answer
        if loaded() == expected:
            return
        if not timer_active():
            break
        time.sleep(0.1)
    taken_back(
        module,
        "the control connection did not come back in time and this host returned to its former rules by itself, or nft "
        "refused to load them",
        why or "the former rules",
        "the new rules and a fresh control connection",
        "",
    )


def note_sessions(module: AnsibleModule) -> None:
    """Note how far the operator's own connection has come, now that the rules are in force."""
    if module.params["local"] and module.params["check_ssh"]:
        noted = to_be_proven(module.params["ssh_ports"])
        keep(SEEN, json.dumps([[s.peer, s.port, s.sent, s.acked] for s in noted]))


def await_proof(module: AnsibleModule) -> None:
    """Wait until the operator's own connection has carried something under the new rules; else the timer strikes."""
    noted = [Session(*one) for one in json.loads(read(SEEN) or "[]")]
    if not noted:
        return
    ports = sorted({*module.params["ssh_ports"], *(c[2] for c in [control_connection()] if c)})
    say("Moat: the new packet filter is in force. If you can read this line, it lets your connection through.")
    while not proven(noted, sessions(ports) or []):
        if not timer_active():
            taken_back(
                module,
                "what was sent over your SSH connection while they were in force did not arrive, and this host "
                "returned to its former rules by itself: they would have locked you out",
                "no answer from " + ", ".join(f"{s.peer} port {s.port}" for s in noted),
                "an SSH connection that goes on under the new rules",
                ", in the foreground of the connection; from the console nothing has to be proven, and with "
                "no_egress_check_ssh: false nothing is asked",
            )
        time.sleep(0.2)


def confirmed(module: AnsibleModule) -> dict[str, Any]:
    """Keep the rules on trial: first the timer away, then look that it had not fired, then the file."""
    if not PENDING.exists():
        return {"changed": False}
    if module.check_mode:
        return {"changed": True}
    await_proof(module)
    run(["systemctl", "stop", f"{TIMER}.timer"])
    in_force(module)
    keep(Path(module.params["path"]), read(PENDING))
    end_trial()
    return {"changed": True}


def absent(module: AnsibleModule) -> dict[str, Any]:
    """Remove the table, the file and a trial."""
    current, path = loaded(), Path(module.params["path"])
    changed = bool(current) or path.exists() or timer_active()
    if changed and not module.check_mode:
        stop_timer()
        code, _, err = run([nft(), "-f", "-"], DELETE) if current else (0, "", "")
        if code != 0:
            module.fail_json(msg=f"the table could not be removed: {err.strip()}")
        end_trial()
        path.unlink(missing_ok=True)
        for folder in (RUN, path.parent):
            with contextlib.suppress(OSError):  # not there, or not ours alone
                folder.rmdir()
    return {"changed": changed, "diff": {"before": current, "after": ""}}


def check(module: AnsibleModule) -> dict[str, Any]:
    """Look whether this host can carry the rules."""
    problem = host_problem(module.params["forward"], module.params["dhcp"])
    if not problem and module.params["check_ssh"]:
        problem = path_problem(module.params["ssh_ports"])
    if problem:
        module.fail_json(msg=problem)
    return {"changed": False}


def main() -> None:
    """Read the arguments and do what ``state`` says."""
    module = AnsibleModule(
        argument_spec={
            "state": {"default": "present", "choices": ["check", "present", "loaded", "confirmed", "absent"]},
            "content": {"type": "str"},
            "path": {"type": "path", "default": "/etc/moat/nftables/no-egress.nft"},
            "rollback_seconds": {"type": "int", "default": 45},
            "ssh_ports": {"type": "list", "elements": "int", "default": [22]},
            "check_ssh": {"type": "bool", "default": True},
            "forward": {"type": "bool", "default": True},
            "dhcp": {"type": "bool", "default": False},
            "local": {"type": "bool", "default": False},
        },
        required_if=[("state", "present", ["content"])],
        supports_check_mode=True,
    )
    state = module.params["state"]
    if state == "loaded":
        if not module.check_mode:
            in_force(module)
            note_sessions(module)
        module.exit_json(changed=False)
    actions = {"check": check, "present": present, "confirmed": confirmed, "absent": absent}
    module.exit_json(**actions[state](module))


if __name__ == "__main__":
    main()
