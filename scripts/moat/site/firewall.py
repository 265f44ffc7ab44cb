# SPDX-License-Identifier: Apache-2.0
"""``moat firewall``: nothing goes out of the containers' networks, nor to the host's services.

An ``internal`` docker network still reaches whatever the host listens on, and a published one can go
anywhere. Two chains of our own close both ways for *new* connections that come in on ``moat-edge``
or ``moat-core``; answers to connections that came from outside (the published ports) belong to no
new connection and pass. Each rule counts what it refuses.

The rules live in iptables, because docker puts its own there and keeps ``DOCKER-USER`` in front of
them for the operator. Nothing but our chains and the jumps to them is ever changed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from moat.console import Console
from moat.errors import FirewallFailed

NAME = "firewall"
HELP = "close the containers' ways out (iptables), show the rules with their counters, or remove them"

BRIDGES: Final = ("moat-edge", "moat-core")
FORWARD_CHAIN: Final = "MOAT-FORWARD"
INPUT_CHAIN: Final = "MOAT-INPUT"
_HINT_ROOT: Final = "run it as root on the host (not in a container)"

#: Runs a program with text for its stdin and returns exit code, stdout and stderr.
Runner = Callable[[Sequence[str], str], tuple[int, str, str]]


@dataclass(frozen=True)
class Family:
    """One address family: its name, its tools, and how a refusal is told to the sender."""

    name: str
    tool: str
    reject: str


FAMILIES: Final = (
    # The sender's connect fails at once with "no route to host" instead of hanging until its timeout.
    Family("ipv4", "iptables", "icmp-admin-prohibited"),
    Family("ipv6", "ip6tables", "icmp6-adm-prohibited"),
)


@dataclass(frozen=True)
class Rule:
    """One refusing rule. ``text`` is in iptables' own words, without the counters."""

    family: str
    chain: str
    text: str
    packets: int
    octets: int


@dataclass(frozen=True)
class FamilyStatus:
    """What is set for one family. ``missing`` names what is not as it should be; empty means closed."""

    family: str
    available: bool
    why: str
    rules: tuple[Rule, ...]
    missing: tuple[str, ...]


def wanted_rules(family: Family) -> dict[str, tuple[str, ...]]:
    """Return the rules of our two chains, as ``iptables -S`` prints them (without ``-A CHAIN``)."""
    refuse = f"-m conntrack --ctstate NEW -j REJECT --reject-with {family.reject}"
    return {
        # "not the same bridge": what stays on one bridge is the services talking to each other.
        FORWARD_CHAIN: tuple(f"-i {b} ! -o {b} {refuse}" for b in BRIDGES),
        INPUT_CHAIN: tuple(f"-i {b} {refuse}" for b in BRIDGES),
    }


def run_program(argv: Sequence[str], stdin: str) -> tuple[int, str, str]:
    """Run one program; a missing one has exit code 127."""
    try:
        done = subprocess.run(list(argv), input=stdin, capture_output=True, text=True, check=False)
    except OSError as e:
        return 127, "", str(e)
    return done.returncode, done.stdout, done.stderr


