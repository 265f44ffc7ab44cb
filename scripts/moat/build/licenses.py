# SPDX-License-Identifier: Apache-2.0
"""Licences as SPDX expressions, from what upstreams actually write.

Four sources, each with its own dialect: wheel metadata (short names, classifiers), Debian's machine-readable
copyright files (DEP-5), and licence texts (Go modules). What is not recognised is ``NOASSERTION``: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NOASSERTION = "NOASSERTION"

#: Short names as they occur in `License:` fields and DEP-5, lower case, to SPDX.
_SHORT = {
    "0bsd": "0BSD",
    "afl-2.1": "AFL-2.1",
    "agpl-3": "AGPL-3.0-only",
    "agpl-3+": "AGPL-3.0-or-later",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license version 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache2": "Apache-2.0",
    "apache2.0": "Apache-2.0",
    "artistic-2.0": "Artistic-2.0",
    "boost": "BSL-1.0",
    "boost-1.0": "BSL-1.0",
    "bsd 2-clause": "BSD-2-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd-2": "BSD-2-Clause",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-4-clause": "BSD-4-Clause",
    "bsl-1.0": "BSL-1.0",
    "bzip2": "bzip2-1.0.6",
    "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "expat": "MIT",
    "expat license": "MIT",
    "gfdl-1.3+": "GFDL-1.3-or-later",
    "gpl-1+": "GPL-1.0-or-later",
    "gpl-2": "GPL-2.0-only",
    "gpl-2+": "GPL-2.0-or-later",
    "gpl-2.0": "GPL-2.0-only",
    "gpl-2.0+": "GPL-2.0-or-later",
    "gpl-2.0-only": "GPL-2.0-only",
    "gpl-2.0-or-later": "GPL-2.0-or-later",
    "gpl-3": "GPL-3.0-only",
    "gpl-3+": "GPL-3.0-or-later",
    "gpl-3.0": "GPL-3.0-only",
    "gpl-3.0+": "GPL-3.0-or-later",
    "hpnd": "HPND",
    "isc": "ISC",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "lgpl-2": "LGPL-2.0-only",
    "lgpl-2+": "LGPL-2.0-or-later",
    "lgpl-2.0+": "LGPL-2.0-or-later",
    "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-2.1+": "LGPL-2.1-or-later",
    "lgpl-2.1-or-later": "LGPL-2.1-or-later",
    "lgpl-3": "LGPL-3.0-only",
    "lgpl-3+": "LGPL-3.0-or-later",
    "lgpl-3.0-only": "LGPL-3.0-only",
    "mit": "MIT",
    "mit license": "MIT",
    "mit-0": "MIT-0",
    "mit-cmu": "MIT-CMU",
    "mit/x11": "MIT",
    "mpl 2.0": "MPL-2.0",
    "mpl-2": "MPL-2.0",
    "mpl-2.0": "MPL-2.0",
    "openssl": "OpenSSL",
    "psf": "PSF-2.0",
    "psf-2": "PSF-2.0",
    "psf-2.0": "PSF-2.0",
    "python-2.0": "Python-2.0",
    "the mit license": "MIT",
    "the unlicense": "Unlicense",
    "unicode-3.0": "Unicode-3.0",
    "unlicense": "Unlicense",
    "x11": "X11",
    "zlib": "Zlib",
    "zpl 2.1": "ZPL-2.1",
}

#: Trove classifiers that name one licence; the vague ones ("BSD License") are left out on purpose.
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "GNU Affero General Public License v3": "AGPL-3.0-only",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.1-or-later",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "Zope Public License": "ZPL-2.1",
}


def from_text(value: str) -> str:
    """Return the SPDX expression of a short `License:` field, or an empty string.

    An SPDX expression whose every identifier is known is taken as it is; a whole licence text is recognised by
    :func:`from_license_file`.
    """
    value = value.strip()
    if not value:
        return ""
    if "\n" in value:
        found = from_license_file(value)
        return "" if found == NOASSERTION else found
    if value.lower() in _SHORT:
        return _SHORT[value.lower()]
    parts = [p for p in re.split(r"\s+(?:AND|OR)\s+|[()]", value) if p.strip()]
    if len(parts) > 1 and all(p.strip() in _SHORT.values() for p in parts):
        return value
    return ""


def from_classifiers(classifiers: Iterable[str]) -> str:
    """Return the SPDX expression of trove classifiers, or an empty string."""
    found = {
        _CLASSIFIERS[c.rsplit(" :: ", 1)[-1]]
        for c in classifiers
        if c.startswith("License ::") and c.rsplit(" :: ", 1)[-1] in _CLASSIFIERS
    }
    # Several classifiers do not say whether they are alternatives: all of them must then be allowed.
    return " AND ".join(sorted(found))


def from_dep5(text: str) -> str:
    """Return the licences of a machine-readable Debian copyright file, joined by AND.

    A short name without an SPDX name here becomes ``LicenseRef-Debian-NAME``: its text is in that copyright file. A
    file in free text is ``NOASSERTION``. What covers ``debian/`` alone is packaging and does not count.
    """
    if not re.match(r"(Format|Format-Specification):\s*\S*(copyright-format|dep5)", text.lstrip("\ufeff \n"), re.I):
        return NOASSERTION
    expressions: set[str] = set()
    for paragraph in re.split(r"\n[ \t]*\n", text):
        files = re.search(r"^Files:[ \t]*((?:.*)(?:\n[ \t]+.*)*)", paragraph, re.M | re.I)
        if files is None or all(f.startswith("debian/") for f in files[1].split()):
            continue
        for found in re.finditer(r"^License:[ \t]*(\S.*)$", paragraph, re.M | re.I):
            expressions.add(_dep5_expression(found[1].strip()))
    whole = sorted(f"({e})" if " OR " in e and len(expressions) > 1 else e for e in expressions)
    # "A AND B" beside "A" says nothing more: the operands count once.
    operands = {o for e in whole for o in ([e] if "(" in e or " OR " in e else e.split(" AND "))}
    return " AND ".join(sorted(operands)) or NOASSERTION


def _dep5_expression(name: str) -> str:
    """Return one DEP-5 ``License:`` line as SPDX: ``A or B, and C`` with its own precedence (a comma binds last)."""

    def single(word: str) -> str:
        return _SHORT.get(word.lower(), "LicenseRef-Debian-" + re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-"))

    groups = []
    for part in re.split(r",\s*(?:and\s+)?", name):
        alternatives = [
            " AND ".join(single(w.strip()) for w in re.split(r"\s+and\s+", a) if w.strip())
            for a in re.split(r"\s+(?:and/)?or\s+", part)
        ]
        joined = " OR ".join(f"({a})" if " AND " in a and len(alternatives) > 1 else a for a in alternatives)
        groups.append(joined)
    return " AND ".join(f"({g})" if " OR " in g and len(groups) > 1 else g for g in groups)


_WORDS = re.compile(r"[a-z0-9]+")
#: Phrases of a licence's own text or notice, in words without punctuation (a mere mention has none of them).
_FINGERPRINTS = (
    ("AGPL-3.0-only", "gnu affero general public license version 3 19 november 2007"),
    ("LGPL-3.0-only", "gnu lesser general public license version 3 29 june 2007"),
    ("LGPL-2.1-only", "gnu lesser general public license version 2 1 february 1999"),
    ("GPL-3.0-only", "gnu general public license version 3 29 june 2007"),
    ("GPL-2.0-only", "gnu general public license version 2 june 1991"),
    ("MPL-2.0", "mozilla public license version 2 0 1 definitions"),
    ("MPL-2.0", "mozilla public license version 2 0 definitions"),
    ("MPL-2.0", "subject to the terms of the mozilla public license v 2 0"),
    ("Apache-2.0", "apache license version 2 0 january 2004"),
    ("Apache-2.0", "licensed under the apache license version 2 0"),
    ("CC0-1.0", "creative commons legal code cc0 1 0 universal"),
    ("Unlicense", "this is free and unencumbered software released into the public domain"),
    ("BSD-3-Clause", "endorse or promote products derived from this software"),
    ("BSD-3-Clause", "endorse or promote products derived from"),
    ("BSD-2-Clause", "redistribution and use in source and binary forms"),
    ("MIT", "permission is hereby granted free of charge to any person obtaining a copy"),
    ("ISC", "permission to use copy modify and or distribute this software for any purpose with or without fee"),
    ("ISC", "permission to use copy modify and distribute this software for any purpose with or without fee"),
)


def from_license_file(text: str) -> str:
    """Return the licences whose text or notice is in a file, joined by AND, else ``NOASSERTION``."""
    words = " ".join(_WORDS.findall(text.lower()))
    found = {name for name, phrase in _FINGERPRINTS if phrase in words}
    if "BSD-3-Clause" in found:
        found.discard("BSD-2-Clause")  # its text holds the shorter one's
    if "GPL-3.0-only" in found and "LGPL-3.0-only" in found:
        found.discard("GPL-3.0-only")  # the lesser licence comes with the text that it adds to
    return " AND ".join(sorted(found)) or NOASSERTION
