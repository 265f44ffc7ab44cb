# SPDX-License-Identifier: Apache-2.0
"""Which wheels a target's Python loads: compatibility tags and marker values, for the lock and for the build alike."""

from __future__ import annotations

from packaging.tags import Tag, compatible_tags, cpython_tags

from moat.build.locks import Target

#: glibc of Debian 12; wheels for it run on Debian 13 (2.41) too, so that one lock serves both.
GLIBC_MINOR = 36


def target_tags(target: Target) -> list[Tag]:
    """Return a target's compatibility tags, the best first."""
    machine = {"amd64": "x86_64"}[target.arch]
    major, minor = (int(x) for x in target.python.split("."))
    platforms = [f"manylinux_2_{n}_{machine}" for n in range(GLIBC_MINOR, 16, -1)]
    platforms += [f"manylinux2014_{machine}"]
    platforms += [f"manylinux_2_{n}_{machine}" for n in range(16, 4, -1)]
    platforms += [f"manylinux2010_{machine}", f"manylinux1_{machine}", f"linux_{machine}"]
    return [
        *cpython_tags((major, minor), platforms=platforms),
        *compatible_tags((major, minor), f"cp{major}{minor}", platforms),
    ]


def target_environment(target: Target) -> dict[str, str]:
    """Return the values that environment markers are evaluated with."""
    return {
        "implementation_name": "cpython",
        "implementation_version": target.python_full,
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": target.python_full,
        "python_version": target.python,
        "sys_platform": "linux",
        "extra": "",
    }
