# SPDX-License-Identifier: Apache-2.0
"""What crosses the boundaries inside the egress verification, and the verdict.

The fields of :class:`Report` that ``to_dict`` writes are the contract of ``egress-report.json``
(docs/architecture.md, section 10). A *layer* watches one kind of trace that an attempt to leave can
make; a *site* is a running deployment (systemd or Compose) that can be restarted inside the capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

JSON_NAME: Final = "egress-report.json"


@dataclass(frozen=True)
class Component:
    """One service of the site.

    Attributes:
        name: as the operator knows it: ``gateway-1``, ``minio``, ``nginx``, ...
        unit: systemd unit or container name.
        uid: numeric user id of its processes, as the host sees it.
        addresses: its own addresses on container networks; empty under systemd.
        cgroup: element of its control group's path by which its processes are told from others of the
            same user: a container's id; empty means the unit's name.
    """

    name: str
    unit: str
    uid: int
    addresses: tuple[str, ...] = ()
    cgroup: str = ""


@dataclass(frozen=True)
class Endpoint:
    """One address that the effective configuration names; ``allowed`` by the site's allow-list or loopback."""

    setting: str
    url: str
    allowed: bool


@dataclass(frozen=True)
class Attempt:
    """One attempt to leave.

    Attributes:
        when: UTC, ISO 8601 with milliseconds and ``Z``.
        layer: name of the layer that saw it.
        process: ``pid/comm`` where the layer knows it, else what it knows (``uid 10102``), never empty.
        component: name of the component, ``control`` for the positive control, or ``unknown``.
        destination: ``udp 203.0.113.5:53``, ``tcp [2001:db8::1]:443``, ``name api.example.com (A)``.
        detail: one sentence more for the page, or empty.
    """

    when: str
    layer: str
    process: str
    component: str
    destination: str
    detail: str = ""


@dataclass(frozen=True)
class LayerResult:
    """What a layer could do here.

    Attributes:
        name: ``packets``, ``dns``, ``syscalls``, ``bridges``, ...
        available: the host offers it.
        control_caught: its positive control was seen by it; ``None`` where it is not available.
        why: why it is not available, or what the control was.
        notes: what it did not see in this run, or left alone: no finding, but whoever accepts the report has to know.
    """

    name: str
    available: bool
    control_caught: bool | None
    why: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RequestResult:
    """One first request: ``kind`` (chat, stream, embeddings, models, ui, metrics), HTTP ``status`` (0: none), word."""

    kind: str
    status: int
    ok: bool
    note: str


@dataclass(frozen=True)
class Probe:
    """One proof about the deployment that is not a capture, e.g. that a container cannot reach the host's services."""

    name: str
    ok: bool
    found: str
    expected: str


@dataclass(frozen=True)
class Step:
    """One thing that was done, for the timeline. ``when`` as in :class:`Attempt`."""

    when: str
    what: str


@dataclass(frozen=True)
class Report:
    """The whole evidence.

    ``rules`` are the packet filter's rules in force, as text; ``allowed`` is the allow-list; ``host`` holds facts that
    are no part of the verdict (``command``, ``kernel``, the host's own name servers). ``attempts`` holds no controls.
    ``subject`` is what was verified: release, rules and configurations that were in force, by name.
    """

    site: str
    started: str
    ended: str
    quiet_seconds: float
    components: tuple[Component, ...]
    endpoints: tuple[Endpoint, ...]
    layers: tuple[LayerResult, ...]
    requests: tuple[RequestResult, ...]
    attempts: tuple[Attempt, ...]
    probes: tuple[Probe, ...] = ()
    rules: str = ""
    problems: tuple[str, ...] = ()
    host: dict[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    allowed: tuple[str, ...] = ()
    subject: dict[str, str] = field(default_factory=dict)

    @property
    def proven(self) -> bool:
        """Whether enough was measured: packets or system calls, and every available layer caught its control.

        ``bridges`` are the packets of containers.
        """
        able = [layer for layer in self.layers if layer.available]
        return (
            any(layer.name in ("packets", "bridges", "syscalls") for layer in able)
            and all(layer.control_caught for layer in able)
            and not self.problems
        )

    @property
    def clean(self) -> bool:
        """Whether nothing was tried, every endpoint is allowed and every probe holds."""
        return not self.attempts and all(e.allowed for e in self.endpoints) and all(p.ok for p in self.probes)

    @property
    def ok(self) -> bool:
        """The verdict."""
        return self.proven and self.clean

    def to_dict(self) -> dict[str, Any]:
        """Return the object of ``egress-report.json``."""
        return {"ok": self.ok, "proven": self.proven, "clean": self.clean, **asdict(self)}


class Layer(Protocol):
    """One capture layer. ``start`` raises :class:`NotAvailable` where the host does not offer it."""

    name: str

    def start(self, components: Sequence[Component]) -> None:
        """Begin to watch; what the components may do (loopback, allow-list, each other) is not an attempt."""

    def control(self) -> str:
        """Make one deliberate attempt that this layer must see, and return its destination; component ``control``."""

    def stop(self) -> list[Attempt]:
        """End, remove everything that ``start`` made, and return what was seen, the control included."""


class NotAvailable(Exception):
    """This host does not offer the layer; the message says why, for the report."""


class Site(Protocol):
    """A running deployment."""

    kind: str

    def components(self) -> list[Component]:
        """List what runs."""

    def endpoints(self) -> list[Endpoint]:
        """List every address that the effective configuration names."""

    def layers(self, allowed: Sequence[str]) -> list[Layer]:
        """Return the capture layers that fit this kind of site, available or not."""

    def restart(self, components: Sequence[Component]) -> None:
        """Restart the services while the layers watch, and wait until the site answers again."""

    def subject(self) -> dict[str, str]:
        """Return what is in force at this moment: release, rules, configurations."""

    def changes(self) -> list[str]:
        """Say which services did not run, or not all the time since the restart: what they would try was not seen."""

    def requests(self) -> list[RequestResult]:
        """Send a first request of every kind."""

    def probes(self) -> list[Probe]:
        """Prove what is not a capture."""

    def rules(self) -> str:
        """Return the packet filter's rules in force."""
