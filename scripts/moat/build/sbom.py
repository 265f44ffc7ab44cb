# SPDX-License-Identifier: Apache-2.0
"""CycloneDX 1.6 documents: one an image, one for the wheel house, one for the apt repository.

Deterministic: the time is ``SOURCE_DATE_EPOCH``, the serial number is derived from the content.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from moat.build.components import Component, dump, license_field

#: Our own name space for serial numbers (a fixed random number).
_SPACE = uuid.UUID("7f6b1c4e-2d7a-4f43-9a0e-5c1b6a2f9d10")
_TYPES = {"program": "application", "model": "machine-learning-model", "code": "application"}


def _component(c: Component) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": _TYPES.get(c.kind, "library"),
        "bom-ref": c.purl,
        "name": c.name,
        "version": c.version,
        "purl": c.purl,
        "licenses": license_field(c.license),
        "properties": [{"name": "moat:kind", "value": c.kind}],
    }
    if c.sha256:
        entry["hashes"] = [{"alg": "SHA-256", "content": c.sha256}]
    return entry


def document(
    *, name: str, version: str, kind: str, sha256: str, components: Iterable[Component], source_date_epoch: int
) -> bytes:
    """Return one SBOM.

    Args:
        name: what it describes, e.g. ``moat/gateway``.
        version: of that.
        kind: CycloneDX type: ``container`` or ``file``.
        sha256: hash of that (an image's id without its prefix), or empty.
        components: its parts.
        source_date_epoch: the time of the document.
    """
    by_ref = {c.purl: c for c in sorted(set(components))}
    subject: dict[str, Any] = {"type": kind, "bom-ref": f"moat:{name}", "name": name, "version": version}
    if sha256:
        subject["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    parts = [_component(by_ref[ref]) for ref in sorted(by_ref)]
    body: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(source_date_epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": subject,
            "tools": {"components": [{"type": "application", "name": "moat"}]},
        },
        "components": parts,
        "dependencies": [{"ref": subject["bom-ref"], "dependsOn": sorted(by_ref)}],
    }
    body["serialNumber"] = f"urn:uuid:{uuid.uuid5(_SPACE, dump(body).decode('utf-8'))}"
    return dump(body)