class Firewall:
    """The rules of one host.

    Args:
        console: where each change is printed before it is made.
        runner: runs the programs (a parameter so that the logic can be tested by itself).
    """

    def __init__(self, console: Console, runner: Runner = run_program) -> None:
        self._console = console
        self._run = runner

    def _tool(self, family: Family, *words: str, stdin: str = "") -> tuple[int, str, str]:
        # -w: docker holds the lock for moments; wait for it instead of failing.
        return self._run([family.tool, "-w", "10", *words], stdin)

    def _change(self, family: Family, *words: str) -> None:
        argv = [family.tool, "-w", "10", *words]
        self._console.info("+ " + shlex.join(argv))
        code, _, err = self._run(argv, "")
        if code != 0:
            raise FirewallFailed(f"{family.tool} refused a rule", found=_last(err), hint=_HINT_ROOT)

    def _fill(self, family: Family, chain: str, rules: Sequence[str]) -> None:
        """Create or replace one chain in one step: at no moment is it half empty."""
        argv = [f"{family.tool}-restore", "-w", "10", "--noflush"]
        text = "\n".join(["*filter", f":{chain} - [0:0]", *(f"-A {chain} {rule}" for rule in rules), "COMMIT", ""])
        self._console.info("+ " + shlex.join(argv) + " <<END")
        for line in text.splitlines():
            self._console.info("  " + line)
        code, _, err = self._run(argv, text)
        if code != 0:
            raise FirewallFailed(f"{argv[0]} refused the chain {chain}", found=_last(err), hint=_HINT_ROOT)

    def _list(self, family: Family, chain: str) -> list[str] | None:
        """Return the rules of a chain, or ``None`` where there is no such chain."""
        code, out, _ = self._tool(family, "-S", chain, "-v")
        return [line for line in out.splitlines() if line.startswith("-A ")] if code == 0 else None

    def availability(self, family: Family) -> str:
        """Return why a family cannot be filtered here, or an empty string."""
        code, _, err = self._tool(family, "-S", "INPUT")
        return "" if code == 0 else _last(err) or f"{family.tool} ended with code {code}"

    def parents(self, family: Family) -> dict[str, str]:
        """Return our chains and the chain that each is entered from."""
        # docker moves its jump to DOCKER-USER to the top again whenever it starts; without that chain (IPv6 on most
        # engines, or an engine that leaves the packet filter alone) there is only FORWARD.
        entered = any(
            _parse(family, "FORWARD", line).text == "-j DOCKER-USER" for line in self._list(family, "FORWARD") or []
        )
        return {FORWARD_CHAIN: "DOCKER-USER" if entered else "FORWARD", INPUT_CHAIN: "INPUT"}

    def status(self, family: Family) -> FamilyStatus:
        """Compare what is set with what should be; changes nothing."""
        why = self.availability(family)
        if why:
            return FamilyStatus(family.name, False, why, (), ())
        rules: list[Rule] = []
        missing: list[str] = []
        parents = self.parents(family)
        for chain, wanted in wanted_rules(family).items():
            lines = self._list(family, chain)
            if lines is None:
                missing.append(f"the chain {chain}")
                continue
            found = [_parse(family, chain, line) for line in lines]
            rules += found
            if tuple(r.text for r in found) != wanted:
                missing.append(f"the rules of {chain}")
            jumps = [_parse(family, parents[chain], line).text for line in self._list(family, parents[chain]) or []]
            if f"-j {chain}" not in jumps:
                missing.append(f"the jump from {parents[chain]} to {chain}")
            elif any(j.endswith("-j ACCEPT") and "ESTABLISHED" not in j for j in jumps[: jumps.index(f"-j {chain}")]):
                missing.append(f"the jump from {parents[chain]} to {chain} in front of a rule that accepts")
        return FamilyStatus(family.name, True, "", tuple(rules), tuple(missing))

    def apply(self, family: Family) -> bool:
        """Set what is missing and return whether anything was; counters of right rules are kept."""
        before = self.status(family)
        if not before.missing:
            return False
        parents = self.parents(family)
        for chain, wanted in wanted_rules(family).items():
            lines = self._list(family, chain)
            if lines is None or tuple(_parse(family, chain, line).text for line in lines) != wanted:
                self._fill(family, chain, wanted)
            # First the new jump, then the old ones away: at no moment is the way open. (A jump further down
            # would come after rules that others may have put in front of it.)
            listed = [_parse(family, parents[chain], x).text for x in self._list(family, parents[chain]) or []]
            old = listed.count(f"-j {chain}")
            if old == 1 and not any(m.startswith(f"the jump from {parents[chain]}") for m in before.missing):
                continue
            self._change(family, "-I", parents[chain], "1", "-j", chain)
            for _ in range(old):
                # -D by number, from below: the first one is the new one.
                listed = [_parse(family, parents[chain], x).text for x in self._list(family, parents[chain]) or []]
                last = len(listed) - listed[::-1].index(f"-j {chain}")
                self._change(family, "-D", parents[chain], str(last))
        after = self.status(family)
        if after.missing:
            raise FirewallFailed(
                f"the {family.name} rules are not in place after setting them",
                found="missing: " + ", ".join(after.missing),
                expected="all of them",
                hint="another program changes the packet filter at the same time; see `iptables -S`",
            )
        return True

    def remove(self, family: Family) -> bool:
        """Remove our jumps and chains, wherever they hang, and return whether there were any."""
        if self.availability(family):
            return False
        changed = False
        for chain, own_parent in ((FORWARD_CHAIN, "FORWARD"), (INPUT_CHAIN, "INPUT")):
            for parent in dict.fromkeys(("DOCKER-USER", own_parent)):
                for line in self._list(family, parent) or []:
                    if _parse(family, parent, line).text == f"-j {chain}":
                        self._change(family, "-D", parent, "-j", chain)
                        changed = True
            if self._list(family, chain) is not None:
                self._change(family, "-F", chain)
                self._change(family, "-X", chain)
                changed = True
        return changed


