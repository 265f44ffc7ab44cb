# SPDX-License-Identifier: Apache-2.0
"""A tiny BPF assembler and loader over the bpf() system call: no compiler, no library but libc.

The assembler knows the instructions that :mod:`moat.site.egresscheck.sysenter` needs, with labels for
jumps. An instruction is eight bytes: opcode, registers (source in the high half), 16-bit offset, 32-bit
immediate (linux/bpf.h, Documentation/bpf/standardization). ``r10`` is the frame pointer: the stack is
below it, 512 bytes. A call takes ``r1``-``r5``, returns in ``r0`` and destroys ``r1``-``r5``.

x86_64 only: the numbers of system calls and the layout of the registers are.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import struct
from collections.abc import Iterator
from typing import Final

_SYS_BPF: Final = 321
_MAP_CREATE, _MAP_LOOKUP, _PROG_LOAD, _RAW_TRACEPOINT_OPEN = 0, 1, 5, 17
_MAP_ARRAY, _MAP_RINGBUF = 2, 27
_PROG_RAW_TRACEPOINT: Final = 17

# Helper functions (linux/bpf.h, enum bpf_func_id).
MAP_LOOKUP_ELEM: Final = 1
KTIME_GET_NS: Final = 5
GET_CURRENT_PID_TGID: Final = 14
GET_CURRENT_UID_GID: Final = 15
GET_CURRENT_COMM: Final = 16
GET_CURRENT_CGROUP_ID: Final = 80
PROBE_READ_USER: Final = 112
PROBE_READ_KERNEL: Final = 113
GET_NS_CURRENT_PID_TGID: Final = 120
RINGBUF_OUTPUT: Final = 130

_SIZES: Final = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
_JUMPS: Final = {"==": 0x10, "!=": 0x50, ">": 0x20, ">=": 0x30, "<": 0xA0, "<=": 0xB0}  # unsigned


class Assembler:
    """Collects instructions; jumps name labels that are set before or after them."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, int]] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def _put(self, opcode: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> None:
        self._code.append((opcode, dst, src, off, imm))

    def label(self, name: str) -> None:
        """Name the next instruction."""
        if name in self._labels:
            raise ValueError(f"the label {name} is set twice")
        self._labels[name] = len(self._code)

    def mov(self, dst: int, src: int) -> None:
        """Copy a register."""
        self._put(0xBF, dst, src)

    def mov_imm(self, dst: int, value: int) -> None:
        """Set a register to a 32-bit number (sign-extended)."""
        self._put(0xB7, dst, imm=value)

    def mov_imm64(self, dst: int, value: int) -> None:
        """Set a register to a 64-bit number (two instructions)."""
        self._wide(dst, 0, value)

    def mov_map(self, dst: int, fd: int) -> None:
        """Set a register to a map, by its file descriptor."""
        self._wide(dst, 1, fd)

    def _wide(self, dst: int, src: int, value: int) -> None:
        low, high = struct.unpack("<ii", struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF))
        self._put(0x18, dst, src, imm=low)
        self._put(0, imm=high)

    def add_imm(self, dst: int, value: int) -> None:
        """Add a number to a register."""
        self._put(0x07, dst, imm=value)

    def load(self, size: int, dst: int, src: int, off: int) -> None:
        """``dst = *(src + off)``, of 1, 2, 4 or 8 bytes, zero-extended."""
        self._put(0x61 | _SIZES[size], dst, src, off)

    def store(self, size: int, dst: int, off: int, src: int) -> None:
        """``*(dst + off) = src``."""
        self._put(0x63 | _SIZES[size], dst, src, off)

    def store_imm(self, size: int, dst: int, off: int, value: int) -> None:
        """``*(dst + off) = value``."""
        self._put(0x62 | _SIZES[size], dst, 0, off, value)

    def atomic_add(self, dst: int, off: int, src: int) -> None:
        """``*(u64 *)(dst + off) += src``, atomically."""
        self._put(0xDB, dst, src, off)

    def call(self, helper: int) -> None:
        """Call a helper function of the kernel."""
        self._put(0x85, imm=helper)

    def jump(self, label: str) -> None:
        """Go to a label."""
        self._jumps.append((len(self._code), label))
        self._put(0x05)

    def jump_if(self, dst: int, relation: str, value: int, label: str) -> None:
        """Go to a label if the register (64 bits, unsigned) stands so to a 32-bit number."""
        self._jumps.append((len(self._code), label))
        self._put(0x05 | _JUMPS[relation], dst, imm=value)

    def jump_if_reg(self, dst: int, relation: str, src: int, label: str) -> None:
        """Go to a label if one register stands so to another."""
        self._jumps.append((len(self._code), label))
        self._put(0x0D | _JUMPS[relation], dst, src)

    def exit(self) -> None:
        """Return ``r0``."""
        self._put(0x95)

    def code(self) -> bytes:
        """Return the program with its jumps resolved.

        Raises:
            ValueError: a jump to a label that does not exist, or too far.
        """
        code = list(self._code)
        for at, name in self._jumps:
            if name not in self._labels:
                raise ValueError(f"no label {name}")
            opcode, dst, src, _, imm = code[at]
            code[at] = (opcode, dst, src, self._labels[name] - at - 1, imm)
        try:
            return b"".join(struct.pack("<BBhi", op, src << 4 | dst, off, imm) for op, dst, src, off, imm in code)
        except struct.error as e:
            raise ValueError(f"a number does not fit into its field: {e}") from e


