# SPDX-License-Identifier: Apache-2.0
"""Proves what the modules of the gateways and of nginx decide, on real files, processes and programs.

What needs systemd is proven by the scenarios in molecule/.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import stat
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.unit.ansible.modules import module

config, instances, nginx, venv = (module(f"moat_{x}") for x in ("config", "instances", "nginx", "venv"))
ME = os.getgid()


# --- moat_venv ---


def wheel(folder: Path, name: str, source: str) -> Path:
    """Make a wheel of one module."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def line(path: str, text: str) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        return f"{path},sha256={digest},{len(text.encode())}\n"

    record = "".join(line(*item) for item in files.items()) + f"{info}/RECORD,,\n"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for member, text in {**files, f"{info}/RECORD": record}.items():
            z.writestr(member, text)
    return path


def test_an_environment_is_whole_only_with_its_marker_and_its_own_requirements(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("one==1.0 --hash=sha256:00\n")
    marker = venv.wanted(sys.executable, requirements)
    assert venv.present(tmp_path) is None
    venv.write(tmp_path / venv.MARKER, json.dumps(marker).encode(), 0o644)
    assert venv.present(tmp_path) == marker
    requirements.write_text("one==1.1 --hash=sha256:00\n")
    assert venv.present(tmp_path) != venv.wanted(sys.executable, requirements)
    (tmp_path / venv.MARKER).write_text('{"format"')  # cut by a power failure
    assert venv.present(tmp_path) is None


def test_an_update_of_python_within_its_minor_version_leaves_an_environment_as_it_is(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("one==1.0 --hash=sha256:00\n")
    said = venv.wanted(sys.executable, requirements)["python"]
    # What of it a security update or another build of Debian's changes: none.
    assert said == f"{sys.version_info[0]}.{sys.version_info[1]} {sysconfig.get_config_var('SOABI')}"
    assert platform.python_version() not in said


def test_an_environment_that_a_process_runs_from_is_not_made_anew(tmp_path: Path) -> None:
    path, link = tmp_path / "releases" / "a" / "venv", tmp_path / "current"
    (path / "bin").mkdir(parents=True)
    (path / "bin/python").symlink_to(sys.executable)
    link.symlink_to("releases/a")
    assert venv.users(path) == []
    with subprocess.Popen([link / "venv/bin/python", "-c", "input()"], stdin=subprocess.PIPE) as process:
        (found,) = venv.users(path)
        assert found.endswith(f"(process {process.pid})")
        # The module itself refuses, and nothing is touched.
        requirements = tmp_path / "requirements.txt"
        requirements.write_text("one==1.0 --hash=sha256:00\n")
        arguments = {"path": str(path), "wheels": str(tmp_path), "requirements": str(requirements)}
        arguments["python"] = sys.executable
        code = "from tests.unit.ansible.modules import module; module('moat_venv').main()"
        argv = [sys.executable, "-c", code, json.dumps({"ANSIBLE_MODULE_ARGS": arguments})]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[3])
        said = json.loads(done.stdout)
        process.communicate(b"\n")
    assert said["failed"] is True, said
    assert f"{path} has to be made anew, and it is in use" in said["msg"]
    assert "Do: bring a newer release" in said["msg"]
    assert (path / "bin/python").exists()
    assert venv.users(path) == []


def test_one_pip_wheel_is_found_and_none_or_two_are_refused(tmp_path: Path) -> None:
    with pytest.raises(venv.Refused, match="found 0 pip wheels"):
        venv.find_pip(tmp_path)
    (tmp_path / "pip-26.3-py3-none-any.whl").touch()
    (tmp_path / "pip_tools-1-py3-none-any.whl").touch()
    assert venv.find_pip(tmp_path).name == "pip-26.3-py3-none-any.whl"
    (tmp_path / "pip-26.4-py3-none-any.whl").touch()
    with pytest.raises(venv.Refused, match="found 2 pip wheels"):
        venv.find_pip(tmp_path)


def test_a_program_that_fails_shows_its_last_lines() -> None:
    with pytest.raises(venv.Refused, match=r"(?s)trying failed \(3\).*the reason"):
        venv.run([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], "trying")


def test_compiled_modules_are_not_compared_with_their_source(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "one.py").write_text("VALUE = 1\n")
    (tmp_path / "lib" / "broken.py").write_text("def (\n")  # some wheels ship templates named .py
    venv.compile_all(sys.executable, tmp_path)
    (made,) = (tmp_path / "lib" / "__pycache__").glob("*.pyc")
    assert int.from_bytes(made.read_bytes()[4:8], "little") == 0b01  # hash-based, unchecked (PEP 552)


# --- moat_config ---


FILES = {"config.yaml": "model_list: []\n", "keys.yaml": "keys: []\n", "gateway.yaml": "# none\n"}


def parameters(tmp_path: Path, **more: Any) -> dict[str, Any]:
    (tmp_path / "live").mkdir(exist_ok=True)
    return {"files": FILES, "path": str(tmp_path / "live"), "history": str(tmp_path / "history"), "keep": 2,
            "source": "/etc/moat/site/config", "secrets": "/none", **more}  # fmt: skip


def test_only_files_that_differ_are_replaced_with_their_mode(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("owners are given by root")
    p = parameters(tmp_path)
    assert config.replace(p, ME, dry=True) == list(config.NAMES)
    assert not list((tmp_path / "live").iterdir())
    assert config.replace(p, ME, dry=False) == list(config.NAMES)
    assert config.replace(p, ME, dry=False) == []
    (tmp_path / "live" / "keys.yaml").chmod(0o644)
    (tmp_path / "live" / "config.yaml").write_text("changed by hand\n")
    assert config.replace(p, ME, dry=False) == ["config.yaml", "keys.yaml"]
    assert stat.S_IMODE((tmp_path / "live" / "keys.yaml").stat().st_mode) == 0o640


def test_the_last_versions_are_kept_and_the_same_one_is_not_kept_twice(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("owners are given by root")
    for i in (1, 1, 2, 3):
        config.keep(parameters(tmp_path, files={**FILES, "keys.yaml": f"# {i}\n"}))
    kept = sorted((tmp_path / "history").iterdir())
    assert [x.name[:6] for x in kept] == ["000002", "000003"]
    assert (kept[-1] / "keys.yaml").read_text() == "# 3\n"


def test_a_problem_names_the_operators_file_and_line(tmp_path: Path) -> None:
    staging = tmp_path / "live.staging"
    problem = {"path": f"{staging}/config.yaml", "line": 7, "message": "names no model", "found": None,
               "expected": "one", "hint": f"correct {staging}/config.yaml"}  # fmt: skip
    text = config.say(problem, parameters(tmp_path), staging)
    assert text == (
        "/etc/moat/site/config/config.yaml line 7: names no model; expected: one. "
        "Do: correct /etc/moat/site/config/config.yaml"
    )


def test_an_environment_file_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "common.env"
    path.write_text("# a comment\nMOAT_HOST=127.0.0.1\nMOAT_EGRESS_ALLOW='a:1 b:2'\nnot a line\n")
    assert config.settings(path) == {"MOAT_HOST": "127.0.0.1", "MOAT_EGRESS_ALLOW": "a:1 b:2"}


# --- moat_instances ---


def node(tmp_path: Path, **more: Any) -> Any:
    return instances.Node({"root": str(tmp_path), "release": "new", "inputs": [], **more})


def test_a_link_moves_in_one_step_and_remembers_where_it_came_from(tmp_path: Path) -> None:
    one, stopped = node(tmp_path), {"ActiveState": "inactive", "MainPID": "0"}
    one.origins[1] = one.origin(1, stopped)
    one.move(1)
    assert (one.release(1), one.moved) == ("new", [])  # the first installation has nothing to return to
    one.flip(1, "old")
    one.origins[1] = one.origin(1, stopped)
    one.move(1)
    assert (str((tmp_path / "instances/1").readlink()), one.moved) == ("../releases/new", [(1, "old")])
    one.move(1)
    assert one.moved == [(1, "old")]
    assert [x.name for x in (tmp_path / "instances").iterdir()] == ["1"]


def test_the_release_is_read_from_the_running_process(tmp_path: Path) -> None:
    program = tmp_path / "releases" / "old" / "venv" / "bin" / "sleep"
    program.parent.mkdir(parents=True)
    program.symlink_to("/usr/bin/sleep")
    with subprocess.Popen([str(program), "30"]) as process:
        try:
            one = node(tmp_path)
            while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                time.sleep(0.01)  # the kernel is still placing the arguments
            assert one.running({"MainPID": str(process.pid)}) == "old"
            assert node(tmp_path / "elsewhere").running({"MainPID": str(process.pid)}) == ""
        finally:
            process.terminate()
    assert one.running({"MainPID": "0"}) == ""


def test_a_gateway_is_stale_if_what_it_reads_changed_since_it_was_started(tmp_path: Path) -> None:
    watched = tmp_path / "config.yaml"
    watched.write_text("a")
    one = node(tmp_path, inputs=[str(tmp_path / "config.yaml")])
    one.record["1"] = {"invocation": "x", "inputs": one.inputs(1)[0]}
    assert not one.stale(1, {"InvocationID": "x"})
    watched.write_text("b")
    assert one.stale(1, {"InvocationID": "x"})
    # Started by somebody else since: what is older than the start has been read.
    now = str(int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6))
    assert one.stale(1, {"InvocationID": "y", "ExecMainStartTimestampMonotonic": "1"})
    os.utime(watched)
    time.sleep(0.05)
    later = str(int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6))
    assert not one.stale(1, {"InvocationID": "y", "ExecMainStartTimestampMonotonic": later})
    assert int(later) > int(now)


# --- moat_nginx ---


def test_what_differs_in_the_folder_of_nginx_is_found(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("owners are given by root")
    files = {"nginx.conf": "a", "tls/key.pem": "b"}
    assert nginx.differing(tmp_path / "none", files, ME) == ["nginx.conf", "tls/key.pem"]
    nginx.folders(tmp_path, files, ME)
    for name, text in files.items():
        nginx.write(tmp_path / name, text.encode(), 0o640, (0, ME))
    assert nginx.differing(tmp_path, files, ME) == []
    (tmp_path / "tls/key.pem").chmod(0o644)  # a key that others could read
    (tmp_path / "left.conf").write_text("from an older release")
    assert nginx.differing(tmp_path, files, ME) == ["left.conf", "tls/key.pem"]
    assert nginx.digest(files) != nginx.digest({**files, "nginx.conf": "c"})


LIST, ONE, TWO = (
    ("GET", "/v1/models", None),
    ("POST", "/v1/chat/completions", "one"),
    ("POST", "/v1/chat/completions", "two"),
)


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        ("models", [LIST]),
        # The first model of the list, before and after; between them the list itself has to come.
        ("auto", [LIST, ONE, LIST, LIST, ONE]),
        ("two", [TWO, LIST, TWO]),
    ],
)
def test_a_restarted_gateway_is_asked_what_the_probe_says(
    probe: str, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = instances.Node.__new__(instances.Node)
    node.p = {"probe": probe, "settle": 0, "only": 0}
    node.started, node.restarted, node.stopped, node.moved = [], [], [], []
    seen: list[Any] = []

    def ask(n: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        seen.append((method, path, body["model"] if body else None))
        return 200, {"data": [{"id": "one"}, {"id": "two"}]}

    for name in ("move", "wait", "remember"):
        monkeypatch.setattr(node, name, lambda *_: None)
    monkeypatch.setattr(node, "ask", ask)
    monkeypatch.setattr(instances, "run", lambda *_, **__: "")
    monkeypatch.setattr(instances, "properties", lambda n: {"UnitFileState": "enabled"})
    node.apply([], [1], [])
    assert node.restarted == [1]
    assert seen == expected
