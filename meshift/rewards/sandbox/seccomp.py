"""The list of system calls that a program may make, as a BPF program of seccomp: all others fail with EPERM.

A Python program of several threads needs these; it can make no process, socket, namespace, mount, memory file or
link, run no other program, and see into no other process. It knows nothing of the other layers.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Sequence

from meshift.rewards.sandbox.syscalls import ARCHITECTURES, NUMBERS, control_process, number_of

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
NR, ARCH, ARGUMENTS = 0, 4, 16
LOAD, JUMP, JUMP_EQUAL, JUMP_ABOVE, AND, RETURN = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
X32 = 0x40000000  # calls of the x32 ABI, which have other numbers

CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = 0x7E020080  # NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
SET_FILTER_MODE, PR_SET_SECCOMP = 2, 22
TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONCLEX FIOCLEX
NAMES_OF_THREADS = (15, 16, 0x53564D41)  # PR_SET_NAME PR_GET_NAME PR_SET_VMA

CHECKED = ("clone", "ioctl", "prctl", "prlimit64")
NOT_FOR_PROGRAMS = (
    "capset", "clone3", "pivot_root", "mount_setattr",
    "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
)  # fmt: skip
ALLOWED = tuple(name for name in NUMBERS if name not in CHECKED + NOT_FOR_PROGRAMS)

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def filter_program() -> list[Instruction]:
    """The BPF instructions for this machine."""
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[platform.machine()]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NR),
        (JUMP_ABOVE, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]
    threads_only = [(LOAD, 0, 0, ARGUMENTS), (AND, 0, 0, CLONE_THREAD | CLONE_NAMESPACES)]
    bodies: dict[str, list[Instruction]] = {name: [(RETURN, 0, 0, ALLOW)] for name in ALLOWED}
    bodies |= {
        "clone": threads_only + _one_of((CLONE_THREAD,)),
        "clone3": [(RETURN, 0, 0, ERRNO | ENOSYS)],  # its flags cannot be read: libc takes clone
        "ioctl": [(LOAD, 0, 0, ARGUMENTS + 8), *_one_of(TERMINAL_QUESTIONS)],
        "prctl": [(LOAD, 0, 0, ARGUMENTS), *_one_of(NAMES_OF_THREADS)],
        "prlimit64": [(LOAD, 0, 0, ARGUMENTS), *_one_of((0,))],  # of the process itself
    }
    numbered = {number: body for name, body in bodies.items() if (number := number_of(name)) is not None}
    return program + _search(sorted(numbered.items()))


def _search(bodies: Sequence[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """By halves, to the body of a call's number. The kernel runs it for every number there is when it is
    installed."""
    if len(bodies) == 1:
        ((number, body),) = bodies
        return [(JUMP_EQUAL, 0, len(body), number), *body, (RETURN, 0, 0, ERRNO | EPERM)]
    middle = len(bodies) // 2
    low, high = _search(bodies[:middle]), _search(bodies[middle:])
    if len(low) < 256:
        return [(JUMP_ABOVE, len(low), 0, bodies[middle][0]), *low, *high]
    return [(JUMP_ABOVE, 0, 1, bodies[middle][0]), (JUMP, 0, 0, len(low)), *low, *high]


def _one_of(values: Sequence[int]) -> list[Instruction]:
    """Allow where the number that was loaded is among these (compared in its low 32 bits), else EPERM."""
    tests: list[Instruction] = []
    for value in values:
        tests += [(JUMP_EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
    return [*tests, (RETURN, 0, 0, ERRNO | EPERM)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def pack(instructions: Sequence[Instruction]) -> bytes:
    """The instructions as the kernel takes them."""
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def install(packed: bytes) -> None:
    """Put this thread, and all that it starts, under the filter for good. Needs `no_new_privs`."""
    buffer = ctypes.c_char_p(packed)
    program = _Program(len(packed) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    control_process(PR_SET_SECCOMP, SET_FILTER_MODE, ctypes.byref(program))
