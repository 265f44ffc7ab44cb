# SPDX-License-Identifier: Apache-2.0
"""Where downloads come from is the host's own configuration: apt's sources (both forms), pip's, Go's."""

from __future__ import annotations

from pathlib import Path

import pytest

from moat.build import mirrors
from moat.errors import FetchFailed, LockFailed


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "MOAT_DEBIAN_MIRROR", "MOAT_DEBIAN_SECURITY_MIRROR", "MOAT_DEBIAN_SNAPSHOT", "MOAT_DEBIAN_KEYRING",
        "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "GOPROXY", "XDG_CONFIG_HOME",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def etc(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "apt"
    (folder / "sources.list.d").mkdir(parents=True)
    for name, text in files.items():
        path = folder / name if name == "sources.list" else folder / "sources.list.d" / name
        path.write_text(text, "utf-8")
    return folder


DEB822 = """# a comment
Types: deb deb-src
URIs: http://mirror.invalid/debian/
Suites: bookworm bookworm-updates
Components: main
Signed-By: /x.gpg

Types: deb
URIs: http://mirror.invalid/sec
Suites: bookworm-security
Components: main

Types: deb
URIs: http://other.invalid/vendor
Suites: bookworm
Enabled: no
"""


def test_deb822_sources(tmp_path: Path) -> None:
    found = mirrors.debian_mirrors(etc(tmp_path, **{"debian.sources": DEB822}))
    assert (found.main, found.security) == ("http://mirror.invalid/debian", "http://mirror.invalid/sec")
    assert found.keyring == "/usr/share/keyrings/debian-archive-keyring.gpg"


def test_one_line_sources_and_other_vendors(tmp_path: Path) -> None:
    text = (
        "# deb http://commented.invalid/debian trixie main\n"
        "deb-src http://source.invalid/debian trixie main\n"
        "deb cdrom:[Debian] trixie main\n"
        "deb https://vendor.invalid/linux nodistro main\n"
        "deb [arch=amd64 signed-by=/x.gpg] https://mirror.invalid/debian trixie main\n"
        "deb https://mirror.invalid/debian-security trixie-security main\n"
    )
    found = mirrors.debian_mirrors(etc(tmp_path, **{"sources.list": text}))
    assert found.main == "https://mirror.invalid/debian"
    assert found.security == "https://mirror.invalid/debian-security"


def test_variables_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOAT_DEBIAN_MIRROR", "file:///srv/debian/")
    monkeypatch.setenv("MOAT_DEBIAN_SECURITY_MIRROR", "file:///srv/sec")
    found = mirrors.debian_mirrors(etc(tmp_path, **{"debian.sources": DEB822}))
    assert (found.main, found.security) == ("file:///srv/debian", "file:///srv/sec")


def test_a_host_without_debian_sources_is_told_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(LockFailed) as refused:
        mirrors.debian_mirrors(etc(tmp_path))
    assert "MOAT_DEBIAN_MIRROR" in (refused.value.hint or "")


def test_the_index_comes_from_variables_then_pips_files_then_the_resolver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = mirrors.python_index()  # no variable, no file in this HOME: the system's pip.conf or uv's own default
    assert default.startswith("http")
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = http://index.invalid/simple/\n", "utf-8")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert mirrors.python_index() == "http://index.invalid/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "http://pip.invalid/simple")
    assert mirrors.python_index() == "http://pip.invalid/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://uv.invalid/simple/")
    assert mirrors.python_index() == "http://uv.invalid/simple"


def test_go_proxies_come_from_the_variable_the_user_or_the_toolchain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goroot = tmp_path / "go"
    goroot.mkdir()
    (goroot / "go.env").write_text("# x\nGOPROXY=http://a.invalid,direct\nGOSUMDB=s\n", "utf-8")
    assert mirrors.go_proxies(goroot) == ["http://a.invalid"]
    user = tmp_path / "home" / ".config" / "go"
    user.mkdir(parents=True)
    (user / "env").write_text("GOPROXY=http://b.invalid/|http://c.invalid\n", "utf-8")
    assert mirrors.go_proxies(goroot) == ["http://b.invalid", "http://c.invalid"]
    monkeypatch.setenv("GOPROXY", "direct")
    with pytest.raises(FetchFailed, match="no Go module proxy"):
        mirrors.go_proxies(goroot)
