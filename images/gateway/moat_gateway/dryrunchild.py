# SPDX-License-Identifier: Apache-2.0
"""The child process of :mod:`moat_gateway.dryrun`: it imports LiteLLM once, then forks for every run.

Run as ``python -m moat_gateway.dryrunchild FD`` with one end of a socket pair; it ends when the other end is closed.
The process has one thread, so that forking it is sound. A fork is a process group of its own with limits of address
space and processor time, without core dumps, without connections and programs; it answers by a pipe with one line.

Messages on the socket: four bytes of length, then JSON (answers) or a line of JSON and the prepared configuration.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from moat_gateway import garbage
from moat_gateway.errors import GatewayError

MAX_MESSAGE = 256 << 20  # bytes
MAX_TEXT = 300  # characters of LiteLLM's words that are passed on
_LENGTH = struct.Struct("!I")
_PR_SET_PDEATHSIG = 1
_MEMORY_RESERVE = 4 << 20  # bytes, freed when memory is out, so that the answer can be made
_NEAR = 8 << 20  # bytes below the limit of memory that count as having reached it
_PIECE = 8  # characters of a secret that may not appear

_DIE_WITH_PARENT = ctypes.CDLL(None).prctl

#: What a run may not do: Python's own audit events, raised before the system call.
_FORBIDDEN = re.compile(
    r"socket\.(connect|sendto|sendmsg|getaddrinfo|gethostbyname|gethostbyaddr|getnameinfo|bind)"
    r"|subprocess\.Popen|os\.(system|exec|posix_spawn|spawn|startfile|fork|forkpty)|pty\.spawn"
)


# --- messages, both sides ---


def request(prepared_json: bytes, timeout: float, memory: int) -> bytes:
    """Return the message that asks for one run."""
    return json.dumps({"timeout": timeout, "memory": memory}).encode("ascii") + b"\n" + prepared_json


def send(to: socket.socket, message: bytes) -> None:
    """Send one message.

    Raises:
        OSError: the other side is gone.
    """
    to.sendall(_LENGTH.pack(len(message)) + message)


def receive(of: socket.socket, deadline: float | None = None) -> bytes:
    """Receive one message.

    Args:
        of: the socket.
        deadline: on the monotonic clock, or ``None`` to wait for ever.

    Raises:
        EOFError: the other side is gone.
        OSError: the deadline has passed, or the socket failed.
        ValueError: a message that is too long.
    """
    (length,) = _LENGTH.unpack(_exactly(of, _LENGTH.size, deadline))
    if length > MAX_MESSAGE:
        raise ValueError("the message is too long")
    return _exactly(of, length, deadline)


def receive_answer(of: socket.socket, deadline: float) -> dict[str, Any]:
    """Receive one answer; see :func:`receive`."""
    answer = json.loads(receive(of, deadline))
    if not isinstance(answer, dict):
        raise ValueError("not an answer")
    return answer


def _exactly(of: socket.socket, count: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        if deadline is not None:
            of.settimeout(max(0.001, deadline - time.monotonic()))
        piece = of.recv(min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other side is gone")
        data += piece
    return bytes(data)


# --- the child ---


def main(fd: int) -> int:
    """Import LiteLLM, say so, and serve runs until the socket is closed."""
    # A child that imports does not read from its socket, and would not notice for seconds that its parent was killed.
    # (It is the end of the thread that started it which counts; those that do live as long as their process.)
    _DIE_WITH_PARENT(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=fd) as parent:
        if select.select([parent], [], [], 0)[0] and not parent.recv(1, socket.MSG_PEEK):
            return 0  # it was killed before
        try:
            from moat_gateway.litellm_port import dryrun

            dryrun.import_proxy()
        except Exception as e:
            send(parent, _answer(False, found=one_line(e, ())))
            return 1
        gc.collect()
        garbage.hold()  # in its forks; they are short
        gc.freeze()  # so that a collection in a fork does not copy every page
        send(parent, _answer(True, resident=_memory("VmRSS")))
        while True:
            try:
                message = receive(parent)
            except EOFError:
                return 0
            answer = _run(message, parent)
            if answer is None:
                return 0
            send(parent, answer)


def _run(message: bytes, parent: socket.socket) -> bytes | None:
    """Carry out one run in a fork; ``None`` if the parent has gone meanwhile."""
    head, _, prepared = message.partition(b"\n")
    limits = json.loads(head)
    ours, theirs = os.pipe()
    deadline = time.monotonic() + limits["timeout"]
    before = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        parent.close()
        _fork(prepared, limits, theirs, before)
    os.close(theirs)
    try:
        return _await(pid, ours, parent, deadline)
    finally:
        os.close(ours)
        # The whole group: also what the run started is not to go on.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _await(pid: int, result: int, parent: socket.socket, deadline: float) -> bytes | None:
    poll = select.poll()
    poll.register(result, select.POLLIN)
    poll.register(parent, select.POLLIN | select.POLLHUP)
    said = b""
    while (left := deadline - time.monotonic()) > 0:
        for fd, _event in poll.poll(left * 1000 + 1):
            if fd == parent.fileno():
                return None  # closed: nobody sends while an answer is due
            piece = os.read(result, 1 << 16)
            if not piece:
                return said or _ended(pid)
            said += piece
    return _answer(False, why="time")


def _ended(pid: int) -> bytes:
    """Tell why a fork ended without a word."""
    # It is only looked at: until it is reaped, no other process can have its number.
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    by = end.si_status if end is not None and end.si_code != os.CLD_EXITED else 0
    if by == signal.SIGXCPU:
        return _answer(False, why="time")
    # Native code that gets no memory ends the process in one of these ways; so does the kernel's memory killer.
    if by in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        return _answer(False, why="memory")
    return _answer(
        False, why="unable", found=f"the run ended with signal {by}" if by else "the run ended without a word"
    )


# --- the fork ---


def _fork(prepared: bytes, limits: Mapping[str, Any], result: int, parent: int) -> NoReturn:
    try:
        os.setpgid(0, 0)
        _DIE_WITH_PARENT(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        reserve = bytearray(_MEMORY_RESERVE)
        space = 0
        secrets: list[str] = []
        try:
            space = _limit(limits)
            answer = _build(prepared, secrets)
        except BaseException as e:
            del reserve
            if not space:
                answer = _answer(False, why="unable", found=f"the limits cannot be set: {one_line(e, secrets)}")
            # LiteLLM turns some errors into others; near the limit, each of them is a want of memory.
            elif isinstance(e, MemoryError) or _memory("VmPeak") + _NEAR > space:
                answer = _answer(False, why="memory")
            else:
                answer = _answer(False, why="error", found=one_line(e, secrets))
        os.write(result, answer)
    finally:
        os._exit(0)


def _limit(limits: Mapping[str, Any]) -> int:
    """Set the limits and return that of the address space, bytes."""
    space = _memory("VmSize") + int(limits["memory"])
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    # Whoever is not killed in time (a stopped parent) still ends.
    seconds = int(limits["timeout"]) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it holds secrets
    return space


def _build(prepared: bytes, secrets: list[str]) -> bytes:
    from moat_gateway import secretfiles
    from moat_gateway.litellm_port import dryrun

    value = json.loads(prepared)
    for name, path in value["references"].items():
        try:
            secrets.append(secretfiles.read_value(Path(path)))
        except GatewayError as e:
            return _answer(False, why="unable", found=f"{path}: {e.message}")
        os.environ[name] = secrets[-1]
    sys.addaudithook(_refuse)
    dryrun.load(value["effective"])
    return _answer(True)


class _Forbidden(RuntimeError):
    """No OSError: clients try those again, with pauses, until the time of the run is over."""


def _refuse(event: str, _args: tuple[Any, ...]) -> None:
    if _FORBIDDEN.fullmatch(event):
        raise _Forbidden(f"a dry run may not do this: {event}")


def one_line(e: BaseException, secrets: Iterable[str]) -> str:
    """Return an exception's class and the first line of its words, unless a part of a secret stands in them."""
    where = ""
    if type(e).__name__ == "BadDeployment" and e.__cause__ is not None:
        where, e = str(e), e.__cause__
    words = _words(e).strip().splitlines()
    text = "".join(c if c.isprintable() else "?" for c in words[0]) if words else ""
    for secret in secrets:
        pieces = {secret[i : i + _PIECE] for i in range(max(1, len(secret) - _PIECE + 1))}
        if any(p in text for p in pieces):
            text = "(its words are not shown: they repeat a secret)"
            break
    name = type(e).__name__
    line = f"{name}: {text[:MAX_TEXT]}" if text else name
    return f"{where}: {line}" if where else line


def _words(e: BaseException) -> str:
    # Pydantic's first line only counts the errors, and the lines below repeat the values.
    try:
        first = e.errors()[0]  # type: ignore[attr-defined]
        return f"{'.'.join(str(step) for step in first['loc'])}: {first['msg']}"
    except (AttributeError, LookupError, TypeError):
        return str(e)


def _answer(ok: bool, **more: Any) -> bytes:
    return json.dumps({"ok": ok, **more}).encode("ascii")


def _memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    return int(found.group(1)) << 10 if found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
