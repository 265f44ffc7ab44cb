# SPDX-License-Identifier: Apache-2.0
"""``bundles/policy.yaml``: the supply-chain rules as data, and their judgement of one input.

Each rule is a method that returns nothing or raises :class:`moat.errors.PolicyRefused` with the rule's name and the
file. Nothing here reads a network or a clock: the moment of the lock is a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from moat.build.locks import ROOT, LockedFile
from moat.errors import LockFailed, PolicyRefused

POLICY = ROOT / "bundles" / "policy.yaml"
_DOC = "docs/locks-and-policy.md"


@dataclass(frozen=True)
class Denied:
    """One entry of the deny-list; no ``versions`` means every version."""

    kind: str
    name: str
    versions: tuple[str, ...]
    reason: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Exception_:
    """A named exception: from the start-up hook rule (``file``) or the minimum age (``version``)."""

    name: str
    reason: str
    file: str = ""
    version: str = ""


@dataclass(frozen=True)
class LicenseEntry:
    """A licence that a person stated: an override of metadata, or a component named under its licence."""

    kind: str
    name: str
    license: str
    reason: str
    version: str = ""


def _name(kind: str, name: str) -> str:
    return canonicalize_name(name) if kind == "wheel" else name


def _operands(expression: str) -> Iterable[tuple[str, ...]]:
    """Yield the alternatives of each AND operand of an SPDX expression.

    ``A AND (B OR C)`` gives ``(A,)``, ``(B, C)``. An expression of another shape (an AND inside an OR) is left whole,
    and so is refused unless it is allowed as it stands.
    """
    depth, start, parts = 0, 0, []
    for m in re.finditer(r"\(|\)|\sAND\s", expression):
        if m[0] == "(":
            depth += 1
        elif m[0] == ")":
            depth -= 1
        elif depth == 0:
            parts.append(expression[start : m.start()])
            start = m.end()
    parts.append(expression[start:])
    for part in parts:
        inner = part.strip()
        while inner.startswith("(") and inner.endswith(")") and _balanced(inner[1:-1]):
            inner = inner[1:-1].strip()
        if re.search(r"\sAND\s", inner):
            if re.search(r"\sOR\s", inner):
                yield (inner,)
            else:
                yield from _operands(inner)
        else:
            yield tuple(x.strip().strip("()") for x in re.split(r"\sOR\s", inner))


def _balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if depth < 0:
            return False
    return depth == 0


@dataclass(frozen=True)
class Policy:
    """The rules; see the comments in ``bundles/policy.yaml`` for what each is for."""

    denied: tuple[Denied, ...]
    refuse_sdist: bool
    hooks_allowed: tuple[Exception_, ...]
    minimum_age_days: int
    age_exempt: tuple[Exception_, ...]
    licenses_allowed: frozenset[str]
    licenses_named: tuple[LicenseEntry, ...]
    debian_main_allowed: bool
    license_overrides: tuple[LicenseEntry, ...]

    def check_denied(self, kind: str, name: str, version: str, filename: str) -> None:
        """Refuse what is on the deny-list."""
        for d in self.denied:
            if d.kind != kind or _name(kind, d.name) != _name(kind, name):
                continue
            if not d.versions or any(SpecifierSet(v).contains(version, prereleases=True) for v in d.versions):
                raise PolicyRefused(
                    f"rule deny: {name} {version} must not enter a bundle ({filename})",
                    found=f"{d.reason} [{'; '.join(d.references)}]",
                    expected="another version" if d.versions else "the package left out",
                    hint="change bundles/components.yaml so that it is not resolved",
                    path=filename,
                )

    def check_sdist(self, name: str, version: str, filenames: Iterable[str]) -> None:
        """Refuse a release that comes as a source archive alone."""
        names = list(filenames)
        if self.refuse_sdist and names and not any(n.endswith(".whl") for n in names):
            raise PolicyRefused(
                f"rule sdist: {name} {version} has no wheel ({names[0]})",
                found=", ".join(names),
                expected="a wheel for the target",
                hint="take a version that has one; a source archive runs its own code when it is built",
                path=names[0],
            )

    def check_startup_hooks(self, name: str, filename: str, members: Iterable[str]) -> None:
        """Refuse a wheel with a file that runs when an interpreter starts.

        Args:
            name: of the package.
            filename: of the wheel.
            members: paths in the wheel.
        """
        allowed = {(canonicalize_name(a.name), a.file) for a in self.hooks_allowed}
        for member in members:
            # Wheels put files into site-packages at their top, or under NAME.data/{purelib,platlib}/.
            top = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member)
            base = top.rsplit("/", 1)[-1]
            in_site = "/" not in top
            hook = (in_site and re.search(r"\.(pth|start)$", base, re.I) is not None) or (
                re.fullmatch(r"(site|user)customize(\.py[co]?|\.[^/]*\.so|\.so)?", top.split("/")[0]) is not None
            )
            # `NAME.data/data/` lands in the prefix: lib/python3.x/site-packages can be reached that way too.
            in_data = re.match(r"^[^/]+\.data/data/", member) is not None
            hook = hook or (
                in_data and re.search(r"(\.pth|\.start|(site|user)customize[^/]*)$", base, re.I) is not None
            )
            if hook and (canonicalize_name(name), base) not in allowed:
                raise PolicyRefused(
                    f"rule startup-hook: {filename} ships {member}, which runs at every start of Python",
                    found=member,
                    expected="no *.pth, *.start, sitecustomize or usercustomize",
                    hint=f"read that file; if it must be, name it under startup_hooks.allow ({_DOC})",
                    path=filename,
                )

    def check_age(self, name: str, version: str, filename: str, uploaded: datetime | None, now: datetime) -> bool:
        """Refuse an upload younger than the minimum age; return False where the index does not tell."""
        if uploaded is None:
            return False
        exempt = any(
            canonicalize_name(e.name) == canonicalize_name(name) and e.version == version for e in self.age_exempt
        )
        if not exempt and now - uploaded < timedelta(days=self.minimum_age_days):
            raise PolicyRefused(
                f"rule minimum-age: {filename} was uploaded {(now - uploaded).days} days ago",
                found=f"uploaded {uploaded:%Y-%m-%d %H:%M} UTC",
                expected=f"at least {self.minimum_age_days} days old",
                hint=f"wait, pin an older version, or name it under minimum_age.exempt with the reason ({_DOC})",
                path=filename,
            )
        return True

    def newest_allowed(self, now: datetime) -> dict[str, datetime]:
        """Return what the resolver may look at: uploads before the value; the key ``""`` stands for every package."""
        return {"": now - timedelta(days=self.minimum_age_days)} | {e.name: now for e in self.age_exempt}

    def license_of(self, kind: str, name: str, version: str, metadata: str) -> str:
        """Return the licence that counts: an override where one is stated, else the metadata's."""
        for o in self.license_overrides:
            if o.kind == kind and fnmatchcase(_name(kind, name), o.name) and o.version in ("", version):
                return o.license
        return metadata

    def check_licenses(self, entries: Iterable[LockedFile]) -> None:
        """Refuse licences that are not allowed, all of them in one message, so that one look is enough.

        Raises:
            PolicyRefused: naming every file that is refused.
        """
        refused: list[PolicyRefused] = []
        for e in entries:
            try:
                self.check_license(e)
            except PolicyRefused as refusal:
                refused.append(refusal)
        if len(refused) == 1:
            raise refused[0]
        if refused:
            first = refused[0]
            raise PolicyRefused(
                f"rule license: {len(refused)} files are refused",
                found="\n            ".join(r.message.removeprefix("rule license: ") for r in refused),
                expected=first.expected,
                hint=first.hint,
                path=first.path,
            )

    def check_license(self, entry: LockedFile) -> None:
        """Refuse a licence that is not allowed."""
        in_main = re.match(r"debian(-security)?:[a-z-]+/main/pool/", entry.source) is not None
        if entry.kind == "deb" and self.debian_main_allowed and in_main:
            return
        if any(
            n.kind == entry.kind and _name(n.kind, n.name) == _name(n.kind, entry.name) and n.license == entry.license
            for n in self.licenses_named
        ):
            return
        for alternatives in _operands(entry.license):
            if not any(a in self.licenses_allowed for a in alternatives):
                raise PolicyRefused(
                    f"rule license: {entry.filename} is under {entry.license}",
                    found=" OR ".join(alternatives),
                    expected="a licence of licenses.allow, or the component named under licenses.named",
                    hint=f"leave it out, or read its licence and state it in bundles/policy.yaml ({_DOC})",
                    path=entry.filename,
                )


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{value!r} is not a list of strings")
    return tuple(value)


