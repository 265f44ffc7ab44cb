# SPDX-License-Identifier: Apache-2.0
"""Values in a configuration that look like real secrets: a revision is kept in the store and copied to every node.

A guess, made so that it does not hit what people write where a server asks for no key (``not-needed``, ``sk-1234``,
``sk-no-key-required``, ``${API_KEY}``): a short password, or one made of words, is not recognised.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from moat_gateway import configrules as rules
from moat_gateway.strictyaml import Trail

#: Names of parameters that hold a secret; ``public_key`` and the like hold none.
_NAME = re.compile(
    r"(?<!public)(?:^|[_-])(?:api)?(?:keys?|tokens?|secrets?|passwords?|passwd|pwd|passphrase|credentials?|auth|authorization)$",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_IN_URL = re.compile(r"://[^/@\s:]*:([^/@\s]+)@")
_SCHEME = re.compile(r"(?:bearer|basic|token)\s+", re.IGNORECASE)  # of an Authorization header
_SECRET_TEXT = re.compile(r"[A-Za-z0-9+/=_.~-]+")
#: How keys of well-known services and of Moat begin.
_PREFIX = re.compile(r"sk-|hf_|gsk_|xai-|nvapi-|ghp_|github_pat_|glpat-|AKIA|AIza|xox[abps]-")
_AFTER_PREFIX = 16  # characters
_WORD = r"(?:[A-Za-z]?[a-z]+[0-9]{0,4}|[0-9]{1,4})"
_WORDS = re.compile(rf"{_WORD}(?:[-_.]{_WORD})*|(.)\1*")  # of a placeholder
_CAPITAL = re.compile(r"[A-Z](?=[a-z]{2})")  # begins a word
_HEX = re.compile(r"[0-9a-fA-F]{32,}")
_RANDOM = 20  # characters that a random value has at least
_DIGITS = 3  # so many of them are digits at least
_DIFFERENT = 8  # characters that are not the same
_CHANGES = 0.3  # of its characters follow one of another kind (in hex digits every second one does, in words few)


def find(value: Any, at: Trail = ()) -> Iterator[tuple[Trail, int]]:
    """Yield what looks like a secret: where, and how many characters it has."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from find(v, (*at, k if isinstance(k, int) and not isinstance(k, bool) else str(k)))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from find(v, (*at, i))
    elif isinstance(value, str) and looks_secret(next((s for s in reversed(at) if isinstance(s, str)), ""), value):
        yield at, len(value)


def looks_secret(name: str, value: str) -> bool:
    """Say whether the value of a parameter looks like a real secret."""
    if value.startswith((rules.REFERENCE, rules.FILE_REFERENCE)):
        return False
    if _PRIVATE_KEY.search(value):
        return True
    if any(_looks_made(part) for part in _IN_URL.findall(value)):
        return True
    return bool(_NAME.search(name)) and _looks_made(_SCHEME.sub("", value.strip(), count=1))


def _looks_made(text: str) -> bool:
    """Say whether a machine made this text."""
    if not _SECRET_TEXT.fullmatch(text) or len(set(text)) < _DIFFERENT:
        return False
    prefix = _PREFIX.match(text)
    if prefix is not None:
        rest = text[prefix.end() :]
        return len(rest) >= _AFTER_PREFIX and not _WORDS.fullmatch(rest)
    if _HEX.fullmatch(text):
        return True
    plain = re.sub(r"[^A-Za-z0-9]", "", text)
    kinds = [c.isdigit() + 2 * c.isupper() for c in _CAPITAL.sub("x", plain)]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    return (
        len(plain) >= _RANDOM and sum(c.isdigit() for c in plain) >= _DIGITS and changes >= _CHANGES * (len(plain) - 1)
    )
