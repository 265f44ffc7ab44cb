# SPDX-License-Identifier: Apache-2.0
"""Where the positive controls of one run are aimed, so that every layer knows them again.

All destinations are documentation addresses (RFC 5737, RFC 3849): nobody answers there, and no real
leak goes there by chance. Host part, port and name are drawn for each run, so that a control is
never mixed up with what an earlier run or a planted test left behind.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from typing import Final

#: The component of an attempt that is a positive control.
CONTROL: Final = "control"


@dataclass(frozen=True)
class Marks:
    """The destinations of one run's controls.

    Attributes:
        ipv4: an address in 198.51.100.0/24.
        ipv6: an address in 2001:db8::/32.
        port: of all controls but the one that asks for a name.
        name: what the control of the name layer asks for; ``.invalid`` exists nowhere.
    """

    ipv4: str
    ipv6: str
    port: int
    name: str

    def is_control(self, address: str, port: int) -> bool:
        """Whether an attempt at ``address`` and ``port`` is one of ours."""
        return address in (self.ipv4, self.ipv6) and port in (self.port, self.call_port, 53)

    @property
    def call_port(self) -> int:
        """The port of the control that is a call without a packet."""
        return self.port + 1


def draw() -> Marks:
    """Draw the destinations of a run."""
    word = secrets.token_hex(4)
    return Marks(
        ipv4=f"198.51.100.{1 + secrets.randbelow(254)}",
        ipv6=str(ipaddress.IPv6Address(f"2001:db8::{word[:4]}:{word[4:]}")),
        port=20000 + secrets.randbelow(20000),
        name=f"control-{word}.moat.invalid",
    )