def read_policy(path: Path = POLICY) -> Policy:
    """Read the rules.

    Raises:
        LockFailed: the file is missing or not of this form; a rule that cannot be read is never skipped.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
        if set(raw) != {"deny", "sdist", "startup_hooks", "minimum_age", "licenses"}:
            raise ValueError(f"the rules are {sorted(raw)}")
        if raw["sdist"] not in ("refuse", "allow"):
            raise ValueError(f"sdist is {raw['sdist']!r}")
        licenses = raw["licenses"]
        if set(licenses) != {"allow", "named", "debian_main", "overrides"}:
            raise ValueError(f"licenses holds {sorted(licenses)}")
        denied = []
        for d in raw["deny"]:
            versions, references = _strings(d.pop("versions")), _strings(d.pop("references"))
            for v in versions:
                SpecifierSet(v)
            denied.append(Denied(**d, versions=versions, references=references))
        return Policy(
            denied=tuple(denied),
            refuse_sdist=raw["sdist"] == "refuse",
            hooks_allowed=tuple(Exception_(**e) for e in raw["startup_hooks"]["allow"]),
            minimum_age_days=int(raw["minimum_age"]["days"]),
            age_exempt=tuple(Exception_(**e) for e in raw["minimum_age"]["exempt"]),
            licenses_allowed=frozenset(_strings(licenses["allow"])),
            licenses_named=tuple(LicenseEntry(**e) for e in licenses["named"]),
            debian_main_allowed=licenses["debian_main"] == "allow",
            license_overrides=tuple(LicenseEntry(**e) for e in licenses["overrides"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as e:
        raise LockFailed(
            f"cannot read the rules in {path.name}", found=f"{type(e).__name__}: {e}", path=str(path)
        ) from e
