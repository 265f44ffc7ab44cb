# SPDX-License-Identifier: Apache-2.0
"""Proves that the services of a Compose site are started again, whatever happens after they were stopped.

`docker` is a small program that notes what it was asked. The verification of containers that really run is in
tests/acceptance/test_egress_verify.py.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from moat.console import Console
from moat.errors import EgressUnproven
from moat.site.egresscheck import leftovers, signals
from moat.site.egresscheck.compose_site import ComposeSite

#: Refuses the first words that the file `refuse` names, as often as it has lines; may send us a signal meanwhile.
DOCKER = r"""
import os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[0]).parent
words = [w for w in sys.argv[1:] if w in ("stop", "up")]
if words:
    with (folder / "asked").open("a") as f:
        f.write(" ".join(words) + "\n")
    if (folder / f"interrupt-{words[0]}").exists():
        os.kill(os.getppid(), signal.SIGTERM)
    refuse = folder / f"refuse-{words[0]}"
    if refuse.exists():
        refuse.unlink()
        sys.exit("the engine refuses")
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(f"#!{sys.executable} -IS\n{DOCKER}")
    (folder / "docker").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setitem(leftovers.ENVIRONMENT, "PATH", path)
    # The host's packet filter is not these tests' subject.
    monkeypatch.setattr(leftovers, "PACKETS_TABLE", "moat_test_none")
    monkeypatch.setattr(leftovers, "DNS_TABLE", "moat_test_none")
    return folder


def asked(docker: Path) -> list[str]:
    return (docker / "asked").read_text().split()


def restart(folder: Path) -> None:
    ComposeSite(folder, Console(quiet=True)).restart([])


def test_services_are_stopped_and_started(docker: Path, tmp_path: Path) -> None:
    restart(tmp_path)
    assert asked(docker) == ["stop", "up"]


def test_what_could_not_be_stopped_whole_is_started(docker: Path, tmp_path: Path) -> None:
    (docker / "refuse-stop").touch()
    with pytest.raises(EgressUnproven, match="stop the services") as refusal:
        restart(tmp_path)
    assert asked(docker) == ["stop", "up"]
    assert f"docker compose --project-directory {tmp_path} up --detach" in (refusal.value.hint or "")


def test_a_signal_takes_effect_when_the_services_run_again(docker: Path, tmp_path: Path) -> None:
    (docker / "interrupt-stop").touch()
    with pytest.raises(KeyboardInterrupt, match=f"signal {signal.SIGTERM.value}"), signals.ended_once():
        restart(tmp_path)
    assert asked(docker) == ["stop", "up"]


def test_what_did_not_start_in_the_capture_is_started_when_it_is_over(docker: Path, tmp_path: Path) -> None:
    (docker / "refuse-up").touch()
    lock = tmp_path / "lock"
    with leftovers.only_one(Console(quiet=True), lock):
        with pytest.raises(EgressUnproven, match="start the services"):
            restart(tmp_path)
        assert len(leftovers.present()) == 1
        assert leftovers.remove(Console(quiet=True)) == []
    assert asked(docker) == ["stop", "up", "up"]
    assert lock.read_text() == ""


def test_what_an_earlier_run_left_stopped_is_started_by_the_next(
    docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    lock.write_text("stopped /opt/my site\nway 4194305 198.51.100.7\n")
    with leftovers.only_one(Console(), lock):
        assert leftovers.present() == []
    assert asked(docker) == ["up"]
    told = capsys.readouterr().err
    assert "`docker compose --project-directory /opt/my site up" in told
    assert "a way to 198.51.100.7 in the network of process 4194305" in told
