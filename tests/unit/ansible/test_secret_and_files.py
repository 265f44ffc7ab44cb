# SPDX-License-Identifier: Apache-2.0
"""Proves moat_secret, moat_files and moat_removed on real folders: nothing overwritten, exact modes, no way out.

Each is also run as a whole by ansible, to see that no secret shows even at the highest verbosity.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ansible.modules import LIBRARY, SHARED, module

SECRET = module("moat_secret")
FILES = module("moat_files")
REMOVED = module("moat_removed")
NAMES = {"one": "sk-", "two": ""}
ME = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- moat_secret ---


def secret(folder: Path, state: str = "present", **more: Any) -> tuple[list[str], list[str], bool]:
    result: tuple[list[str], list[str], bool] = SECRET.apply(folder, NAMES, state, 32, **more)
    return result


def test_missing_secrets_are_made_once_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert secret(folder, dry=True) == (["one", "two"], [], False)
    assert not folder.exists()
    assert secret(folder)[0] == ["one", "two"]
    values = {n: (folder / n).read_text() for n in NAMES}
    assert values["one"].startswith("sk-")
    assert all(v.endswith("\n") and len(v) > 43 for v in values.values())
    assert (mode(folder), mode(folder / "one")) == (0o700, 0o600)
    (folder / "two").unlink()
    assert secret(folder)[0] == ["two"]
    assert (folder / "one").read_text() == values["one"]
    assert (folder / "two").read_text() != values["two"]
    assert secret(folder) == ([], [], False)


def test_a_mode_that_somebody_opened_is_closed(tmp_path: Path) -> None:
    secret(tmp_path / "s")
    (tmp_path / "s/one").chmod(0o644)
    assert secret(tmp_path / "s") == ([], [], True)
    assert mode(tmp_path / "s/one") == 0o600


def test_a_rotation_keeps_the_value_before_until_it_is_settled(tmp_path: Path) -> None:
    secret(tmp_path)
    before = (tmp_path / "one").read_text()
    assert secret(tmp_path, "rotated")[0] == ["one", "two"]
    now = (tmp_path / "one").read_text()
    assert now != before
    assert (tmp_path / "one.previous").read_text() == before
    assert mode(tmp_path / "one.previous") == 0o600
    # Cut short and run again, it goes on with the value that it made.
    assert secret(tmp_path, "rotated") == ([], [], False)
    assert (tmp_path / "one").read_text() == now
    assert secret(tmp_path, "settled")[1] == ["one", "two"]
    assert not list(tmp_path.glob("*.previous"))
    assert secret(tmp_path, "settled") == ([], [], False)
    assert secret(tmp_path, "rotated")[0] == ["one", "two"]


def test_cut_short_before_the_new_value_a_rotation_makes_it(tmp_path: Path) -> None:
    secret(tmp_path)
    (tmp_path / "one.previous").write_bytes((tmp_path / "one").read_bytes())
    assert "one" in secret(tmp_path, "rotated")[0]
    assert (tmp_path / "one.previous").read_text() != (tmp_path / "one").read_text()


@pytest.mark.parametrize("wrong", ["link", "empty", "folder"])
def test_what_cannot_be_a_secret_is_refused_and_left(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "one"
    if wrong == "link":
        path.symlink_to("/nowhere")
    elif wrong == "empty":
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(SECRET.Refused, match=r"Do: "):
        secret(tmp_path)
    assert os.path.lexists(path)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a" * 65])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SECRET.Refused):
        SECRET.apply(tmp_path, {name: ""}, "present", 32)


# --- moat_files ---


def entry(path: Path, text: str = "x\n", octal: str = "0640") -> dict[str, str]:
    return {"path": str(path), "content": text, "mode": octal, **ME}


def test_files_and_folders_get_exact_modes_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    folders = [{"path": str(tmp_path / "a"), "mode": "0750", **ME}]
    files = [entry(tmp_path / "a/f")]
    assert FILES.folders(folders, True) == [str(tmp_path / "a")]
    assert not (tmp_path / "a").exists()
    assert FILES.folders(folders, False) + FILES.files(files, False) == [str(tmp_path / "a"), str(tmp_path / "a/f")]
    assert (mode(tmp_path / "a"), mode(tmp_path / "a/f")) == (0o750, 0o640)
    assert FILES.folders(folders, False) + FILES.files(files, False) == []
    (tmp_path / "a/f").chmod(0o666)
    assert FILES.files(files, False) == [str(tmp_path / "a/f")]
    assert mode(tmp_path / "a/f") == 0o640


def test_a_link_in_the_place_of_a_file_is_refused_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("theirs")
    (tmp_path / "f").symlink_to(target)
    with pytest.raises(FILES.Refused):
        FILES.files([entry(tmp_path / "f")], False)
    assert target.read_text() == "theirs"


def test_what_is_not_listed_goes_only_where_that_was_asked_for(tmp_path: Path) -> None:
    for name in ("keep", "stale"):
        (tmp_path / name).write_text("x\n")
    files = [entry(tmp_path / "keep")]
    assert FILES.others([str(tmp_path)], files, True) == [str(tmp_path / "stale")]
    assert FILES.others([str(tmp_path)], files, False) == [str(tmp_path / "stale")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keep"]


# --- moat_removed ---


def test_only_what_is_moats_can_be_removed(tmp_path: Path) -> None:
    for path in (
        "/etc/moat/tls",
        "/etc/moat",
        "/opt/moat/releases",
        "/var/lib/moat/minio",
        "/usr/local/bin/moat-gateway",
    ):
        assert REMOVED.allowed(path), path
    for path in (
        "/",
        "/etc",
        "/etc/moat/../ssh",
        "/etc/moatx",
        "/var/lib",
        "/etc/systemd/system",
        "/var/lib/valkey",
        "x",
    ):
        assert not REMOVED.allowed(path), path
    with pytest.raises(REMOVED.Refused):
        REMOVED.paths([str(tmp_path)], False)
    assert tmp_path.exists()


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    root, theirs = tmp_path / "root", tmp_path / "theirs"
    (root / "folder/deep").mkdir(parents=True)
    theirs.mkdir()
    (theirs / "file").touch()
    (root / "folder/out").symlink_to(theirs)
    (root / "link").symlink_to("/nowhere")
    roots, folders = (f"{root}/",), (str(root),)
    assert REMOVED.paths([f"{root}/*"], True, roots, folders) == [f"{root}/folder", f"{root}/link"]
    assert REMOVED.paths([f"{root}/*"], False, roots, folders) == [f"{root}/folder", f"{root}/link"]
    assert REMOVED.paths([f"{root}/*"], False, roots, folders) == []
    assert (theirs / "file").exists()
    (root / "bend").symlink_to(theirs)
    with pytest.raises(REMOVED.Refused):
        REMOVED.paths([f"{root}/bend/file"], False, roots, folders)
    assert (theirs / "file").exists()


def test_what_is_left_is_looked_up_by_the_module_itself(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("kept")
    (tmp_path / "b" / "inside").write_text("kept")
    assert REMOVED.entries([str(tmp_path), str(tmp_path / "gone")]) == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_persons_account_is_never_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REMOVED.pwd, "getpwnam", lambda name: pwd.struct_passwd((name, "x", 1000, 1000, "", "/", "")))
    with pytest.raises(REMOVED.Refused):
        REMOVED.users(["somebody"], True)


# --- by ansible, as a whole ---


def test_no_secret_shows_at_the_highest_verbosity(tmp_path: Path) -> None:
    playbook = [
        {
            "hosts": "localhost",
            "gather_facts": False,
            "vars": {"ansible_python_interpreter": sys.executable},
            "tasks": [
                {"moat_secret": {"path": f"{tmp_path}/s", "secrets": {"canary": "canary-"}}, "register": "made"},
                {
                    "moat_files": {
                        "files": [{
                            "path": f"{tmp_path}/placed", "mode": "0600", **ME,
                            "content": "{{ lookup('ansible.builtin.file', '" + f"{tmp_path}/s/canary" + "') }}",
                        }],
                    }
                },
                {"ansible.builtin.debug": {"var": "made"}},
            ],
        }
    ]  # fmt: skip
    (tmp_path / "play.yml").write_text(json.dumps(playbook))
    program = Path(sys.executable).parent / "ansible-playbook"
    done = subprocess.run(
        [str(program), "-i", "localhost,", "-c", "local", "-vvvvv", "--diff", str(tmp_path / "play.yml")],
        capture_output=True,
        text=True,
        env={
            "PATH": f"{program.parent}:/usr/bin:/bin",
            "ANSIBLE_LIBRARY": str(LIBRARY),
            "ANSIBLE_MODULE_UTILS": str(SHARED),
            "ANSIBLE_HOME": str(tmp_path / "home"),
            "LC_ALL": "C.UTF-8",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    value = (tmp_path / "s/canary").read_text().strip()
    assert (tmp_path / "placed").read_text() == value
    shown = done.stdout + done.stderr
    assert "changed=2" in shown
    # Without no_log too: the module itself hides contents.
    assert value not in shown
    assert value.removeprefix("canary-") not in shown
