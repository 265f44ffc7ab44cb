# SPDX-License-Identifier: Apache-2.0
"""Every way in which ``moat`` can refuse: one class a failure, one exit code a class.

Exit codes are an API (``docs/reference/exit-codes.md``; a test compares the two). ``0`` is
done, ``1`` a defect of ours (with a traceback), ``2`` wrong usage (argparse's own code), and
from ``3`` on one for each documented kind of refusal.
"""

from __future__ import annotations

from typing import ClassVar


class MoatError(Exception):
    """A refusal that the operator can act on.

    Args:
        message: what happened, one line, naming the file or thing.
        found: what was there, or ``None`` where there is nothing to compare.
        expected: what should have been there.
        hint: what to do next, as an instruction.
        path: the file or object that the refusal is about, relative to the bundle where it is in one.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        found: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.found = found
        self.expected = expected
        self.hint = hint
        self.path = path

    def to_dict(self) -> dict[str, str | None]:
        """Return the fields of one entry of ``problems`` (architecture, section 10)."""
        return {
            "kind": self.kind,
            "path": self.path,
            "message": self.message,
            "found": self.found,
            "expected": self.expected,
            "hint": self.hint,
        }


# --- verification of a bundle: the words are the contract of `moat verify --json` ---


class BadSignature(MoatError):
    """The manifest's signature is malformed, or does not match the manifest."""

    exit_code, kind = 3, "bad-signature"


class UnknownKey(MoatError):
    """The manifest is signed by a key that this site does not trust."""

    exit_code, kind = 4, "unknown-key"


class MissingFile(MoatError):
    """The manifest lists a file that is not on the medium."""

    exit_code, kind = 5, "missing"


class ChangedFile(MoatError):
    """A file's size or sha256 differs from the manifest."""

    exit_code, kind = 6, "changed"


class ExtraFile(MoatError):
    """The medium holds a file that the manifest does not list."""

    exit_code, kind = 7, "extra"


class UnsafePath(MoatError):
    """A path escapes the bundle, is absolute, is a link, or has a twin by case or Unicode form."""

    exit_code, kind = 8, "unsafe-path"


class BadManifest(MoatError):
    """The manifest is missing, too large, malformed, not canonical, or of an unknown format."""

    exit_code, kind = 9, "bad-manifest"


class WrongTarget(MoatError):
    """The bundle is made for another distribution or architecture."""

    exit_code, kind = 10, "wrong-target"


class OlderThanInstalled(MoatError):
    """The bundle is older than the release that is installed (a replay)."""

    exit_code, kind = 11, "older"


class Unreadable(MoatError):
    """The medium returned an input/output error or refused access."""

    exit_code, kind = 12, "unreadable"


# --- the site's other commands ---


class HostNotReady(MoatError):
    """`moat doctor` found something that would make the installation fail."""

    exit_code, kind = 20, "host-not-ready"


class LoadFailed(MoatError):
    """The container engine refused an image, or the loaded image is not the one in the manifest."""

    exit_code, kind = 21, "load-failed"


class PrepareFailed(MoatError):
    """The deployment folder could not be prepared (`moat prepare`)."""

    exit_code, kind = 22, "prepare-failed"


class FirewallFailed(MoatError):
    """The rules that close the containers' ways out are not in place, or cannot be set (`moat firewall`)."""

    exit_code, kind = 23, "firewall-failed"


class EgressFound(MoatError):
    """Something tried to leave, a named endpoint is not allowed, or a probe does not hold (`moat egress verify`)."""

    exit_code, kind = 24, "egress-found"


class EgressUnproven(MoatError):
    """Nothing can be said: a positive control was not caught, or nothing could be measured (`moat egress verify`)."""

    exit_code, kind = 25, "egress-unproven"


class StageFailed(MoatError):
    """A release could not be brought into the store (`moat stage`, `pack`, `program`, `apt-sign`)."""

    exit_code, kind = 26, "stage-failed"


class EvidenceFailed(MoatError):
    """The evidence cannot be written, would hold a secret, or shows something that must not be (`moat evidence`)."""

    exit_code, kind = 27, "evidence-failed"


class InstallFailed(MoatError):
    """A playbook that `install.sh` or `moat-site` ran ended with an error; Ansible's words are in the log."""

    exit_code, kind = 28, "install-failed"


class GatewayFiles(MoatError):
    """Files of this host cannot be brought to `moat-gateway` or back (`moat gateway`, whose codes are else its own)."""

    exit_code, kind = 29, "gateway-files"


# --- the build host ---


class PolicyRefused(MoatError):
    """A supply-chain rule of ``bundles/policy.yaml`` refuses an input."""

    exit_code, kind = 30, "policy-refused"


class LockFailed(MoatError):
    """An input cannot be resolved, or a lock file is malformed."""

    exit_code, kind = 31, "lock-failed"


class LockStale(MoatError):
    """Locked Debian packages have vanished from the mirror; a reviewed lock is needed."""

    exit_code, kind = 32, "lock-stale"


class FetchFailed(MoatError):
    """A locked file could not be downloaded."""

    exit_code, kind = 33, "fetch-failed"


class HashMismatch(MoatError):
    """A download does not have the locked sha256 or size."""

    exit_code, kind = 34, "hash-mismatch"


class BuildFailed(MoatError):
    """A step of the bundle's build failed."""

    exit_code, kind = 35, "build-failed"


class KeyProblem(MoatError):
    """A key file is missing, malformed, too open, or its passphrase is wrong."""

    exit_code, kind = 36, "key-problem"


class DemoFailed(MoatError):
    """A step of `make demo` failed that no other refusal names."""

    exit_code, kind = 37, "demo-failed"


def all_kinds() -> list[type[MoatError]]:
    """Return every refusal class, ordered by exit code."""
    return sorted(MoatError.__subclasses__(), key=lambda c: c.exit_code)
