"""Mounts in a mount namespace of this process's own, and in no other.

Whoever mounts must have left the namespace that it was in: what root covers there is covered for the
whole machine. It knows nothing of what is mounted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from meshift.rewards.sandbox.syscalls import mount, system_call, unmount

NOSUID, NODEV, NOEXEC, READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 1, 32, 4096, 16384, 1 << 18
DETACH = 2
CAP_SYS_ADMIN = 21
CAPABILITY_HEADER = b"\x22\x05\x08\x20\0\0\0\0"
"""What capget and capset begin with on x86 and Arm: version 3 (0x20080522), this process."""


def mount_namespace() -> str:
    """The name of the mount namespace that this process is in, such as `mnt:[4026531841]`."""
    return os.readlink("/proc/self/ns/mnt")


class OwnMounts:
    """The mounts of a process that has left the mount namespace `outside`, none of which are seen out there."""

    def __init__(self, outside: str) -> None:
        """Cut all mounts off from those outside. Raises `OSError` in `outside` itself, and mounts nothing."""
        if mount_namespace() == outside:
            raise OSError(errno.EPERM, "still in the mount namespace outside, where nothing may be covered")
        mount("none", "/", None, RECURSIVE | PRIVATE)

    def mount(self, source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        """mount(2). Raises `OSError` naming the target."""
        mount(source, target, kind, flags, options)

    def protect(self, target: str) -> None:
        """Make what is mounted there, and below, read-only, without devices or set-user-id files."""
        attributes = struct.pack("QQQQ", READ_ONLY | NOSUID | NODEV, 0, 0, 0)  # MOUNT_ATTR_* have the same numbers
        system_call("mount_setattr", -100, target.encode(), 0x8000, attributes, len(attributes))

    def enter(self, root: str) -> None:
        """Make it the root, read-only, and let go of everything else."""
        os.chdir(root)
        system_call("pivot_root", b".", b".")
        unmount(".", DETACH)
        os.chdir("/")
        mount("none", "/", None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV)


def give_up_mounting() -> None:
    """Take CAP_SYS_ADMIN out of this process's sets, for one that stays in another's mount namespace.

    Root's program could otherwise cover a folder of the machine. Under `no_new_privs` it does not come back.
    """
    header, sets = ctypes.create_string_buffer(CAPABILITY_HEADER), ctypes.create_string_buffer(24)
    system_call("capget", header, sets)
    low = [part & ~(1 << CAP_SYS_ADMIN) for part in struct.unpack_from("=3I", sets.raw)]
    struct.pack_into("=3I", sets, 0, *low)  # effective, permitted, inheritable; those from 32 on stay as they are
    system_call("capset", header, sets)
