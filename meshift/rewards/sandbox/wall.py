"""The outer wall where bubblewrap is not installed: a root of its own with few folders, read-only, in namespaces
of its own, and another user where root started it.

It runs inside the process that becomes the server. It knows nothing of programs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from meshift.rewards.sandbox.mounts import (
    BIND,
    NODEV,
    NOEXEC,
    NOSUID,
    RECURSIVE,
    OwnMounts,
    mount_namespace,
)
from meshift.rewards.sandbox.syscalls import control_process, unshare

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
PR_SET_DUMPABLE = 4
DEVICES = ("null", "zero", "full", "random", "urandom")
NOBODY = 65534

Bind = tuple[str, str]  # where something is, and where it is to be seen


def build(binds: Sequence[Bind]) -> None:
    """Return in a process that sees these folders alone, as the first of its process namespace.

    The process that called stays outside, waits, and ends as that one does. Raises `OSError` where the kernel
    does not allow it.
    """
    uid, gid, outside = os.geteuid(), os.getegid(), mount_namespace()
    spaces = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
    unshare(spaces if uid == 0 else spaces | NEWUSER)
    if uid != 0:
        map_user(NOBODY, uid, gid)
    _leave_in_child()
    own = OwnMounts(outside)
    sources = [(os.open(source, os.O_PATH), target) for source, target in binds]
    devices = [(os.open(f"/dev/{name}", os.O_PATH), f"/dev/{name}") for name in DEVICES]
    root = "/tmp"
    own.mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "mode=0755,size=1m")
    for place, target in sources:
        _bind(own, place, root + target, read_only=True)
    for place, target in devices:
        _bind(own, place, root + target, read_only=False)
    for folder in ("/proc", "/tmp"):
        os.makedirs(root + folder, exist_ok=True)
    own.mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC)
    own.enter(root)
    for place, _ in (*sources, *devices):
        os.close(place)


def map_user(inside: int, uid: int, gid: int) -> None:
    """Say who this process, in a new user namespace, is in there: `inside`, user and group."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        place = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(place, text.encode())
        finally:
            os.close(place)


def _leave_in_child() -> None:
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _bind(own: OwnMounts, place: int, target: str, *, read_only: bool) -> None:
    source = f"/proc/self/fd/{place}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    own.mount(source, target, None, BIND | RECURSIVE)
    if read_only:
        own.protect(target)


def become(uid: int) -> None:
    """Give up root for this user and group, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    control_process(PR_SET_DUMPABLE, 1)  # else its children's files in /proc, their user maps too, are root's