def _parse(family: Family, chain: str, line: str) -> Rule:
    """Read one line of ``iptables -S CHAIN -v``: ``-A CHAIN <match> -c PACKETS OCTETS -j ...``."""
    text = line.removeprefix(f"-A {chain} ")
    counters = re.search(r"-c (\d+) (\d+) ?", text)
    if counters is None:
        return Rule(family.name, chain, text.strip(), 0, 0)
    rest = (text[: counters.start()] + text[counters.end() :]).strip()
    return Rule(family.name, chain, rest, int(counters[1]), int(counters[2]))


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("action", choices=("apply", "remove", "status"), help="set, remove or show the rules")


def run(args: argparse.Namespace, console: Console) -> int:
    """Apply, remove or show; the result is the state afterwards."""
    firewall = Firewall(console)
    changed = False
    if args.action in ("apply", "remove"):
        for family in FAMILIES:
            why = firewall.availability(family)
            if not why:
                changed |= firewall.apply(family) if args.action == "apply" else firewall.remove(family)
            elif family.name == "ipv4":
                raise FirewallFailed(
                    "the packet filter cannot be read", found=why, expected="iptables", hint=_HINT_ROOT
                )
    states = [firewall.status(f) for f in FAMILIES]
    closed = all(not s.missing and (s.available or s.family == "ipv6") for s in states)
    # `status` asks "is the way out closed?", so an open one is a refusal; after `remove` it is what was asked for.
    ok = closed or args.action == "remove"
    console.result(
        {
            "ok": ok,
            "exit": 0 if ok else FirewallFailed.exit_code,
            "closed": closed,
            "changed": changed,
            "families": [asdict(s) for s in states],
        },
        _text(states, closed, changed, args.action),
    )
    return 0 if ok else FirewallFailed.exit_code


def _text(states: Sequence[FamilyStatus], closed: bool, changed: bool, action: str) -> str:
    lines = []
    for state in states:
        if not state.available:
            lines.append(f"{state.family}: not available here ({state.why})")
            continue
        for rule in state.rules:
            lines.append(f"{state.family} {rule.chain:<12} {rule.packets:>8} refused   {rule.text}")
        for name in state.missing if action != "remove" else ():
            lines.append(f"{state.family}: missing: {name}")
    if action == "remove":
        lines.append("firewall: the rules are removed" if changed else "firewall: there was nothing to remove")
    elif closed:
        lines.append(f"firewall: closed ({'changed' if changed else 'nothing to change'})")
    else:
        lines.append("firewall: OPEN; run `moat firewall apply`")
    return "\n".join(lines)
