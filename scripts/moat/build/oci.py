# SPDX-License-Identifier: Apache-2.0
"""Image archives that every engine loads: an OCI layout and docker's ``manifest.json`` over the same blobs.

``docker load`` refuses a pure OCI archive (20.10), other tools refuse a pure docker one; both
descriptions fit into one tar because docker's may point at any path in it. The image ID that the
engine shows is the digest of the configuration, known before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moat.build.cache import sha256_file
from moat.build.layers import Layer, Node, add_to_tar
from moat.errors import BuildFailed

_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class ImageConfig:
    """What the engine needs to start a container. ``created`` is seconds; ``labels`` are sorted pairs."""

    architecture: str
    created: int
    user: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    workdir: str
    env: tuple[tuple[str, str], ...]
    ports: tuple[int, ...]
    stop_signal: str
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Archive:
    """A written archive. ``image_id`` is the config digest, ``unpacked`` the sum of the layers in bytes."""

    path: Path
    image_id: str
    reference: str
    unpacked: int


def encode(document: object) -> bytes:
    """Return canonical JSON: sorted keys, no white space."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def digest_of(data: bytes) -> str:
    """Return ``sha256:<hex>``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def config_bytes(config: ImageConfig, layers: Sequence[Layer]) -> bytes:
    """Return the image configuration; its digest is the image ID."""
    created = datetime.fromtimestamp(config.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    inner: dict[str, Any] = {
        "User": config.user,
        "Entrypoint": list(config.entrypoint),
        "WorkingDir": config.workdir,
        "Env": [f"{k}={v}" for k, v in config.env],
        "ExposedPorts": {f"{p}/tcp": {} for p in config.ports},
        "StopSignal": config.stop_signal,
        "Labels": dict(config.labels),
    }
    if config.command:
        inner["Cmd"] = list(config.command)
    return encode(
        {
            "architecture": config.architecture,
            "os": "linux",
            "created": created,
            "config": inner,
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": created, "created_by": f"moat build: {layer.name}"} for layer in layers],
        }
    )


def write_archive(path: Path, *, name: str, version: str, config: ImageConfig, layers: Sequence[Layer]) -> Archive:
    """Write the hybrid archive of one image.

    Args:
        path: the ``.tar`` to write.
        name: the image's name; the reference is ``moat/<name>:<version>-<first 12 hex digits of the id>``.
        version: Moat's version.
        config: what the engine shows and runs.
        layers: bottom first.

    Raises:
        BuildFailed: a layer's blob is not what its digest says.
    """
    raw_config = config_bytes(config, layers)
    image_id = digest_of(raw_config)
    hexid = image_id.removeprefix("sha256:")
    reference = f"moat/{name}:{version}-{hexid[:12]}"
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {"mediaType": _CONFIG, "digest": image_id, "size": len(raw_config)},
            "layers": [{"mediaType": _LAYER, "digest": layer.digest, "size": layer.size} for layer in layers],
        }
    )
    index = encode(
        {
            "schemaVersion": 2,
            "mediaType": _INDEX,
            "manifests": [
                {
                    "mediaType": _MANIFEST,
                    "digest": digest_of(manifest),
                    "size": len(manifest),
                    "platform": {"architecture": config.architecture, "os": "linux"},
                    # containerd names an image by the first, other tools by the second.
                    "annotations": {
                        "io.containerd.image.name": f"docker.io/{reference}",
                        "org.opencontainers.image.ref.name": reference,
                    },
                }
            ],
        }
    )
    docker = encode(
        [
            {
                "Config": blob_path(image_id),
                "RepoTags": [reference],
                "Layers": [blob_path(layer.digest) for layer in layers],
            }
        ]
    )
    nodes = {
        "oci-layout": Node("oci-layout", 0o644, "archive", data=encode({"imageLayoutVersion": "1.0.0"})),
        "index.json": Node("index.json", 0o644, "archive", data=index),
        "manifest.json": Node("manifest.json", 0o644, "archive", data=docker),
        "blobs": Node("blobs", 0o755, "archive"),
        "blobs/sha256": Node("blobs/sha256", 0o755, "archive"),
    }
    for data in (raw_config, manifest):
        p = blob_path(digest_of(data))
        nodes[p] = Node(p, 0o644, "archive", data=data)
    for layer in layers:
        if (found := f"sha256:{sha256_file(layer.blob)}") != layer.digest:
            raise BuildFailed(
                f"the layer {layer.name} of {name} is damaged in the cache",
                found=found,
                expected=layer.digest,
                hint=f"delete {layer.blob.parent} and build again",
                path=str(layer.blob),
            )
        p = blob_path(layer.digest)
        nodes[p] = Node(p, 0o644, "archive", source=layer.blob)
    with path.open("wb") as out, tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key in sorted(nodes):
            add_to_tar(tar, nodes[key], config.created)
    return Archive(path, image_id, reference, sum(layer.unpacked for layer in layers))


def blob_path(digest: str) -> str:
    """Return a blob's place in the archive."""
    return "blobs/" + digest.replace(":", "/")
