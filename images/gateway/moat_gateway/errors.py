# SPDX-License-Identifier: Apache-2.0
"""Every way in which ``moat-gateway`` can refuse: one class a failure, one exit code a class.

Exit codes are an API (``docs/reference/gateway-exit-codes.md``; a test compares the two). ``0`` is done, ``1`` a
defect of ours (with a traceback), ``2`` wrong usage (argparse's own code), and from ``3`` on one for each documented
kind of refusal.
"""

from __future__ import annotations

from typing import ClassVar


class GatewayError(Exception):
    """A refusal that the operator can act on.

    Args:
        message: what happened, one line, naming the file or thing. Never a secret.
        found: what was there, or ``None`` where there is nothing to compare.
        expected: what should have been there.
        hint: what to do next, as an instruction.
        path: the file or setting that the refusal is about.
        line: the line in ``path``, from 1, or ``None``.
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
        line: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.found = found
        self.expected = expected
        self.hint = hint
        self.path = path
        self.line = line

    def one_line(self) -> str:
        """Return the whole refusal as one line: where, what, found, expected, what to do."""
        where = f"{self.path} line {self.line}: " if self.path and self.line else f"{self.path}: " if self.path else ""
        parts = [where + self.message]
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        text = "; ".join(parts)
        if self.hint:
            text += f". Do: {self.hint}"
        return " ".join(text.split())

    def to_dict(self) -> dict[str, str | int | None]:
        """Return the fields of one entry of ``problems``."""
        return {
            "kind": self.kind,
            "path": self.path,
            "line": self.line,
            "message": self.message,
            "found": self.found,
            "expected": self.expected,
            "hint": self.hint,
        }


class BadSetting(GatewayError):
    """A setting (`MOAT_*`, or `/etc/moat/gateway.yaml`) has a value that cannot be used."""

    exit_code, kind = 3, "bad-setting"


class BadMasterKey(GatewayError):
    """The master key is missing, too short, or well known."""

    exit_code, kind = 4, "bad-master-key"


class UnreadableSecret(GatewayError):
    """A secret file cannot be read, or does not hold one line of text."""

    exit_code, kind = 5, "unreadable-secret"


class UnsetSecret(GatewayError):
    """The configuration refers to a secret for which there is no file."""

    exit_code, kind = 6, "unset-secret"


class BadConfig(GatewayError):
    """`config.yaml` cannot be read, is not strict YAML, or has the wrong shape."""

    exit_code, kind = 7, "bad-config"


class EndpointRefused(GatewayError):
    """The configuration names an endpoint outside the allow-list, or would call one by default."""

    exit_code, kind = 8, "endpoint-refused"


class NoModels(GatewayError):
    """The configuration leaves no model to serve."""

    exit_code, kind = 9, "no-models"


class DatabaseSet(GatewayError):
    """A database is configured; the gateway runs without one."""

    exit_code, kind = 10, "database-set"


class SettingRefused(GatewayError):
    """The configuration holds a LiteLLM setting that would undo what Moat enforces."""

    exit_code, kind = 11, "setting-refused"


class BadKeys(GatewayError):
    """`keys.yaml` cannot be read, is malformed, or does not hold what the command needs."""

    exit_code, kind = 12, "bad-keys"


class CannotListen(GatewayError):
    """The port or the admin socket cannot be opened."""

    exit_code, kind = 13, "cannot-listen"


class LiteLLMRefused(GatewayError):
    """LiteLLM is missing, is not the pinned version's shape, or did not accept the configuration."""

    exit_code, kind = 14, "litellm-refused"


class NotRunning(GatewayError):
    """No gateway runs: nobody listens on the admin socket, or there is none."""

    exit_code, kind = 15, "not-running"


class RequestFailed(GatewayError):
    """`moat-gateway ask` got no complete answer."""

    exit_code, kind = 16, "request-failed"


class StoreFailed(GatewayError):
    """The object store cannot be reached, or refuses."""

    exit_code, kind = 17, "store-failed"


class TlsFailed(GatewayError):
    """A certificate could not be made, or a file is in the way."""

    exit_code, kind = 18, "tls-failed"


class BadRevision(GatewayError):
    """A revision cannot be used: its archive, a hash, a size, a missing object, or a file that does not belong."""

    exit_code, kind = 19, "bad-revision"


class BadSignature(GatewayError):
    """A revision is not signed by a site key that is trusted here."""

    exit_code, kind = 20, "bad-signature"


class OlderRevision(GatewayError):
    """The pointer leads back to a revision that is older than the one in force."""

    exit_code, kind = 21, "older-revision"


class PushConflict(GatewayError):
    """Somebody else pushed a revision at the same time; what is in force is theirs, and nothing of yours."""

    exit_code, kind = 22, "push-conflict"


class NotConverged(GatewayError):
    """The revision is pushed, and not every gateway serves it in time (`--wait`)."""

    exit_code, kind = 23, "not-converged"


class DryRunFailed(GatewayError):
    """LiteLLM's router cannot be built from the configuration, or not within the limits of time and memory."""

    exit_code, kind = 24, "dry-run-failed"


class BadSiteKey(GatewayError):
    """A site key is missing, or its file cannot be used."""

    exit_code, kind = 25, "bad-site-key"


class SyncFolderFailed(GatewayError):
    """The folder of config-sync cannot be written, or another config-sync holds it."""

    exit_code, kind = 26, "sync-folder-failed"


class SyncStuck(GatewayError):
    """A step of config-sync does not come to its end; whoever runs it starts it again."""

    exit_code, kind = 27, "sync-stuck"


class NoAnswer(GatewayError):
    """Something has the admin socket, and no usable answer came from it in time: a gateway may be busy."""

    exit_code, kind = 28, "no-answer"


def all_kinds() -> list[type[GatewayError]]:
    """Return every refusal class, ordered by exit code."""
    return sorted(GatewayError.__subclasses__(), key=lambda c: c.exit_code)
