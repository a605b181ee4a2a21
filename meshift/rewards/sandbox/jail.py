"""What a process does to itself before it runs a program: the layers, inner ones last, none of which it can undo.

It runs in a fresh child of the server. It knows nothing of programs, nor of what comes out of them.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from meshift.rewards.sandbox import landlock, seccomp
from meshift.rewards.sandbox.layers import LANDLOCK, LIMITS, NAMESPACES, PRIVILEGES, SECCOMP, Limits
from meshift.rewards.sandbox.mounts import (
    CAPABILITY_HEADER,
    NODEV,
    NOEXEC,
    NOSUID,
    READ_ONLY,
    OwnMounts,
    give_up_mounting,
    mount_namespace,
)
from meshift.rewards.sandbox.syscalls import control_process, drop_from_bounding_set, system_call
from meshift.rewards.sandbox.wall import (
    NEWCGROUP,
    NEWIPC,
    NEWNET,
    NEWNS,
    NEWPID,
    NEWUSER,
    NEWUTS,
    NOBODY,
    map_user,
)

FRESH = NEWUSER | NEWPID | NEWNS | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
WORK_FOLDER = "/tmp"
WRITABLE = ((WORK_FOLDER, True), ("/dev/null", False))
WORK_BYTES = 32 * 2**20
NUM_OPEN_FILES = 64
PR_SET_DUMPABLE, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 4, 28, 38
ALL_SECURE_BITS = 0b10101111  # no root privileges, no keeping of capabilities, locked; no ambient ones, locked


@dataclass(frozen=True, kw_only=True)
class Walls:
    """What the server has found out once for all its children."""

    readable: Sequence[tuple[str, bool]]  # paths, and whether each is a folder
    landlock_abi: int
    last_capability: int
    seccomp_filter: bytes
    memory_before: int  # bytes of address space of the interpreter without a program
    mounts: str  # the mount namespace of the server, where no child may mount

    @staticmethod
    def of_this_process(readable: Sequence[str]) -> Walls:
        """Read off the kernel; before the first child."""
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
            last = int(file.read())
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        return Walls(
            readable=[(path, os.path.isdir(path)) for path in readable if os.path.exists(path)],
            landlock_abi=landlock.version(),
            last_capability=last,
            seccomp_filter=seccomp.pack(seccomp.filter_program()),
            memory_before=pages * resource.getpagesize(),
            mounts=mount_namespace(),
        )


def enter(walls: Walls, limits: Limits, layers: Collection[str], uid: int) -> None:
    """Shut this process in. `uid` is the server's user. Raises `OSError` naming what the kernel refuses."""
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # where a cgroup runs full, this process ends and not the server
    if NAMESPACES in layers:
        map_user(NOBODY, uid, uid)
        _cover(OwnMounts(walls.mounts))
    else:
        give_up_mounting()
    if LIMITS in layers:
        _limit(limits, walls.memory_before)
    control_process(PR_SET_NO_NEW_PRIVS, 1)
    if PRIVILEGES in layers:
        _drop_privileges(walls.last_capability, has_any=NAMESPACES in layers)
    if LANDLOCK in layers:
        landlock.restrict(walls.landlock_abi, walls.readable, WRITABLE)
    if SECCOMP in layers:
        seccomp.install(walls.seccomp_filter)


def _cover(own: OwnMounts) -> None:
    """A working folder of its own, and nothing where /proc and shared memory were."""
    own.mount(
        "tmpfs", WORK_FOLDER, "tmpfs", NOSUID | NODEV | NOEXEC, f"size={WORK_BYTES},nr_inodes=1024,mode=0700"
    )
    for place in ("/proc", "/dev/shm"):
        if os.path.isdir(place):
            own.mount("tmpfs", place, "tmpfs", NOSUID | NODEV | NOEXEC | READ_ONLY, "size=4k,nr_inodes=2")
    os.chdir(WORK_FOLDER)


def _limit(limits: Limits, memory_before: int) -> None:
    seconds = math.ceil(limits.cpu_s) + 1
    for what, most in (
        (resource.RLIMIT_AS, memory_before + limits.memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits.output_bytes),
        (resource.RLIMIT_NOFILE, NUM_OPEN_FILES),
        (resource.RLIMIT_NPROC, limits.num_threads + 1),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NICE, 0),
        (resource.RLIMIT_RTPRIO, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(what, (most, most))


def _drop_privileges(last_capability: int, *, has_any: bool) -> None:
    """No capability in any set, now or later."""
    if has_any:  # as the first process of a new user namespace it has all of them
        drop_from_bounding_set(last_capability)
        control_process(PR_SET_SECUREBITS, ALL_SECURE_BITS)
    header = ctypes.create_string_buffer(CAPABILITY_HEADER)
    system_call("capset", header, ctypes.create_string_buffer(24))
    control_process(PR_SET_DUMPABLE, 0)
