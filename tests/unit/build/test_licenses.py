# SPDX-License-Identifier: Apache-2.0
"""Licences are read from what upstreams write; what is not recognised is NOASSERTION and never a guess."""

from __future__ import annotations

import pytest

from moat.build.licenses import NOASSERTION, from_classifiers, from_dep5, from_license_file, from_text

_MIT = "Permission is hereby granted, free of charge, to any person\nobtaining a copy of this software ..."
_BSD = "Redistribution and use in source and binary forms, with or without\nmodification, are permitted"
_BSD3 = _BSD + "\n3. ... may be used to endorse or promote products derived from\n  this software without ..."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MIT", "MIT"),
        ("Apache License 2.0", "Apache-2.0"),
        ("BSD-3-Clause", "BSD-3-Clause"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        (f"The MIT License\n\n{_MIT}", "MIT"),
        ("BSD", ""),
        ("Dual License", ""),
        ("Proprietary", ""),
        ("", ""),
    ],
)
def test_short_license_fields(text: str, expected: str) -> None:
    assert from_text(text) == expected


def test_classifiers_name_one_licence_or_all_of_several() -> None:
    assert from_classifiers(["License :: OSI Approved :: MIT License", "Topic :: x"]) == "MIT"
    two = ["License :: OSI Approved :: MIT License", "License :: OSI Approved :: Apache Software License"]
    assert from_classifiers(two) == "Apache-2.0 AND MIT"
    # "BSD License" does not say which of the BSD licences.
    assert from_classifiers(["License :: OSI Approved :: BSD License"]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_MIT, "MIT"),
        (_BSD, "BSD-2-Clause"),
        (_BSD3, "BSD-3-Clause"),
        (f"{_BSD3}\n----\n{_MIT}", "BSD-3-Clause AND MIT"),
        ("GNU AFFERO GENERAL PUBLIC LICENSE\n  Version 3, 19 November 2007", "AGPL-3.0-only"),
        ('1.12 "Secondary License" means either the GNU General Public License, Version 2.0', NOASSERTION),
        ("All rights reserved. You may not copy this.", NOASSERTION),
        ("", NOASSERTION),
    ],
)
def test_license_texts(text: str, expected: str) -> None:
    assert from_license_file(text) == expected


_DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: thing

Files: *
Copyright: 2020 A
License: Expat

Files: lib/*
 more/*
Copyright: 2020 B
License: GPL-2+ or BSD-3-clause

Files: contrib/*
Copyright: C
License: Odd-one

Files: debian/*
Copyright: D
License: GPL-3+

License: Expat
 Permission ...
"""


def test_a_machine_readable_copyright_file_becomes_spdx_without_the_packaging() -> None:
    assert from_dep5(_DEP5) == "(GPL-2.0-or-later OR BSD-3-Clause) AND LicenseRef-Debian-Odd-one AND MIT"


def test_free_text_is_noassertion() -> None:
    assert from_dep5("This package was debianized by A.\n\nLicense: see below\n") == NOASSERTION