_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytes) -> int:
    """Call bpf(); unknown attributes are zero, as the kernel wants them."""
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    done = int(_libc.syscall(_SYS_BPF, command, ctypes.byref(buffer), 128))
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done


def raise_memory_limit() -> None:
    """Before Linux 5.11 maps count against the limit of locked memory."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        return  # newer kernels do not ask; older ones say so when the map is made


def create_counter() -> int:
    """Create an array map with one 64-bit number and return its file descriptor.

    Raises:
        OSError: the kernel has no BPF or we may not use it.
    """
    return _bpf(_MAP_CREATE, struct.pack("=IIIII", _MAP_ARRAY, 4, 8, 1, 0))


def read_counter(fd: int) -> int:
    """Return the number in a map of :func:`create_counter`."""
    key, value = ctypes.c_uint32(0), ctypes.c_uint64(0)
    _bpf(_MAP_LOOKUP, struct.pack("=IxxxxQQQ", fd, ctypes.addressof(key), ctypes.addressof(value), 0))
    return value.value


def load(code: bytes, license_text: str) -> int:
    """Load a raw tracepoint program and return its file descriptor.

    Raises:
        OSError: the kernel refuses it; the verifier's last line is in the message.
    """
    program = ctypes.create_string_buffer(code, len(code))
    words = ctypes.create_string_buffer(license_text.encode("ascii"))

    def attributes(log: ctypes.Array[ctypes.c_char] | None) -> bytes:
        return struct.pack(
            "=IIQQIIQ",
            _PROG_RAW_TRACEPOINT,
            len(code) // 8,
            ctypes.addressof(program),
            ctypes.addressof(words),
            1 if log is not None else 0,
            len(log) if log is not None else 0,
            ctypes.addressof(log) if log is not None else 0,
        )

    try:
        return _bpf(_PROG_LOAD, attributes(None))
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EACCES):
            raise
        log = ctypes.create_string_buffer(1 << 20)
        try:
            return _bpf(_PROG_LOAD, attributes(log))
        except OSError as again:
            lines = [x for x in log.value.decode("ascii", "replace").splitlines() if not x.startswith("processed ")]
            raise OSError(again.errno, f"{again.strerror} ({lines[-1] if lines else 'no word of the verifier'})") from e


def attach_raw_tracepoint(program: int, name: str) -> int:
    """Run a program at a tracepoint for as long as the returned file descriptor is open.

    Raises:
        OSError: there is no such tracepoint, or we may not use it.
    """
    word = ctypes.create_string_buffer(name.encode("ascii"))
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", ctypes.addressof(word), program))


class RingBuffer:
    """A BPF ring buffer, read through shared memory (Documentation/bpf/ringbuf.rst).

    The first page holds the reader's position (ours), the second the writer's; behind it the data, mapped
    twice in a row, so that a record never has to be put together. A record is a head of eight bytes (length
    and two flags) and the data, rounded up to eight.

    Args:
        size: bytes, a power of two and a multiple of the page size.

    Raises:
        OSError: older than Linux 5.8, or not allowed.
    """

    _BUSY: Final = 1 << 31
    _DISCARD: Final = 1 << 30

    def __init__(self, size: int) -> None:
        self.fd = _bpf(_MAP_CREATE, struct.pack("=IIIII", _MAP_RINGBUF, 0, 0, size, 0))
        self._mask = size - 1
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(self.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(self.fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._data = page

    def read(self) -> Iterator[bytes]:
        """Yield every record that is there."""
        position = int.from_bytes(self._consumer[:8], "little")
        while position < int.from_bytes(self._producer[:8], "little"):
            at = self._data + (position & self._mask)
            head = int.from_bytes(self._producer[at : at + 4], "little")
            if head & self._BUSY:
                return  # is being written; the writer wakes us again
            size = head & ~(self._BUSY | self._DISCARD)
            record = None if head & self._DISCARD else self._producer[at + 8 : at + 8 + size]
            position += (8 + size + 7) & ~7
            self._consumer[:8] = position.to_bytes(8, "little")
            if record is not None:
                yield record

    def close(self) -> None:
        """Give the memory back."""
        self._consumer.close()
        self._producer.close()
        os.close(self.fd)
